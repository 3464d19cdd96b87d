"""The ways of doing one training step that are compared: ours and those of others.

A step is the forward, the loss and the backward on one or more groups, from their token ids on. It returns the
log-probs that it computed, so that every step can be checked to have done the same work. The ways share one set of
weights and of gradients.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AttentionInterface, PreTrainedModel

from d2o import losses
from d2o.forward import Policy, Row
from d2o.forward.head import token_logprobs
from d2o.groups import Group
from d2o.losses import Side
from workload import Work, packed_work, padded_work, pairs, shared_work


@dataclass(frozen=True)
class Peer:
    """One way of doing a step.

    Attributes:
        model: holds the weights and, after a step, their gradients.
        step: forward, loss and backward; returns the log-prob of each response of the groups, float32 [R], nats.
        work: the work of a step on the groups.
        view: turns a group into the groups that this way computes.
    """

    model: nn.Module
    step: Callable[[Sequence[Group]], Tensor]
    work: Callable[[Sequence[Group]], Work]
    view: Callable[[Group], list[Group]] = lambda group: [group]

    def groups(self, groups: Sequence[Group]) -> list[Group]:
        """The groups that this way computes."""
        return list(chain.from_iterable(map(self.view, groups)))


def ours(lm: PreTrainedModel) -> Peer:
    """One row that holds each prompt once; the head on the responses' tokens, in pieces."""
    policy = Policy(twin(lm))

    def step(groups: Sequence[Group]) -> Tensor:
        return _descend(policy(Row.of(groups).to(lm.device)), groups)

    return Peer(policy, step, shared_work)


def each_negative(lm: PreTrainedModel) -> Peer:
    """Ours, with one group and one pass per negative: prompt and positives are computed again for each negative."""
    alone = ours(lm)

    def step(groups: Sequence[Group]) -> Tensor:
        return torch.cat([alone.step([group]) for group in groups])

    return Peer(alone.model, step, alone.work, lambda group: [replace(group, negatives=[n]) for n in group.negatives])


def padded_full_logits(lm: PreTrainedModel) -> Peer:
    """A padded row for each response, and the log-softmax of all logits in float32, as the authors of DPO do it
    (github.com/eric-mitchell/direct-preference-optimization)."""
    lm = twin(lm)

    def step(groups: Sequence[Group]) -> Tensor:
        ids, mask, scored = _padded(groups, lm.device)
        logits = lm(input_ids=ids, attention_mask=mask, use_cache=False).logits.float()
        tokens = logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None]).squeeze(2)
        return _descend(tokens[scored], groups)

    return Peer(lm, step, lambda groups: padded_work(groups, all_scored=True, head_passes=3))


