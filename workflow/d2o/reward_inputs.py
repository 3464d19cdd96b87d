"""Inputs and raw scores of reward models: templates, cutting to length, batches.

Training and scoring both use this module, so a reward model scores texts in the form that it was trained on.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Hashable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from d2o import devices, dtypes
from d2o.chat import Messages, as_data, conversation
from d2o.errors import D2OError
from d2o.settings import Reward

if TYPE_CHECKING:
    from torch import Tensor

    from d2o.forward import Row

# `input_ids`, and for a pair of segments `token_type_ids`: the segment of each token.
Encoding = dict[str, list[int]]

_FIELD = re.compile(r"\{(prompt|response)\}")


# From a conversation to tokens -------------------------------------------------------------------


def encode(tokenizer, template: str, messages: Messages, response: str, limit: int) -> tuple[Encoding, bool]:
    """The tokens that a reward model reads, and whether they were cut. A long input keeps its last `limit` tokens.

    Args:
        template: `chat` (the tokenizer's chat template), `pair` (last turn and response as two segments), or a text
            with {response} and, if the model reads the prompt too, {prompt}. The end token is added to such a text.
        limit: tokens.
    Raises:
        D2OError: if the template is `chat` and the tokenizer has no chat template.
    """
    if template == "pair":
        pair = tokenizer(as_data(tokenizer, messages[-1]["content"]), as_data(tokenizer, response))
        encoding = {key: pair[key] for key in ("input_ids", "token_type_ids") if key in pair}
    elif template == "chat":
        encoding = {"input_ids": _chat_ids(tokenizer, messages, response)}
    else:
        encoding = {"input_ids": _text_ids(tokenizer, template, messages, response)}
    return _cut(tokenizer, encoding, limit), len(encoding["input_ids"]) > limit


def _chat_ids(tokenizer, messages: Messages, response: str) -> list[int]:
    if not tokenizer.chat_template:
        raise D2OError(
            f"{tokenizer.name_or_path}: the reward model has no chat template; "
            f"set `template` to `pair` or to a text with {{prompt}} and {{response}}"
        )
    text = conversation(tokenizer, [*messages, {"role": "assistant", "content": response}])
    return tokenizer(text, add_special_tokens=False).input_ids


def _text_ids(tokenizer, template: str, messages: Messages, response: str) -> list[int]:
    # The template introduces the first turn. Each later turn is introduced by its role.
    first, *others = messages
    prompt = first["content"] + "".join(f" {turn['role'].upper()}: {turn['content']}" for turn in others)
    parts = {"prompt": as_data(tokenizer, prompt), "response": as_data(tokenizer, response)}
    ids = tokenizer(_FIELD.sub(lambda field: parts[field[1]], template)).input_ids
    end = tokenizer.eos_token_id
    return ids if end is None or ids[-1] == end else [*ids, end]


def _cut(tokenizer, encoding: Encoding, limit: int) -> Encoding:
    """The last `limit` tokens of an input. A special token at its beginning is kept as the first of them."""
    ids = encoding["input_ids"]
    if len(ids) <= limit:
        return encoding
    # Encoders such as DeBERTa compute the score from the first token.
    head = int(ids[0] in (tokenizer.bos_token_id, tokenizer.cls_token_id))
    return {key: values[:head] + values[len(ids) - limit + head :] for key, values in encoding.items()}


def batches(lengths: Sequence[int], tokens: int) -> list[list[int]]:
    """Batches of input indices, longest inputs first. A batch has at most `tokens` tokens, padding included.

    An input that is longer than `tokens` is a batch of its own.
    """
    batched: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batched and (len(batched[-1]) + 1) * lengths[batched[-1][0]] <= tokens:
            batched[-1].append(index)
        else:
            batched.append([index])
    return batched


# From tokens to a score --------------------------------------------------------------------------


def head_weights(folder: Path, name: str) -> Tensor | None:
    """The tensor `name` from the safetensors files of a folder; None if they do not have it."""
    from safetensors import safe_open

    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            if name in file.keys():  # noqa: SIM118 (no mapping)
                return file.get_tensor(name)
    return None


def is_classifier(architectures: Sequence[str] | None) -> bool:
    """Whether transformers loads the head of such a checkpoint without a mapping of names."""
    return any(name.endswith("ForSequenceClassification") for name in architectures or ())


def load(reward: Reward, folder: Path):
    """Load a reward model in the precision of its checkpoint, and its tokenizer.

    Raises:
        D2OError: if the checkpoint lacks a weight of the model, which would then be random.
    """
    import torch
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

    device = devices.device()
    trust = bool(reward.source and reward.source.trust_remote_code)
    outputs = {} if reward.label else {"num_labels": 1}
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust, **outputs)
    config.scored_label = reward.label
    head = reward.score_weights
    foreign = not is_classifier(config.architectures)
    model, info = AutoModelForSequenceClassification.from_pretrained(
        folder,
        config=config,
        dtype=dtypes.checkpoint_dtype(),
        key_mapping={rf"^{re.escape(head)}\.": "score."} if foreign else None,
        output_loading_info=True,
        trust_remote_code=trust,
    )
    if missing := info["missing_keys"]:
        raise D2OError(
            f"{folder}: no weights for {', '.join(sorted(missing))} in the checkpoint, scores would be random; "
            f"name the head's weights in score_weights (now {head!r})"
        )
    if foreign and (bias := head_weights(folder, f"{head}.bias")) is not None:
        model.score.bias = torch.nn.Parameter(bias.to(model.dtype))
    model.to(device).eval()
    return model, AutoTokenizer.from_pretrained(folder, trust_remote_code=trust)


def token_limit(model, tokens: int) -> int:
    """The smaller one of `tokens` and the number of positions of a model."""
    return min(tokens, getattr(model.config.get_text_config(), "max_position_embeddings", tokens))


def forward(model, encodings: Sequence[Encoding]) -> Tensor:
    """Raw scores of a batch, [N] float32 on the model's device. No sigmoid is applied."""
    import torch

    # A causal classifier takes the score at the last token that is not the padding token. Many tokenizers pad with
    # the end token; then an input that ends with the end token would be scored one token too early. So the batch is
    # padded with a token with which none of its inputs ends.
    ends = {encoding["input_ids"][-1] for encoding in encodings}
    pad = next(token for token in range(len(ends) + 1) if token not in ends)
    model.config.get_text_config().pad_token_id = pad

    lengths = torch.tensor([len(encoding["input_ids"]) for encoding in encodings], device=model.device)
    width = int(lengths.max())
    batch = {
        key: torch.tensor(
            [e[key] + [pad if key == "input_ids" else 0] * (width - len(e[key])) for e in encodings],
            device=model.device,
        )
        for key in encodings[0]
    }
    mask = (torch.arange(width, device=model.device) < lengths[:, None]).long()
    return _log_odds(model.config, model(**batch, attention_mask=mask).logits.float())


def _log_odds(config, logits: Tensor) -> Tensor:
    """[N, L] outputs of a head → [N] scores: the only output, or the log-odds of the label that is scored."""
    label = getattr(config, "scored_label", None)
    if label is None:
        return logits[:, 0]
    index = next(index for index, name in config.id2label.items() if name == label)
    if config.problem_type == "multi_label_classification":
        return logits[:, index]
    others = [other for other in range(logits.shape[1]) if other != index]
    return logits[:, index] - logits[:, others].logsumexp(1)


def score_all(
    model, encodings: Sequence[Encoding], owners: Sequence[Hashable], tokens: int, description: str
) -> list[float]:
    """The score of every input, in the order of the inputs, computed in batches of at most `tokens` tokens.

    The answers to one prompt share its states where the model allows it. If that gives other scores than padded rows,
    padded rows are used and a line reports it.

    Args:
        owners: the prompt that each input answers.
    Raises:
        D2OError: if a score is not a finite number.
    """
    import torch
    from tqdm import tqdm

    scores = [math.nan] * len(encodings)

    def keep(places: Sequence[int], values: Tensor) -> None:
        for place, value in zip(places, values.tolist(), strict=True):
            scores[place] = value
        bar.update(len(places))

    with (
        torch.inference_mode(),
        tqdm(total=len(encodings), desc=description, unit="answers", mininterval=2) as bar,
    ):
        for places, values in _shared(model, encodings, owners, tokens):
            keep(places, values)
        rest = [place for place in range(len(encodings)) if math.isnan(scores[place])]
        for batch in batches([len(encodings[place]["input_ids"]) for place in rest], tokens):
            places = [rest[index] for index in batch]
            keep(places, forward(model, [encodings[place] for place in places]))
    if not all(map(math.isfinite, scores)):
        raise D2OError(f"{description}: a score is not a finite number; is the checkpoint whole?")
    return scores


def _shared(
    model, encodings: Sequence[Encoding], owners: Sequence[Hashable], tokens: int
) -> Iterator[tuple[list[int], Tensor]]:
    """Indices and scores of the inputs that share a beginning, row by row; none if padded rows give other scores.

    The two are compared on a first small row.
    """
    from d2o import reward_groups

    if not reward_groups.serves(model):
        return
    inputs, plain = [encoding["input_ids"] for encoding in encodings], model.config._attn_implementation

    def scores(row: Row) -> Tensor:
        values = _log_odds(model.config, reward_groups.logits(model, row))
        model.set_attn_implementation(plain)
        return values

    for places, row in islice(reward_groups.rows(inputs, owners, reward_groups.COMPARED), 1):
        padded = forward(model, [encodings[place] for place in places])
        difference = float((scores(row) - padded).abs().max())
        if difference > reward_groups.TOLERANCE[model.dtype]:
            print(
                f"scores: with a shared prompt they differ from those of padded rows by {difference:.1e}; each "
                f"answer is scored in a padded row of its own",
                file=sys.stderr,
            )
            return
    for places, row in reward_groups.rows(inputs, owners, tokens):
        yield places, scores(row)
