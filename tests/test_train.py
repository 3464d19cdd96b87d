"""Training with real DeepSpeed on a tiny model: schedule, equality over ranks, resume after SIGKILL."""

import fcntl
import json
import math
import os
import pickle
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine
from safetensors.torch import load_file

from d2o import chat, checksums, groups, progress, records, rounds, schemas
from d2o.contracts import CONTRACTS
from d2o.errors import D2OError
from d2o.groups import Group, Response
from d2o.losses import Side
from d2o.settings import (
    Alarms,
    Forward,
    Lora,
    Method,
    MovingAverage,
    MovingAverages,
    Online,
    Train,
    TrainStage,
    execution_keys,
)
from d2o.train import Inputs, data, references, run, schedule, watch
from d2o.train import checkpoints as checkpointing
from d2o.weights import ADAPTER
from rows import asked, human_row, pooled

# Minutes between checkpoints: one after every step.
OFTEN = 1e-9
KILLED = str(Path(__file__).with_name("killed.py"))
LOG = "d2o.train.watch:Watch.step"
# Calls: run.json, the manifest of the groups, probe.json, then the last file of each checkpoint.
WHOLE = "d2o.records:write_json"
DPO = Method(loss="dpo", positives="human", negatives=True)
D2O = Method(loss="d2o", positives="self", negatives=True)


# The schedule ------------------------------------------------------------------------------------


def test_every_group_is_seen_once_an_epoch_and_every_step_is_full():
    train = Train(groups_per_step=4, epochs=3)
    total = schedule.total_steps(train, 10)
    steps = [schedule.step_groups(step, 10, train, seed=1) for step in range(total)]
    assert total == 8
    assert all(len(step) == 4 for step in steps)
    flat = [i for step in steps for i in step]
    for epoch in range(3):
        assert Counter(flat[epoch * 10 : (epoch + 1) * 10]) == Counter(range(10))
    assert flat[:10] != flat[10:20]
    assert schedule.step_groups(3, 10, train, seed=2) != steps[3]


@pytest.mark.parametrize("decay", ["cosine", "linear", "constant"])
def test_learning_rate_rises_then_falls(decay):
    train = Train(warmup=0.2, decay=decay)
    rates = [schedule.rate(step, 50, train) for step in range(50)]
    assert rates[:10] == sorted(rates[:10])
    assert rates[9] == 1 == max(rates)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert (rates[-1] == 1) == (decay == "constant")


def group(prompt: int, *responses: int) -> Group:
    return Group("p", [1] * prompt, [Response("r", [1] * n) for n in responses])


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_ranks_share_the_work_and_make_as_many_passes(ranks):
    batch = [group(5, n) for n in (40, 3, 9, 22, 31, 2, 17)]
    shares = schedule.passes(batch, ranks, tokens=50)
    assert len({len(share) for share in shares}) == 1
    assert Counter(id(g) for share in shares for row in share for g in row) == Counter(map(id, batch))
    assert all(sum(g.tokens for g in row) <= 50 for share in shares for row in share)
    work = [sum(g.tokens for row in share for g in row) for share in shares]
    assert max(work) - min(work) <= max(g.tokens for g in batch)


def test_a_rank_without_a_group_has_empty_passes():
    assert schedule.passes([group(5, 9)], 2, tokens=50)[1] == [[]]


# What is monitored -------------------------------------------------------------------------------


def history(**columns) -> list[dict]:
    fixed = {"loss": 0.5, "grad_norm": 1.0, "length_drift": 0.0}
    steps = max(map(len, columns.values()))
    return [fixed | {key: values[i] for key, values in columns.items()} for i in range(steps)]


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"loss": [0.6] * 30}, set()),
        ({"loss": [0.6, None]}, {"not_finite"}),
        ({"grad_norm": [1.0, math.inf]}, {"not_finite"}),
        ({"positive_shift": [None] * 9 + [-0.1], "negative_shift": [None] * 9 + [-2.0]}, set()),
        ({"positive_shift": [None] * 9 + [-0.1] + [None] * 9 + [-0.2]}, {"displacement"}),
        ({"positive_shift": [None] * 9 + [-0.2] + [None] * 5}, {"displacement"}),
        ({"positive_shift": [None] * 9 + [-0.2] + [None] * 9 + [-0.1]}, set()),
        ({"length_drift": [0.0] * 5 + [1.2] * 10}, {"length_drift"}),
        ({"length_drift": [9.0] * 9}, set()),
    ],
)
def test_alarms(columns, expected):
    assert watch.alarms(history(**columns), Alarms()).keys() == expected


def test_what_is_observed_of_a_group():
    up = Side(*(torch.tensor(x) for x in ([-10.0, -20.0], [-12.0, -20.0], [5.0, 10.0], [0.0, 0.0])))
    down = Side(*(torch.tensor([x]) for x in (-8.0, -7.0, 4.0, 0.0)))
    seen = dict(zip(watch.MEANS, watch.observe(torch.tensor(0.5), up, down).tolist(), strict=True))
    weight = math.exp(2) / (1 + math.exp(2))
    assert seen["loss"] == 0.5
    assert (seen["margin"], seen["accuracy"]) == (2.0, 1.0)
    assert seen["length_drift"] == pytest.approx((weight * 5 + (1 - weight) * 10) / 7.5 - 1)
    assert (seen["positive_logprob"], seen["positive_reference"], seen["positive_logratio"]) == (-15, -16, 1)
    assert (seen["negative_logprob_per_token"], seen["negative_reference_per_token"]) == (-2.0, -1.75)
    alone = dict(zip(watch.MEANS, watch.observe(torch.tensor(0.5), up.part(0, 1), down).tolist(), strict=True))
    assert math.isnan(alone["length_drift"])


def test_means_leave_out_what_a_group_lacks_but_never_a_loss(monkeypatch):
    monkeypatch.setattr(watch.dist, "all_reduce", lambda sums: None)
    up = Side(*(torch.tensor([x]) for x in (-4.0, -5.0, 2.0, 0.0)))
    down = Side(*(torch.tensor([x]) for x in (-6.0, -5.0, 2.0, 0.0)))
    means = watch.Means(torch.device("cpu"))
    means.add([torch.tensor(1.0), torch.tensor(3.0)], [(up, down), (up.part(0, 0), down)])
    seen = means.over_ranks()
    assert (seen["loss"], seen["margin"], seen["positive_logprob"], seen["negative_logprob"]) == (
        2.0,
        2.0,
        -4.0,
        -6.0,
    )
    means.add([torch.tensor(math.nan)], [(up, down)])
    assert math.isnan(means.over_ranks()["loss"])


def test_useful_work_counts_a_prompt_once():
    """2 FLOPs per weight and token forward, twice that backward; attention included."""
    shape = watch.ModelSizes(linear=100, head=10, attention=8, trained=True)
    seen = 6**2 / 2 + 2 * (6 * 4 + 4**2 / 2)
    assert shape.flops([group(6, 4, 4)]) == 3 * (2 * 100 * 14 + 2 * 10 * 8 + 4 * 8 * seen)


# What a training reads ---------------------------------------------------------------------------


