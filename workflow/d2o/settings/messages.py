"""Messages about a wrong config: one line per key, with a close match where there is one."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from typing import Any

from pydantic import BaseModel, ValidationError


def lines(error: ValidationError, section: type[BaseModel], prefix: str = "") -> list[str]:
    """One line per wrong key of `section`; `prefix` is the section's place in the config."""
    messages = []
    for problem in error.errors(include_url=False):
        where = ".".join(map(str, [prefix, *problem["loc"]])).removeprefix(".")
        where = re.sub(r"\.(\d+)(?=\.|$)", r"[\1]", where)
        message = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "extra_forbidden":
            message = "unknown key" + suggestion(problem["loc"][-1], _keys_at(section, problem["loc"][:-1]))
        elif problem["type"] == "missing":
            message = "this key is required"
        elif not problem["type"].startswith("value_error"):
            shown = repr(problem["input"])
            message += f", not {shown if len(shown) < 60 else shown[:57] + '…'}"
        messages += [f"{where}: {message}"] if where else message.splitlines()
    return messages


def suggestion(word: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown word: the nearest of those known, or all of them."""
    close = difflib.get_close_matches(str(word), [str(k) for k in known], n=1)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; there are: {', '.join(sorted(map(str, known))) or 'none'}"


def _keys_at(section: type[BaseModel], location: tuple) -> list[str]:
    """Keys allowed at a place of the config, by walking the JSON schema."""
    schema = section.model_json_schema()
    node: Any = schema
    for step in (None, *location):
        if step is not None:
            node = node.get("properties", {}).get(step) or _values(node)
        for option in node.get("anyOf", []):
            if "$ref" in option:
                node = option
        if "$ref" in node:
            node = schema["$defs"][node["$ref"].rsplit("/", 1)[1]]
    return list(node.get("properties", {}))


def _values(node: dict[str, Any]) -> dict[str, Any]:
    """Schema of a mapping's values; empty where they may be anything."""
    inner = next(iter(node.get("patternProperties", {}).values()), node.get("additionalProperties"))
    return inner if isinstance(inner, dict) else {}
