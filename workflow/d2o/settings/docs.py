"""The settings as documents: `config/schema.json`, `config/README.md` and the help of the command line."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel

from d2o.contracts import CONTRACTS
from d2o.settings import Settings


def schema() -> str:
    """The JSON schema of the config, for editors."""
    return json.dumps(Settings.model_json_schema(), indent=2, ensure_ascii=False) + "\n"


def keys(section: type[BaseModel]) -> str:
    """One line per key of a section: name, type, default, meaning."""
    return "\n\n".join(f"{key}: {kind}, {default}. {meaning}" for key, kind, default, meaning in _rows(section))


def settings_page() -> str:
    """`config/README.md`: every section as a table, in the order in which they are first named; the losses."""
    text = [
        "# Settings",
        "",
        "Generated from `workflow/d2o/settings/` by `d2o schema`; a test fails when it drifts.",
        "`config.yaml` is the demo, `paper.yaml` the paper at full size, `thumbs-down.yaml` a log of negatives,",
        "`study.yaml` and `study-pku.yaml` the study of the paper's claims, `controls.yaml` the null controls.",
        "An unknown key, a wrong type or a name that does not exist stops Snakemake within seconds.",
    ]
    for section in _sections():
        rows = ((f"`{key}`", *others) for key, *others in _rows(section))
        text += ["", f"## {section.__name__}", "", _paragraphs(section.__doc__), ""]
        text += _table(("key", "type", "default", "meaning"), rows)
    text += ["", "## Losses", "", _LOSSES, ""]
    text += _table(("loss", "positives", "negative", "reference", "log-probs", "parameters", "source"), _losses())
    return "\n".join(text) + "\n"


_LOSSES = (
    "What each loss takes of a group, and the keys of a method that it reads; another key is refused, or dropped\n"
    "where `extends` would hand it down. lp: log-prob; m: lp per token; lr: log-ratio of policy and reference;\n"
    "`y_w`: positive; `y_l`: negative; h = lr(`y_w`) − lr(`y_l`)."
)


def loss_source(loss: str) -> str:
    """What a loss is, and the paper that it is from: the first line of its docstring, read without torch."""
    tree = ast.parse((Path(__file__).parents[1] / "losses.py").read_text(encoding="utf-8"))
    name = loss.replace("-", "_")
    (function,) = (node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name)
    return (ast.get_docstring(function) or "").splitlines()[0]


def _losses() -> Iterator[tuple[str, ...]]:
    for name, contract in CONTRACTS.items():
        parameters = ", ".join(f"`{key}` {json.dumps(value)}" for key, value in contract.parameters.items())
        sides = (contract.positives, "yes" if contract.negative else "no", "yes" if contract.reference else "no")
        yield (f"`{name}`", *sides, contract.unit, parameters or "none", loss_source(name))


def _sections() -> list[type[BaseModel]]:
    """`Settings` and every section in it, level by level."""
    sections: list[type[BaseModel]] = [Settings]
    for section in sections:
        for field in section.model_fields.values():
            sections += [inner for inner in _models(field.annotation) if inner not in sections]
    return sections


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from _models(inner)


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> list[str]:
    lines = ("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |" for cells in (head, *rows))
    return [next(lines), "|" + "---|" * len(head), *lines]


def _paragraphs(docstring: str | None) -> str:
    return "\n".join(line.strip() for line in (docstring or "").strip().splitlines())


def _rows(section: type[BaseModel]) -> list[tuple[str, str, str, str]]:
    rows = []
    for key, node in section.model_json_schema()["properties"].items():
        field = section.model_fields[key]
        if field.is_required():
            default = "required"
        elif isinstance(field.default, BaseModel):
            default = "as its section says"
        else:
            default = f"default {json.dumps(field.default, ensure_ascii=False)}"
        rows.append((key, _kind(node), default, field.description or ""))
    return rows


def _kind(node: dict[str, Any]) -> str:
    if "$ref" in node:
        return node["$ref"].rsplit("/", 1)[1]
    if "enum" in node:
        return " | ".join(json.dumps(value) for value in node["enum"])
    if "anyOf" in node:
        return " | ".join(_kind(option) for option in node["anyOf"])
    if node.get("type") == "array":
        return f"list of {_kind(node['items'])}"
    if node.get("type") == "object":
        inner = node.get("additionalProperties") or next(iter(node.get("patternProperties", {}).values()), True)
        return f"mapping to {_kind(inner)}" if isinstance(inner, dict) else "mapping"
    limits = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    bounds = " ".join(f"{sign} {node[key]:g}" for key, sign in limits.items() if key in node)
    return f"{node.get('type', 'any')} {bounds}".strip()
