"""Wall time of one optimizer step of our engine against the number of ranks, which share the same groups.

Each number of ranks runs in its own processes under torchrun, one thread per rank. A step is what training does from
token ids on: the passes of all groups, the exchange between ranks and AdamW, in bf16 and with the default ZeRO stage;
it ends when the slowest rank is done. One step before them is a warm-up. The part that is not forward and backward
(clipping, AdamW, DeepSpeed's copies, statistics of the groups) takes the same time however short the groups are; its
share of a step is measured on rank 0.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict

from plan import Scaling
from timing import spread
from workload import Lengths, Shape


def scaling(shape: Shape, lengths: Lengths, plan: Scaling) -> list[dict]:
    """One row per number of ranks: tokens of the last step, wall seconds of a step, speed-up over the first number of
    ranks, and the share of a step that is not forward and backward."""
    runs = []
    for ranks in plan.ranks:
        print(f"step time: {ranks} ranks", file=sys.stderr)
        runs.append(_run(shape, lengths, plan, ranks))
    return [
        {
            "ranks": ranks,
            "tokens": steps[-1]["tokens"],
            "seconds": spread(step["seconds"] for step in steps),
            "speedup": spread(a["seconds"] / b["seconds"] for a, b in zip(runs[0], steps, strict=True)),
            "share_beside_passes": spread(1 - step["passes"] / step["seconds"] for step in steps),
        }
        for ranks, steps in zip(plan.ranks, runs, strict=True)
    ]


def _run(shape: Shape, lengths: Lengths, plan: Scaling, ranks: int) -> list[dict[str, float]]:
    job = json.dumps({"shape": asdict(shape), "lengths": asdict(lengths), "plan": asdict(plan)})
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launcher, __file__, job], env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"step time with {ranks} ranks:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def _measure(shape: Shape, lengths: Lengths, plan: Scaling) -> list[dict[str, float]]:
    """For each step: its tokens, its seconds (the same on every rank), and the seconds of this rank's passes."""
    import torch
    import torch.distributed as dist

    from d2o import losses
    from d2o.forward import Policy
    from d2o.forward.memory import keep_freed_memory
    from d2o.settings import Method, Train, TrainStage
    from d2o.train import schedule
    from d2o.train.engine import TrainingEngine, start
    from d2o.train.watch import Means

    keep_freed_memory()
    rank, ranks = start()
    train = Train(groups_per_step=plan.groups)
    stage = TrainStage(method=Method(loss="d2o", positives="self", negatives=True), train=train)
    engine = TrainingEngine(Policy(shape.model("bf16")), stage, total=plan.steps + 1)
    loss_of = losses.of(stage.method)
    timings = []
    for step in range(plan.steps + 1):
        batch = [lengths.sample(plan.k, shape.vocabulary, "ranks", step, i) for i in range(plan.groups)]
        dist.barrier()
        begin, passes = time.perf_counter(), 0.0
        means = Means(engine.device)
        for groups in schedule.passes(batch, ranks, train.tokens_per_pass)[rank]:
            start_pass = time.perf_counter()
            sides = engine.sides(groups or batch[:1])
            each = [loss_of(*pair) for pair in sides]
            engine.backward(torch.stack(each).sum() * (ranks / len(batch) if groups else 0.0))
            passes += time.perf_counter() - start_pass
            if groups:
                means.add(each, sides)
        engine.step()
        means.over_ranks()
        dist.barrier()
        tokens = sum(group.tokens for group in batch)
        timings.append({"tokens": tokens, "seconds": time.perf_counter() - begin, "passes": passes})
    dist.destroy_process_group()
    return timings[1:]


if __name__ == "__main__":
    job = json.loads(sys.argv[1])
    steps = _measure(Shape(**job["shape"]), Lengths(**job["lengths"]), Scaling(**job["plan"]))
    if os.environ["RANK"] == "0":
        print(json.dumps(steps))
