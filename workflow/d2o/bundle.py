"""Archive of an experiment for a paper's appendix: config, environment, manifests, report; no weights, no data.

Its metadata are an RO-Crate (https://w3id.org/ro/crate/1.1), which lists each file with its SHA-256. Names are
sorted, times fixed and files not compressed: two bundles of the same state are the same bytes on any machine.
"""

from __future__ import annotations

import hashlib
import json
import lzma
import mimetypes
import os
import subprocess
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path, PurePath
from types import SimpleNamespace
from typing import Any

from d2o import layout, records
from d2o.errors import D2OError
from d2o.layout import manifest_path
from d2o.texts import line, visible

METADATA = "ro-crate-metadata.json"
_SPECIFICATION = "https://w3id.org/ro/crate/1.1"
# A term that the context of version 1.1 lacks.
_SHA256 = {"sha256": "https://schema.org/sha256"}
_ROOT = Path(__file__).parents[2]
# Keys of manifests that hold texts of data.
_TEXTS = {"leaks", "examples"}
# Keys of settings and manifests that name files or folders, alone, in a list, or by split.
_PATHS = {
    "answers", "data", "evaluation_prompts", "include", "organism", "path", "results", "source", "test", "texts",
    "train",
}  # fmt: skip
_README = """\
# {experiment}

What the numbers of the experiment `{experiment}` rest on, packed by `d2o bundle`. `d2o verify` compares each file
with the SHA-256 in `{metadata}`.

- `config.yaml`: the config as it was written. `settings.json`: of this experiment, with all defaults.
- `environment.lock.txt`: the packages and their versions.
- `manifests/`: what made each artifact: settings, digests of inputs and outputs, versions, time. Examples out of the
  data are left out. Folders outside the results are numbers; so is the name of a file that was read from one.
- `report/`: the page, its tables and figures. `cards/`: a model card for each training.

Not in it: weights, data, prompts and answers, but for those that the page shows.
"""


def write(config: Path, experiment: str, output: Path) -> None:
    """Write the bundle of an experiment whose report and cards exist.

    Raises:
        D2OError: where there is no such experiment, where a file of the bundle is missing, damaged, or made with
            other settings, and where the bundle is larger than `verify` reads.
    """
    if not output.parent.is_dir():
        raise D2OError(f"{output.parent}: no such folder; make it, or choose another --output")
    content = _collect(config, experiment)
    made = records.read_manifest(content.page)["made"]
    content.files[METADATA] = _json(_crate(experiment, made, content.files))
    if sum(map(len, content.files.values())) > records.LARGEST:
        largest = max(content.files, key=lambda name: len(content.files[name]))
        raise D2OError(
            f"{output}: not written: it would unpack to more than {records.LARGEST >> 20} MiB, most of all "
            f"{visible(largest)}; split the experiment {experiment}"
        )
    temporary = output.with_name(f".{output.name}.tmp")
    with zipfile.ZipFile(temporary, "w") as archive:
        for name, data in sorted(content.files.items()):
            entry = zipfile.ZipInfo(name)  # dated 1980, whenever it is written
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, data)
    records.sync(temporary)
    temporary.replace(output)


def verify(bundle: Path) -> tuple[list[str], str]:
    """Compare every file of a bundle with the SHA-256 in its metadata.

    Returns:
        One line per file that is damaged, missing, or not listed there; and one line with the counts.
    Raises:
        D2OError: where the file is not a bundle, or its metadata cannot be read.
    """
    try:
        with zipfile.ZipFile(bundle) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > records.LARGEST:
                raise D2OError(f"{bundle}: unpacks to more than {records.LARGEST >> 20} MiB; is it the right file?")
            digests = _digests(archive)
            problems = [f"{bundle}: {problem}; get it again" for problem in _problems(archive, digests)]
    except (zipfile.BadZipFile, lzma.LZMAError, OSError, KeyError, NotImplementedError) as error:
        raise D2OError(f"{bundle}: no bundle of d2o, or a damaged one ({line(error)}); get it again") from None
    return problems, f"{len(digests):,} files, {len(problems):,} not whole"


