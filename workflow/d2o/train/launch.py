"""Starts the ranks of a training: by torchrun on one machine, by srun and torchrun on the nodes of a Slurm job."""

from __future__ import annotations

import ctypes
import os
import re
import signal
import sys
from collections.abc import Mapping

from d2o import killed
from d2o.errors import D2OError

# PR_SET_PDEATHSIG of Linux's prctl: the signal that a process gets when its parent ends.
_DEATH_SIGNAL = 1
# Seconds until torchrun kills ranks after a SIGTERM, by default 30: ranks save a checkpoint first. The Slurm profile
# sends the signal 300 seconds before a job's time is up.
_GRACE = ("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "280")
# Variable with the id of the process that becomes torchrun: a rank with another parent infers that it has ended.
_LAUNCHER = "D2O_LAUNCHER"


def launch(ranks: int, nodes: int) -> None:
    """Become rank 0 of 1, or the launcher that starts all ranks with the same command line; errors as `launcher`."""
    if ranks > 1:
        line = [*launcher(ranks, nodes, os.environ), "-m", "d2o", *sys.argv[1:]]
        os.environ.setdefault(*_GRACE)
        os.environ[_LAUNCHER] = str(os.getpid())  # exec keeps it
        killed.ends()
        os.execvp(line[0], line)
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    # Port 0: torch takes a free one; a port chosen here could be another job's by then.
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}


def follow() -> None:
    """Make a rank of torchrun end when torchrun ends: a rank that goes on alone would hold a GPU that looks free."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        launcher = int(os.environ.get(_LAUNCHER, os.getppid()))
        ctypes.CDLL(None).prctl(_DEATH_SIGNAL, signal.SIGKILL)
        if os.getppid() != launcher:  # it has ended already
            os._exit(1)


def launcher(ranks: int, nodes: int, variables: Mapping[str, str]) -> list[str]:
    """The command line that starts the ranks, up to the module that they run.

    On one node this is torchrun. On several nodes it is first srun, which starts the same command once per node;
    there it is torchrun, with the node's share of the ranks. The rendezvous is static: Slurm has numbered the nodes,
    so a rank is on the same node each time, and one port of the first node is all that the others must reach.

    Args:
        ranks: of all nodes together.
        variables: the environment, with Slurm's variables.
    Raises:
        D2OError: where several nodes are requested outside of a Slurm job with that many nodes.
    """
    torchrun = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks // nodes}"]
    if nodes == 1:
        return [*torchrun, "--standalone"]
    if variables.get("SLURM_STEP_NUM_NODES") == str(nodes):
        return [
            *torchrun,
            f"--nnodes={nodes}",
            f"--node-rank={variables['SLURM_NODEID']}",
            f"--master-addr={_first(variables['SLURM_STEP_NODELIST'])}",
            f"--master-port={_port(int(variables['SLURM_JOB_ID']), int(variables['SLURM_STEP_ID']))}",
        ]
    # Snakemake's plugin keeps few of Slurm's variables but the job's number: then srun reports missing nodes.
    allocated = int(variables.get("SLURM_JOB_NUM_NODES", nodes)) if "SLURM_JOB_ID" in variables else 0
    if allocated < nodes:
        job = f"a Slurm job of {allocated}" if allocated else "no Slurm job"
        raise D2OError(
            f"train.nodes: {nodes} nodes are asked for, and this is {job}; "
            f"run with --profile profiles/slurm, start torchrun on each node yourself, or set train.nodes: 1"
        )
    # A step beside the one that this command may run in, with all cores and GPUs that the job has on each node.
    step = ["--ntasks-per-node=1", "--overlap", "--cpu-bind=none", "--kill-on-bad-exit=1"]
    return ["srun", f"--nodes={nodes}", f"--ntasks={nodes}", *step, sys.executable]


def _first(nodes: str) -> str:
    """The first of the nodes that Slurm writes as `gpu[03-04,7],big1`."""
    return re.sub(r"\[(\w+)[^]]*\]", r"\1", nodes).partition(",")[0]


def _port(job: int, step: int) -> int:
    """The port where the ranks of a step meet: below those that Linux assigns itself, another one for each step."""
    return 10_000 + (101 * job + step) % 20_000