def padded_chunked(lm: PreTrainedModel) -> Peer:
    """A padded row for each response; our head."""
    lm = twin(lm)

    def step(groups: Sequence[Group]) -> Tensor:
        ids, mask, scored = _padded(groups, lm.device)
        states = lm.get_decoder()(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        targets = ids[:, 1:][scored]
        return _descend(token_logprobs(states[:, :-1][scored], lm.lm_head.weight, targets), groups)

    return Peer(lm, step, padded_work)


def same_head_pairs(lm: PreTrainedModel) -> Peer:
    """The K pairs as 2K padded rows; our head, cached references as in ours. With one pair D2O's loss is DPO's."""
    rows = padded_chunked(lm)
    return Peer(rows.model, rows.step, rows.work, pairs)


def packed_chunked(lm: PreTrainedModel) -> Peer:
    """One row of all sequences, each with its prompt; flash attention in each, on a GPU in one call; our head."""
    lm = twin(lm)
    lm.set_attn_implementation(_PACKED)

    def step(groups: Sequence[Group]) -> Tensor:
        sequences = _sequences(groups, lm.device)
        lengths = [len(sequence) for sequence, _ in sequences]
        ids = torch.cat([sequence for sequence, _ in sequences])
        scored = torch.cat([is_response for _, is_response in sequences])
        positions = torch.cat([torch.arange(length, device=lm.device) for length in lengths])
        starts = nn.functional.pad(torch.tensor(lengths).cumsum(0), (1, 0)).int().to(lm.device)
        states = lm.get_decoder()(
            input_ids=ids[None], position_ids=positions[None], use_cache=False, lengths=lengths, starts=starts
        ).last_hidden_state[0]
        sources = scored.nonzero().squeeze(1) - 1
        return _descend(token_logprobs(states[sources], lm.lm_head.weight, ids[scored]), groups)

    return Peer(lm, step, packed_work)


_PACKED = "benchmark_packed"


def _packed_attention(
    module, query, key, value, attention_mask, *, scaling: float, lengths: list[int], starts: Tensor, **unused
):
    """Causal attention within each sequence of a row, with the signature that transformers calls."""
    if query.is_cuda:
        whole = (x[0].transpose(0, 1).contiguous() for x in (query, key, value))
        flash = torch.ops.aten._flash_attention_forward
        longest = max(lengths)
        return flash(*whole, starts, starts, longest, longest, 0.0, True, False, scale=scaling)[0][None], None
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    stretches = zip(*(x.split(lengths, dim=2) for x in (query, key, value)), strict=True)
    outputs = [flash(*stretch, is_causal=True, scale=scaling)[0] for stretch in stretches]
    return torch.cat(outputs, dim=2).transpose(1, 2), None


AttentionInterface.register(_PACKED, _packed_attention)


def trl(lm: PreTrainedModel, *, checkpointing: bool = False, cached: bool = False) -> Peer:
    """TRL's own DPOTrainer on the K pairs: its collator, its loss with all its metrics, its backward.

    The trainer first makes one real step of its own on a toy data set, which sets it up; a step here is then what its
    loop does with one batch. Without Triton, TRL's head computes every position, not only those of the responses.

    Args:
        checkpointing: recompute the layers in the backward pass, TRL's default.
        cached: take the reference's log-probs from the data instead of from a second model in each step.
    """
    trainer = _trl_trainer(lm, checkpointing, cached)
    on_cpu = lm.device.type == "cpu"
    logprobs = []
    trainer.model.register_forward_hook(lambda module, inputs, outputs: logprobs.append(outputs.log_probs.detach()))

    def step(groups: Sequence[Group]) -> Tensor:
        logprobs.clear()
        batch = trainer.data_collator([_trl_row(group, cached) for group in groups])
        trainer.training_step(trainer.model_wrapped, batch)
        return logprobs[0].sum(1).view(2, -1).T.flatten()  # the chosen ones come first, then the rejected ones

    # PyTorch recomputes a checkpointed layer without its last product: a quarter of the weights in SmolLM2's shape.
    passes = {"passes": 4 - cached + 0.75 * checkpointing, "head_passes": 5 - cached}

    def work(groups: Sequence[Group]) -> Work:
        return padded_work(groups, all_scored=on_cpu, **passes)

    return Peer(trainer.model, step, work, pairs)


def _trl_trainer(lm: PreTrainedModel, checkpointing: bool, cached: bool):
    """TRL's trainer after one step of its own with learning rate 0."""
    from datasets import Dataset, disable_progress_bars
    from transformers import PrinterCallback
    from trl import DPOConfig, DPOTrainer

    disable_progress_bars()
    with tempfile.TemporaryDirectory() as folder:
        config = DPOConfig(
            output_dir=folder,
            use_cpu=lm.device.type == "cpu",
            bf16=lm.dtype == torch.bfloat16,
            gradient_checkpointing=checkpointing,
            precompute_ref_log_probs=cached,
            max_length=None,
            optim="sgd",
            learning_rate=0.0,
            max_steps=1,
            per_device_train_batch_size=1,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
        )
        trainer = DPOTrainer(
            model=twin(lm),
            ref_model=None if cached else copy.deepcopy(lm),
            args=config,
            train_dataset=Dataset.from_list([{"prompt": "x", "chosen": " x", "rejected": " x x"}]),
            processing_class=_toy_tokenizer(),
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return trainer


def _trl_row(group: Group, cached: bool) -> dict:
    (chosen,), (rejected,) = group.positives, group.negatives
    row = {"prompt_ids": group.prompt, "chosen_ids": chosen.ids, "rejected_ids": rejected.ids}
    references = {"ref_chosen_logps": chosen.reference_logprob, "ref_rejected_logps": rejected.reference_logprob}
    return row | references if cached else row


def _toy_tokenizer():
    """A tokenizer of one word; TRL's trainer requires a tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1, "x": 2}, unk_token="x"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")


PEERS: dict[str, Callable[[PreTrainedModel], Peer]] = {
    "ours": ours,
    "each_negative": each_negative,
    "packed_chunked": packed_chunked,
    "padded_chunked": padded_chunked,
    "padded_full_logits": padded_full_logits,
    "same_head_pairs": same_head_pairs,
    "trl": trl,
    "trl_cached": lambda lm: trl(lm, cached=True),
    "trl_checkpointing": lambda lm: trl(lm, checkpointing=True),
}


def twin(lm: PreTrainedModel) -> PreTrainedModel:
    """A copy that shares weights and gradients with the model, but has its own attention and head."""
    return copy.deepcopy(lm, {id(weight): weight for weight in lm.parameters()})


def _sequences(groups: Sequence[Group], device: torch.device) -> list[tuple[Tensor, Tensor]]:
    """For each response: the ids of prompt and response, and a mask of the response's tokens."""
    sequences = []
    for group in groups:
        for response in group.responses:
            ids = torch.tensor(group.prompt + response.ids, device=device)
            sequences.append((ids, torch.arange(len(ids), device=device) >= len(group.prompt)))
    return sequences


def _padded(groups: Sequence[Group], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids [B, T], their attention mask [B, T], and a mask of the responses' tokens among 1…T−1, [B, T−1]."""
    sequences = _sequences(groups, device)
    ids = pad_sequence([sequence for sequence, _ in sequences], batch_first=True)
    mask = pad_sequence([torch.ones_like(sequence) for sequence, _ in sequences], batch_first=True)
    scored = pad_sequence([is_response for _, is_response in sequences], batch_first=True)
    return ids, mask, scored[:, 1:]


def _descend(tokens: Tensor, groups: Sequence[Group]) -> Tensor:
    """D2O's mean loss over the negatives and its backward, from the log-probs of the responses' tokens, [T].

    Returns:
        The log-prob of each response, [R], nats.
    """
    sides = list(_sides(tokens, groups))
    terms = chain.from_iterable(losses.terms(up, down) for up, down in zip(sides[::2], sides[1::2], strict=True))
    torch.stack([losses.d2o(*pair, beta=0.1, alpha=0.1) for pair in terms]).mean().backward()
    return torch.cat([side.logprobs.detach() for side in sides])


def _sides(tokens: Tensor, groups: Sequence[Group]) -> Iterator[Side]:
    """Positives and negatives of each group in turn."""
    sides = [side for group in groups for side in (group.positives, group.negatives)]
    lengths = [[len(response.ids) for response in side] for side in sides]
    for side, n, part in zip(sides, lengths, tokens.split([sum(n) for n in lengths]), strict=True):
        references = torch.tensor([response.reference_logprob for response in side], device=tokens.device)
        yield Side.of(part, torch.tensor(n, device=tokens.device), references)
