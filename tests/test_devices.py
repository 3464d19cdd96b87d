"""Leases of GPUs: real processes compete for devices of which only the names exist."""

import os
import re
import signal
import subprocess
import sys

import pytest

from conftest import ROOT
from d2o import devices, dtypes, records, schemas
from d2o.errors import D2OError

_JOB = """
import os, sys, time
from d2o import devices, records
devices.lease(int(sys.argv[1]))
print(os.environ["CUDA_VISIBLE_DEVICES"], flush=True)
os.execv(sys.executable, [sys.executable, "-c", "import time; time.sleep(600)"])
"""


@pytest.fixture
def job(tmp_path):
    """Starts a job that leases a number of some devices, then becomes another program, as it does with torchrun."""
    jobs = []

    def start(gpus: int, there: str) -> subprocess.Popen:
        variables = os.environ | {"CUDA_VISIBLE_DEVICES": there, "TMPDIR": str(tmp_path)}
        command = [sys.executable, "-c", _JOB, str(gpus)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        jobs.append(subprocess.Popen(command, env=variables, text=True, **pipes))
        return jobs[-1]

    yield start
    for process in jobs:
        process.kill()
        process.communicate()


def test_two_jobs_have_a_device_each_and_a_killed_ones_is_free(job):
    first, second = job(1, "3,5"), job(1, "3,5")
    leased = {process: process.stdout.readline().strip() for process in (first, second)}
    assert sorted(leased.values()) == ["3", "5"]
    third = job(1, "3,5")
    assert third.stderr.readline().startswith("devices: waiting for 1 of 2 GPUs, which other jobs have leased")
    first.send_signal(signal.SIGKILL)
    assert third.stdout.readline().strip() == leased[first]


def test_a_job_that_waits_for_two_devices_holds_none_meanwhile(job):
    first, second = job(1, "3,5,7"), job(1, "3,5,7")
    leased = {first.stdout.readline(), second.stdout.readline()}
    both = job(2, "3,5,7")
    assert "waiting for 2 of 3 GPUs" in both.stderr.readline()
    assert leased | {job(1, "3,5,7").stdout.readline()} == {"3\n", "5\n", "7\n"}
    for process in (first, second):
        process.kill()
    assert set(both.stdout.readline().strip().split(",")) == {device.strip() for device in leased}


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """Makes this process see `present` devices and, unless None, CUDA_VISIBLE_DEVICES=`assigned`; no lease stays."""

    def make(present: int, assigned: str | None) -> None:
        folder = tmp_path / "dev"
        folder.mkdir()
        for name in ["nvidiactl", "nvidia-uvm", *(f"nvidia{n}" for n in range(present))]:
            (folder / name).touch()
        gpus = devices._present(folder)
        monkeypatch.setattr(devices, "_present", lambda: gpus)
        monkeypatch.setattr(devices.tempfile, "gettempdir", lambda: str(tmp_path))
        for name in ("CUDA_VISIBLE_DEVICES", "D2O_ASKED_GPUS"):
            monkeypatch.setenv(name, "")  # so that values set by a lease are undone
            monkeypatch.delenv(name)
        if assigned is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", assigned)

    yield make


def test_a_folder_of_leases_that_somebody_else_made_is_refused(machine, tmp_path):
    machine(1, None)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / f"d2o-gpus-{os.getuid()}").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(D2OError, match="made by somebody else; remove it, or set TMPDIR"):
        devices.lease(1)


def test_a_folder_of_leases_that_is_open_to_all_is_closed(machine, tmp_path):
    machine(1, None)
    folder = tmp_path / f"d2o-gpus-{os.getuid()}"
    folder.mkdir()
    folder.chmod(0o777)
    devices.lease(1)
    assert folder.stat().st_mode & 0o777 == 0o700


