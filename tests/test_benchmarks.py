"""The benchmark of the training step runs to its end, and its peers do the work that is claimed for them."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from conftest import ROOT
from d2o.forward import Row

sys.path.append(str(ROOT / "benchmarks"))

import peers
import score
import table
import timing
from workload import LENGTHS, Shape, packed_work, shared_work

SHAPE = Shape(layers=2, vocabulary=2048)
WAYS = [pytest.param(way, marks=[pytest.mark.slow] if way.startswith("trl") else []) for way in peers.PEERS]


def group(k: int):
    return LENGTHS["brief"].over(4).sample(k, SHAPE.vocabulary)


def in_place_flops(total, a, b, **unused) -> int:
    """FLOPs of `total += a @ b`, from shapes: the one product that the counter does not know."""
    return 2 * a[0] * a[1] * b[1]


@pytest.mark.parametrize("way", WAYS)
def test_a_way_multiplies_as_much_as_it_is_said_to(way):
    peer = peers.PEERS[way](SHAPE.model("fp32"))
    groups = peer.groups([group(3)])
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: in_place_flops}) as counter:
        peer.step(groups)
    expected = replace(peer.work(groups), attended=0).flops(SHAPE)  # the counter does not know flash on a CPU
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.005)


def test_pairs_attended_to_are_those_of_the_mask():
    groups = [group(3), group(1)]
    assert shared_work(groups).attended == pytest.approx(int(Row.of(groups).mask().sum()), rel=0.03)
    alone = [replace(g, positives=[r], negatives=[]) for g in groups for r in g.responses]
    assert packed_work(groups).attended == pytest.approx(sum(int(Row.of([g]).mask().sum()) for g in alone), rel=0.03)


@pytest.mark.parametrize("wrong", [-10.01, float("nan")])
def test_a_peer_with_other_logprobs_ends_the_run(wrong):
    logprobs = {"ours": {"a": [-10.0], "b": [-20.0]}, "peer": {"a": [-10.000001], "b": [-20.0, -20.0]}}
    assert timing.difference(logprobs, "fp32") == pytest.approx(1e-7)
    logprobs["peer"]["b"][1] = 2 * wrong
    with pytest.raises(RuntimeError, match="peer, fp32: a log-prob of"):
        timing.difference(logprobs, "fp32")


def run(script: str, folder, *options) -> str:
    """Run a benchmark to its end; return its output."""
    command = [sys.executable, ROOT / "benchmarks" / script, folder, *options]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_quick_run_writes_every_figure(tmp_path):
    printed = run("train_step.py", tmp_path, "--quick")
    result = json.loads((tmp_path / "train_step.json").read_text())
    assert printed.strip().endswith((tmp_path / "train_step.md").read_text().strip())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["train_step.json", "train_step.md"]
    for name in (*table.SPEED, *table.MEMORY):
        assert result[name] > 0
        assert f"| {name} |" in printed
    assert result["flop_utilisation"].keys() == table.UTILISATION.keys()
    assert {row["peer"] for row in result["grid"]} | {"ours"} == peers.PEERS.keys()
    assert all(row["largest_logprob_difference"] <= timing.TOLERANCE[row["precision"]] for row in result["grid"])
    assert [row["ranks"] for row in result["ranks"]] == [1, 2]
    assert all(row["seconds"]["median"] > 0 for row in result["ranks"])
    assert "| ranks | seconds | speed-up |" in printed
    assert all(0 < row["share_beside_passes"]["median"] < 1 for row in (*result["ranks"], result["short_step"]))
    assert result["short_step"]["tokens"] < result["ranks"][0]["tokens"]
    assert "| tokens | seconds | share |" in printed
    assert all(result["exactness"][name] <= limit for name, limit in table.LIMITS.items())


@pytest.mark.slow
def test_quick_run_of_generation(tmp_path):
    run("generate.py", tmp_path, "--quick")
    result = json.loads((tmp_path / "generate.json").read_text())
    assert result["speedup_vs_transformers"] > 0
    (cell,) = result["by_k"].values()
    assert cell["requests"] == 8
    assert all(rate["low"] > 0 for rate in cell["tokens_per_second"].values())


@pytest.mark.slow
def test_quick_run_of_starting(tmp_path, tiny_model):
    run("startup.py", tmp_path, "--quick", "--model", tiny_model)
    result = json.loads((tmp_path / "startup.json").read_text())
    assert result["stages"].keys() == {"logprobs", "train", "scores", "responses", "tasks"}
    assert all(stage["over_torch"]["low"] > 1 for stage in result["stages"].values())


@pytest.mark.slow
def test_answers_are_scored_in_three_ways_alike(tmp_path):
    sizes = ["--layers", "1", "--prompts", "2", "--answers", "3", "--rounds", "2"]
    printed = run("score.py", tmp_path, *sizes, "--precision", "fp32")
    result = json.loads((tmp_path / "score.json").read_text())
    assert json.loads(printed) == result and result["lengths"].keys() == LENGTHS.keys()
    for ways in result["lengths"].values():
        assert ways["answers"] == 6 and 0 < ways["largest_difference"] <= score.ROUNDING["fp32"]
        for name in ("our_seconds", "padded_over_ours", "sorted_over_ours"):
            assert 0 < ways[name]["low"] <= ways[name]["median"] <= ways[name]["high"]


def test_a_way_with_other_scores_ends_the_run(monkeypatch):
    """As a way has that shares the states of the wrong prompt."""
    model = score.classifier(replace(SHAPE, layers=1), "fp32")
    monkeypatch.setattr(score, "SMOLLM2", SHAPE)
    plain = score.reward_inputs.score_all

    def wrong(*arguments):
        return [one + 0.01 * (arguments[-1] == "ours") for one in plain(*arguments)]

    monkeypatch.setattr(score.reward_inputs, "score_all", wrong)
    with pytest.raises(RuntimeError, match="brief: two ways differ by"):
        score.measure(model, "brief", 2, 2, 1, score.ROUNDING["fp32"])


@pytest.mark.slow
def test_groups_are_made_and_read_by_all_ranks(tiny_model, tmp_path):
    (tiny_model / "manifest.json").write_text("{}")
    script = ROOT / "benchmarks" / "groups.py"
    options = ["--model", tiny_model, "--groups", "9", "--tokens", "12", "--negatives", "3"]
    subprocess.run([sys.executable, script, tmp_path, *options], check=True, stdout=subprocess.DEVNULL)
    (run,) = json.loads((tmp_path / "groups.json").read_text())["runs"]
    assert (run["counts"]["groups"], run["counts"]["responses"]) == (9, 9 * 12)
    assert run["reading"]["ranks"] == 8
