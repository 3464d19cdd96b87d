"""Conventions of the code that no linter knows."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator

from conftest import ROOT


def bound(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Every name that code binds, and its line: variables, attributes, parameters, functions and classes."""
    for node in ast.walk(tree):
        match node:
            case ast.Name(id=name, ctx=ast.Store()) | ast.Attribute(attr=name, ctx=ast.Store()) | ast.arg(arg=name):
                yield name, node.lineno
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                yield name, node.lineno


def test_bindings_of_every_kind_are_seen():
    code = "class a:\n b: int\n def c(self, d, *e, f=0, **g): self.h = [i for i in d if (j := i)]\nwith d as k: l = k"
    assert {name for name, _ in bound(ast.parse(code))} == {*"abcdefghijkl", "self"}


def test_a_name_says_what_it_holds():
    """`found`, `told`, `said` and `there` state only how a value was obtained."""
    places = [
        f"{path.relative_to(ROOT)}:{line}"
        for path in sorted((ROOT / "workflow").rglob("*.py"))
        for name, line in bound(ast.parse(path.read_text()))
        if name.strip("_") in {"found", "told", "said", "there"}
    ]
    assert not places


def test_a_class_has_a_name_of_its_own():
    """One word for one idea: a reader who knows one class meets no other by its name."""
    trees = [ast.parse(path.read_text()) for path in (ROOT / "workflow").rglob("*.py")]
    names = Counter(node.name for tree in trees for node in tree.body if isinstance(node, ast.ClassDef))
    assert not [name for name, times in names.items() if times > 1]


def test_a_stage_imports_no_other_stage():
    """Code that two stages share belongs in a module below them; else an edit of one stage reruns the other."""
    rules = "".join(path.read_text() for path in (ROOT / "workflow" / "rules").glob("*.smk"))
    stages = {*re.findall(r'plan\.code\("(\w+)"', rules)}
    assert {"questions", "tasks", "train", "judge"} <= stages
    imports = {}
    for stage in sorted(stages - {"report"}):  # the report reads the results of all stages
        home = ROOT / "workflow" / "d2o" / stage
        for path in [home.with_suffix(".py")] if home.with_suffix(".py").exists() else sorted(home.rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.ImportFrom) and node.module:
                    names = [f"{node.module}.{alias.name}" for alias in node.names]
                    others = {name.split(".")[1] for name in names if name.startswith("d2o.")} & stages - {stage}
                    if others:
                        imports[path.name] = others
    assert not imports
