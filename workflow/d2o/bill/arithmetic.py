"""Formulas for the operations, bytes and seconds of a model's work. Units: tokens, bytes, FLOPs and seconds."""

from __future__ import annotations

from dataclasses import dataclass

from d2o.bill.shapes import Shape

# Each response of a group attends to its prompt and to itself. `watch.ModelSizes.flops` counts in the same way.


def forward_flops(shape: Shape, tokens: float, read: float, scored: float) -> float:
    """Floating-point operations of one forward pass.

    Args:
        tokens: through the layers.
        read: tokens that each token looks back at, itself included, on average.
        scored: tokens whose next token the head predicts.
    """
    return 2 * shape.linear * tokens + 2 * shape.head * scored + 4 * shape.attention * tokens * read


def group_flops(shape: Shape, prompt: float, response: float, responses: float) -> float:
    """FLOPs of a forward pass of one group, its prompt computed once: prompt | y_1 | … | y_n."""
    alone = forward_flops(shape, prompt, prompt / 2, 0)
    each = forward_flops(shape, response, prompt + response / 2, response)
    return alone + responses * each


def decode_seconds(shape: Shape, tokens: float, context: float, batch: float, rates: tuple[float, float]) -> float:
    """Seconds to generate `tokens` tokens, `batch` answers at a time.

    A step reads the weights once and the keys and values of each answer, and multiplies each token with the weights.

    Args:
        context: tokens that an answer looks back at, on average.
        rates: FLOP/s and bytes/s that are reached.
    """
    flops, bandwidth = rates
    moved = 2 * shape.parameters + batch * context * shape.kv_bytes
    computed = batch * forward_flops(shape, 1, context, 1)
    return tokens / batch * max(moved / bandwidth, computed / flops)


@dataclass(frozen=True)
class States:
    """Bytes that a training holds on each device besides activations (ZeRO, arXiv 1910.02054, section 3)."""

    weights: float
    gradients: float
    optimizer: float

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer


def states(parameters: float, trained: float, stage: int, ranks: int, half: bool, moving: bool = False) -> States:
    """Weights, gradients and AdamW's states by ZeRO stage.

    Bytes per parameter in bf16 (`half`): 2 for the weights; for the gradients 2 while they are computed and 4 where
    passes are summed; 12 for float32 weights and two moments. In fp32: 4, 4 and 8. Stage 1 partitions the optimizer's
    states among ranks, stage 2 the gradients too, stage 3 the weights too. Two moving references are float32 copies
    beside the optimizer's states, partitioned as these are.

    Args:
        trained: parameters that are trained; with adapters far fewer than `parameters`.
        moving: whether there are moving references.
    """
    copies = 8 * moving
    part = [1 / ranks if stage >= at else 1.0 for at in (1, 2, 3)]
    if not half:
        return States(4 * parameters * part[2], 4 * trained * part[1], (8 + copies) * trained * part[0])
    made = 2 * trained if stage < 2 else 2 * min(trained, 5e8)  # DeepSpeed's bucket
    return States(2 * parameters * part[2], 4 * trained * part[1] + made, (12 + copies) * trained * part[0])


def activations(shape: Shape, tokens: float, checkpointing: bool) -> float:
    """Bytes that a forward pass of `tokens` tokens keeps for its backward pass, in bf16.

    For each token a layer keeps: the float32 input, the normalised input and the output of its two norms (16 h);
    queries, keys, values and output of the attention; and four products of the gated MLP (8 I). With checkpointing
    only each layer's input is kept, and one layer at a time is recomputed.
    """
    layer = 16 * shape.hidden + 4 * shape.queries + 4 * shape.keys + 8 * shape.inner
    return tokens * (2 * shape.hidden * shape.layers + layer if checkpointing else layer * shape.layers)


def head_pieces(shape: Shape, piece: float) -> float:
    """Bytes of the head's backward pass: a float32 gradient of its weights and its bf16 copy, logits in pieces."""
    return 6 * shape.head + 2.5 * piece
