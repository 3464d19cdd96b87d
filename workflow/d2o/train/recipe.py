"""One training from top to bottom: groups, model, DeepSpeed engine, steps, export."""

from __future__ import annotations

import json
import math
import os
import shutil
import socket
import sys
import time
from pathlib import Path

from d2o import chat, groups, records
from d2o.errors import D2OError
from d2o.settings import TrainStage


def run(
    stage: TrainStage,
    *,
    model: Path,
    comparisons: Path,
    samples: list[Path],
    references: list[Path],
    checkpoints: Path,
    output: Path,
) -> None:
    """Align a model with one method; a killed run goes on from its newest checkpoint.

    Args:
        stage: method, optimisation, forward pass and seed.
        model: folder of the initial model.
        comparisons: human answers (`records.COMPARISONS`).
        samples: pools of self-generated answers (`records.SAMPLES`), none or one.
        references: log-probs under the reference (`records.LOGPROBS`); none where the loss needs none.
        checkpoints: folder for checkpoints and the growing log; emptied after success.
        output: folder of the aligned model; `train.jsonl` and `tensorboard/` go beside it.
    Raises:
        D2OError: before the model loads, where the loss is not built, there is no group to train on, a response
            lacks its reference, or the batch does not divide over the ranks.
    """
    if "RANK" not in os.environ:
        _check(stage)
        _launch(stage.train.ranks)
    found, counts = _groups(stage, model, comparisons, samples, references)

    import deepspeed
    import torch
    import torch.distributed as dist

    from d2o import logprobs, losses
    from d2o.train import schedule, watch

    settings = stage.train
    deepspeed.init_distributed(dist_backend="nccl" if torch.cuda.is_available() else "gloo", verbose=False)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(stage.seed)
    loss_of = losses.of(stage.method)
    policy = logprobs.load(model, stage.forward.precision)
    if settings.gradient_checkpointing:
        policy.lm.gradient_checkpointing_enable({"use_reentrant": False})
    total = schedule.total_steps(settings, len(found))
    optimizer = torch.optim.AdamW(policy.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay)
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: schedule.rate(step, total, settings))
    engine, *_ = deepspeed.initialize(
        model=policy, optimizer=optimizer, lr_scheduler=decay, config=_deepspeed(stage, ranks)
    )
    inputs = [model / "manifest.json", comparisons, *samples, *references]
    first = _resume(engine, checkpoints, stage, inputs)

    start = time.monotonic()
    log = watch.Watch(checkpoints, total, first, stage.method.loss, active=rank == 0)
    for step in range(first, total):
        began = time.monotonic()
        batch = [found[i] for i in schedule.step_groups(step, len(found), settings, stage.seed)]
        seen = torch.zeros(2, len(watch.MEANS), dtype=torch.float64)
        for micro in _share(batch, rank, ranks, settings.groups_per_pass):
            sides = _sides(micro, engine(micro))
            each = [loss_of(positives, negatives) for positives, negatives in sides]
            engine.backward(torch.stack(each).mean())
            norm = _gradient_norm(engine)
            engine.step()
            for loss, (positives, negatives) in zip(each, sides, strict=True):
                values = watch.observe(loss, positives, negatives).cpu()
                seen += torch.stack([values.nan_to_num(), (~values.isnan()).double()])
        seen = seen.to(engine.device)
        dist.all_reduce(seen)
        seconds = time.monotonic() - began
        log.step(
            {
                "step": step + 1,
                "epoch": round((step + 1) * settings.groups_per_step / len(found), 4),
                **dict(zip(watch.MEANS, (seen[0] / seen[1]).tolist(), strict=True)),
                "grad_norm": float(engine.get_global_grad_norm() or norm),
                "learning_rate": settings.learning_rate * schedule.rate(step, total, settings),
                "seconds": round(seconds, 3),
                "tokens_per_second": round(watch.tokens_of(batch) / seconds, 1),
                "memory_gb": round(_peak_memory() / 1e9, 3),
            }
        )
        if (step + 1) % settings.checkpoint_every == 0 and step + 1 < total:
            engine.save_checkpoint(checkpoints, tag=f"step{step + 1}", client_state={"step": step + 1})
            _keep_newest(checkpoints, rank)
    log.close()
    facts = counts | {
        "steps": total,
        "ranks": ranks,
        "train_seconds": round(time.monotonic() - start, 1),
        "resumed_at": first,
        "peak_memory_gb": round(_peak_memory() / 1e9, 3),
    }
    _export(engine, stage, model, checkpoints, output, facts, inputs)
    dist.destroy_process_group()


def _check(stage: TrainStage) -> None:
    from d2o import losses

    losses.of(stage.method)
    train = stage.train
    if train.groups_per_step % (train.ranks * train.groups_per_pass):
        raise D2OError(
            f"train.groups_per_step: {train.groups_per_step} groups do not divide over {train.ranks} ranks × "
            f"{train.groups_per_pass} groups a pass; choose a multiple of {train.ranks * train.groups_per_pass}"
        )


