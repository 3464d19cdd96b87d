"""A causal language model that returns the log-probs of response tokens."""

from __future__ import annotations

import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, PreTrainedModel

from d2o import dtypes, model_folders
from d2o.errors import D2OError
from d2o.forward import attention
from d2o.forward.head import token_logprobs
from d2o.forward.memory import keep_freed_memory
from d2o.forward.rows import Row
from d2o.groups import Group, packs

Route = Literal["shared", "dense", "padded"]

# Architectures in which tokens interact only in the attention that is replaced; tested one by one.
SHARING = ("llama", "qwen2", "qwen3", "phi3", "gpt_neox")
# Keys of a model's configuration that change logits after the head, or those inside attention.
_ON_LOGITS = ("final_logit_softcapping", "logit_scale", "logits_scaling")
# Tokens on which two routes are compared, a prompt counted once.
COMPARED = 512
# Mean difference of a token's log-prob between two routes, in nats, above which it is not rounding. With SmolLM2-135M
# in bf16, on 80 to 161 response tokens, rounding gives 0.037 to 0.057 (on 12 to 36 of them up to 0.065), positions
# off by one 0.11 to 0.15, other wrong positions 0.19 to 0.9, a response that attends to another one 0.46 to 0.82.
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.08}


class Policy(nn.Module):
    """A causal language model that returns the log-probs of response tokens.

    Three routes give the same numbers. `shared` computes each prompt once and nothing that is masked. `dense` runs
    the same row under a dense mask, to test `shared` and where that has no kernel. `padded` gives each response its
    own row with its prompt, for models that `shared` does not support.

    Attributes:
        lm: the wrapped model.
        route: the route that is used.
    """

    def __init__(self, lm: PreTrainedModel, route: Route = "shared"):
        """
        Args:
            lm: its dropout is removed, also in training mode: policy and reference must agree at the first step.
        Raises:
            D2OError: for a model that scales or caps its logits after the head, or adds a bias there.
        """
        super().__init__()
        config, head = lm.config, lm.get_output_embeddings()
        for key in _ON_LOGITS:
            if getattr(config, key, None):
                raise D2OError(f"{config.model_type}: {key} is not supported; choose a model without it")
        if head.bias is not None:
            raise D2OError(f"{config.model_type}: a bias in the head is not supported; choose a model without it")
        if route == "shared" and config.model_type not in SHARING:
            _say_padded(f"{config.model_type} is not known to share prompts ({', '.join(SHARING)} are)")
            route = "padded"
        _without_dropout(lm)
        # The head is called as a module, so that ZeRO 3 gathers its weight.
        head.forward = types.MethodType(lambda self, states, ids: token_logprobs(states, self.weight, ids), head)
        self.lm, self.route = lm, route

    def forward(self, row: Row) -> Tensor:
        """Log-probs of all response tokens of a row, in order.

        Returns:
            float32 [T], nats.
        """
        window = getattr(self.lm.config, "sliding_window", None)
        plain = self.route == "padded" or (window and row.reach > window)  # only plain rows support a window
        states = self._padded(row) if plain else self._as_one(row)
        return self.lm.get_output_embeddings()(states, row.targets)

    def _as_one(self, row: Row) -> Tensor:
        """States [T, d] that predict the response tokens, from the row as it is."""
        if self.route == "shared" and not attention.serves(row.ids.device, self.lm.dtype):
            name = str(self.lm.dtype).removeprefix("torch.")
            print(
                f"forward: no GPU kernel leaves out what is masked in {name}; rows run under a dense mask, which "
                "takes more time and memory: set forward.precision: bf16 if that will do",
                file=sys.stderr,
            )
            self.route = "dense"
        if self.route == "shared":
            states = self._states(attention.NAME, row.ids, position_ids=row.positions, spans=row.spans)
        else:
            states = self._states("sdpa", row.ids, position_ids=row.positions, attention_mask=row.mask())
        return states[0, row.sources]

    def _padded(self, row: Row) -> Tensor:
        """The same states, from one sequence per response, padded on the right; group by group, to save memory."""
        response_states = []
        for span in row.spans:
            start, length = span.prompt
            prompt = row.ids[0, start : start + length]
            rows = [torch.cat([prompt, row.ids[0, first : first + n]]) for first, n in span.responses]
            mask = pad_sequence([torch.ones_like(r) for r in rows], batch_first=True)
            states = self._states("sdpa", pad_sequence(rows, batch_first=True), attention_mask=mask)
            response_states += [states[i, length - 1 : length - 1 + n] for i, (_, n) in enumerate(span.responses)]
        return torch.cat(response_states)

    def _states(self, kernel: str, ids: Tensor, **layout) -> Tensor:
        if self.lm.config._attn_implementation != kernel:
            self.lm.set_attn_implementation(kernel)
        return self.lm.get_decoder()(input_ids=ids, use_cache=False, **layout).last_hidden_state

    def check(self, groups: Sequence[Group], device: torch.device) -> None:
        """Compare this route with `padded`; where they differ by more than rounding, use `padded` and print why.

        Every start does this: otherwise a new release of a library, or a model with its own kind of attention, could
        train on wrong numbers without a warning.

        Args:
            groups: the longest of them are compared, by prompt and longest response, `COMPARED` tokens in all.
        """
        longest = sorted(groups, key=lambda g: len(g.prompt) + max(len(r.ids) for r in g.responses), reverse=True)
        row = Row.of(packs(longest, COMPARED)[0]).to(device)
        with torch.no_grad():
            ours, route = self(row), self.route
            self.route = "padded"
            difference = float((ours - self(row)).abs().mean())
        if difference <= _TOLERANCE[self.lm.dtype]:
            self.route = route
        else:
            _say_padded(f"the {route} forward differs from the padded one by {difference:.1e} nats a token")

    @torch.no_grad()
    def sums(self, row: Row) -> Tensor:
        """Log-prob of each response of a row, without gradient: float32 [R], nats."""
        return torch.stack([tokens.sum() for tokens in self(row).split(row.lengths.tolist())])


def _without_dropout(lm: PreTrainedModel) -> None:
    for module in lm.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0


def _say_padded(problem: str) -> None:
    print(f"forward: {problem}; each response runs in a padded row of its own, several times slower", file=sys.stderr)


def load(folder: Path, precision: str, route: Route = "shared", device: str = "cpu") -> Policy:
    """The model of a folder, with weights in `bf16` or `fp32`; `auto` as `dtypes.precision`.

    Args:
        device: as of `devices.device`. Weights that are stored in another precision are converted there, and do not
            pass through the machine's memory.
    """
    if device == "cpu":
        keep_freed_memory()
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[dtypes.precision(precision)]
    trust = model_folders.trusts_code(folder)
    lm = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, trust_remote_code=trust, device_map=device)
    return Policy(lm, route)
