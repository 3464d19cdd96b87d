"""The command lines that start the ranks of a training, on one node and on several."""

import os
import re
import subprocess
import sys

import pytest

from d2o import preflight
from d2o.errors import D2OError
from d2o.train import launch
from d2o.train.launch import _first, launcher

PLAIN = {"PATH": "/bin"}
# What Snakemake's plugin leaves of a job's variables, what Slurm sets for a batch script, what srun sets for a task.
LEFT = {"SLURM_JOB_ID": "7040"}
BATCH = LEFT | {"SLURM_JOB_NUM_NODES": "4", "SLURM_NNODES": "4", "SLURM_JOB_NODELIST": "gpu[03-06]"}
STEP = {"SLURM_STEP_NUM_NODES": "4", "SLURM_STEP_NODELIST": "gpu[03-06]", "SLURM_STEP_ID": "1", "SLURM_NODEID": "2"}
# The step in which a job's command runs, alone on the first node.
ALONE = {"SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_NODELIST": "gpu03", "SLURM_STEP_ID": "0", "SLURM_NODEID": "0"}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
SRUN = [
    "srun", "--nodes=4", "--ntasks=4", "--ntasks-per-node=1", "--overlap", "--cpu-bind=none", "--kill-on-bad-exit=1",
    sys.executable,
]  # fmt: skip


@pytest.mark.parametrize(
    ("ranks", "nodes", "variables", "line"),
    [
        (1, 1, PLAIN, [*TORCHRUN, "--nproc-per-node=1", "--standalone"]),
        (8, 1, PLAIN, [*TORCHRUN, "--nproc-per-node=8", "--standalone"]),
        (8, 1, BATCH | ALONE, [*TORCHRUN, "--nproc-per-node=8", "--standalone"]),
        (32, 4, LEFT, SRUN),
        (32, 4, BATCH, SRUN),
        (32, 4, BATCH | ALONE, SRUN),
        (
            32,
            4,
            LEFT | STEP,
            [
                *TORCHRUN, "--nproc-per-node=8", "--nnodes=4", "--node-rank=2", "--master-addr=gpu03",
                "--master-port=21041",
            ],
        ),
    ],
)  # fmt: skip
def test_ranks_are_started_on_every_node(ranks, nodes, variables, line):
    assert launcher(ranks, nodes, variables) == line


@pytest.mark.parametrize(
    ("variables", "there"),
    [(PLAIN, "no Slurm job"), (PLAIN | STEP | ALONE, "no Slurm job"), (BATCH, "a Slurm job of 4")],
)
def test_nodes_that_are_not_there_are_refused(variables, there):
    with pytest.raises(
        D2OError, match=rf"train\.nodes: 8 nodes are asked for, and this is {there}; .* train\.nodes: 1$"
    ):
        launcher(64, 8, variables)


def test_ranks_have_minutes_for_a_checkpoint_after_a_sigterm(monkeypatch):
    """torchrun kills them after 30 seconds by default."""
    lines = []
    monkeypatch.setattr("os.execvp", lambda program, line: lines.append(line))
    monkeypatch.setattr("os.environ", dict(PLAIN))
    launch.launch(8, 1)
    (line,) = lines
    assert line[: len(TORCHRUN)] == TORCHRUN
    assert 30 < int(launch.os.environ["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]) < 300


def test_nodes_are_missed_before_the_first_job(monkeypatch):
    monkeypatch.setattr(preflight.devices, "visible", lambda: ["0"] * 8)
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    asked = {"nodes": 2, "gpu": 16, "leased": 8}
    assert [line[:28] for line in preflight._machine(asked)] == ["a training asks for 2 nodes:"]
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    assert [*preflight._machine(asked)] == []


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("gpu03", "gpu03"), ("gpu[03-06]", "gpu03"), ("gpu[07,11-12],big1", "gpu07"), ("a-1.b,a-2.b", "a-1.b"),
     ("r[1-2]n[05-08]x", "r1n05x")],
)  # fmt: skip
def test_the_first_of_slurms_nodes(nodes, first):
    assert _first(nodes) == first


def test_two_trainings_in_one_job_meet_at_ports_of_their_own():
    def port(**variables: str) -> str:
        return re.search(r"--master-port=(\d+)", " ".join(launcher(4, 4, LEFT | STEP | variables)))[1]

    ports = {port(SLURM_JOB_ID=job, SLURM_STEP_ID=step) for job in ("1", "2", "999999") for step in ("0", "1")}
    assert len(ports) == 6 and all(1024 < int(number) < 32768 for number in ports)


_JOINS = """
import os, socket, sys
from d2o.train.launch import launch

launch(1, 1)
taken = socket.socket()  # what another job has opened before this one has imported torch
taken.bind(("127.0.0.1", int(os.environ["MASTER_PORT"])))
taken.listen()
import torch.distributed as dist

dist.init_process_group("gloo")
print(dist.get_rank(), dist.get_world_size())
"""


def test_a_rank_alone_takes_no_port_that_another_job_has_taken():
    done = subprocess.run([sys.executable, "-c", _JOINS], capture_output=True, text=True)
    assert done.stdout.split() == ["0", "1"], done.stderr


@pytest.mark.parametrize(("launcher_of", "status"), [("this", 0), ("another", 1), (None, 0)])
def test_a_rank_whose_launcher_ended_while_it_started_ends_too(launcher_of, status):
    """Its parent is then the process that adopts orphans, which never ends."""
    variables = os.environ | {"TORCHELASTIC_RUN_ID": "x", "PYTHONPATH": os.pathsep.join(sys.path)}
    if launcher_of:
        variables["D2O_LAUNCHER"] = str(os.getpid() + (launcher_of == "another"))
    done = subprocess.run([sys.executable, "-c", "from d2o.train.launch import follow; follow()"], env=variables)
    assert done.returncode == status