def test_groups_with_fewer_positives_than_k_are_counted(tables, tiny_model, tmp_path):
    rows = records.read_table(tables / "pool.parquet", schemas.POOL)
    rows[0] |= {"usable": False, "flags": ["repeating"]}
    with records.artifact(tmp_path / "pool.parquet", None, [tiny_model / "manifest.json"]) as draft:
        records.write_table(draft.path, schemas.POOL, rows)
    inputs = Inputs(tiny_model, tables / "human.parquet", [tmp_path / "pool.parquet"])
    for k, short in ((3, 1), (2, 0)):
        data.prepare(stage(D2O.model_copy(update={"k": k})), inputs, tmp_path / "groups.arrow")
        counts = records.read_manifest(tmp_path / "groups.arrow")["counts"]
        assert (counts["groups"], counts["short_groups"]) == (12, short)


def test_groups_out_of_the_file_are_those_of_the_tables_in_their_order(tiny_model, tmp_path):
    """Also where a prompt's negatives are not adjacent; with references; renewed by rounds; mapped, not copied."""
    human = []
    for i in (0, 1, 2, 1, 0, 3, 1):
        question = "Too long? " * 99 if i == 3 else f"Question number {i}?"
        human.append(human_row(asked(question), f"No, {len(human)}."))
    prompts = list(dict.fromkeys(row["prompt_id"] for row in human))
    pool = [pooled(prompt, k, f"Answer {k}.") for prompt in prompts for k in range(3)]
    with_references(tmp_path, tiny_model, human, pool)
    renewed = {1: prompts[1], 2: prompts[0]}  # the third round has no usable answer
    fresh = [tmp_path / f"round{number}.parquet" for number in (1, 2, 3)]
    for number, path in enumerate(fresh, start=1):
        new = [pooled(renewed[number], 0, f"Fresh {number}.")] if number in renewed else []
        records.write_table(path, schemas.POOL, new)
    online = stage(D2O.model_copy(update={"online": ONLINE, "k": 3}), steps=8, groups_per_step=6)
    read = inputs(tmp_path, online)
    made = []
    for rounds_by_now in (0, 3):
        some = Inputs(tiny_model, tmp_path / "human.parquet", **read, fresh=fresh[:rounds_by_now])
        if rounds_by_now:
            with pytest.raises(D2OError, match="is missing"):  # the fresh answers have no reference log-probs
                data.prepare(online, some, tmp_path / "groups.arrow")
            assert not list(tmp_path.glob("*groups.arrow*"))
            some = replace(some, reference_logprobs=[])
        data.prepare(online, some, tmp_path / "groups.arrow")
        made.append(data.Data(online, tmp_path / "groups.arrow"))
        records.discard(tmp_path / "groups.arrow")  # the mapped data stay
    before, after = made

    tokenizer = chat.load_tokenizer(tiny_model)
    texts = [text for text in groups.view(online.method, human, pool) if text.prompt_id != prompts[3]]
    known = groups.reference_logprobs(
        row for path in read["reference_logprobs"] for row in records.read_table(path, schemas.LOGPROBS)
    )
    assert len(before.groups) == len(texts) == 6
    for group, text in zip(before.groups, texts, strict=True):
        assert group.prompt.tolist() == chat.encode_prompt(tokenizer, text.messages)
        assert said(tokenizer, group.responses) == [answer.text for answer in text.answers]
        assert [response.reference_logprob for response in group.responses] == [
            known[response.response_id][0] for response in group.responses
        ]
        assert not group.positives[0].ids.flags.owndata
    assert {group.prompt_id for group in before.probe} == set(prompts[:3])
    assert (before.until, after.until) == (3, 8)
    for step, number in enumerate([0, 0, 0, 1, 1, 2, 2, 3]):
        assert len({group.row for group in after.batch(step)}) == 6
        for group in after.batch(step):
            last = f"Fresh {number}." if group.prompt_id == renewed.get(number) else "Answer 2."
            assert said(tokenizer, group.positives) == ["Answer 0.", "Answer 1.", last]


def said(tokenizer, responses: list[Response]) -> list[str]:
    return [tokenizer.decode(response.ids, skip_special_tokens=True) for response in responses]


# Real runs ---------------------------------------------------------------------------------------


def with_references(folder, model, human: list[dict], pool: list[dict], precisions=("fp32",)):
    """Write human answers and a pool to a folder, and their log-probs under a model."""
    from d2o import logprobs

    records.write_table(folder / "human.parquet", schemas.NEGATIVES, human)
    (model / "manifest.json").write_text("{}")
    with records.artifact(folder / "pool.parquet", None, [model / "manifest.json"]) as draft:
        records.write_table(draft.path, schemas.POOL, pool)
    for name, samples in (("human", None), ("pool", folder / "pool.parquet")):
        for precision in precisions:
            output = folder / precision / f"references-{name}.parquet"
            output.parent.mkdir(exist_ok=True)
            forward = Forward(precision=precision)
            logprobs.compute(forward, model, folder / "human.parquet", samples, "train", output)
    return folder


@pytest.fixture(scope="module")
def tables(tiny_model, tmp_path_factory):
    """Twelve prompts, each with a pair and a pool of three, and their references under the tiny model."""
    human, pool = [], []
    for i in range(12):
        messages, positive = asked(f"Question number {i}?"), f"Yes, here it is: {i}."
        human.append(human_row(messages, f"No, I will not help {i}.", positive=positive, positive_unsafe=False))
        pool += [pooled(human[-1]["prompt_id"], k, f"Answer {k} to {i}.") for k in range(3)]
    return with_references(tmp_path_factory.mktemp("tables"), tiny_model, human, pool, ("fp32", "bf16"))


def stage(method: Method, precision="fp32", **train) -> TrainStage:
    settings = {"groups_per_step": 4, "tokens_per_pass": 1, "learning_rate": 1e-3, "zero_stage": 0, "epochs": 2}
    return TrainStage(method=method, train=Train(**settings | train), forward=Forward(precision=precision))


def inputs(tables, stage: TrainStage) -> dict[str, list]:
    """The tables that a stage is trained on beside the human answers."""
    method, made = stage.method, tables / stage.forward.precision
    own = method.positives == "self"
    kinds = ("human", "pool") if own else ("human",)
    tabled = CONTRACTS[method.loss].reference and not method.ema
    return {
        "samples": [tables / "pool.parquet"] if own else [],
        "reference_logprobs": [made / f"references-{kind}.parquet" for kind in kinds] if tabled else [],
    }


def test_references_of_two_routes_are_refused(tables, tiny_model, tmp_path):
    """For example after an architecture was added to `SHARING`: the old table stays, a new one has another route."""
    made = shutil.copytree(tables / "fp32", tmp_path / "fp32")
    manifest = made / "references-pool.parquet.manifest.json"
    manifest.write_text(json.dumps(records.read_manifest(manifest) | {"route": "padded"}))
    read = inputs(tables, stage(D2O)) | {"reference_logprobs": sorted(made.glob("*.parquet"))}
    with pytest.raises(
        D2OError, match=r"different routes \(\w+ and \w+\), .*; delete the older one and run again, or"
    ):
        data.prepare(stage(D2O), Inputs(tiny_model, tables / "human.parquet", **read), tmp_path / "groups.arrow")


