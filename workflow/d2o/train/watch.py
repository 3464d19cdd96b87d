"""Monitoring of a training: a progress bar, one JSON line per step, TensorBoard and other trackers, alarms."""

from __future__ import annotations

import json
import math
import resource
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedModel

from d2o import checksums, growing, records
from d2o.errors import D2OError
from d2o.groups import Group
from d2o.losses import Side
from d2o.progress import LOG, STATE
from d2o.settings import Alarms, TrainStage

# Steps that an alarm looks back over.
_WINDOW = 10
# Seconds of matrix products after which no more are timed.
_PATIENCE = 0.5
_SIDE = ("logprob", "reference", "logratio", "logprob_per_token", "reference_per_token")
# Means over the groups that have the value; NaN where a group has no such side or the loss no reference.
MEANS = (
    "loss",
    "margin",
    "accuracy",
    "length_drift",
    "logratio_square",
    *(f"{side}_{x}" for side in ("positive", "negative") for x in _SIDE),
)


def observe(loss: Tensor, positives: Side, negatives: Side) -> Tensor:
    """The values of `MEANS` for one group, shape [len(MEANS)], float64.

    The margin is the mean log-ratio of the positives less that of the negatives, in nats and without β; the
    accuracy is whether it is above 0. The length drift is the relative growth of the positives' mean length when each
    is weighted by the policy's preference over the reference (softmax of the log-ratios): importance sampling from
    answers of the reference, so an estimate; NaN for a single positive. The square is the mean over all responses.
    """
    with torch.no_grad():
        logratios = torch.cat([positives.logratios, negatives.logratios])
        values = [loss.detach(), *_differences(positives, negatives), logratios.square().mean()]
        for side in (positives, negatives):
            values += [side.logprobs.mean(), side.reference_logprobs.mean(), side.logratios.mean()]
            values += [side.means.mean(), (side.reference_logprobs / side.lengths).mean()]
        return torch.stack([value.double() for value in values])


def _differences(positives: Side, negatives: Side) -> tuple[Tensor, Tensor, Tensor]:
    margin = positives.logratios.mean() - negatives.logratios.mean()
    accuracy = torch.where(margin.isnan(), margin, (margin > 0).to(margin.dtype))
    preferred = positives.logratios.softmax(0) @ positives.lengths
    drift = preferred / positives.lengths.mean() - 1
    return margin, accuracy, drift if len(positives.lengths) > 1 else torch.full_like(drift, math.nan)


class Means:
    """The means of `MEANS` over the groups of a step."""

    def __init__(self, device: torch.device):
        self._sums = torch.zeros(2, len(MEANS), dtype=torch.float64, device=device)

    def add(self, losses: Sequence[Tensor], sides: Sequence[tuple[Side, Side]]) -> None:
        """Add the groups of one pass."""
        values = torch.stack([observe(loss, *pair) for loss, pair in zip(losses, sides, strict=True)])
        counted = ~values.isnan()
        counted[:, 0] = True  # a loss of NaN must be visible
        self._sums += torch.stack([values.where(counted, 0).sum(0), counted.double().sum(0)])

    def over_ranks(self) -> dict[str, float]:
        """The means over all ranks; NaN where no group has the value."""
        dist.all_reduce(self._sums)
        return dict(zip(MEANS, (self._sums[0] / self._sums[1]).tolist(), strict=True))


@dataclass(frozen=True)
class ModelSizes:
    """The sizes that the work of a model depends on.

    Attributes:
        linear: weights of the linear layers below the head.
        head: weights of the head.
        attention: layers × width of the queries.
        trained: whether these weights get gradients; where only adapters do, a third of the work is saved.
    """

    linear: int
    head: int
    attention: int
    trained: bool

    @classmethod
    def of(cls, lm: PreTrainedModel) -> ModelSizes:
        """The sizes of a model, before ZeRO partitions it."""
        config, head = lm.config, lm.get_output_embeddings().weight
        layers = [p for p in lm.get_decoder().layers.parameters() if p.ndim == 2]
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        attention = config.num_hidden_layers * config.num_attention_heads * width
        return cls(sum(p.numel() for p in layers), head.numel(), attention, head.requires_grad)

    def flops(self, groups: Sequence[Group]) -> float:
        """Floating-point operations of a forward and backward pass that cannot be avoided: each prompt once, the
        head on response tokens only, nothing computed again."""
        total = 0.0
        for group in groups:
            prompt, lengths = len(group.prompt), [len(r.ids) for r in group.responses]
            seen = prompt**2 / 2 + sum(prompt * n + n**2 / 2 for n in lengths)
            total += 2 * self.linear * group.tokens + 2 * self.head * sum(lengths) + 4 * self.attention * seen
        return total * (3 if self.trained else 2)


