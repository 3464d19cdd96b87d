"""Seconds and peak memory of the stage `negatives` on synthetic logs of rejected answers.

A log holds one unsafe answer per row. Its words are made up, with frequencies by Zipf's law; a prompt occurs in 2.5
rows on average, one prompt in twenty differs from another in one word, and one answer in fifty repeats the one
before. The stage runs in its own process, after the rows are written; the peak is that process's resident set.

Writes negatives.json and prints it.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import date
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from tqdm import tqdm

from d2o import identities, negatives, records, schemas
from d2o.settings import Extraction

SIZES = (330_000, 10_000_000)
ROWS_PER_PROMPT = 2.5
BATCH = 50_000
VOCABULARY = 50_000


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where negatives.json goes")
    parser.add_argument("--rows", type=int, nargs="+", default=SIZES, help="sizes of the log")
    parser.add_argument("--near", type=float, nargs="+", default=[0.7, 0], help="near_duplicates; 0: not searched")
    options = parser.parse_args()
    result = {
        "runs": [run for rows in options.rows for run in measure(rows, options.near)],
        "cpus": len(os.sched_getaffinity(0)),
        "versions": {name: version(name) for name in ("numpy", "polars", "pyarrow")},
        "date": date.today().isoformat(),
    }
    options.folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(result, indent=2) + "\n"
    draft = options.folder / ".negatives.json.tmp"
    draft.write_text(text)
    draft.replace(options.folder / "negatives.json")
    print(text)


def measure(rows: int, near: list[float]) -> Iterator[dict]:
    """Time and memory of the stage on a log of `rows` rows, for each threshold of near-duplicates."""
    with tempfile.TemporaryDirectory() as folder:
        table = Path(folder) / "rows.parquet"
        write_log(table, rows)
        for threshold in near:
            made = Path(folder) / "made"
            job = json.dumps({"rows": str(table), "made": str(made), "near": threshold or None})
            done = subprocess.run([sys.executable, __file__, "--job", job], stdout=subprocess.PIPE, check=True)
            counts = records.read_manifest(made / "negatives.parquet")["counts"]
            kept = ("negatives", "prompts", "near_leaks", "near_duplicates", "duplicates")
            facts = {"rows": rows, "near_duplicates": threshold or None, "megabytes": table.stat().st_size // 10**6}
            yield facts | json.loads(done.stdout) | {"counts": {name: counts[name] for name in kept}}


def _run(rows: str, made: str, near: float | None) -> None:
    """Run the stage in this process and print the time and memory it took."""
    load = os.getloadavg()[0]  # of other processes
    wall, processor = time.perf_counter(), time.process_time()
    negatives.extract(Extraction(near_duplicates=near), Path(rows), Path(made))
    taken = {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - processor}
    taken["load_before"] = load
    taken["peak_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(json.dumps({name: round(value, 2) for name, value in taken.items()}))


def write_log(path: Path, count: int) -> None:
    """Write a `schemas.ROWS` table of `count` rows; the same for the same count."""
    prompts = int(count / ROWS_PER_PROMPT)
    with records.TableWriter(path, schemas.ROWS) as table:
        for start in tqdm(range(0, count, BATCH), "writing a log", unit_scale=BATCH, unit=" rows", mininterval=2):
            table.add_columns(_rows(np.arange(start, min(start + BATCH, count), dtype=np.uint64), prompts))


def _rows(numbers: np.ndarray, prompts: int) -> pa.Table:
    """The rows with these numbers."""
    # One answer in fifty is that of the row before.
    answers = numbers - (_noise(numbers, 1) % 50 == 0)
    asked = _noise(answers, 2) % prompts
    # One prompt in twenty differs from another one in one word only.
    changed = _noise(asked, 3) % 20 == 0
    prompt = _texts(asked - (changed & (asked > 0)), 5, 40, 4, changed)
    answer = _texts(answers, 20, 60, 5)
    ids = [identities.prompt_id([{"role": "user", "content": text}]) for text in prompt.to_pylist()]
    n = len(numbers)
    offsets = pa.array(np.arange(n + 1, dtype=np.int32))
    message = {"role": pa.array(["user"] * n), "content": prompt}
    labelled = schemas.ROWS.field("responses").type.value_type
    response = {"text": answer, "unsafe": pa.array([True] * n)}
    response |= {label: pa.nulls(n, labelled.field(label).type) for label in ("categories", "severity")}
    columns = {
        "row": pa.array(numbers.astype(np.int64)),
        "split": pa.array(["train"] * n),
        "prompt_id": pa.array(ids),
        "messages": pa.ListArray.from_arrays(offsets, pa.StructArray.from_arrays(message.values(), list(message))),
        "responses": pa.ListArray.from_arrays(
            offsets, pa.StructArray.from_arrays(response.values(), fields=[*labelled])
        ),
        "better": pa.nulls(n, pa.int8()),
        "safer": pa.nulls(n, pa.int8()),
    }
    return pa.table(
        {name: column.cast(schemas.ROWS.field(name).type) for name, column in columns.items()}, schemas.ROWS
    )


def _texts(of: np.ndarray, least: int, most: int, salt: int, changed: np.ndarray | None = None) -> pa.Array:
    """A text of `least` to `most` - 1 words for each number; where `changed`, with another third word."""
    lengths = (least + _noise(of, salt) % (most - least)).astype(np.int64)
    ends = np.cumsum(lengths)
    place = np.arange(ends[-1]) - np.repeat(ends - lengths, lengths)
    noise = _noise(np.repeat(of, lengths) * 64 + place.astype(np.uint64), salt + 100)
    if changed is not None:
        noise[(place == 2) & np.repeat(changed, lengths)] ^= np.uint64(0xABCDEF << 40)
    # Zipf's law: the logarithm of a word's rank is uniform.
    ranks = (np.exp(noise / 2.0**64 * np.log(VOCABULARY)) - 1).astype(np.int64)
    words = pa.ListArray.from_arrays(np.r_[0, ends].astype(np.int32), _words().take(pa.array(ranks)))
    return pc.binary_join(words, " ")


def _words() -> pa.Array:
    """Made-up words, the frequent ones shorter."""
    syllables = [c + v for c in "bdfgklmnprstvz" for v in "aeiou"]
    words = []
    for rank in range(VOCABULARY):
        word = ""
        while rank or not word:
            rank, index = divmod(rank, len(syllables))
            word += syllables[index]
        words.append(word)
    return pa.array(words)


def _noise(numbers: np.ndarray, salt: int) -> np.ndarray:
    """64 random bits for each number (the finaliser of splitmix64)."""
    x = numbers + np.uint64((salt + 1) * 0x9E3779B97F4A7C15 % 2**64)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
    return x ^ (x >> np.uint64(31))


if __name__ == "__main__":
    if sys.argv[1] == "--job":
        _run(**json.loads(sys.argv[2]))
    else:
        main()