def _digests(archive: zipfile.ZipFile) -> dict[str, str]:
    """The SHA-256 of each file, from the metadata."""
    data = _unpacked(archive, METADATA)
    if data is None:
        raise zipfile.BadZipFile(f"{METADATA} is damaged")
    try:
        graph = json.loads(data)["@graph"]
        digests = {entity["@id"]: entity["sha256"] for entity in graph if entity["@type"] == "File"}
        (root,) = (entity for entity in graph if entity["@id"] == "./")
        parts = {part["@id"] for part in root["hasPart"]}
    except (ValueError, TypeError, KeyError, RecursionError):
        raise zipfile.BadZipFile(f"{METADATA} is none") from None
    if parts != digests.keys():
        raise zipfile.BadZipFile(f"{METADATA} contradicts itself")
    return digests


def _problems(archive: zipfile.ZipFile, digests: Mapping[str, str]) -> Iterator[str]:
    names = Counter(archive.namelist())
    for name in sorted({*digests, *names} - {METADATA}):
        if name not in names:
            yield f"{visible(name)} is gone"
        elif name not in digests or names[name] > 1:
            yield f"{visible(name)} is not of it"
        else:
            data = _unpacked(archive, name)
            if data is None or hashlib.sha256(data).hexdigest() != digests[name]:
                yield f"{visible(name)} is damaged"


def _unpacked(archive: zipfile.ZipFile, name: str) -> bytes | None:
    """A file of an archive, at most as large as the archive states; None where it cannot be unpacked."""
    try:
        return archive.read(name)
    except (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, RuntimeError, NotImplementedError):
        return None  # the last two: a flag marks it as encrypted, or as packed otherwise


# Content --------------------------------------------------------------------------------------------


def _collect(config: Path, experiment: str) -> SimpleNamespace:
    """The files of a bundle by name, without the metadata, and the path of the experiment's page."""
    import yaml

    from d2o.plan import Plan, checks
    from d2o.settings.messages import suggestion

    written = config.read_bytes()
    plan = Plan(yaml.safe_load(written), str(config))
    if experiment not in plan.settings.experiments:
        raise D2OError(f"{config}: no experiment {experiment!r}" + suggestion(experiment, plan.settings.experiments))
    settings = plan.settings.only(experiment)
    (page,), cards = plan.targets("page", experiment), plan.targets("card", experiment)
    needed = plan.report_inputs(SimpleNamespace(experiment=experiment))
    for path in (*needed, page, *cards):
        if not Path(path).exists():
            target = "cards" if path in cards else page
            command = f"snakemake --cores all {target} --configfile {config}"
            raise D2OError(f"{path}: no such file; make it with: {command}")
    if changed := checks.differing(page, settings):
        raise D2OError(f"{page}: made with other settings ({', '.join(changed)}); run snakemake again")
    lock = _ROOT / "envs" / f"{'gpu' if plan.settings.compute.gpus else 'cpu'}.lock.txt"
    names = _Names(plan.settings.results)
    files = {
        "README.md": _README.format(experiment=experiment, metadata=METADATA).encode(),
        "config.yaml": written,
        "settings.json": _json(names.portable(settings.model_dump(mode="json"))),
        "environment.lock.txt": lock.read_bytes(),
    }
    for last in (page, *plan.targets("pair_quality_figure", experiment)):
        files |= {f"report/{name}": _whole(Path(page).parent / name) for name in _published(last)}
    for path in cards:
        name = os.path.relpath(path, plan.settings.results)
        run = layout.names_in("card", PurePath(name).as_posix())
        files["cards/{dataset}/{model}/{method}/seed{seed}.md".format_map(run)] = _whole(Path(path))
    for name, manifest in sorted(_manifests([*needed, page, *cards], plan.settings.results).items()):
        files[f"manifests/{name}"] = _json(names.portable(_without_texts(manifest)))
    return SimpleNamespace(files=files, page=page)


def _published(path: str) -> list[str]:
    """The names, in the report's folder, of the files that were written with a page or figure."""
    manifest = records.read_manifest(path)
    if "files" not in manifest:
        raise D2OError(f"{path}: made by another version, which did not say what belongs to it; run snakemake again")
    return manifest["files"]


def _whole(path: Path) -> bytes:
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != records.read_manifest(path)["content"]:
        raise D2OError(f"{path}: damaged since it was written; delete it and run snakemake again")
    return data


