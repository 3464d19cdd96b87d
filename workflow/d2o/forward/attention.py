"""Attention over a row of groups that computes each prompt once and nothing that is masked.

Registered with transformers as `d2o_shared`; the row's spans reach it as a keyword of the model's call.

On a CPU, a response's attention to its prompt and its attention to itself are two flash calls, merged by their
log-sum-exp (a cascade). In the backward pass, flash gets the merged output and log-sum-exp with each part, which
makes it exact: the softmax over a part then is that part of the whole softmax.
On a GPU one variable-length call does both: the keys of every response include those of its prompt.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from d2o.forward.rows import Span

NAME = "d2o_shared"

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
# The kernel of torch's own `varlen_attn`, which does not support fewer heads of keys before torch 2.12.
_flash_on_gpu = torch.ops.aten._flash_attention_forward
_flash_on_gpu_backward = torch.ops.aten._flash_attention_backward


def serves(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a kernel supports this type on this device: the variable-length kernel of GPUs has no float32."""
    return device.type != "cuda" or dtype in (torch.bfloat16, torch.float16)


def shared_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    *,
    scaling: float,
    spans: tuple[Span, ...],
    **unused,
) -> tuple[Tensor, None]:
    """Attention with the signature that transformers calls.

    Args:
        query: [1, H, L, D].
        key: [1, H_kv, L, D], each head serving H / H_kv heads of the query; so `value`.
        attention_mask: always None: the mask follows from `spans`.
        scaling: factor of the attention logits.
        spans: where the groups of the row lie; they cover it.
    Returns:
        [1, L, H, D], and None for the attention weights.
    """
    if query.is_cuda:
        return _VariableLength.apply(query, key, value, spans, scaling), None
    return _Cascade.apply(query, key, value, spans, scaling).transpose(1, 2), None


AttentionInterface.register(NAME, torch.compiler.disable(shared_attention))


class _Cascade(torch.autograd.Function):
    """Two flash calls merged; shapes as in `shared_attention`, the result [1, H, L, D]."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, spans: tuple[Span, ...], scale: float) -> Tensor:
        out = torch.empty_like(q.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)
        lse = torch.empty(q.shape[:-1], dtype=torch.float32)
        for segment in _segments(spans):
            out[:, :, segment], lse[:, :, segment] = _flash(
                q[:, :, segment], k[:, :, segment], v[:, :, segment], is_causal=True, scale=scale
            )
        for responses, prompt in _branches(spans):
            part, part_lse = _flash(q[:, :, responses], k[:, :, prompt], v[:, :, prompt], scale=scale)
            own, own_lse = out[:, :, responses], lse[:, :, responses]
            share = torch.sigmoid(part_lse - own_lse).unsqueeze(-1)
            own.copy_(torch.lerp(own.float(), part.float(), share))
            own_lse.copy_(torch.logaddexp(own_lse, part_lse))
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.spans, ctx.scale = spans, scale
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        # In float32: flash's backward in bf16 takes 1.2 to 3 times as long on short sequences.
        *saved, lse = ctx.saved_tensors
        q, k, v, out, grad = (x.float() for x in (*saved, grad))

        def part(queries: slice, keys: slice, causal: bool):
            of_queries = (x[:, :, queries] for x in (grad, q))
            of_keys = (x[:, :, keys] for x in (k, v))
            merged = (x[:, :, queries] for x in (out, lse))
            return _flash_backward(*of_queries, *of_keys, *merged, 0.0, causal, scale=ctx.scale)

        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        for segment in _segments(ctx.spans):
            dq[:, :, segment], dk[:, :, segment], dv[:, :, segment] = part(segment, segment, True)
        for responses, prompt in _branches(ctx.spans):
            more_q, more_k, more_v = part(responses, prompt, False)
            dq[:, :, responses] += more_q
            dk[:, :, prompt] += more_k
            dv[:, :, prompt] += more_v
        return *(x.to(saved[0].dtype) for x in (dq, dk, dv)), None, None


class Sequences(NamedTuple):
    """Queries and keys of a row as sequences for a variable-length kernel, causal from the bottom right.

    Attributes:
        keys: int64 [T_k], the row's token of each key; a prompt is repeated for each of its responses.
        query_starts: int32 [N+1], where each sequence's queries begin; the queries are the row as it is.
        key_starts: int32 [N+1], likewise for the keys.
        longest_query: tokens.
        longest_key: tokens.
    """

    keys: Tensor
    query_starts: Tensor
    key_starts: Tensor
    longest_query: int
    longest_key: int


@lru_cache(maxsize=4)  # all layers ask for the same
def sequences(spans: tuple[Span, ...], device: torch.device) -> Sequences:
    """Every prompt as a sequence of its own, and every response as queries whose keys begin with its prompt's."""
    keys, queries = [], []
    for span in spans:
        start, length = span.prompt
        prompt = torch.arange(start, start + length)
        queries += [length, *(n for _, n in span.responses)]
        keys += [prompt, *(torch.cat([prompt, torch.arange(first, first + n)]) for first, n in span.responses)]
    lengths = torch.tensor([queries, [len(k) for k in keys]])
    starts = torch.nn.functional.pad(lengths.cumsum(1), (1, 0)).int().to(device)
    longest = lengths.amax(1).tolist()
    return Sequences(torch.cat(keys).to(device), starts[0], starts[1], *longest)


