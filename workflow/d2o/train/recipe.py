"""One training from top to bottom: groups, model, DeepSpeed engine, steps, export."""

from __future__ import annotations

import os
import shutil
import socket
import sys
from pathlib import Path

from d2o import chat, groups, records
from d2o.contracts import CONTRACTS
from d2o.errors import D2OError
from d2o.settings import TrainStage, Upkeep


def run(
    stage: TrainStage,
    upkeep: Upkeep,
    *,
    model: Path,
    comparisons: Path,
    samples: list[Path],
    references: list[Path],
    checkpoints: Path,
    output: Path,
) -> None:
    """Align a model with one method; a killed run goes on from its newest whole checkpoint.

    Args:
        stage: method, optimisation, forward pass and seed.
        upkeep: what is kept and watched on the way; a run goes on under another one.
        model: folder of the initial model.
        comparisons: human answers (`records.COMPARISONS`).
        samples: pools of self-generated answers (`records.SAMPLES`), none or one.
        references: log-probs under the reference (`records.LOGPROBS`); none where the loss needs none, or where
            the references move.
        checkpoints: folder for checkpoints and the growing log; emptied after success.
        output: folder of the aligned model; `train.jsonl`, `tensorboard/` and, of a snapshot,
            `step<n>/model/` go beside it.
    Raises:
        D2OError: before the model loads, where there is no group to train on, a response lacks its reference, or a
            snapshot lies beyond the last step; later, where an alarm stops the training.
    """
    if "RANK" not in os.environ:
        _launch(stage.train.ranks)
    found, counts = _groups(stage, model, comparisons, samples, references)

    import torch

    from d2o import logprobs, losses
    from d2o.train import adapters, schedule, watch
    from d2o.train.checkpoints import Checkpoints
    from d2o.train.engine import Engine, enough_memory, start
    from d2o.train.references import MismatchedPairs, MovingReferences

    train, method = stage.train, stage.method
    rank, ranks = start()
    torch.manual_seed(stage.seed)
    inputs = [model / "manifest.json", comparisons, *samples, *references]
    kept = Checkpoints(checkpoints, stage, inputs, upkeep.keep_checkpoints)
    total = schedule.total_steps(train, len(found))
    if max(train.snapshots, default=0) > total:
        raise D2OError(f"train.snapshots: step {max(train.snapshots)} is beyond the last one, {total}; leave it out")

    def batch(step: int) -> list[groups.Group]:
        return [found[i] for i in schedule.step_groups(step, len(found), train, stage.seed)]

    policy = logprobs.load(model, stage.forward.precision)
    if train.lora:
        adapters.attach(policy, train.lora)
    if train.gradient_checkpointing:
        policy.lm.gradient_checkpointing_enable({"use_reentrant": False})
    shape = watch.Shape.of(policy.lm)
    policy.train()  # or gradient checkpointing does nothing; there is no dropout
    engine = Engine(policy, stage, total)
    policy.check(logprobs.Row.of(batch(0)[:1]).to(engine.device))

    mismatched = moving = None
    if CONTRACTS[method.loss].mismatched:
        mismatched = MismatchedPairs(engine, found, checkpoints, stage.forward.tokens)
    if method.ema:
        moving = MovingReferences(engine, method.ema, batch, total, stage.forward.tokens)
    first, state = kept.load(engine)
    if moving and state:
        moving.restore(state)
    loss_of = losses.of(method)
    peak = watch.matmul_peak(engine.device, policy.lm.dtype) * ranks
    log = watch.Watch(checkpoints, stage, upkeep, shape, peak, total, first)

    for step in range(first, total):
        members = batch(step)
        if moving:
            moving.refresh(step)
        zero = {"z0": mismatched.zero_point(members)} if mismatched else {}
        means = watch.Means(engine.device)
        for micro in schedule.passes(members, ranks, train.tokens_per_pass)[rank]:
            # An empty pass keeps step with the other ranks: any group, and no gradient from it.
            with enough_memory(sum(group.tokens for group in micro)):
                sides = engine.sides(micro or members[:1])
                each = [loss_of(*pair, **zero) for pair in sides]
                # The mean over the groups of all passes and ranks; DeepSpeed averages over the ranks.
                engine.backward(torch.stack(each).sum() * (ranks / len(members) if micro else 0.0))
            if micro:
                means.add(each, sides)
        engine.step()
        record = {"step": step + 1, "epoch": round((step + 1) * len(members) / len(found), 4)}
        record |= means.over_ranks()
        record |= {"grad_norm": engine.norm, "learning_rate": train.learning_rate * schedule.rate(step, total, train)}
        log.step(record, members)
        # The snapshot first: what goes on after a checkpoint does not come back to its step.
        if step + 1 in train.snapshots:
            folder = output.with_name(f"step{step + 1}") / output.name
            _export(engine, stage, model, folder, {"step": step + 1}, inputs)
        if (step + 1) % upkeep.checkpoint_every == 0 and step + 1 < total:
            kept.save(engine, step + 1, moving.state() if moving else {})
    log.close()

    if rank == 0:
        shutil.copy(checkpoints / "train.jsonl", output.with_name("train.jsonl"))
        shutil.rmtree(output.with_name("tensorboard"), ignore_errors=True)
        shutil.copytree(checkpoints / "tensorboard", output.with_name("tensorboard"))
    memory = round(watch.peak_memory() / 1e9, 3)
    facts = counts | {"steps": total, "ranks": ranks, "resumed_at": first, "peak_memory_gb": memory}
    _export(engine, stage, model, output, facts, inputs)
    kept.remove()


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
    for path in references:
        if records.file_digest(model / "manifest.json") not in records.read_manifest(path)["inputs"].values():
            raise D2OError(f"{path}: made by another model than {model}; delete it and run again")
    if references:
        rows = [row for path in references for row in records.read_table(path, records.LOGPROBS)]
        groups.attach_references(found, rows)
    return found, counts


def _export(engine, stage: TrainStage, model: Path, folder: Path, facts: dict, inputs: list[Path]) -> None:
    """Write the policy as a model folder; called on all ranks."""
    import torch.distributed as dist

    from d2o.train import adapters

    weights = engine.state_dict()
    if dist.get_rank() == 0:
        with records.artifact(folder, stage, inputs) as draft:
            if stage.train.lora:
                lm = adapters.merged(model, stage.forward.precision, stage.train.lora, weights)
                lm.save_pretrained(draft.path)
            else:
                engine.deepspeed.module.lm.save_pretrained(draft.path, state_dict=weights)
            chat.load_tokenizer(model).save_pretrained(draft.path)
            draft.facts |= facts
            draft.facts["trust_remote_code"] = records.trusts_code(model)
            draft.facts["weights"] = {
                file.name: records.file_digest(file) for file in sorted(draft.path.glob("*.safetensors"))
            }
    dist.barrier()
