"""Check that the files in a folder of results are unchanged since they were written."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from d2o import layout, records, weights
from d2o.errors import D2OError
from d2o.texts import visible


def verify(folder: Path) -> tuple[list[str], str]:
    """Read every artifact below a folder, and compare it with the SHA-256 in its manifest.

    Returns:
        One line per file that is damaged or missing, with the way out; and one line with the counts.
    Raises:
        D2OError: where there is no artifact.
    """
    from tqdm import tqdm

    every = {*folder.rglob("manifest.json"), *folder.rglob("*.manifest.json")}
    # Hidden files are being written, or were left by a killed job.
    manifests = sorted(path for path in every if not any(p.startswith(".") for p in path.relative_to(folder).parts))
    if not manifests:
        raise D2OError(f"{folder}: holds no artifact; name a folder of results")
    problems, counts = [], Counter()
    for manifest in tqdm(manifests, desc="verify", unit="artifact", mininterval=1):
        lines = [visible(line) for line in _problems(manifest, counts)]
        counts["artifacts"] += 1
        counts["not whole"] += bool(lines)
        problems += lines
    counted = [f"{counts[what]:,} {what}" for what in ("artifacts", "files", "not whole")]
    line = ", ".join(counted) + f"; {counts['released']:,} files of weights were released" * bool(counts["released"])
    if problems:
        line += "; what no target needs any more is made again by its name: snakemake --cores all FILE"
    return problems, line


def _problems(manifest: Path, counts: Counter) -> Iterator[str]:
    target = layout.made_again(manifest)
    again = f"delete {target} and run again"
    try:
        content = records.read_manifest(manifest)["content"]
    except D2OError as error:
        yield str(error)
        return
    except KeyError:
        yield f"{manifest}: of another version; {again}"
        return
    for path, digest in _files(manifest, content):
        counts["files"] += 1
        if not path.is_file():
            counts["released"] += (released := weights.released(path))
            if not released:
                missed = f"run again, or delete {manifest} if nothing that is asked for needs it"
                yield f"{path}: is gone; {missed if path == target else again}"  # Snakemake misses its own outputs
        elif records.file_digest(path) != digest:
            yield f"{path}: damaged; {again}"


def _files(manifest: Path, content: str | dict[str, str]) -> list[tuple[Path, str]]:
    if isinstance(content, dict):
        return [(manifest.parent / name, digest) for name, digest in content.items()]
    return [(layout.described(manifest), content)]
