"""Conventions of the code that no linter knows."""

from __future__ import annotations

import ast
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
    """`found` says how a thing was come by."""
    places = [
        f"{path.relative_to(ROOT)}:{line}"
        for path in sorted((ROOT / "workflow").rglob("*.py"))
        for name, line in bound(ast.parse(path.read_text()))
        if name.strip("_") == "found"
    ]
    assert not places
