"""Seconds and memory before the first step of a training: its groups are tokenised once, and all ranks map the file.

Each group has one negative and K positives. Their texts are stretches of this repository's documents, with enough
words for about the requested number of tokens per response. Either several negatives of a prompt share its K
positives, or each prompt has one negative. They are written as the pipeline's tables, with references. Then two parts
are measured:

- `prepare`: the process that makes the file of groups, as rank 0 of a training does. Its CPU seconds are reported in
  two parts: Python's, on one core, and the tokenizer's, on all cores.
- `ranks`: `RANKS` processes that read one epoch; each builds all groups of a step and reads the tokens of its share.
  Their memory is the sum of their proportional set sizes (Pss, which counts a shared page once) while all processes
  run, less that sum before they open the file.

Writes groups.json and prints it.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import date
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pandas  # noqa: F401  transformers imports it, so a rank has it before it opens the file

from d2o import dtypes, identities, models, records, schemas
from d2o.settings import Forward, Method, Train, TrainStage
from d2o.train import Inputs
from d2o.train.data import Data, prepare

ROOT = Path(__file__).parent.parent
RANKS = 8
POSITIVES = 11
# Words of the documents per token.
WORDS = 0.55
PROMPT_WORDS = 20


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where groups.json goes")
    parser.add_argument("--groups", type=int, default=13_000, help="how many")
    parser.add_argument("--tokens", type=int, default=230, help="of a response")
    parser.add_argument("--negatives", type=int, nargs="+", default=[3, 1], help="of a prompt, each in its own group")
    parser.add_argument("--model", type=Path, help="model folder in place of SmolLM2-135M")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        model = options.model or _smollm2(Path(name) / "model")
        result = {
            "runs": [measure(Path(name), model, options.groups, options.tokens, n) for n in options.negatives],
            "cpus": len(os.sched_getaffinity(0)),
            "versions": {name: version(name) for name in ("numpy", "pyarrow", "tokenizers", "transformers")},
            "date": date.today().isoformat(),
        }
    options.folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(result, indent=2) + "\n"
    draft = options.folder / ".groups.json.tmp"
    draft.write_text(text)
    draft.replace(options.folder / "groups.json")
    print(text)


def _smollm2(folder: Path) -> Path:
    from generate import SMOLLM2_135M

    models.fetch(SMOLLM2_135M, None, folder)
    return folder


def measure(folder: Path, model: Path, groups: int, tokens: int, negatives: int) -> dict:
    """Time and memory that a training on `groups` groups takes before its first step."""
    write_tables(folder, model, groups, tokens, negatives)
    job = json.dumps({"folder": str(folder), "model": str(model)})
    made = json.loads(_run("prepare", job).communicate()[0])
    ranks = [_run(str(rank), job) for rank in range(RANKS)]
    opened = [json.loads(rank.stdout.readline()) for rank in ranks]  # all have read their epoch
    for rank in ranks:
        print("now", file=rank.stdin, flush=True)
    after = [json.loads(rank.stdout.readline()) for rank in ranks]
    for rank in ranks:
        rank.communicate()
    read = {
        "gigabytes": round(sum(after) - sum(one["before"] for one in opened), 3),
        "seconds_to_open": max(one["seconds_to_open"] for one in opened),
        "ranks": RANKS,
    }
    manifest = records.read_manifest(folder / "groups.arrow")
    facts = {"groups": groups, "negatives_of_a_prompt": negatives, "counts": manifest["counts"]}
    return facts | {"tokens": made.pop("tokens"), "prepare": made, "reading": read}


def _run(what: str, job: str) -> subprocess.Popen:
    command = [sys.executable, __file__, "--job", what, job]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def _stage() -> TrainStage:
    method = Method(loss="d2o", positives="self", negatives=True, k=POSITIVES)
    return TrainStage(method=method, train=Train(epochs=1), forward=Forward(precision="fp32"))


def _prepare(folder: str, model: str) -> None:
    """Make the file of groups and print the time and memory it took."""
    path = Path(folder)
    inputs = Inputs(Path(model), path / "human.parquet", [path / "pool.parquet"], (), [path / "references.parquet"])
    load, wall, processor = os.getloadavg()[0], time.perf_counter(), time.process_time()
    prepare(_stage(), inputs, path / "groups.arrow")
    wall, processor, tokenizer = time.perf_counter() - wall, time.process_time() - processor, _other_threads()
    taken = {"seconds": round(wall, 2), "python_cpu_seconds": round(processor - tokenizer, 2)}
    taken |= {"tokenizer_cpu_seconds": round(tokenizer, 2), "load_before": round(load, 2)}
    taken |= {"peak_gigabytes": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, 3)}
    taken |= {"file_gigabytes": round((path / "groups.arrow").stat().st_size / 1e9, 3)}
    data = Data(_stage(), path / "groups.arrow")
    taken["tokens"] = sum(group.tokens for group in data.groups)
    print(json.dumps(taken))


def _other_threads() -> float:
    """CPU seconds of all running threads but the main one: those of the tokenizer."""
    threads = (path / "stat" for path in Path("/proc/self/task").iterdir() if int(path.name) != os.getpid())
    ticks = (thread.read_text().rpartition(")")[2].split()[11:13] for thread in threads)
    return sum(int(user) + int(system) for user, system in ticks) / os.sysconf("SC_CLK_TCK")


def _rank(rank: int, folder: str) -> None:
    """Read an epoch as one of the ranks; print the memory before and, when asked, now; run until stdin is closed."""
    before, start = _resident(), time.perf_counter()
    data = Data(_stage(), Path(folder) / "groups.arrow")
    data.groups.longest(512)
    opened = time.perf_counter() - start
    for step in range(data.total):
        for group in data.batch(step)[rank::RANKS]:
            assert all(response.ids.min() >= 0 for response in group.responses)
    print(json.dumps({"before": before, "seconds_to_open": round(opened, 2)}), flush=True)
    sys.stdin.readline()
    print(_resident(), flush=True)
    sys.stdin.read()  # keeps shared pages shared while the others measure


def _resident() -> float:
    """Gigabytes of memory of this process, counting its share of pages that other processes map too (Pss)."""
    return 1024 * int(re.search(r"^Pss:\s+(\d+) kB", Path("/proc/self/smaps_rollup").read_text(), re.M)[1]) / 1e9


def write_tables(folder: Path, model: Path, groups: int, tokens: int, negatives: int) -> None:
    """Write human answers, a pool and references for `groups` groups; the same for the same arguments."""
    words = " ".join(path.read_text() for path in sorted((ROOT / "docs").glob("*.md"))).split()
    source = random.Random(0)

    def text(count: int) -> str:
        start = source.randrange(len(words) - count)
        return " ".join(words[start : start + count])

    said = int(tokens * WORDS)
    prompts = [
        [{"role": "user", "content": f"{number} {text(PROMPT_WORDS)}"}] for number in range(-(-groups // negatives))
    ]
    order = [number % len(prompts) for number in range(groups)]  # a prompt's negatives lie far from each other
    human = (
        dict.fromkeys(schemas.NEGATIVES.names)
        | {"prompt_id": identities.prompt_id(prompts[number]), "split": "train", "messages": prompts[number]}
        | {"negative": text(said)}
        for number in order
    )
    records.write_table(folder / "human.parquet", schemas.NEGATIVES, human)
    with records.artifact(folder / "pool.parquet", None, [model / "manifest.json"]) as draft:
        records.write_table(draft.path, schemas.POOL, _pool(prompts, lambda: text(said), tokens))
    # The references need the numbers of tokens: they are read from a file of groups without references.
    bare = folder / "bare.arrow"
    prepare(_stage(), Inputs(model, folder / "human.parquet", [folder / "pool.parquet"]), bare)
    with records.artifact(folder / "references.parquet", None, [model / "manifest.json"]) as draft:
        draft.facts["precision"] = dtypes.precision("fp32")
        records.write_table(draft.path, schemas.LOGPROBS, _references(Data(_stage(), bare)))
    records.discard(bare)


def _pool(prompts: list, text, tokens: int) -> Iterator[dict]:
    for messages in prompts:
        for number in range(POSITIVES):
            sample = {
                "prompt_id": identities.prompt_id(messages),
                "sample": number,
                "instruction": None,
                "seed": number,
            }
            sample |= {"text": text(), "tokens": tokens, "finish": "stop", "attempt": 0, "flags": [], "usable": True}
            yield sample


def _references(data: Data) -> Iterator[dict]:
    seen = set()
    for group in data.groups:
        for response in group.responses:
            if response.response_id not in seen:
                seen.add(response.response_id)
                row = {"prompt_id": group.prompt_id, "response_id": response.response_id}
                yield row | {"logprob": -1.0 * len(response.ids), "tokens": len(response.ids)}


if __name__ == "__main__":
    if sys.argv[1] == "--job":
        arguments = json.loads(sys.argv[3])
        _prepare(**arguments) if sys.argv[2] == "prepare" else _rank(int(sys.argv[2]), arguments["folder"])
    else:
        main()