@pytest.mark.skipif(os.getuid() != 0, reason="only root gives folders away")
@pytest.mark.parametrize("place", ["another user's folder", "a link", "a link to nothing", "a file"])
def test_a_folder_of_leases_that_is_not_this_users_is_refused(place, machine, tmp_path):
    machine(1, None)
    folder = tmp_path / f"d2o-gpus-{os.getuid()}"
    match place:
        case "a file":
            folder.touch()
        case "another user's folder":
            folder.mkdir()
            os.chown(folder, 65534, 65534)
        case _:
            folder.symlink_to(tmp_path if place == "a link" else tmp_path / "nothing")
    with pytest.raises(D2OError, match="made by somebody else; remove it, or set TMPDIR"):
        devices.lease(1)


@pytest.mark.parametrize(
    ("present", "assigned", "gpus", "leased", "locks"),
    [
        (2, None, 1, "0", 1),
        (2, None, 2, "0,1", 2),
        (0, None, 1, None, 0),  # a machine without a GPU
        (2, None, 0, "", 0),  # a job without one
        (2, "1", 1, "1", 1),  # assigned; another job may have the same one
        (2, "", 1, "", 0),  # hidden
        (4, "2,3", 1, "2", 1),  # an allocation for several jobs
        (1, "MIG-a,MIG-b", 2, "MIG-a,MIG-b", 2),
    ],
)
def test_what_is_leased(machine, tmp_path, present, assigned, gpus, leased, locks):
    machine(present, assigned)
    devices.lease(gpus)
    assert os.environ.get("CUDA_VISIBLE_DEVICES") == leased
    assert len(list(tmp_path.rglob("*.lock"))) == locks


def test_a_rank_has_the_devices_of_the_training_that_started_it(machine):
    machine(2, None)
    devices.lease(2)
    devices.lease(2)  # a second lease would wait for the first
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "0,1"


def test_a_launcher_on_another_node_leases_there(machine, monkeypatch, tmp_path):
    """srun passes it the environment of the first node, whose leases do not cover this node."""
    machine(2, None)
    monkeypatch.setenv("D2O_ASKED_GPUS", "2@another")
    devices.lease(2)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "0,1"
    assert len(list(tmp_path.rglob("*.lock"))) == 2


@pytest.mark.parametrize(("asked", "share", "seen", "device"), [
    (None, False, 0, "cpu"), (None, False, 2, "cuda"), (0, False, 0, "cpu"), (1, False, 0, None), (8, False, 7, None),
    (8, False, 8, "cuda"), (1, True, 0, None), (1, True, 8, "cuda"),
])  # fmt: skip
def test_a_job_that_asks_for_gpus_does_not_run_without_them(machine, monkeypatch, asked, share, seen, device):
    import torch

    machine(8, None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: seen > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: seen)
    if asked is not None:
        devices.lease(asked, share)
    if device:
        assert devices.device() == device
    else:
        with pytest.raises(D2OError, match=rf"asks for {asked} GPUs, and torch .* sees {seen}; .* compute\.gpus: 0$"):
            devices.device()


@pytest.mark.parametrize(("built", "said", "told"), [
    ("13.0", "12.4", "it is built for CUDA 13.0, and the driver has 12.4 (nvidia-smi): install a newer driver"),
    ("12.10", "12.4", "it is built for CUDA 12.10, and the driver has 12.4 (nvidia-smi): install a newer driver"),
    ("12.4", "12.10", "look at nvidia-smi"),
    (None, "12.4", "look at nvidia-smi"),
    ("13.0", "ERR!", "look at nvidia-smi"),
])  # fmt: skip
def test_a_driver_that_is_too_old_is_told(machine, monkeypatch, tmp_path, built, said, told):
    smi = tmp_path / "nvidia-smi"
    smi.write_text(f"#!/bin/sh\necho '| NVIDIA-SMI 550.54  Driver Version: 550.54    CUDA Version: {said}     |'\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr("torch.version.cuda", built)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    machine(1, None)
    devices.lease(1)
    with pytest.raises(D2OError, match=re.escape(f"sees 0; {told}")):
        devices.device()


@pytest.mark.parametrize(("capability", "precision"), [((7, 5), "fp32"), ((8, 0), "bf16"), ((9, 0), "bf16")])
def test_a_gpu_without_bf16_computes_in_fp32_where_it_may_choose(monkeypatch, capability, precision):
    monkeypatch.setattr(devices, "device", lambda: "cuda")
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: capability)
    assert dtypes.precision("auto") == precision


