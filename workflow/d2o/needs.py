"""The jobs' requests to the machine or cluster: `threads` and resources of the rules that run a model."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from d2o import runs
from d2o.bill import hardware
from d2o.bill.jobs import Job
from d2o.bill.work import Bill, Work
from d2o.errors import D2OError
from d2o.plan import Plan
from d2o.settings import Need

# The resources of an exact scorer.
_SMALL = {"threads": 1, "mem_mb": 4000, "runtime": 60, "gpu": 0}
# Factors on the memory and the time that `d2o plan` estimates for a job; its first attempt asks for the product.
_ROOM, _SLACK = 2, 4
# Attempts that use the estimate.
_BELIEVED = 2
# The least request: GB, and minutes, of which a job loses the last five (`--signal=TERM@300` of the profile).
_LEAST_GB, _LEAST_MINUTES = 4, 15


class Needs:
    """The requests of a plan's jobs, as functions of their wildcards: resources of rules."""

    def __init__(self, plan: Plan):
        self._s = plan.settings
        self._estimate = Bill(plan, hardware.named(hardware.of(plan.settings.compute)))

    def of(self, kind: str, resource: str) -> Callable[[Any, int], int]:
        """A rule's `threads`, or one of its resources `mem_mb`, `runtime` and `gpu`.

        The first attempt asks for what `compute.jobs` states for its kind; where that states nothing and
        `compute.device` is set, for twice the memory and four times the time of the job's own estimate; else for all
        of `compute`. The second attempt asks for twice as much, the third for three times as much or, after an
        estimate, for all of `compute`; no attempt asks for more than that. An exact scorer takes little, whatever
        `compute` states.

        Args:
            kind: kind of job, one of `settings.JOBS`.
        """

        def needed(wildcards, attempt: int) -> int:
            if kind == "scores" and self._s.rewards[wildcards.reward].rule:
                return _SMALL[resource]
            compute, need = self._s.compute, self._s.compute.jobs.get(kind, Need())
            match resource:
                case "threads":
                    return need.threads or compute.threads
                case "mem_mb":
                    own = need.memory_gb or self._estimated(_memory, kind, wildcards, attempt) or compute.memory_gb
                    return 1000 * min(own * attempt, compute.memory_gb)
                case "runtime":
                    own = need.minutes or self._estimated(_minutes, kind, wildcards, attempt) or compute.minutes
                    return min(own * attempt, compute.minutes)
                case "gpu":
                    return compute.gpus
            raise KeyError(resource)

        return needed

    def training(self, resource: str) -> Callable:
        """A training's resources: one GPU per rank, none on a CPU; `leased` is the number of GPUs per node.

        Over several nodes: one task per node, and `gres`, the GPUs per node; without it Slurm may put 7 of 8 on one.
        Slurm's plugin starts a job with `mpi` outside of a step, on the first node; `d2o train` starts the others.
        """

        def needed(wildcards) -> int | str | None:  # None: the job has no such resource
            train = runs.train_of(self._s, self._s.methods[wildcards.method])
            gpus = train.ranks if self._s.compute.gpus else 0
            leased, several = gpus // train.nodes, train.nodes > 1
            return {
                "gpu": gpus,
                "leased": leased,
                "nodes": train.nodes,
                "tasks": train.nodes,
                "mpi": "srun" if several else None,
                "gres": f"gpu:{leased}" if several and gpus else None,
            }[resource]

        return needed

    def _estimated(self, of: Callable[[Work], int], kind: str, wildcards, attempt: int) -> int | None:
        """The value of the job's estimate; None where there is no estimate, or two attempts with it have failed."""
        if not self._s.compute.device or attempt > _BELIEVED:
            return None
        try:
            return of(self._estimate.of(Job.of(kind, wildcards)))
        except D2OError:  # perhaps a damaged table; the job that reads it reports it
            return None


def _memory(work: Work) -> int:
    """GB of memory."""
    return max(_LEAST_GB, math.ceil(_ROOM * work.host / 1e9))


def _minutes(work: Work) -> int:
    return max(_LEAST_MINUTES, math.ceil(_SLACK * work.seconds / 60))