def command(tables, model, folder, method, precision="fp32", **train) -> list[str]:
    whole = stage(method, precision, **train)
    execution = execution_keys(whole)
    options = ["--settings", whole.model_dump_json(exclude=execution)]
    options += ["--execution", whole.model_dump_json(include=execution)]
    options += ["--model", model, "--negatives", tables / "human.parquet"]
    options += ["--checkpoints", folder / "checkpoints", "--output", folder / "model" / "manifest.json"]
    options += [
        x
        for name, paths in inputs(tables, whole).items()
        for path in paths
        for x in (f"--{name.replace('_', '-')}", path)
    ]
    return [sys.executable, "-m", "d2o", "train", *map(str, options)]


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1"}


def finished(line: list[str], **variables: str) -> str:
    """Run a command that succeeds; return its error output."""
    done = subprocess.run(line, env=environment() | variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr


def refused(line: list[str]) -> str:
    """Run a command that fails with an error; return the last line of its error output."""
    done = subprocess.run(line, env=environment(), capture_output=True, text=True)
    assert done.returncode == 1
    return done.stderr.splitlines()[-1]


def train(*args, **kwargs) -> tuple[dict[str, torch.Tensor], list[dict]]:
    """Run a training; returns its weights and its log."""
    finished(command(*args, **kwargs))
    return result(args[2])


def result(folder):
    log = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    return load_file(folder / "model" / "model.safetensors"), log


@pytest.mark.slow
def test_a_run_leaves_a_loadable_model_a_log_and_no_checkpoints(tables, tiny_model, tmp_path):
    weights, log = train(tables, tiny_model, tmp_path, D2O, epochs=4, checkpoint_minutes=OFTEN)
    assert [row["step"] for row in log] == list(range(1, 13))
    assert log[0]["loss"] == pytest.approx(0.693147, abs=1e-4)
    assert abs(log[0]["margin"]) < 1e-3
    assert log[-1]["loss"] < 0.5
    assert log[-1]["margin"] > 0
    assert log[-1]["accuracy"] == 1
    assert not (tmp_path / "checkpoints").exists()
    assert any((tmp_path / "tensorboard").iterdir())

    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    assert AutoTokenizer.from_pretrained(tmp_path / "model").chat_template
    torch.testing.assert_close(dict(model.named_parameters())["model.norm.weight"], weights["model.norm.weight"])
    assert records.read_manifest(tmp_path / "model")["steps"] == 12


@pytest.mark.slow
def test_ranks_accumulation_and_zero_stages_give_the_same_weights(tables, tiny_model, tmp_path):
    """1 rank × 4 accumulated = 2 ranks × 2 = one pass of 4, to rounding."""
    alone, log = train(tables, tiny_model, tmp_path / "a", DPO, steps=4)
    variants = {
        "one pass of 4": {"tokens_per_pass": 4096},
        "2 ranks": {"ranks": 2},
        "2 ranks, ZeRO 2": {"ranks": 2, "zero_stage": 2},
        "2 ranks, ZeRO 3": {"ranks": 2, "zero_stage": 3},
    }
    for name, settings in variants.items():
        weights, other = train(tables, tiny_model, tmp_path / name, DPO, steps=4, **settings)
        for row, twin in zip(log, other, strict=True):
            assert row["loss"] == pytest.approx(twin["loss"], rel=1e-4), name
            assert row["grad_norm"] == pytest.approx(twin["grad_norm"], rel=1e-3), name
        for key, value in alone.items():
            # Adam turns rounding of a tiny gradient into a step of up to the learning rate.
            assert (value - weights[key].float()).norm() / value.norm() < 2e-3, (name, key)


@pytest.mark.slow
@pytest.mark.parametrize("zero_stage", [2, 3])
def test_two_launchers_give_the_weights_of_one(tables, tiny_model, tmp_path, zero_stage):
    """As srun would start them on two nodes, here both on this machine."""
    settings = {"steps": 2, "ranks": 2, "zero_stage": zero_stage}
    weights, _ = train(tables, tiny_model, tmp_path / "one", DPO, **settings)
    line = command(tables, tiny_model, tmp_path / "two", DPO, **settings, nodes=2)
    step = {"SLURM_JOB_ID": "0", "SLURM_STEP_ID": str(free_port() - 10_000)}
    step |= {"SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NODELIST": "localhost,another"}
    launchers = [subprocess.Popen(line, env=environment() | step | {"SLURM_NODEID": node}) for node in "01"]
    assert [launcher.wait(timeout=300) for launcher in launchers] == [0, 0]
    assert records.read_manifest(tmp_path / "two" / "model")["ranks"] == 2
    others, _ = result(tmp_path / "two")
    assert weights.keys() == others.keys()
    assert all(torch.equal(weight, others[name]) for name, weight in weights.items())


def free_port() -> int:
    """A free port at which launchers can meet."""
    for port in random.sample(range(10_000, 30_000), 100):
        with socket.socket() as free, suppress(OSError):
            free.bind(("", port))
            return port
    raise AssertionError("no free port")


@pytest.mark.slow
def test_negatives_of_a_prompt_in_one_group_give_the_numbers_of_groups_of_their_own(tiny_model, tmp_path):
    """Steps over all negatives, one to four per prompt: loss, gradient and logged values are the same."""
    human, pool = [], []
    for i, count in enumerate((1, 4, 2, 3)):
        messages, said = asked(f"Question number {i}?"), f"No, I will not help {i}"
        human += [human_row(messages, said + n * "!", positive=f"Yes {n}.") for n in range(count)]
        pool += [pooled(human[-1]["prompt_id"], k, f"Answer {k} to {i}.") for k in range(3)]
    with_references(tmp_path, tiny_model, human, pool)
    moving = MovingAverages(positives={"decay": 0.5, "every": 2}, negatives={"decay": 0.5, "every": 1})
    methods = {"d2o": D2O, "npo": Method(loss="npo", negatives=True), "dpo": DPO,
               "ema": D2O.model_copy(update={"ema": moving})}  # fmt: skip
    ways = {"negative": 10, "prompt": 4}
    stages = {
        f"{name}-{way}": stage(
            method, group_by=way, steps=4, groups_per_step=10 if name == "dpo" else groups, tokens_per_pass=200
        )
        for name, method in methods.items()
        for way, groups in ways.items()
    }
    train_all(tmp_path, tiny_model, stages, tmp_path)
    for name in methods:
        (_, each), (_, whole) = (result(tmp_path / f"{name}-{way}") for way in ways)
        for row, twin in zip(each, whole, strict=True):
            for key in (*watch.MEANS, "grad_norm"):
                assert (row[key] is None) == (twin[key] is None)
                assert row[key] is None or row[key] == pytest.approx(twin[key], rel=1e-3, abs=2e-4), (name, key)
        groups = [records.read_manifest(tmp_path / f"{name}-{way}" / "model")["groups"] for way in ways]
        # In pairs each negative has a positive of its own: nothing to share.
        assert groups == ([10, 10] if name == "dpo" else [10, 4])


def train_all(tables, model, stages: dict[str, TrainStage], folder) -> None:
    """Run stages in one process, each into a folder of its own: starting one costs more than they do."""
    run_all([one_run(tables, model, stage, folder / name) for name, stage in stages.items()])


def one_run(tables, model, stage: TrainStage, folder, output="model", **fresh) -> dict:
    """The description of a run for `_TRAIN_ALL`."""
    read = {"model": model, "negatives": tables / "human.parquet"} | inputs(tables, stage) | fresh
    paths = {"checkpoints": folder / "checkpoints", "output": folder / output}
    return {"stage": stage.model_dump_json(), "inputs": read} | paths


def run_all(runs: list[dict]) -> None:
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    alone |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}  # any free port
    finished([sys.executable, "-c", _TRAIN_ALL, json.dumps(runs, default=str)], **alone)


