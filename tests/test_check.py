"""`d2o check`: it passes here, and a fault of a machine fails it."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from d2o import check, devices
from d2o.check import Finding
from d2o.forward import attention


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return check._tiny(tmp_path_factory.mktemp("check") / "model")


@pytest.mark.slow
def test_the_whole_check_passes_here():
    done = subprocess.run([sys.executable, "-m", "d2o", "check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line.split()[:2] for line in done.stdout.splitlines() if line.startswith(("ok", "FAILED", "skipped"))]
    assert {name for _, name in lines} == {"machine", "kernel", "forward", "step", "vllm"}
    assert {status for status, _ in lines} == {"ok"}
    steps = [
        line.split(", DeepSpeed")[0].split(maxsplit=2)[2]
        for line in done.stdout.splitlines()
        if "DeepSpeed ag" in line
    ]
    assert steps == ["1 CPU rank, fp32", "1 CPU rank, bf16", "2 CPU ranks, bf16"]


@pytest.mark.slow
def test_an_attention_that_sees_other_keys_fails_the_kernel_and_the_forward(model, monkeypatch):
    """Responses do not see the last key of their prompt: one of seven hundred in the longest."""
    branches = attention._branches

    def shorter(spans):
        for responses, prompt in branches(spans):
            yield responses, slice(prompt.start, max(prompt.stop - 1, prompt.start + 1))

    monkeypatch.setattr(attention, "_branches", shorter)
    monkeypatch.setattr(check, "_SHAPES", {name: check._SHAPES[name][:1] for name in ("short", "long prompt")})
    assert [right for right, _ in check._kernel()] == [False] * 4
    assert not all(right for right, _ in check._forward(model))


def test_a_gradient_that_lacks_a_part_fails_the_kernel(monkeypatch):
    """The gradient of the prompts' keys from their responses is missing."""
    backward = attention._Cascade.backward

    def poorer(ctx, grad):
        dq, dk, *others = backward(ctx, grad)
        dk[:, :, ctx.spans[0].prompt[0]] = 0
        return dq, dk, *others

    monkeypatch.setattr(attention._Cascade, "backward", staticmethod(poorer))
    monkeypatch.setattr(check, "_SHAPES", {"short": check._SHAPES["short"]})
    assert [right for right, _ in check._kernel()] == [False] * 2


@pytest.mark.parametrize("fault", ["rate", "norm"])
@pytest.mark.slow
def test_a_step_that_differs_fails(model, tmp_path, monkeypatch, fault):
    truth = check._Change(1.0, torch.ones(4))
    other = truth._replace(norm=1.1) if fault == "norm" else truth._replace(weights=truth.weights * 1.5)

    def step(inputs, stage, output):
        check.prepare(stage, inputs, output.with_suffix(".arrow"))  # refuses references of another precision
        return other

    monkeypatch.setattr(check, "_plain_step", lambda *_: truth)
    monkeypatch.setattr(check, "_stage_step", step)
    assert [right for right, _ in check._step(model, tmp_path)] == [False] * 3


def test_tokens_that_are_not_the_likeliest_fail(model, monkeypatch):
    monkeypatch.setattr(check, "_greedy", lambda folder, prompts: [[5, 6, 7] for _ in prompts])
    monkeypatch.setattr(check.importlib.util, "find_spec", lambda name: True)
    ((right, text),) = check._vllm(model)
    assert not right
    assert "of 12 greedy tokens" in text


def test_devices_that_torch_does_not_see_fail(monkeypatch):
    monkeypatch.setattr(devices, "visible", lambda: ["0", "1"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert check._passes("machine", check._machine) is False


def test_a_line_says_how_a_check_ended(capsys):
    def checks():
        yield Finding(True, "a")
        yield Finding(False, "b")
        raise check.Skip("c")

    def broken():
        yield Finding(True, "d")
        raise ValueError("e")

    assert not check._passes("one", checks)
    assert not check._passes("two", broken)
    assert check._passes("three", lambda: iter([Finding(True, "f")]))
    lines = [line.rpartition(" (")[0] for line in capsys.readouterr().out.splitlines()]
    assert lines == [
        "ok       one      a",
        "FAILED   one      b",
        "skipped  one      c",
        "ok       two      d",
        "FAILED   two      ValueError: e",
        "ok       three    f",
    ]
