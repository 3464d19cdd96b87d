"""The Python sources that a result depends on, our own and a user's: editing them reruns what they made.

Of d2o only the definitions count that a stage uses, directly or indirectly: an unused function beside a used one does
not. They are found by their names in the syntax trees; where that is not possible, the whole module counts.
"""

from __future__ import annotations

import ast
import hashlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.machinery import PathFinder
from pathlib import Path

_PACKAGE = Path(__file__).parent
# Settings reach a stage as params, the command line only forwards them, and where a model runs, how ranks are started
# or where an artifact lies is no part of a result: none of these is part of a digest.
_NOT_DIGESTED = {f"d2o.{name}" for name in ("settings", "plan", "layout", "sources", "cli", "errors", "devices")}
# The list of architectures that share prompts decides the route alone. Routes give the same numbers but for rounding,
# which each start checks; a training takes the route of its references, and refuses references of two routes.
_NOT_DIGESTED |= {"d2o.forward.policy.SHARING", "d2o.train.launch"}
# A lock keeps two processes apart, what the allocator keeps saves time, and trackers get copies of the log.
_NOT_DIGESTED |= {"d2o.locks", "d2o.forward.memory", "d2o.train.watch._TRACKERS"}
# Tables of entries by name, and folders of them: a result that depends on one entry does not depend on the others.
_TABLES = {
    "d2o.losses.LOSSES", "d2o.contracts.CONTRACTS", "d2o.formats.FORMATS", "d2o.chat.templates",
    "d2o.metrics.HUMAN_METRICS", "d2o.metrics.STYLE_METRICS",
}  # fmt: skip


@cache
def source_digest(module: str, entries: tuple[str, ...] | None = None) -> str:
    """Digest of the definitions of a module of d2o, and of those that they use elsewhere in d2o.

    Comments, layout and docstrings do not count: rewording one retrains nothing.

    Args:
        entries: names of the entries that count, in the tables of entries; None: all.
    Raises:
        ValueError: where there is no such module: what depends on it would never rerun.
    """
    if _path(module) is None:
        raise ValueError(f"no module {module} to take a digest of")
    digest = hashlib.sha256()
    for name, text in sorted(_used(module, entries).items()):
        digest.update(f"{name}\n{text}\n".encode())
    return digest.hexdigest()[:12]


def _used(start: str, entries: tuple[str, ...] | None) -> dict[str, str]:
    """The text of each used definition, by its dotted name; of other files, the digest of their bytes, by path."""
    texts: dict[str, str] = {}
    seen: set[str] = set()
    queue = [start]
    while queue:
        dotted = queue.pop()
        if dotted in seen:
            continue
        seen.add(dotted)
        module, name = _split(dotted)
        if module is None:
            continue
        if name is None:
            queue += module.all()
        elif name in module.imports:
            queue.append(module.imports[name])
        elif name in module.definitions:
            chosen = entries if dotted in _TABLES else None
            for number, (text, uses) in enumerate(_statements(dotted, chosen)):
                texts[f"{dotted} {number}"] = text
                queue += uses
            queue += module.at_import()
            texts |= module.data(entries)
        else:
            queue.append(module.name)
    return texts


@cache
def _statements(dotted: str, entries: tuple[str, ...] | None) -> list[tuple[str, list[str]]]:
    """The text of each statement that binds a name, and what it uses; of a table, only with the chosen entries."""
    module, name = _split(dotted)
    nodes = module.definitions[name]
    if entries is not None:
        nodes = [_chosen(node, entries) for node in nodes]
    return [(ast.unparse(node), list(module.uses(node))) for node in nodes]


@dataclass(frozen=True)
class _Module:
    """A module's statements, sorted by what they do.

    Attributes:
        name: dotted name.
        definitions: the statements that bind each name; under "" those that do more than that at import.
        imports: the dotted origin of each name that it imports from d2o.
    """

    name: str
    path: Path
    definitions: dict[str, list[ast.stmt]]
    imports: dict[str, str]

    def all(self) -> Iterator[str]:
        """Every definition, and the names that a package re-exports from its own modules."""
        yield from (f"{self.name}.{name}" for name in self.definitions)
        yield from (origin for origin in self.imports.values() if origin.startswith(f"{self.name}."))

    def uses(self, node: ast.stmt) -> Iterator[str]:
        """The dotted names of d2o that a statement uses."""
        known = {name: f"{self.name}.{name}" for name in self.definitions} | self.imports
        nodes = list(ast.walk(node))
        for inner in nodes:
            known |= _imported(inner, self.name, self.path)
        owners = {inner.value for inner in nodes if isinstance(inner, ast.Attribute)}
        for inner in nodes:
            match inner:
                case ast.Attribute(value=ast.Name(id=owner)) if owner in known:
                    # Of a module its member; of any other object the object itself.
                    yield f"{known[owner]}.{inner.attr}" if _path(known[owner]) else known[owner]
                case ast.Name(id=name, ctx=ast.Load()) if name in known and inner not in owners:
                    yield known[name]

    def at_import(self) -> Iterator[str]:
        """The statements that run when the module, and before it its packages, are imported."""
        parts = self.name.split(".")
        for end in range(1, len(parts) + 1):
            package = ".".join(parts[:end])
            if "" in _module(package).definitions:
                yield f"{package}."

    def data(self, entries: tuple[str, ...] | None) -> dict[str, str]:
        """The digests of the files of its package that are not Python, such as templates, by path."""
        folder = self.path.parent
        if folder == _PACKAGE:
            return {}
        files = [path for path in folder.iterdir() if path.is_file() and path.suffix != ".py"]
        if self.name in _TABLES and entries is not None:
            files = [path for path in files if path.stem in entries]
        return {
            path.relative_to(_PACKAGE).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files
        }


