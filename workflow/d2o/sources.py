"""What a result depends on among Python sources, our own and a user's: to edit them reruns what they made."""

from __future__ import annotations

import ast
import hashlib
import sys
from collections.abc import Iterator
from functools import cache
from importlib.machinery import PathFinder
from pathlib import Path

_PACKAGE = Path(__file__).parent
# Settings reach a stage as params, the command line only forwards them, and where a model runs is no part of a
# result: none of these is part of a digest.
_NOT_DIGESTED = {f"d2o.{name}" for name in ("settings", "plan", "cli", "errors", "devices")}


@cache
def source_digest(module: str) -> str:
    """Digest of a module or package of d2o and of all d2o modules that it imports.

    Comments, layout and docstrings do not count: rewording one retrains nothing.
    """
    digest = hashlib.sha256()
    for path in sorted(files(module)):
        digest.update(path.relative_to(_PACKAGE).as_posix().encode())
        digest.update(_code(path).encode() if path.suffix == ".py" else path.read_bytes())
    return digest.hexdigest()[:12]


def files(module: str) -> set[Path]:
    """The files of a module and of everything of its own top-level package that it imports, directly or not."""
    found: set[Path] = set()
    seen: set[str] = set()
    queue = [module]
    while queue:
        name = queue.pop()
        if name in seen:
            continue
        seen.add(name)
        for path in _files_of(name) - found:
            found.add(path)
            if path.suffix == ".py":
                queue += _imports(path, name)
    return found


def module_file(module: str) -> Path | None:
    """The file of a module or package, found from the working directory on, or None. Imports nothing."""
    place: list[str] | None = [str(Path.cwd()), *sys.path]
    spec = None
    for end in range(1, module.count(".") + 2):
        spec = PathFinder.find_spec(".".join(module.split(".")[:end]), place)
        if spec is None:
            return None
        place = spec.submodule_search_locations
    return Path(spec.origin) if spec.origin and Path(spec.origin).suffix == ".py" else None


def names_of(path: Path) -> set[str]:
    """The names that a Python file defines or imports at its top level."""
    found: set[str] = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            found |= {alias.asname or alias.name.partition(".")[0] for alias in node.names}
        else:
            found |= {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    return found


def _files_of(module: str) -> set[Path]:
    top, *parts = module.split(".")
    if top != "d2o":
        path = module_file(module)
        return {path} if path else set()
    if not parts or f"d2o.{parts[0]}" in _NOT_DIGESTED:
        return set()
    path = _PACKAGE.joinpath(*parts)
    if path.is_dir():
        return {p for p in path.rglob("*") if p.is_file() and "__pycache__" not in p.parts}
    return {path.with_suffix(".py")} if path.with_suffix(".py").exists() else set()


def _imports(path: Path, module: str) -> Iterator[str]:
    """The modules of its own top-level package that a file imports."""
    top = module.partition(".")[0]
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names if name.name.startswith(f"{top}."))
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*above, *([node.module] if node.module else [])])
            if origin.split(".")[0] == top:
                # `from d2o import records` names a module, `from d2o.records import ROWS` lies in one.
                yield origin
                yield from (f"{origin}.{name.name}" for name in node.names)


def _code(path: Path) -> str:
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0] if node.body else None
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(tree)