def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of the fastest of some matrix products on this rank; a step's utilisation is a share of it.

    The products grow until they have taken `_PATIENCE`: in bf16 on a CPU without AVX-512, a large one takes seconds.
    On a GPU `peak_memory` is reset after them: they are not part of the training.
    """
    torch.ones(8, 8, device=device, dtype=dtype).mm(torch.ones(8, 8, device=device, dtype=dtype))  # loads a library
    sizes = [8192] * 8 if device.type == "cuda" else [256, *[512] * 8, *[1024] * 8]
    best = spent = 0.0
    for size in sizes:
        if spent > _PATIENCE:
            break
        a, b = torch.randn(2, size, size, device=device).to(dtype)
        start = time.perf_counter()
        product = a @ b
        product[0, 0].item()  # waits for a GPU
        seconds = time.perf_counter() - start
        best, spent = max(best, 2 * size**3 / seconds), spent + seconds
    if device.type == "cuda":
        del a, b, product
        torch.cuda.reset_peak_memory_stats(device)
    return best


def alarms(history: Sequence[Mapping[str, Any]], limits: Alarms) -> dict[str, str]:
    """Messages on what goes wrong in a training, by the alarm's name.

    Args:
        history: the step records so far.
    """
    last, raised = history[-1], {}
    for key in ("loss", "grad_norm"):
        if last[key] is None or not math.isfinite(last[key]):
            raised["not_finite"] = f"{key} is {last[key]}; lower the learning rate, or try fp32"
    shifts = [row["positive_shift"] for row in history if row.get("positive_shift") is not None]
    if shifts and -shifts[-1] > limits.displacement:
        raised["displacement"] = (
            f"the probe's positives have lost {-shifts[-1]:.2f} nats per token since the initial model, more than "
            f"{limits.displacement}; lower the learning rate, or raise β"
        )
    drift = _mean(history[-_WINDOW:], "length_drift")
    if len(history) >= _WINDOW and drift > limits.length_drift:
        raised["length_drift"] = (
            f"the policy prefers positives that are {drift:.0%} longer than the reference does, more than "
            f"{limits.length_drift:.0%}"
        )
    return raised


def _mean(history: Sequence[Mapping[str, Any]], key: str) -> float:
    values = [row[key] for row in history if row[key] is not None]
    return sum(values) / len(values) if values else math.nan


class Watch:
    """Writes the log of a training; on ranks other than 0 it writes nothing."""

    def __init__(self, folder: Path, stage: TrainStage, sizes: ModelSizes, peak: float, total: int, first: int):
        """
        Args:
            folder: gets `train.jsonl`, `watch.json` and `tensorboard/`.
            sizes: of the model.
            peak: FLOP/s of all ranks together.
            total: steps of the whole training.
            first: steps done; later lines of an interrupted run are dropped, as their steps are run again.
        Raises:
            D2OError: where a tracker is not installed, or the log lacks a line of a step that is done.
        """
        from tqdm import tqdm

        self._limits, self._sizes, self._peak = stage.train.alarms, sizes, peak
        self._active = dist.get_rank() == 0
        self._path, self._state, self._total = folder / LOG, folder / STATE, total
        present = first and self._path.exists()
        lines = self._path.read_text(errors="replace").splitlines(keepends=True)[:first] if present else []
        self._history = _records(self._path, lines, first)
        self._raised: set[str] = set()
        self._began = time.monotonic()
        dist.barrier()
        if self._active:
            records.write_text(self._path, "".join(lines))
            self._tell({})
            self._trackers = [_TensorBoard(folder / "tensorboard", first)]
            self._trackers += [_TRACKERS[name](stage, folder / f"{name}.run") for name in stage.train.trackers]
        self._bar = tqdm(
            total=total, initial=first, desc=stage.method.loss, unit="step", mininterval=2, disable=not self._active
        )

    def step(self, record: dict[str, Any], members: Sequence[Group]) -> None:
        """Log one step; called on all ranks with the same values.

        Args:
            record: values to log beside speed and memory. NaN, for no such value, becomes null.
            members: the groups of the step.
        Raises:
            D2OError: where an alarm is set to stop the training.
        """
        now = time.monotonic()
        seconds, self._began = now - self._began, now
        record = {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in record.items()} | {
            "seconds": round(seconds, 3),
            "tokens_per_second": round(sum(group.tokens for group in members) / seconds, 1),
            "utilisation": round(self._sizes.flops(members) / seconds / self._peak, 4),
            "memory_gb": round(peak_memory() / 1e9, 3),
        }
        self._history.append(record)
        raised = alarms(self._history, self._limits)
        if self._active:
            with growing.appended(self._path) as file:
                file.write(checksums.sealed(record))
            numbers = {k: v for k, v in record.items() if k != "step" and v is not None}
            for tracker in self._trackers:
                tracker.log(numbers, record["step"])
            self._bar.set_postfix_str(f"loss {record['loss'] or math.nan:.4f}", refresh=False)
            self._bar.update()
            if raised.keys() != self._raised:
                self._tell(raised)
        for name, message in raised.items():
            if name in self._limits.stop:
                raise D2OError(f"train: step {record['step']}: {message}. The log is {self._path}")
            if name not in self._raised and self._active:
                print(f"train: alarm at step {record['step']}: {message}", file=sys.stderr, flush=True)
        self._raised = set(raised)

    def _tell(self, raised: Mapping[str, str]) -> None:
        records.write_json(self._state, {"steps": self._total, "alarms": raised})

    @property
    def noise(self) -> float | None:
        """Root mean square of the first step's log-ratios, nats; None where the loss takes no reference.

        In the first step the policy still is the initial model: its log-ratios are rounding and nothing else.
        """
        square = self._history[0]["logratio_square"]
        return None if square is None else round(math.sqrt(square), 4)

    def write(self, path: Path) -> None:
        """Write all lines, without their checksums."""
        path.write_text("".join(json.dumps(record) + "\n" for record in self._history))

    def close(self) -> None:
        """Flush everything."""
        self._bar.close()
        for tracker in self._trackers if self._active else ():
            tracker.close()


def _records(path: Path, lines: Sequence[str], steps: int) -> list[dict[str, Any]]:
    history = [*takewhile(bool, map(checksums.unsealed, lines))]
    if len(history) < steps:
        raise D2OError(f"{path}: line {len(history) + 1} is damaged; delete {path.parent} to start again from step 0")
    return history


class _TensorBoard:
    def __init__(self, folder: Path, first: int):
        from torch.utils.tensorboard import SummaryWriter

        self._board = SummaryWriter(folder, purge_step=first)

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        for key, value in numbers.items():
            self._board.add_scalar(key, value, step)

    def close(self) -> None:
        self._board.close()


class _WandB:
    def __init__(self, stage: TrainStage, kept: Path):
        """
        Args:
            kept: file with the id of the run that an interrupted training continues.
        """
        known = kept.read_text() if kept.exists() else None
        self._run = _installed("wandb").init(config=stage.model_dump(), id=known, resume="allow" if known else None)
        records.write_text(kept, self._run.id)

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        self._run.log(dict(numbers), step=step)

    def close(self) -> None:
        self._run.finish()


class _MLflow:
    def __init__(self, stage: TrainStage, kept: Path):
        """
        Args:
            kept: as of `_WandB`.
        """
        self._mlflow = _installed("mlflow")
        run = self._mlflow.start_run(run_id=kept.read_text() if kept.exists() else None)
        records.write_text(kept, run.info.run_id)
        self._mlflow.log_dict(stage.model_dump(), "settings.json")

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        self._mlflow.log_metrics(dict(numbers), step=step)

    def close(self) -> None:
        self._mlflow.end_run()


_TRACKERS = {"wandb": _WandB, "mlflow": _MLflow}


def _installed(name: str):
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError:
        raise D2OError(f"train.trackers: {name} is not installed; install it, or take it out of the list") from None


def peak_memory() -> int:
    """The most bytes that this process, or its GPU, has held."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
