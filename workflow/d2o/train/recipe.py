"""One training from top to bottom: groups, model, DeepSpeed engine, steps, export."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from d2o import chat, devices, dtypes, model_folders, records, trials
from d2o.contracts import CONTRACTS
from d2o.errors import D2OError
from d2o.progress import LOG
from d2o.settings import TrainStage
from d2o.train.data import Data, Inputs, prepare, write_prompts
from d2o.train.launch import follow, launch


def run(stage: TrainStage, inputs: Inputs, checkpoints: Path, output: Path) -> None:
    """Align a model with one method; a killed run goes on from its newest whole checkpoint.

    With online rounds, a run ends where the next round has to be sampled: `output` is then the policy so far, and
    `negatives.parquet` beside it contains the prompts of the next round. Called again with that round, it goes on.

    Args:
        stage: method, optimisation, forward pass and seed; the values of `inputs.tuned` replace its own.
        checkpoints: folder for checkpoints, the growing log and the groups that ranks map; removed after the last
            step. The model of a snapshot, `step<n>/model/`, goes beside it.
        output: folder of the aligned model; `train.jsonl` and `tensorboard/` go beside it.
    Raises:
        D2OError: before the model loads, as `data.prepare`, and where a folder to be replaced is not ours; later,
            where an alarm stops the training.
    """
    if inputs.tuned:
        stage = trials.tuned(stage, inputs.tuned)
    board = output.with_name("tensorboard")
    snapshots = {step: checkpoints.with_name(f"step{step}") / "model" for step in stage.train.snapshots}
    for folder in (checkpoints, output, board, *snapshots.values()):
        records.check_ours(folder)
    if "RANK" not in os.environ:
        launch(stage.train.ranks, stage.train.nodes)
    follow()  # before the imports, which take seconds

    import torch
    import torch.distributed as dist

    from d2o import forward, losses
    from d2o.train import adapters, schedule, watch
    from d2o.train.checkpoints import Checkpoints
    from d2o.train.engine import TrainingEngine, enough_memory, start
    from d2o.train.probe import EVERY, Probe
    from d2o.train.references import MismatchedPairs, MovingReferences

    rank, ranks = start()
    torch.manual_seed(stage.seed)
    kept = Checkpoints(checkpoints, stage, inputs)
    data = _shared(stage, inputs, checkpoints / "groups.arrow")
    train, method, total = stage.train, stage.method, data.total

    # Under ZeRO 3 no device has to hold all weights.
    whole = devices.device() if train.zero_stage < 3 else "cpu"
    policy = forward.load(inputs.model, stage.forward.precision, data.route, whole)
    if train.lora:
        adapters.attach(policy, train.lora)
    if train.gradient_checkpointing:
        policy.lm.gradient_checkpointing_enable({"use_reentrant": False})
    model_sizes = watch.ModelSizes.of(policy.lm)
    peak = watch.matmul_peak(torch.device(devices.device()), policy.lm.dtype) * ranks
    if rank == 0:
        kept.check_room(policy)
    policy.train()  # or gradient checkpointing does nothing; there is no dropout
    engine = TrainingEngine(policy, stage, total)
    policy.check(data.groups.longest(forward.COMPARED), engine.device)  # a group has a token at least

    probe = Probe(engine, data.probe, checkpoints, stage.forward.tokens)
    mismatched = moving = None
    if CONTRACTS[method.loss].mismatched:
        mismatched = MismatchedPairs(engine, data.groups, checkpoints, stage.forward.tokens)
    if method.ema:
        moving = MovingReferences(engine, method.ema, data.batch, total, stage.forward.tokens)
    first, state = kept.load(engine, data.until)
    if moving and state:
        moving.restore(state)
    loss_of = losses.of(method)
    log = watch.Watch(checkpoints, stage, model_sizes, peak, total, first)

    for step in range(first, data.until):
        members = data.batch(step)
        if moving:
            moving.refresh(step, members)
        terms = sum(group.terms for group in members)
        zero = {"z0": mismatched.zero_point(members)} if mismatched else {}
        means = watch.Means(engine.device)
        for micro in schedule.passes(members, ranks, train.tokens_per_pass)[rank]:
            # An empty pass keeps this rank in step with the others: it runs any group, and uses no gradient from it.
            with enough_memory(sum(group.tokens for group in micro)):
                sides = engine.sides(micro or members[:1])
                each = [loss_of(*pair, **zero) for pair in sides]
                # The mean over the terms of all passes and ranks; DeepSpeed averages over the ranks.
                engine.backward(torch.stack(each).sum() * (ranks / terms if micro else 0.0))
            if micro:
                means.add(each, sides)
        engine.step()
        record = {"step": step + 1, "epoch": round((step + 1) * len(members) / len(data.groups), 4)}
        record |= means.over_ranks()
        record |= {"grad_norm": engine.norm, "learning_rate": train.learning_rate * schedule.rate(step, total, train)}
        if (step + 1) % EVERY == 0 or step + 1 == total:
            record |= probe.shifts()
        if method.online:
            record |= data.freshness(step)
        log.step(record, members)
        # The snapshot is written before the checkpoint: a run that resumes there does not repeat this step.
        if folder := snapshots.get(step + 1):
            _export(engine, stage, inputs, folder, {"step": step + 1})
        due, last = kept.due(engine.device), step + 1 == total
        if kept.ending or ((due or step + 1 == data.until) and not last):
            kept.save(engine, step + 1, moving.state() if moving else {})
        if kept.ending:
            log.close()
            kept.leave(step + 1)
    log.close()

    memory = round(watch.peak_memory() / 1e9, 3)
    facts = data.counts | {"steps": data.until, "ranks": ranks, "resumed_at": first, "peak_memory_gb": memory}
    facts |= {"precision": dtypes.precision(stage.forward.precision), "route": policy.route}
    facts["reference_noise"] = log.noise
    if rank == 0 and data.next:
        write_prompts(data, stage, inputs.negatives, output.with_name("negatives.parquet"))
    elif rank == 0:
        with records.artifact(output.with_name(LOG), stage) as draft:
            log.write(draft.path)
        with records.artifact(board, stage) as draft:
            shutil.copytree(checkpoints / "tensorboard", draft.path)
    _export(engine, stage, inputs, output, facts)
    kept.close(engine.device, over=not data.next)
    dist.destroy_process_group()


def _shared(stage: TrainStage, inputs: Inputs, groups: Path) -> Data:
    """The data, in a file that rank 0 makes and all ranks map; made again at each start, as a round may be new.

    Raises:
        D2OError: on rank 0, as `prepare`; the other ranks exit without a message.
    """
    import torch.distributed as dist

    problem: list[D2OError | None] = [None]
    if dist.get_rank() == 0:
        try:
            prepare(stage, inputs, groups)
        except D2OError as error:
            problem = [error]
    dist.broadcast_object_list(problem)
    if problem[0]:
        raise problem[0] if dist.get_rank() == 0 else SystemExit(1)
    return Data(stage, groups)


def _export(engine, stage: TrainStage, inputs: Inputs, folder: Path, facts: dict) -> None:
    """Write the policy as a model folder; called on all ranks."""
    import torch.distributed as dist

    from d2o.train import adapters

    weights = engine.state_dict()
    if dist.get_rank() == 0:
        with records.artifact(folder, stage, [*inputs.lasting, *inputs.rounds]) as draft:
            if stage.train.lora:
                adapters.export(inputs.model, stage.forward.precision, stage.train.lora, weights, draft.path)
            else:
                engine.deepspeed.module.lm.save_pretrained(draft.path, state_dict=weights)
            chat.load_tokenizer(inputs.model).save_pretrained(draft.path)
            draft.facts |= facts
            draft.facts["trust_remote_code"] = model_folders.trusts_code(inputs.model)
    dist.barrier()