_TRAIN_ALL = """
import json, sys
from pathlib import Path
import torch.distributed as dist
from d2o.settings import TrainStage
from d2o.train import Inputs, run

dist.destroy_process_group = lambda: None  # DeepSpeed joins its ranks once in a process
for job in json.loads(sys.argv[1]):
    stage = TrainStage.model_validate_json(job["stage"])
    read = {k: [*map(Path, v)] if isinstance(v, list) else Path(v) for k, v in job["inputs"].items()}
    run(stage, Inputs(**read), Path(job["checkpoints"]), Path(job["output"]))
"""


@pytest.mark.slow
def test_every_loss_trains(tables, tiny_model, tmp_path):
    """Each with data that it can use, and each loss falls."""
    stages = {}
    for loss, contract in CONTRACTS.items():
        positives = {"none": "none", "one": "human", "many": "self", "any": "self"}[contract.positives]
        method = Method(loss=loss, positives=positives, negatives=contract.negative)
        stages[loss] = stage(method, steps=8)
    train_all(tables, tiny_model, stages, tmp_path)
    for loss in stages:
        _, log = result(tmp_path / loss)
        assert len(log) == 8
        assert all(math.isfinite(row["loss"]) and row["grad_norm"] > 0 for row in log), loss
        assert log[-1]["loss"] < log[0]["loss"], loss


@pytest.mark.slow
@pytest.mark.parametrize("route", ["shared", "padded"])
def test_every_loss_starts_at_its_reference_in_bf16(tables, tiny_model, tmp_path, route, monkeypatch):
    """Rounding is the same in the table and in the training, whichever route the table was made on."""
    from d2o import forward, logprobs

    load = forward.load
    monkeypatch.setattr(forward, "load", lambda folder, precision, device: load(folder, precision, route))
    shutil.copytree(tables, tmp_path, dirs_exist_ok=True)
    for name, samples in (("human", None), ("pool", tmp_path / "pool.parquet")):
        output, bf16 = tmp_path / "bf16" / f"references-{name}.parquet", Forward(precision="bf16")
        logprobs.compute(bf16, tiny_model, tmp_path / "human.parquet", samples, "train", output)
    stages = {}
    for loss in STARTS:
        contract = CONTRACTS[loss]
        positives = {"none": "none", "one": "human", "many": "self"}[contract.positives]
        method = Method(loss=loss, positives=positives, negatives=True)
        stages[loss] = stage(method, "bf16", steps=1, tokens_per_pass=300)
    train_all(tmp_path, tiny_model, stages, tmp_path)
    for loss, expected in STARTS.items():
        made = records.read_manifest(tmp_path / loss / "model")
        assert result(tmp_path / loss)[1][0]["loss"] == pytest.approx(expected, rel=1e-5), loss
        assert (made["route"], made["precision"]) == (route, "bf16")
        assert made["reference_noise"] < 1e-3, loss


# The value of each loss with a reference, with default parameters, where the policy equals the reference.
STARTS = dict.fromkeys(("d2o", "d2o-instance", "dpo", "cdpo", "robust-dpo", "dpop"), math.log(2))
STARTS |= {"ipo": 25.0, "kto": 0.5, "npo": 20 * math.log(2)}


@pytest.mark.slow
def test_references_in_another_precision_are_refused(tables, tiny_model, tmp_path):
    line = command(tables, tiny_model, tmp_path, DPO, "bf16")
    line[line.index(str(tables / "bf16/references-human.parquet"))] = str(tables / "fp32/references-human.parquet")
    assert "references-human.parquet: computed in fp32, and this training would run in bf16" in refused(line)


EMA = MovingAverages(positives=MovingAverage(decay=0.5, every=4), negatives=MovingAverage(decay=0.25, every=2))


@pytest.mark.slow
def test_moving_references(tables, tiny_model, tmp_path):
    """Frozen averages equal the fixed table; averages that follow at once make every window start at log 2."""
    still = MovingAverages(positives=MovingAverage(decay=1, every=3), negatives=MovingAverage(decay=1, every=2))
    follow = MovingAverages(positives=MovingAverage(decay=0, every=2), negatives=MovingAverage(decay=0, every=2))
    methods = {name: D2O.model_copy(update={"ema": ema}) for name, ema in (("still", still), ("follow", follow))}
    stages = {"fixed": stage(D2O)} | {name: stage(method) for name, method in methods.items()}
    for zero in (1, 2, 3):
        stages[f"ema, ZeRO {zero}"] = stage(D2O.model_copy(update={"ema": EMA}), zero_stage=zero)
    stages["ema"] = stage(D2O.model_copy(update={"ema": EMA}))
    train_all(tables, tiny_model, stages, tmp_path)
    losses = {name: [row["loss"] for row in result(tmp_path / name)[1]] for name in stages}
    assert losses["still"] == pytest.approx(losses["fixed"], rel=1e-5)
    assert losses["follow"][::2] == pytest.approx([math.log(2)] * 3, rel=1e-5)
    assert max(losses["follow"][1::2]) < 0.69
    assert losses["ema"] != pytest.approx(losses["fixed"], rel=1e-3)
    for zero in (1, 2, 3):
        assert losses[f"ema, ZeRO {zero}"] == pytest.approx(losses["ema"], rel=1e-4)


ONLINE = Online(start=3, every=2, share=0.5)  # of eight steps: rounds after 3, 5 and 7


def segments(tables, model, stage: TrainStage, folder, fresh=()) -> list[dict]:
    """The runs of a training with rounds: each sees one round more than the one before."""
    count = len(rounds.boundaries(stage.method.online, 8))
    names = [f"rounds/{n + 1}/policy" for n in range(count)] + ["model"]
    tables_of = [{name: paths[:n] for name, paths in dict(fresh).items()} for n in range(count + 1)]
    return [one_run(tables, model, stage, folder, name, **t) for name, t in zip(names, tables_of, strict=True)]


@pytest.mark.slow
@pytest.mark.parametrize("ema", [None, EMA])
def test_rounds_with_nothing_fresh_change_nothing(tables, tiny_model, tmp_path, ema):
    """The segments join without a seam: a share of 0 ends with the weights of a run without rounds."""
    method = D2O.model_copy(update={"ema": ema})
    # A round of the same answers, with slightly different log-probs, as on another device.
    unused, otherwise = tables / "pool.parquet", tmp_path / "otherwise.parquet"
    known = records.read_table(tables / "fp32/references-pool.parquet", schemas.LOGPROBS)
    records.write_table(otherwise, schemas.LOGPROBS, [row | {"logprob": row["logprob"] - 0.1} for row in known])
    shutil.copy(records.manifest_path(tables / "fp32/references-pool.parquet"), records.manifest_path(otherwise))
    references = {} if ema else {"fresh_logprobs": [otherwise] * 3}
    online = method.model_copy(update={"online": ONLINE.model_copy(update={"share": 0.0})})
    runs = [one_run(tables, tiny_model, stage(method, steps=8), tmp_path / "plain")]
    fresh = {"fresh": [unused] * 3} | references
    run_all(runs + segments(tables, tiny_model, stage(online, steps=8), tmp_path / "online", fresh))
    assert_equal_runs(tmp_path / "online", tmp_path / "plain")
    log = result(tmp_path / "online")[1]
    assert [row["fresh_share"] for row in log] == [0.0] * 8
    assert [row["fresh_age"] for row in log] == [0, 0, 0, 0, 1, 0, 1, 0]


