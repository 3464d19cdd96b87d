"""What a reward model reads and the raw score it gives: templates, cutting, batches.

Training and scoring both go through here, so a reward model is never asked about a text in another form than
the one it learnt from.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from d2o import devices
from d2o.chat import Messages
from d2o.errors import D2OError
from d2o.settings import Reward

if TYPE_CHECKING:
    from torch import Tensor

# Token ids, and for a pair of segments the segment of each token.
Encoding = dict[str, list[int]]

_FIELD = re.compile(r"\{(prompt|response)\}")


# From a conversation to tokens -------------------------------------------------------------------


def encode(tokenizer, template: str, messages: Messages, response: str, limit: int) -> tuple[Encoding, bool]:
    """What a reward model reads, and whether it had to be cut: of a long input the last `limit` tokens stay.

    Args:
        template: `chat`, `pair`, or a text with {response} and maybe {prompt}, which the end token follows.
    Raises:
        D2OError: where `chat` is asked of a tokenizer that has no chat template.
    """
    if template == "pair":
        pair = tokenizer(messages[-1]["content"], response)
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
    conversation = [*messages, {"role": "assistant", "content": response}]
    text = tokenizer.apply_chat_template(conversation, tokenize=False)
    return tokenizer(text, add_special_tokens=False).input_ids


def _text_ids(tokenizer, template: str, messages: Messages, response: str) -> list[int]:
    # The template introduces the first turn; later ones name their role.
    first, *others = messages
    prompt = first["content"] + "".join(f" {turn['role'].upper()}: {turn['content']}" for turn in others)
    parts = {"prompt": prompt, "response": response}
    ids = tokenizer(_FIELD.sub(lambda field: parts[field[1]], template)).input_ids
    end = tokenizer.eos_token_id
    return ids if end is None or ids[-1] == end else [*ids, end]


def _cut(tokenizer, encoding: Encoding, limit: int) -> Encoding:
    """The end of an input, at most `limit` tokens; a special token that opens it stays."""
    ids = encoding["input_ids"]
    if len(ids) <= limit:
        return encoding
    # Encoders such as DeBERTa read their score off the first token.
    head = int(ids[0] in (tokenizer.bos_token_id, tokenizer.cls_token_id))
    return {key: values[:head] + values[len(ids) - limit + head :] for key, values in encoding.items()}


def batches(lengths: Sequence[int], tokens: int) -> list[list[int]]:
    """Indices of inputs, longest first, at most `tokens` a batch with its padding; a longer one stands alone."""
    found: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if found and (len(found[-1]) + 1) * lengths[found[-1][0]] <= tokens:
            found[-1].append(index)
        else:
            found.append([index])
    return found


# From tokens to a score --------------------------------------------------------------------------


def head_weights(folder: Path, name: str) -> Tensor | None:
    """One tensor out of the safetensors of a folder, or None."""
    from safetensors import safe_open

    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            if name in file.keys():  # noqa: SIM118 (no mapping)
                return file.get_tensor(name)
    return None


def is_classifier(architectures: Sequence[str] | None) -> bool:
    """Whether transformers knows a checkpoint's head by itself."""
    return any(name.endswith("ForSequenceClassification") for name in architectures or ())


def load(reward: Reward, folder: Path):
    """A reward model ready to score, in the precision of its checkpoint, and its tokenizer.

    Raises:
        D2OError: where a weight of the model is not in the checkpoint: it would be random.
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
        dtype="auto",
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
    """`tokens`, or the positions that a model has where these are fewer."""
    return min(tokens, getattr(model.config.get_text_config(), "max_position_embeddings", tokens))


def forward(model, encodings: Sequence[Encoding]) -> Tensor:
    """Raw scores of a batch, without a sigmoid: float32 [N], on the model's device."""
    import torch

    # A causal classifier scores the last token that is not padding. Many tokenizers pad with the end token, so
    # an input that ends in one would be scored too early: pad with a token that no input of the batch ends in.
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
    """[N, L] outputs of a head → [N] scores: the one output, or the log-odds of the label that is scored."""
    label = getattr(config, "scored_label", None)
    if label is None:
        return logits[:, 0]
    index = next(index for index, name in config.id2label.items() if name == label)
    if config.problem_type == "multi_label_classification":
        return logits[:, index]
    others = [other for other in range(logits.shape[1]) if other != index]
    return logits[:, index] - logits[:, others].logsumexp(1)


def score_all(model, encodings: Sequence[Encoding], tokens: int, description: str) -> list[float]:
    """The score of every input, in their order, `tokens` tokens a batch.

    Raises:
        D2OError: where a score is not a finite number.
    """
    import torch
    from tqdm import tqdm

    scores = [math.nan] * len(encodings)
    with (
        torch.inference_mode(),
        tqdm(total=len(encodings), desc=description, unit="answers", mininterval=2) as bar,
    ):
        for batch in batches([len(encoding["input_ids"]) for encoding in encodings], tokens):
            values = forward(model, [encodings[index] for index in batch]).tolist()
            for index, value in zip(batch, values, strict=True):
                scores[index] = value
            bar.update(len(batch))
    if not all(map(math.isfinite, scores)):
        raise D2OError(f"{description}: a score is not a finite number; is the checkpoint whole?")
    return scores