def _launch(ranks: int) -> None:
    """Become rank 0 of 1, or hand over to torchrun, which starts all ranks with the same command line."""
    if ranks > 1:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        os.execv(sys.executable, [*launcher, f"--nproc-per-node={ranks}", "-m", "d2o", *sys.argv[1:]])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def _groups(
    stage: TrainStage, model: Path, comparisons: Path, samples: list[Path], references: list[Path]
) -> tuple[list[groups.Group], dict[str, int]]:
    human = records.read_table(comparisons, records.COMPARISONS)
    pool = [row for path in samples for row in records.read_table(path, records.SAMPLES)]
    texts = list(groups.view(stage.method, human, pool))
    if not texts and stage.method.positives in ("human", "safe-human"):
        raise D2OError(
            f"{comparisons}: {stage.method.loss} needs pairs, and no negative here has a human positive; "
            f"take a method with `positives: self`, such as d2o"
        )
    found, counts = groups.tokenise(texts, chat.load_tokenizer(model), stage.forward)
    if not found:
        raise D2OError(
            f"{comparisons}: nothing to train on: {counts['long_prompts']} of {len(texts)} groups have prompts "
            f"longer than forward.max_prompt_tokens ({stage.forward.max_prompt_tokens})"
        )
    if references:
        rows = [row for path in references for row in records.read_table(path, records.LOGPROBS)]
        groups.attach_references(found, rows)
    return found, counts


def _deepspeed(stage: TrainStage, ranks: int) -> dict:
    train = stage.train
    return {
        "train_micro_batch_size_per_gpu": train.groups_per_pass,
        "gradient_accumulation_steps": train.groups_per_step // (ranks * train.groups_per_pass),
        "gradient_clipping": train.clip,
        "bf16": {"enabled": stage.forward.precision == "bf16"},
        "zero_optimization": {"stage": train.zero_stage},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 1 << 30,
    }


def _share(batch: list[groups.Group], rank: int, ranks: int, size: int):
    """This rank's forward passes of one optimizer step."""
    for start in range(rank * size, len(batch), ranks * size):
        yield batch[start : start + size]


def _sides(micro, sums):
    """The flat log-probs of a forward pass as (positives, negatives) of each group."""
    import torch

    from d2o.losses import Side

    sides, start = [], 0
    for group in micro:
        pair = []
        for responses in (group.positives, group.negatives):
            stop = start + len(responses)
            references = torch.tensor([r.reference for r in responses], device=sums.device)
            lengths = torch.tensor([float(len(r.ids)) for r in responses], device=sums.device)
            pair.append(Side(sums[start:stop], references, lengths, torch.full_like(lengths, math.nan)))
            start = stop
        sides.append(tuple(pair))
    return sides


def _gradient_norm(engine) -> float:
    """L2 norm of the whole gradient where a plain torch optimizer steps (ZeRO 0 in fp32).

    DeepSpeed's own optimizers measure it themselves in their step; here it is measured before theirs.
    """
    import torch

    gradients = [p.grad for p in engine.module.parameters() if p.grad is not None]
    if not engine.is_gradient_accumulation_boundary() or not gradients:
        return math.nan
    return float(torch.nn.utils.get_total_norm(gradients))


def _resume(engine, checkpoints: Path, stage: TrainStage, inputs: list[Path]) -> int:
    """Load the newest checkpoint of this very run, if there is one; returns the steps done.

    Checkpoints of another method, setting or input are removed with a line that says so.
    """
    import torch.distributed as dist

    run = json.dumps([stage.model_dump(), {str(path): records.file_digest(path) for path in inputs}])
    identity = checkpoints / "run.json"
    if dist.get_rank() == 0 and (not identity.exists() or identity.read_text() != run):
        if checkpoints.exists():
            print(f"train: {checkpoints} is of other settings or inputs; starting anew", file=sys.stderr, flush=True)
            shutil.rmtree(checkpoints)
        checkpoints.mkdir(parents=True)
        identity.write_text(run)
    dist.barrier()
    if not (checkpoints / "latest").exists():
        return 0
    path, state = engine.load_checkpoint(checkpoints)
    print(f"train: going on after step {state['step']} ({path})", file=sys.stderr, flush=True)
    return state["step"]


def _keep_newest(checkpoints: Path, rank: int) -> None:
    import torch.distributed as dist

    dist.barrier()
    newest = (checkpoints / "latest").read_text().strip()
    if rank == 0:
        for folder in checkpoints.glob("step*"):
            if folder.name != newest:
                shutil.rmtree(folder)


def _peak_memory() -> int:
    """Bytes: the most that this process, or its GPU, has held."""
    import resource

    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _export(engine, stage, model: Path, checkpoints: Path, output: Path, facts: dict, inputs: list) -> None:
    """Write the aligned model's folder and put the log beside it; then the checkpoints have served."""
    import torch.distributed as dist

    lm = engine.module.lm
    if stage.train.zero_stage == 3:
        weights = engine._zero3_consolidated_16bit_state_dict()
        weights = weights and {k.removeprefix("lm."): v for k, v in weights.items() if k.startswith("lm.")}
    else:
        weights = lm.state_dict()
    if dist.get_rank() == 0:
        with records.artifact(output, stage, inputs) as draft:
            lm.save_pretrained(draft.path, state_dict=weights)
            chat.load_tokenizer(model).save_pretrained(draft.path)
            draft.facts |= facts
            draft.facts["trust_remote_code"] = records.trusts_code(model)
            draft.facts["weights"] = {
                file.name: records.file_digest(file) for file in sorted(draft.path.glob("*.safetensors"))
            }
            log = output.with_name("train.jsonl")
            shutil.copy(checkpoints / "train.jsonl", log)
            shutil.rmtree(output.with_name("tensorboard"), ignore_errors=True)
            shutil.copytree(checkpoints / "tensorboard", output.with_name("tensorboard"))
        shutil.rmtree(checkpoints)
    dist.barrier()