class _VariableLength(torch.autograd.Function):
    """One call of a variable-length kernel, for bf16 and fp16 on a GPU; shapes as in `shared_attention`.

    A prompt's key has a copy for each of its responses. The copies are not kept, but made again in the backward pass.
    """

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, spans: tuple[Span, ...], scale: float) -> Tensor:
        plan = sequences(spans, q.device)
        q, k, v = (x[0].transpose(0, 1).contiguous() for x in (q, k, v))
        out, *kept, _ = _flash_on_gpu(
            q,
            k[plan.keys],
            v[plan.keys],
            *plan[1:],
            dropout_p=0.0,
            is_causal=True,
            return_debug_mask=False,
            scale=scale,
        )
        ctx.save_for_backward(q, k, v, out, *kept)
        ctx.plan, ctx.scale = plan, scale
        return out[None]

    @staticmethod
    def backward(ctx, grad: Tensor):
        q, k, v, out, lse, *random = ctx.saved_tensors
        plan = ctx.plan
        inputs = grad[0].contiguous(), q, k[plan.keys], v[plan.keys], out, lse
        dq, dk, dv = _flash_on_gpu_backward(*inputs, *plan[1:], 0.0, True, *random, scale=ctx.scale)
        grads = dq, _sum_of_copies(dk, plan.keys, len(k)), _sum_of_copies(dv, plan.keys, len(v))
        return *(x.transpose(0, 1)[None] for x in grads), None, None


def _sum_of_copies(copies: Tensor, of: Tensor, count: int) -> Tensor:
    """The gradient of each of `count` keys from those of its copies, summed in float32.

    On an H200, with pools of eleven, its relative error is 0.0032; summed in bf16 it would be 0.0044.
    """
    total = torch.zeros(count, *copies.shape[1:], dtype=torch.float32, device=copies.device)
    return total.index_add_(0, of, copies.float()).to(copies.dtype)


def _segments(spans: tuple[Span, ...]) -> Iterator[slice]:
    """Every prompt and every response: tokens that attend to each other causally."""
    for span in spans:
        for start, length in (span.prompt, *span.responses):
            yield slice(start, start + length)


def _branches(spans: tuple[Span, ...]) -> Iterator[tuple[slice, slice]]:
    """The responses of each group, which are contiguous, and the prompt that all of them attend to."""
    for span in spans:
        start, length = span.prompt
        stop, last = span.responses[-1]
        yield slice(start + length, stop + last), slice(start, start + length)