@pytest.mark.slow
def test_rounds_replace_a_share_of_the_positives_from_their_step_on(tables, tiny_model, tmp_path):
    online = D2O.model_copy(update={"online": ONLINE, "ema": EMA})
    chosen = stage(online, steps=8)
    rows = records.read_table(tables / "pool.parquet", schemas.POOL)
    fresh = []
    for number in range(1, 4):
        fresh.append(tmp_path / f"fresh{number}.parquet")
        records.write_table(
            fresh[-1], schemas.POOL, [row | {"text": f"Fresh {number}, {row['text']}"} for row in rows]
        )
    runs = segments(tables, tiny_model, chosen, tmp_path / "online", {"fresh": fresh})
    # The last two segments again from nothing: a lost folder of checkpoints costs only time.
    runs += [one_run(tables, tiny_model, chosen, tmp_path / "again", fresh=fresh)]
    runs += [one_run(tables, tiny_model, stage(D2O.model_copy(update={"ema": EMA}), steps=8), tmp_path / "plain")]
    run_all(runs)
    log, plain = result(tmp_path / "online")[1], result(tmp_path / "plain")[1]
    positives = len({row["sample"] for row in rows})
    assert [row["fresh_share"] for row in log] == [0.0] * 3 + [round(positives / 2) / positives] * 5
    same = [row["loss"] == other["loss"] for row, other in zip(log, plain, strict=True)]
    assert same == [True] * 3 + [False] * 5
    assert result(tmp_path / "again")[1][-1]["loss"] == pytest.approx(log[-1]["loss"], rel=1e-5)
    for number, steps in ((1, (3, 4)), (2, (5, 6)), (3, (7,))):
        asked = records.read_table(tmp_path / f"online/rounds/{number}/negatives.parquet", schemas.NEGATIVES)
        human = records.read_table(tables / "human.parquet", schemas.NEGATIVES)
        train_prompts = [row["prompt_id"] for row in human if row["split"] == "train"]
        expected = {
            train_prompts[i] for s in steps for i in schedule.step_groups(s, len(train_prompts), chosen.train, 0)
        }
        assert {row["prompt_id"] for row in asked} == expected
        assert records.read_manifest(tmp_path / f"online/rounds/{number}/policy")["steps"] == steps[0]


@pytest.mark.slow
def test_the_matrix_of_deepspeed(tables, tiny_model, tmp_path):
    """ZeRO, offload, precision and checkpointing change where numbers are stored, not their values."""
    stages = {"plain": stage(D2O), "gradient checkpointing": stage(D2O, gradient_checkpointing=True)}
    for zero in (1, 2, 3):
        stages[f"ZeRO {zero}"] = stage(D2O, zero_stage=zero)
        stages[f"ZeRO {zero}, offload"] = stage(D2O, zero_stage=zero, offload=True)
        stages[f"ZeRO {zero}, bf16"] = stage(D2O, "bf16", zero_stage=zero)
    stages["bf16"] = stage(D2O, "bf16")
    train_all(tables, tiny_model, stages, tmp_path)
    plain = result(tmp_path / "plain")[1]
    for name in stages:
        log = result(tmp_path / name)[1]
        near = {"rel": 0.02} if "bf16" in name else {"rel": 1e-4}
        assert [row["loss"] for row in log] == pytest.approx([row["loss"] for row in plain], **near), name
        norms = [row["grad_norm"] for row in log]
        assert norms == pytest.approx([row["grad_norm"] for row in plain], rel=0.1 if "bf16" in name else 1e-3), name


@pytest.mark.slow
def test_adapters_are_trained_alone_and_merged(tables, tiny_model, tmp_path):
    lora = {"lora": Lora(rank=4, alpha=8), "learning_rate": 1e-2}
    stages = {f"ZeRO {zero}": stage(D2O, zero_stage=zero, **lora) for zero in (0, 2, 3)}
    train_all(tables, tiny_model, stages, tmp_path)
    before = load_file(tiny_model / "model.safetensors")
    for name in stages:
        weights, log = result(tmp_path / name)
        assert log[0]["loss"] == pytest.approx(math.log(2), rel=1e-4)
        assert log[-1]["loss"] < 0.6, name
        assert weights.keys() == before.keys()
        changed = {key for key in before if not torch.equal(before[key].float(), weights[key].float())}
        assert changed == {key for key in before if "_proj" in key}, name
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    described = json.loads((tmp_path / "ZeRO 0" / "model" / ADAPTER / "adapter_config.json").read_text())
    modules = described["target_modules"]
    assert modules == sorted(modules), "a set in any order: the same training, run again, would write other bytes"
    adapted = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32), tmp_path / "ZeRO 0" / "model" / ADAPTER
    )
    alone = adapted.merge_and_unload().state_dict()
    twins = [result(tmp_path / name)[0] for name in stages]
    for key, value in twins[0].items():
        torch.testing.assert_close(alone[key].float(), value.float(), msg=key)
    for twin in twins[1:]:
        for key, value in twins[0].items():
            assert (value - twin[key]).norm() / value.norm() < 2e-3, key


@pytest.mark.slow
def test_a_stopping_alarm_ends_the_training_with_one_line(tables, tiny_model, tmp_path):
    """Without a pull on the positives, they fall with the negatives."""
    alarms = Alarms(displacement=0.01, stop=["displacement"])
    line = command(tables, tiny_model, tmp_path, D2O.model_copy(update={"beta": 0.0}), steps=60, alarms=alarms)
    assert "positives have lost" in refused(line)
    assert not (tmp_path / "model").exists()


@pytest.mark.slow
def test_a_probe_shows_what_the_policy_has_lost_whatever_the_loss_sees(tables, tiny_model, tmp_path):
    """GA and NPO see no positive, SFT no negative, moving references follow: the probe shows both sides."""
    follow = MovingAverages(positives=MovingAverage(decay=0, every=1), negatives=MovingAverage(decay=0, every=1))
    methods = {
        "ga": Method(loss="ga", negatives=True),
        "npo": Method(loss="npo", negatives=True),
        "sft": Method(loss="sft", positives="human"),
        "d2o": D2O.model_copy(update={"ema": follow}),
    }
    stages = {name: stage(method, steps=13) for name, method in methods.items()}
    train_all(tables, tiny_model, stages, tmp_path)
    for name in stages:
        log = result(tmp_path / name)[1]
        assert [row["step"] for row in log if "positive_shift" in row] == [10, 13], name
        assert (log[-1]["positive_shift"] < -0.15) == (name in ("ga", "npo")), name
        assert log[-1]["negative_shift"] < -0.15 or name == "sft", name
    assert abs(log[-1]["positive_logratio"]) < 1e-3 < abs(log[-1]["positive_shift"]), "the references have followed"
    assert records.read_manifest(tmp_path / "d2o/model")["reference_noise"] < 1e-3


