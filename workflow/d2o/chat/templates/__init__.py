"""Chat templates for models that ship none: one file per template."""

from __future__ import annotations

from pathlib import Path

from d2o.errors import D2OError


def read(name: str) -> str:
    """The text of a template.

    Raises:
        D2OError: where there is none of that name.
    """
    path = Path(__file__).with_name(f"{name}.jinja")
    if not path.exists():
        names = ", ".join(sorted(p.stem for p in path.parent.glob("*.jinja")))
        raise D2OError(f"chat_template: no template {name!r}; there are: {names}")
    return path.read_text().rstrip("\n")