@cache
def _module(name: str) -> _Module:
    path = _path(name)
    definitions: dict[str, list[ast.stmt]] = {}
    imports: dict[str, str] = {}
    for node in _without_docstrings(path).body:
        bound: set[str] = set()
        match node:
            case ast.Import() | ast.ImportFrom():
                if any(alias.name == "*" or alias.name.startswith("d2o.") for alias in node.names):
                    raise ValueError(
                        f"{path}: {ast.unparse(node)}: write `from d2o import NAME`; uses must be told apart"
                    )
                imports |= _imported(node, name, path)
            case ast.If(test=ast.Name(id="TYPE_CHECKING"), orelse=[]):
                pass
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                # A decorator of our own may do more than decorate.
                decorators = {id for one in node.decorator_list for id in _names(one)}
                bound = {node.name} | ({""} if decorators & (definitions.keys() | imports.keys()) else set())
            case ast.Assign(targets=[ast.Name(id=target)]) | ast.AnnAssign(target=ast.Name(id=target)):
                bound = {target} if target != "_" else {""}
            case _:
                inner = list(ast.walk(node))
                bound = {"", *_names(node)} | {n.name for n in inner if isinstance(n, ast.FunctionDef | ast.ClassDef)}
                for one in inner:
                    imports |= _imported(one, name, path)
        for one in bound:
            definitions.setdefault(one, []).append(node)
    return _Module(name, path, definitions, imports)


def _names(node: ast.AST) -> set[str]:
    return {inner.id for inner in ast.walk(node) if isinstance(inner, ast.Name)}


def _split(dotted: str) -> tuple[_Module | None, str | None]:
    """The module that contains a dotted name, and its name there; (None, None) where it does not count."""
    if any(dotted == name or dotted.startswith(f"{name}.") for name in _NOT_DIGESTED):
        return None, None
    if _path(dotted):
        return _module(dotted), None
    module, _, name = dotted.rpartition(".")
    return (_module(module), name) if _path(module) else (None, None)


@cache
def _path(module: str) -> Path | None:
    """The file of a module of d2o; None where there is no such module."""
    top, *parts = module.split(".")
    if top != "d2o" or not all(parts):
        return None
    path = _PACKAGE.joinpath(*parts)
    return next((p for p in (path / "__init__.py", path.with_suffix(".py")) if p.is_file()), None)


def _imported(node: ast.AST, module: str, path: Path) -> dict[str, str]:
    """The names that an import statement binds to things of d2o, dotted."""
    return {name: origin for name, origin in _origins(node, module, path).items() if origin.startswith("d2o.")}


def _origins(node: ast.AST, module: str, path: Path) -> dict[str, str]:
    """The names that an import statement binds, each with its dotted origin."""
    match node:
        case ast.Import():
            return {alias.asname or alias.name: alias.name for alias in node.names}
        case ast.ImportFrom():
            package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
            above = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*above, *([node.module] if node.module else [])])
            return {alias.asname or alias.name: f"{origin}.{alias.name}" for alias in node.names}
    return {}


def _chosen(node: ast.stmt, entries: tuple[str, ...]) -> ast.stmt:
    """A table's statement with only the chosen entries: of a dict by key, of calls by their first argument."""
    match node:
        case ast.Assign(value=ast.Dict(keys=keys, values=values)):
            kept = [pair for pair in zip(keys, values, strict=True) if ast.literal_eval(pair[0]) in entries]
            table = ast.Dict(keys=[key for key, _ in kept], values=[value for _, value in kept])
        case ast.Assign(value=ast.Tuple(elts=calls)):
            table = ast.Tuple([call for call in calls if ast.literal_eval(call.args[0]) in entries], ast.Load())
        case _:
            return node
    return ast.Assign(targets=node.targets, value=table, lineno=node.lineno)


def _without_docstrings(path: Path) -> ast.Module:
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0] if node.body else None
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                node.body = node.body[1:] or [ast.Pass()]
    return tree


# A user's modules ------------------------------------------------------------------------------------


def files(module: str) -> set[Path]:
    """The files of a user's module, and of what it imports from its own package or from the working directory.

    Indirect imports count too, and so do the packages that contain each module.
    """
    read: set[Path] = set()
    seen: set[str] = {""}
    queue = [module]
    while queue:
        name = queue.pop()
        path = None if name in seen else module_file(name)
        seen.add(name)
        if path and (name.partition(".")[0] == module.partition(".")[0] or path.is_relative_to(Path.cwd())):
            read.add(path)
            queue.append(name.rpartition(".")[0])
            for node in ast.walk(ast.parse(path.read_text())):
                for origin in _origins(node, name, path).values():
                    # `from scorers import words` names a module, `from scorers.words import count` a function in one.
                    queue += [origin, origin.rpartition(".")[0]]
    return read


def module_file(module: str) -> Path | None:
    """The file of a module or package, looked up from the working directory on, or None. Imports nothing."""
    place: list[str] | None = [str(Path.cwd()), *sys.path]
    spec = None
    for end in range(1, module.count(".") + 2):
        spec = PathFinder.find_spec(".".join(module.split(".")[:end]), place)
        if spec is None or (place is None and end > 1):
            return None
        place = spec.submodule_search_locations
    return Path(spec.origin) if spec.origin and Path(spec.origin).suffix == ".py" else None


def names_of(path: Path) -> set[str]:
    """The names that a Python file defines or imports at its top level."""
    names: set[str] = set()
    queue = list(ast.parse(path.read_text()).body)
    for node in queue:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.If | ast.Try):
            queue += [inner for inner in ast.iter_child_nodes(node) if isinstance(inner, ast.stmt)]
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {alias.asname or alias.name.partition(".")[0] for alias in node.names}
        else:
            names |= {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    return names