@pytest.mark.slow
def test_snapshots(tables, tiny_model, tmp_path):
    train(tables, tiny_model, tmp_path, DPO, steps=4, snapshots=[2, 4])
    weights = {step: load_file(tmp_path / f"step{step}" / "model" / "model.safetensors") for step in (2, 4)}
    final = result(tmp_path)[0]
    assert all(torch.equal(final[key], weights[4][key]) for key in final)
    assert not all(torch.equal(final[key], weights[2][key]) for key in final)
    line = command(tables, tiny_model, tmp_path / "short", DPO, steps=4, snapshots=[2, 5])
    assert "train.snapshots: step 5 is beyond the last one, 4" in refused(line)


@pytest.mark.parametrize("name", ["checkpoints", "model", "tensorboard", "step2/model"])
def test_a_folder_that_is_not_ours_is_refused_before_anything_is_read(tiny_model, tmp_path, name):
    (tmp_path / name).mkdir(parents=True)
    (tmp_path / name / "thesis.txt").write_text("mine")
    read = Inputs(tiny_model, tmp_path / "no such table")
    with pytest.raises(
        D2OError, match=rf"{name}: not made by this pipeline .*; delete it yourself, or choose another"
    ):
        run(stage(DPO, snapshots=[2]), read, tmp_path / "checkpoints", tmp_path / "model")
    assert (tmp_path / name / "thesis.txt").read_text() == "mine"


@pytest.mark.slow
def test_what_rank_0_refuses_is_told_once(tables, tiny_model, tmp_path):
    line = command(tables, tiny_model, tmp_path, DPO, ranks=2, steps=3, snapshots=[9])
    told = subprocess.run(line, env=environment(), capture_output=True, text=True).stderr
    assert told.count("error: train.snapshots: step 9 is beyond the last one, 3; leave it out") == 1
    assert "[rank1]" not in told


@pytest.mark.slow
def test_a_reference_table_of_another_model_is_refused(tables, tiny_model, tmp_path):
    other = shutil.copytree(tiny_model, tmp_path / "other")
    (other / "manifest.json").write_text('{"another": true}')
    message = refused(command(tables, other, tmp_path, DPO))
    assert "references-human.parquet: made by another model than" in message


def test_running_out_of_memory_says_what_to_lower():
    from d2o.train.engine import enough_memory

    with pytest.raises(D2OError, match=r"a pass of 77 tokens; lower train\.tokens_per_pass"), enough_memory(77):
        torch.empty(1 << 60)
    with pytest.raises(RuntimeError, match="size mismatch"), enough_memory(77):
        torch.zeros(3, 3) @ torch.zeros(2)


def test_a_training_that_goes_on_goes_on_with_its_run_of_a_tracker(tmp_path, monkeypatch):
    """Only the functions of W&B and MLflow that we call are faked; by hand, both were seen to append to the run."""
    started = []

    def run(known):
        started.append(known)
        return SimpleNamespace(id=known or "r1", info=SimpleNamespace(run_id=known or "r1"), finish=lambda: None)

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda config, id, resume: run(id)))
    quiet = {"log_dict": lambda *_: None, "end_run": lambda: None}
    monkeypatch.setitem(sys.modules, "mlflow", SimpleNamespace(start_run=lambda run_id: run(run_id), **quiet))
    stage = TrainStage(method=DPO)
    for name in ("wandb", "mlflow"):
        for _ in range(2):
            watch._TRACKERS[name](stage, tmp_path / name).close()
    assert started == [None, "r1"] * 2


def test_a_tracker_that_is_not_installed_is_refused():
    with pytest.raises(D2OError, match=r"train\.trackers: no_such_tracker is not installed"):
        watch._installed("no_such_tracker")


# Resume ------------------------------------------------------------------------------------------


def killed(line: list[str], function: str, call: int, when: str = "after") -> None:
    """Run a training whose processes are all killed at a call of a function; see `killed.py`."""
    python, _, _, *arguments = line
    line = [python, KILLED, "SIGKILL", function, str(call), when, "all", *arguments]
    child = subprocess.run(line, env=environment(), capture_output=True, text=True, start_new_session=True)
    assert child.returncode == -signal.SIGKILL, child.stderr[-3000:]


def checkpoints(folder, file="") -> list[int]:
    """The steps of the checkpoints that have a file, in order; whole ones have `whole.json`."""
    folders = (folder / "checkpoints").glob("step*")
    return sorted(int(path.name.removeprefix("step")) for path in folders if (path / file).exists())


def assert_equal_runs(folder, twin):
    """Equal except for timings and the logged values of rounds."""
    (weights, log), (others, other_log) = result(folder), result(twin)
    differ = {"seconds", "tokens_per_second", "memory_gb", "utilisation", "fresh_share", "fresh_age"}
    assert [{k: v for k, v in row.items() if k not in differ} for row in log] == [
        {k: v for k, v in row.items() if k not in differ} for row in other_log
    ]
    assert all(torch.equal(weights[key], others[key]) for key in weights)


MOVING = D2O.model_copy(update={"ema": EMA})


_DUE = """
import os, sys, time
from pathlib import Path
import torch, torch.distributed as dist
from d2o.settings import TrainStage
from d2o.train.checkpoints import Checkpoints
from d2o.train.data import Inputs

dist.init_process_group("gloo")
stage, model = (TrainStage.model_validate_json(sys.argv[1]), Path(sys.argv[2]))
kept = Checkpoints(Path(sys.argv[3]), stage, Inputs(model, model / "config.json"))
rank, due = dist.get_rank(), []
for minutes in ((9, 11), (11, 9)):  # since the last checkpoint, by the clock of each rank
    kept._saved = time.monotonic() - 60 * minutes[rank]
    due.append(kept.due(torch.device("cpu")))
Path(sys.argv[4], f"rank{rank}").write_text(str(due))
dist.barrier()
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_a_checkpoint_is_due_when_the_minutes_have_passed_on_rank_0(tiny_model, tmp_path):
    (tiny_model / "manifest.json").write_text("{}")
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", tmp_path / "due.py"]
    (tmp_path / "due.py").write_text(_DUE)
    finished(
        [
            *map(str, run),
            stage(DPO, checkpoint_minutes=10).model_dump_json(),
            str(tiny_model),
            str(tmp_path / "kept"),
            str(tmp_path),
        ]
    )
    assert [(tmp_path / f"rank{rank}").read_text() for rank in (0, 1)] == ["[False, True]"] * 2


def test_weights_of_a_checkpoint_are_mapped_not_copied(tiny_model, tmp_path):
    """Each of a node's ranks reads all of them: eight copies of 7 billion are 108 GB."""

    def anonymous() -> float:
        """MB of memory of this process that no file backs."""
        return int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1000

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    (tiny_model / "manifest.json").write_text("{}")
    kept = checkpointing.Checkpoints(tmp_path / "kept", stage(DPO), Inputs(tiny_model, tiny_model / "config.json"))
    folder = kept.folder / "step1"
    folder.mkdir()
    torch.save({"module": torch.ones(50_000_000)}, folder / "weights.pt")
    torch.save({"moved": []}, folder / "rank0.pt")
    records.write_json(folder / checkpointing._WHOLE, checkpointing._digests(folder))

    loaded = []
    reader = TorchCheckpointEngine()  # as DeepSpeed reads the file of all weights

    def load(where: Path, tag: str) -> None:
        loaded.append(reader.load(str(where / tag / "weights.pt"), map_location=lambda storage, place: storage))

    engine, before = SimpleNamespace(load_checkpoint=load), anonymous()
    try:
        assert kept.load(SimpleNamespace(deepspeed=engine, device=torch.device("cpu")), 9) == (1, {"moved": []})
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        dist.destroy_process_group()
    assert loaded[0]["module"].sum() == 50_000_000
    assert anonymous() - before < 50  # of 200