@pytest.mark.parametrize(
    ("capability", "precision", "dtype"), [("AVX2", "fp32", "float32"), ("AVX512", "bf16", "auto")]
)
def test_a_processor_without_avx_512_computes_in_fp32_where_it_may_choose(monkeypatch, capability, precision, dtype):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: capability)
    monkeypatch.delenv("D2O_ASKED_GPUS", raising=False)
    assert dtypes.precision("auto") == precision and dtypes.checkpoint_dtype() == dtype
    assert dtypes.precision("bf16") == "bf16"


@pytest.mark.parametrize("stage", ["logprobs", "reward_inputs", "rewards", "tasks", "train/engine", "generation"])
def test_every_stage_that_runs_a_model_asks_where(stage):
    path = ROOT / "workflow" / "d2o" / stage
    files = sorted(path.glob("with_*.py")) or [path.with_suffix(".py")]
    assert all("devices.device()" in file.read_text() for file in files)


def test_a_model_is_not_answered_with_on_the_cpu_in_place_of_a_gpu(tiny_model, tmp_path):
    prompts = tmp_path / "prompts.parquet"
    records.write_table(prompts, schemas.PROMPTS, [])
    line = [sys.executable, "-m", "d2o", "--gpus", "1", "responses", "--model", tiny_model, "--prompts", prompts]
    line += ["--output", tmp_path / "out.parquet", "--settings", '{"engine": {"backend": "transformers"}}']
    done = subprocess.run(line, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: devices: the job asks for 1 GPUs, and torch ")


@pytest.mark.parametrize("assigned", [None, "0"])
def test_more_than_there_are_is_refused(machine, assigned):
    machine(1, assigned)
    with pytest.raises(D2OError, match=r"the job asks for 2 GPUs, and there are 1; lower compute\.gpus"):
        devices.lease(2)


def test_a_job_without_gpus_sees_none_even_where_they_are_shared(tmp_path):
    (tmp_path / "manifest.json").write_text("{}")
    variables = os.environ | {"CUDA_VISIBLE_DEVICES": "0", "D2O_SHARE_GPUS": "1"}
    command = [sys.executable, "-m", "d2o", "--gpus", "0", "show", str(tmp_path)]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=True)
    assert "compute.gpus is 0, so the 1 GPUs here are not used" in done.stderr


@pytest.mark.parametrize(("share", "status"), [("0", 1), ("1", 0)])
def test_the_command_leases_unless_the_config_says_share(tmp_path, share, status):
    (tmp_path / "manifest.json").write_text("{}")
    variables = os.environ | {"CUDA_VISIBLE_DEVICES": "0", "D2O_SHARE_GPUS": share}
    command = [sys.executable, "-m", "d2o", "--gpus", "2", "show", str(tmp_path)]
    done = subprocess.run(command, env=variables, capture_output=True, text=True)
    assert done.returncode == status
    assert ("the job asks for 2 GPUs" in done.stderr) == bool(status)


def test_every_rule_that_is_given_gpus_leases_them():
    texts = "".join(path.read_text() for path in sorted((ROOT / "workflow" / "rules").glob("*.smk")))
    rules = re.split(r"(?m)^rule ", texts)
    asking = [rule for rule in rules if re.search(r"gpu=needs", rule)]
    assert len(asking) == 8
    leased = {rule.partition(":")[0]: re.search(r"python -m d2o --gpus {resources\.(\w+)} ", rule) for rule in asking}
    # The GPUs of a training may lie on several nodes.
    assert all(match[1] == ("leased" if rule == "train_method" else "gpu") for rule, match in leased.items())
