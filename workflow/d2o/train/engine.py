"""DeepSpeed: its configuration, and this rank's part of the float32 weights."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor

from d2o import devices, dtypes
from d2o.errors import D2OError
from d2o.forward import Policy, Row, sides
from d2o.groups import Group
from d2o.losses import Side
from d2o.settings import TrainStage
from d2o.train import schedule
from d2o.train.launch import follow

# How long ranks wait for each other: the first one tokenises all data.
_PATIENCE = timedelta(hours=4)


class TrainingEngine:
    """A policy under DeepSpeed: forward, backward and step, over all ranks.

    The number of passes may differ from step to step, since passes are filled by tokens; so DeepSpeed is configured
    not to count them (`managed_gradient_accumulation`).

    Attributes:
        deepspeed: DeepSpeed's own engine.
        device: where its inputs go.
        norm: L2 norm of the last step's gradient, before clipping.
    """

    def __init__(self, policy: Policy, stage: TrainStage, total: int):
        """
        Args:
            total: optimizer steps of the whole training.
        """
        train = stage.train
        weights = [p for p in policy.parameters() if p.requires_grad]
        # Fused: on one CPU thread a step of 135 M weights takes 0.17 s instead of 1.2 s.
        optimizer = torch.optim.AdamW(weights, lr=train.learning_rate, weight_decay=train.weight_decay, fused=True)
        decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: schedule.rate(step, total, train))
        self.deepspeed, *_ = deepspeed.initialize(
            model=policy, optimizer=optimizer, lr_scheduler=decay, config=_config(stage)
        )
        self.device = self.deepspeed.device
        self._clip = train.clip
        self._weights = weights
        self.norm = float("nan")
        if self.deepspeed.optimizer is optimizer:  # ZeRO 0 in fp32: DeepSpeed would clip without reporting the norm
            optimizer.register_step_pre_hook(self._clip_gradient)

    def sides(self, groups: Sequence[Group]) -> list[tuple[Side, Side]]:
        """One forward pass: the two sides of each term of the groups' losses."""
        return sides(self.deepspeed, groups, self.device)

    def sums(self, groups: Sequence[Group]) -> Tensor:
        """As `Policy.sums`, for groups."""
        return self.deepspeed.module.sums(Row.of(groups).to(self.device))

    def backward(self, loss: Tensor) -> None:
        """Add a loss's gradient; it is averaged over the ranks."""
        self.deepspeed.backward(loss)

    def step(self) -> None:
        """Clip the gradient, update the weights, advance the learning rate."""
        self.deepspeed.step()
        if (norm := self.deepspeed.get_global_grad_norm()) is not None:
            self.norm = float(norm)

    def _clip_gradient(self, *_) -> None:
        self.norm = float(torch.nn.utils.clip_grad_norm_(self._weights, self._clip))

    # The float32 weights ---------------------------------------------------------------------------

    def shards(self) -> list[Tensor]:
        """This rank's part of the float32 weights that are trained, as DeepSpeed keeps them; to be read or written.

        All of them under ZeRO 0; flat slices under ZeRO 1 to 3.
        """
        match self.deepspeed.optimizer:
            case DeepSpeedZeroOptimizer_Stage3() as optimizer:
                return list(optimizer.fp32_partitioned_groups_flat)
            case DeepSpeedZeroOptimizer() as optimizer:
                return list(optimizer.single_partition_of_fp32_groups)
            case BF16_Optimizer() as optimizer:
                return list(optimizer.fp32_groups_flat_partition)
        return self._weights

    def _publish(self) -> None:
        """Copy the float32 `shards` to the weights that the forward pass uses."""
        match self.deepspeed.optimizer:
            case DeepSpeedZeroOptimizer_Stage3() as optimizer:
                for group in range(len(optimizer.fp32_partitioned_groups_flat)):
                    optimizer._reassign_or_swap_out_partitioned_parameters(group)
                if optimizer.persistent_parameters:
                    optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)
            case DeepSpeedZeroOptimizer() | BF16_Optimizer() as optimizer:
                optimizer.update_lp_params()

    @contextmanager
    def weights(self, others: Sequence[Tensor]) -> Iterator[None]:
        """A context in which the policy has the weights of `others`, shaped as `shards`; no second model is held."""
        self._exchange(others)
        try:
            yield
        finally:
            self._exchange(others)

    @torch.no_grad()
    def _exchange(self, others: Sequence[Tensor]) -> None:
        for mine, other in zip(self.shards(), others, strict=True):
            kept = mine.clone()
            mine.copy_(other)
            other.copy_(kept)
        self._publish()

    def state_dict(self) -> dict[str, Tensor] | None:
        """The weights that are trained, by their names in the model, on rank 0; to be called on all ranks."""
        if self.deepspeed.zero_optimization_stage() == 3:
            weights = self.deepspeed._zero3_consolidated_16bit_state_dict(exclude_frozen_parameters=True)
        else:
            module = self.deepspeed.module
            trained = {name for name, p in module.named_parameters(remove_duplicate=False) if p.requires_grad}
            weights = {name: weight for name, weight in module.state_dict().items() if name in trained}
        return weights and {name.removeprefix("lm."): weight for name, weight in weights.items()}


def start() -> tuple[int, int]:
    """Join the other ranks; return this rank's number and the number of ranks. Errors as `devices.device`."""
    follow()
    on_gpu = devices.device() == "cuda"
    if on_gpu:  # before the first collective, or NCCL guesses this rank's GPU
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    deepspeed.init_distributed(dist_backend="nccl" if on_gpu else "gloo", timeout=_PATIENCE, verbose=False)
    return dist.get_rank(), dist.get_world_size()


@contextmanager
def enough_memory(tokens: int) -> Iterator[None]:
    """A context in which running out of memory raises an error of one line that states what to lower.

    Args:
        tokens: of the pass.
    Raises:
        D2OError: where memory runs out.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        known = isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in str(error)
        if not known:
            raise
        raise D2OError(
            f"train: no memory left in a pass of {tokens} tokens; lower train.tokens_per_pass, or set "
            f"train.gradient_checkpointing, train.offload, a higher train.zero_stage or train.lora"
        ) from None


def _config(stage: TrainStage) -> dict:
    train, half = stage.train, dtypes.precision(stage.forward.precision) == "bf16"
    # Gradients of bf16 weights are added up in float32 from stage 1 on.
    zero: dict = {"stage": max(train.zero_stage, 1) if half else train.zero_stage}
    if train.offload:
        zero["offload_optimizer"] = {"device": "cpu"}
        if train.zero_stage == 3:
            zero["offload_param"] = {"device": "cpu"}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": train.clip if zero["stage"] else 0.0,
        "bf16": {"enabled": half},
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 1 << 30,
    }