@pytest.mark.parametrize("damage", [None, "digit", "empty", "short", "list", "gone"])
def test_log_probs_that_are_kept_for_a_resume_are_no_others_when_damaged(tmp_path, monkeypatch, capfd, damage):
    """Of the probe, and of KTO's mismatched pairs: a digit of these would be another gradient."""
    pairs, kept = [group(3, 2, 4), group(5, 1)], tmp_path / "mismatched.json"
    counted = []
    monkeypatch.setattr(references, "response_logprobs", lambda *_: counted.append(1) or [-1.5, -2.25, -3.125])
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        first = references.initial_logprobs(None, pairs, kept, 100)
        text = kept.read_text()
        match damage:
            case "digit":
                kept.write_text(text.replace("2.25", "2.75"))
            case "empty":
                kept.write_text("")
            case "short":  # of other groups
                records.write_json(kept, checksums.seal({"logprobs": first[:2]}))
            case "list":
                kept.write_text("[-1.5, -2.25, -3.125]\n")
            case "gone":
                kept.unlink()
        assert references.initial_logprobs(None, pairs, kept, 100) == first == [-1.5, -2.25, -3.125]
    finally:
        dist.destroy_process_group()
    assert len(counted) == (1 if damage is None else 2) and kept.read_text() == text
    assert ("damaged; its log-probs are computed again" in capfd.readouterr().err) == (damage not in (None, "gone"))


def test_a_checkpoint_is_on_disk_before_an_older_one_goes(tiny_model, tmp_path, monkeypatch):
    """Its files and their names: else a power cut could leave neither."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    (tiny_model / "manifest.json").write_text("{}")
    inputs = Inputs(tiny_model, tiny_model / "config.json")
    kept = checkpointing.Checkpoints(tmp_path / "kept", stage(DPO, keep_checkpoints=1), inputs)
    (kept.folder / "train.jsonl").write_text("")
    synced, removed = [], []
    remove, sync_names = records.remove_folder, records.sync_names
    monkeypatch.setattr(records, "sync_names", lambda folder: synced.append(folder.name) or sync_names(folder))
    monkeypatch.setattr(
        records, "remove_folder", lambda folder: removed.append((folder.name, *synced)) or remove(folder)
    )

    def save(folder: Path, tag: str, **_) -> None:
        (folder / tag).mkdir()
        (folder / tag / "weights.pt").write_bytes(b"1")

    try:
        for step in (1, 2):
            synced.clear()
            kept.save(SimpleNamespace(deepspeed=SimpleNamespace(save_checkpoint=save)), step, {})
    finally:
        dist.destroy_process_group()
    assert removed == [("step1", "step2", "kept")]


def test_odd_things_in_a_checkpoint_end_no_training(tmp_path):
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        whole = tmp_path / "whole.json"
        (tmp_path / "weights.pt").write_bytes(b"1")
        records.write_json(whole, checkpointing._digests(tmp_path))
        (tmp_path / "copy").mkdir()
        (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
        (tmp_path / "loop").symlink_to(tmp_path / "loop")
        assert checkpointing._problem(tmp_path) is None
        for odd in ("[]", "5", "[" * 100_000, "{", ""):
            whole.write_text(odd)
            assert checkpointing._problem(tmp_path)
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
def test_a_run_killed_at_ten_points_ends_bit_for_bit_the_same(tables, tiny_model, tmp_path):
    """Steps, data order, schedule, moving references, final weights; kills between steps and inside checkpoints."""
    settings = {"steps": 40, "checkpoint_minutes": OFTEN, "keep_checkpoints": 2}
    train(tables, tiny_model, tmp_path / "whole", MOVING, **settings)
    folder = tmp_path / "killed"
    line = command(tables, tiny_model, folder, MOVING, **settings)
    killed(line, WHOLE, 1, "before")  # before run.json exists
    for call in random.Random(0).sample(range(1, 8), 3):
        killed(line, LOG, call)  # the step is logged, but has no checkpoint
        killed(line, "torch:save", call, "before")  # only some files of a checkpoint exist
        killed(line, WHOLE, 4)  # before the oldest checkpoint is removed
    assert not (folder / "model" / "manifest.json").exists()
    said = finished(line)
    assert "train: going on after step" in said
    assert_equal_runs(folder, tmp_path / "whole")


@pytest.mark.slow
def test_a_killed_rank_takes_the_run_down_and_it_goes_on(tables, tiny_model, tmp_path):
    settings = {"steps": 12, "checkpoint_minutes": OFTEN, "ranks": 2, "zero_stage": 2}
    train(tables, tiny_model, tmp_path / "whole", MOVING, **settings)
    folder = tmp_path / "killed"
    line = command(tables, tiny_model, folder, MOVING, **settings)
    python, _, _, *arguments = line
    launcher = [python, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    dies = [*launcher, KILLED, "SIGKILL", LOG, "8", "before", "1", *arguments]
    assert subprocess.run(dies, env=environment(), stderr=subprocess.DEVNULL).returncode != 0

    fewer = command(tables, tiny_model, folder, MOVING, **settings | {"ranks": 1})
    assert "were written by 2 ranks and cannot go on with 1; set train.ranks: 2" in refused(fewer)

    said = finished(line)
    assert "train: going on after step 7" in said
    losses = [[row["loss"] for row in result(tmp_path / name)[1]] for name in ("whole", "killed")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.slow
def test_a_sigterm_to_one_rank_makes_all_keep_their_step_and_leave(tables, tiny_model, tmp_path):
    """Also in the last step: torchrun fails after a SIGTERM, whatever its ranks do."""
    settings = {"steps": 8, "ranks": 2, "zero_stage": 2}
    train(tables, tiny_model, tmp_path / "whole", MOVING, **settings)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    for step in (5, 8):
        folder = tmp_path / f"ended{step}"
        line = command(tables, tiny_model, folder, MOVING, **settings)
        python, _, _, *arguments = line
        ending = [python, *launcher, KILLED, "SIGTERM", LOG, str(step), "before", "1", *arguments]
        ended = subprocess.run(ending, env=environment(), capture_output=True, text=True)
        assert f"train: ended by SIGTERM after step {step}, which is kept" in ended.stderr
        assert "exitcode  : 143" in ended.stderr
        assert checkpoints(folder, "whole.json") == [step]
        assert f"train: going on after step {step}" in finished(line)
        assert_equal_runs(folder, tmp_path / "whole")


@pytest.mark.slow
def test_a_sigterm_before_the_steps_ends_a_training_at_once(tables, tiny_model, tmp_path):
    python, _, _, *arguments = command(tables, tiny_model, tmp_path, DPO, steps=2)
    line = [python, KILLED, "SIGTERM", "d2o.forward:load", "1", "before", "all", *arguments]
    ended = subprocess.run(line, env=environment(), capture_output=True, text=True, start_new_session=True)
    assert ended.returncode == -signal.SIGTERM


@pytest.mark.slow
def test_ranks_die_with_their_launcher(tmp_path):
    ranks = tmp_path / "ranks.py"
    ranks.write_text(_ORPHAN)
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", ranks, tmp_path]
    killed = subprocess.run(list(map(str, line)), env=environment(), capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL
    pids = [int((tmp_path / f"rank{rank}").read_text()) for rank in (0, 1)]
    deadline = time.monotonic() + 30
    while any(Path(f"/proc/{pid}").exists() for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert [pid for pid in pids if Path(f"/proc/{pid}").exists()] == []


_ORPHAN = """
import os, signal, sys, time
from pathlib import Path
import torch.distributed as dist
from d2o.train import engine