def _manifests(artifacts: Iterable[str], results: str) -> dict[str, dict[str, Any]]:
    """The manifests of artifacts and of their direct and indirect inputs in the results, by name."""
    manifests: dict[str, dict[str, Any]] = {}
    queue = [*artifacts]
    while queue:
        path = manifest_path(queue.pop())
        name = PurePath(os.path.relpath(path, results)).as_posix()
        if path.exists() and name not in manifests and not name.startswith("../"):
            manifests[name] = records.read_manifest(path)
            queue += manifests[name].get("inputs", {})
    return manifests


def _without_texts(manifest: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in manifest.items() if key not in _TEXTS}


@dataclass
class _Names:
    """Names of files and folders in a bundle: those outside the results are numbered in the order of mention.

    Attributes:
        results: the folder of results.
    """

    results: str
    _folders: dict[PurePath, int] = field(default_factory=dict)
    _files: dict[PurePath, int] = field(default_factory=dict)

    def portable(self, data: Any, key: str = "") -> Any:
        """Plain data without folders of this machine; only values under keys that name paths are replaced."""
        match data:
            case dict() if key == "inputs":
                return {self._read(PurePath(name)): digest for name, digest in data.items()}
            case dict():
                return {name: self.portable(value, key if key == "data" else name) for name, value in data.items()}
            case list():
                return [self.portable(value, key) for value in data]
            case str() if key in _PATHS and (path := PurePath(data)).is_absolute():
                return self._inside(path) or f"{self._folder(path)}/{path.name}"
        return data

    def _read(self, path: PurePath) -> str:
        """The name of an input; outside the results a number, because a file name may identify an annotator."""
        if inside := self._inside(path):
            return inside
        return f"{self._folder(path)}/{self._files.setdefault(path, len(self._files) + 1)}{path.suffix}"

    def _inside(self, path: PurePath) -> str | None:
        """A path inside the results, as `results/…` where it is absolute; None for a path outside them."""
        below = PurePath(os.path.relpath(path, self.results))
        if below.parts[:1] == ("..",):
            return None
        return ("results" / below).as_posix() if path.is_absolute() else path.as_posix()

    def _folder(self, path: PurePath) -> str:
        return f"…{self._folders.setdefault(path.parent, len(self._folders) + 1)}"


# As an RO-Crate -------------------------------------------------------------------------------------


def _crate(experiment: str, made: str, files: Mapping[str, bytes]) -> dict[str, Any]:
    """The metadata: the archive, each file, and the code that made them."""
    root = {
        "@id": "./",
        "@type": "Dataset",
        "name": f"{experiment}: alignment from human negatives only",
        "description": f"Config, environment, manifests, report and model cards of the experiment {experiment}.",
        "datePublished": made,
        "license": "Not stated here; licences of what the models were made from stand in the model cards.",
        "hasPart": [{"@id": name} for name in sorted(files)],
        "mentions": {"@id": "#report"},
    }
    parts = [
        {
            "@id": name,
            "@type": "File",
            "name": PurePath(name).name,
            "encodingFormat": mimetypes.guess_type(name)[0] or "text/plain",
            "contentSize": str(len(data)),
            "sha256": hashlib.sha256(data).hexdigest(),
        }
        for name, data in sorted(files.items())
    ]
    action = {
        "@id": "#report",
        "@type": "CreateAction",
        "name": "The report",
        "endTime": made,
        "instrument": {"@id": "#d2o"},
        "result": {"@id": "report/report.html"},
    }
    software = {"@id": "#d2o", "@type": "SoftwareApplication", "name": "d2o", "softwareVersion": _version()}
    descriptor = {
        "@id": METADATA,
        "@type": "CreativeWork",
        "about": {"@id": "./"},
        "conformsTo": {"@id": _SPECIFICATION},
    }
    return {
        "@context": [f"{_SPECIFICATION}/context", _SHA256],
        "@graph": [descriptor, root, *parts, action, software],
    }


def _version() -> str:
    """The version of the code; where git knows them, also the commit and whether files differ from it."""
    version = metadata.version("d2o")
    git = ["git", "-C", str(_ROOT)]
    try:
        outputs = [
            subprocess.run([*git, *command], capture_output=True, text=True, check=True).stdout.strip()
            for command in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        ]
    except (OSError, subprocess.CalledProcessError):
        return version
    return f"{version}, commit {outputs[0]}" + ", with edits" * bool(outputs[1])


def _json(data: Any) -> bytes:
    return (json.dumps(data, indent=2, ensure_ascii=False) + "\n").encode()