rank, _ = engine.start()
Path(sys.argv[1], f"rank{rank}").write_text(str(os.getpid()))
dist.barrier()
if rank == 0:
    os.kill(os.getppid(), signal.SIGKILL)
time.sleep(300)
"""


@dataclass
class Planted:
    """Makes a file when it is unpickled."""

    path: Path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.slow
@pytest.mark.parametrize("removed", [True, False])
def test_a_broken_checkpoint_is_removed_with_a_line(tables, tiny_model, tmp_path, removed):
    settings = {"steps": 12, "checkpoint_minutes": OFTEN, "keep_checkpoints": 3}
    train(tables, tiny_model, tmp_path / "whole", DPO, **settings)
    folder = tmp_path / "killed"
    line = command(tables, tiny_model, folder, DPO, **settings)
    # The sixth checkpoint is whole; the third, then one too many, is removed or not.
    killed(line, *((LOG, 7, "before") if removed else (WHOLE, 10, "after")))
    assert checkpoints(folder, "whole.json") == ([4, 5, 6] if removed else [3, 4, 5, 6])
    states = {step: next((folder / "checkpoints" / f"step{step}").glob("mp_rank*")) for step in (5, 6)}
    ran, planted = folder / "ran", pickle.dumps(Planted(folder / "ran"))
    pickle.loads(planted)  # as DeepSpeed would
    ran.unlink()
    states[6].write_bytes(planted)
    flipped = bytearray(states[5].read_bytes())
    flipped[len(flipped) // 2] ^= 1
    states[5].write_bytes(flipped)
    said = finished(line)
    for step in (5, 6):
        assert f"step{step} is broken ({states[step].name} is not as it was written); it is removed" in said
    assert "train: going on after step 4" in said and not ran.exists()
    assert_equal_runs(folder, tmp_path / "whole")


@pytest.mark.slow
def test_damage_and_company_are_told_in_a_line(tables, tiny_model, tmp_path):
    """A second training in the same folder, a damaged mark, a damaged log, a disk that is too small."""
    line = command(tables, tiny_model, tmp_path, DPO, steps=6, checkpoint_minutes=OFTEN)
    killed(line, LOG, 4)
    kept = tmp_path / "checkpoints"
    os.utime(kept / "train.jsonl", (0, 0))  # a log of the last minute may be another machine's
    watched = progress.read(kept, "killed")
    assert (watched.active, watched.steps, len(watched.records)) == (False, 6, 4)
    lock = (tmp_path / ".checkpoints.lock").open("a+")
    fcntl.flock(lock, fcntl.LOCK_EX)
    assert f"{kept}: another process is at work here (process " in refused(line)
    lock.close()

    log = kept / "train.jsonl"
    whole = log.read_text()
    log.write_text(whole.replace('"step"', "step", 1))
    assert f"{log}: line 1 is damaged; delete {kept} to start again from step 0" in refused(line)
    log.write_text(whole.replace('"loss": 0.', '"loss": 1.', 1))  # a line that can be read
    assert f"{log}: line 1 is damaged" in refused(line)
    log.write_text(whole.splitlines(keepends=True)[0])
    assert f"{log}: line 2 is damaged" in refused(line)
    log.write_bytes(b"\xff" + whole.encode())
    assert f"{log}: line 1 is damaged" in refused(line)
    log.write_text(whole)

    python, _, _, *arguments = line
    small = [python, "-c", _SMALL_DISK, *arguments]
    assert "0.0 GB are free, and the training writes up to 0.0: 2 checkpoints of" in refused(small)

    broken = [python, "-c", _FAILING_DISK, *arguments]
    assert f"{kept / 'step4'}: the checkpoint could not be written ([Errno 5] Input/output error)" in refused(broken)

    mark = kept / "run.json"
    whole = mark.read_text()
    for damaged in (whole.replace('"ranks": 1', '"ranks": 3'), "[]"):
        mark.write_text(damaged)
        assert f"{mark}: damaged; delete {kept} to start again from step 0" in refused(line)
    mark.unlink()
    assert f"{mark}: gone, and checkpoints are there; delete {kept} to start again from step 0" in refused(line)
    assert checkpoints(tmp_path, "whole.json"), "what hours have made is not lost for a bit"
    mark.write_text(whole)
    (kept / "step2.bak").mkdir()  # somebody's copy
    assert "train: going on after step 3" in finished(line)
    assert not kept.exists()
    assert not (tmp_path / ".checkpoints.lock").exists()


# A disk that fails to flush the files under `step4`.
_FAILING_DISK = """
import errno, os
from d2o import cli

sync = os.fsync

def failing(handle):
    if "/step4/" in os.readlink(f"/proc/self/fd/{handle}"):
        raise OSError(errno.EIO, os.strerror(errno.EIO))
    sync(handle)

os.fsync = failing
cli.main()
"""

_SMALL_DISK = """
import shutil
from types import SimpleNamespace
from d2o import cli

shutil.disk_usage = lambda _: SimpleNamespace(free=1_000_000)
cli.main()
"""


@pytest.mark.slow
def test_checkpoints_of_other_settings_are_not_resumed(tables, tiny_model, tmp_path):
    killed(command(tables, tiny_model, tmp_path, DPO, steps=4, checkpoint_minutes=OFTEN), LOG, 3)
    assert checkpoints(tmp_path, "whole.json")
    other = DPO.model_copy(update={"beta": 0.5})
    line = command(tables, tiny_model, tmp_path, other, steps=3, checkpoint_minutes=OFTEN)
    said = finished(line)
    assert "is of other settings or inputs; starting again from step 0" in said
    assert [row["step"] for row in result(tmp_path)[1]] == [1, 2, 3]


@pytest.mark.slow
def test_a_killed_run_goes_on_with_other_keys_of_execution(tables, tiny_model, tmp_path):
    train(tables, tiny_model, tmp_path / "whole", DPO, steps=10)
    folder = tmp_path / "killed"
    killed(command(tables, tiny_model, folder, DPO, steps=10, checkpoint_minutes=OFTEN), LOG, 6)
    alarms = Alarms(displacement=5.0, stop=[])
    said = finished(command(tables, tiny_model, folder, DPO, steps=10, keep_checkpoints=3, alarms=alarms))
    assert "train: going on after step 5" in said
    assert_equal_runs(folder, tmp_path / "whole")
