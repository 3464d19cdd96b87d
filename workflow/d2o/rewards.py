"""Stage `rewards`: one folder for each reward model, with links to an existing model or with a model trained here.

A model trained here is a backbone with a new head. Its loss is cross-entropy on answers labelled safe or unsafe, plus
the pairwise loss of Bradley and Terry on preferred answers, as for the cost model of Safe RLHF (Dai et al.,
2310.12773). It is trained on prompts of the train split only. Its manifest holds its AUC on the test split, and its
accuracy on pairs of answers to one prompt there.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from d2o import devices, dtypes, hub, model_folders, records, reward_inputs, schemas, statistics
from d2o.chat import Messages
from d2o.errors import D2OError
from d2o.settings import Reward
from d2o.texts import visible

if TYPE_CHECKING:
    from torch import Tensor


def make(reward: Reward, backbone: Path | None, rows: Path | None, negatives: Path | None, folder: Path) -> None:
    """Make the folder of a reward model.

    Args:
        backbone: model folder to train a head on. This, `rows` and `negatives` are needed for `reward.train` only.
        rows: a `schemas.ROWS` table with human labels.
        negatives: a `schemas.NEGATIVES` table; its column `split` states which prompts are train and which test.
    Raises:
        D2OError: if the source is not a reward model, or the rows have no label to learn from.
    """
    if reward.source:
        with records.artifact(folder, reward) as draft:
            draft.facts["source"] = str(_link(reward, draft.path))
        return
    if backbone is None or rows is None or negatives is None:
        raise D2OError("rewards: training a reward model needs --backbone, --rows and --negatives")
    examples = _read(rows, negatives)
    with records.artifact(folder, reward, [backbone / "manifest.json", rows, negatives]) as draft:
        draft.facts |= _train(reward, backbone, examples["train"], draft.path)
        draft.facts |= _held_out(reward, draft.path, examples["test"])


# A reward model that exists ----------------------------------------------------------------------


def _link(reward: Reward, folder: Path) -> Path:
    """Fill `folder` with links to the checkpoint, which is not copied. Returns the folder of the checkpoint."""
    located = hub.locate(reward.source)
    model_folders.check_source(located)
    _check_head(located, reward.score_weights, reward.label)
    folder.mkdir()
    model_folders.link(located, folder)
    return located


def _check_head(folder: Path, name: str, label: str | None) -> None:
    """Check, without loading the model, that the head of a checkpoint has the output `label`, or just one output."""
    config = model_folders.configuration(folder)
    architectures, labels = config.get("architectures") or [], config.get("id2label") or {}
    if not _is_list_of_texts(architectures) or not isinstance(labels, dict):
        raise D2OError(f"{folder}/config.json: `architectures` is no list of texts, or `id2label` no object; mend it")
    if label is not None:
        known = list(labels.values())
        if label not in known:
            names = ", ".join(visible(str(name)) for name in known) or "none"
            raise D2OError(f"{folder}: no label {label!r}; set `label` to one of: {names}")
        return
    if reward_inputs.is_classifier(architectures):
        outputs = config.get("num_labels") or len(labels) or 2  # two by default
    elif (weights := reward_inputs.head_weights(folder, f"{name}.weight")) is not None:
        outputs = len(weights)
    else:
        names = ", ".join(map(visible, architectures)) or "an unnamed architecture"
        raise D2OError(
            f"{folder}: {names} is no sequence classifier, and "
            f"the checkpoint has no {name}.weight; name the head's weights in score_weights"
        )
    if outputs != 1:
        raise D2OError(
            f"{folder}: the head has {outputs} outputs and a score is one: choose another model, or set `label`"
        )


def _is_list_of_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, str) for one in value)


# Human labels ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Example:
    """The answers of one preference row.

    Attributes:
        texts: the answers.
        safe: for each answer 1.0 if it is labelled safe, 0.0 if unsafe, NaN without a label.
        pairs: indices into `texts`: (preferred answer, other answer).
    """

    prompt_id: str
    messages: Messages
    texts: tuple[str, ...]
    safe: tuple[float, ...]
    pairs: tuple[tuple[int, int], ...]


def example(row: Mapping[str, Any]) -> Example | None:
    """The labels of a row of `schemas.ROWS` about safety; None if it has none.

    A safe answer is preferred to an unsafe one. If the labels do not decide, the `safer` answer is preferred.
    `better` is used only if the row has no label of safety at all, because in other rows it means more helpful.
    """
    labels = [answer["unsafe"] for answer in row["responses"]]
    couples = list(permutations(range(len(labels)), 2))
    pairs = [(i, j) for i, j in couples if labels[i] is False and labels[j] is True]
    preferred = row["safer"]
    if preferred is None and all(label is None for label in labels):
        preferred = row["better"]
    if not pairs and preferred is not None:
        pairs = [(i, j) for i, j in couples if i == preferred]
    if not pairs and all(label is None for label in labels):
        return None
    return Example(
        prompt_id=row["prompt_id"],
        messages=row["messages"],
        texts=tuple(answer["text"] for answer in row["responses"]),
        safe=tuple(math.nan if label is None else float(not label) for label in labels),
        pairs=tuple(pairs),
    )


def _read(rows: Path, negatives: Path) -> dict[str, list[Example]]:
    """The labelled rows of the train prompts and of the test prompts.

    Raises:
        D2OError: if the train prompts have neither both labels nor a preferred answer.
    """
    split = {
        row["prompt_id"]: row["split"]
        for batch in records.read_batches(negatives, schemas.NEGATIVES)
        for row in batch
    }
    examples: dict[str, list[Example]] = {"train": [], "test": []}
    for batch in records.read_batches(rows, schemas.ROWS):
        for row in batch:
            if (part := split.get(row["prompt_id"])) in examples and (labelled := example(row)):
                examples[part].append(labelled)
    labels = {label for labelled in examples["train"] for label in labelled.safe}
    if not {0.0, 1.0} <= labels and not any(labelled.pairs for labelled in examples["train"]):
        raise D2OError(
            f"{rows}: a reward model cannot be trained: no answer to a train prompt is labelled safe or "
            f"preferred to another, there are negatives only; give the reward a `source` in place of `train`"
        )
    return examples


# Training ----------------------------------------------------------------------------------------


def loss(scores: Tensor, safe: Tensor, pairs: Tensor) -> Tensor:
    """The mean cross-entropy of the labels plus the mean of −log σ(preferred − other) over the pairs; a scalar.

    Args:
        scores: [N] raw scores.
        safe: [N] 1 safe, 0 unsafe, NaN without a label.
        pairs: [P, 2] indices into `scores`, the preferred answer first.
    """
    from torch.nn import functional

    known = ~safe.isnan()
    labels = functional.binary_cross_entropy_with_logits(scores[known], safe[known], reduction="sum")
    preferences = -functional.logsigmoid(scores[pairs[:, 0]] - scores[pairs[:, 1]]).sum()
    return labels / max(int(known.sum()), 1) + preferences / max(len(pairs), 1)


def _train(reward: Reward, backbone: Path, examples: Sequence[Example], folder: Path) -> dict[str, Any]:
    """Train a head and the upper layers of a backbone, and save the model. Returns facts for the manifest."""
    import torch
    from tqdm import tqdm
    from transformers import (
        AutoModelForSequenceClassification,
        AutoTokenizer,
        get_linear_schedule_with_warmup,
        set_seed,
    )

    device = devices.device()
    plan = reward.train
    set_seed(plan.seed)  # the head's weights
    tokenizer = AutoTokenizer.from_pretrained(backbone)
    model = AutoModelForSequenceClassification.from_pretrained(backbone, num_labels=1, dtype=torch.float32)
    model.to(device).train()
    limit = reward_inputs.token_limit(model, plan.max_tokens)
    trained = _trained(model, plan.layers)
    optimizer = torch.optim.AdamW(trained, lr=plan.learning_rate)
    order = random.Random(plan.seed)
    steps = [step for _ in range(plan.epochs) for step in _steps(examples, plan.batch, order)]
    schedule = get_linear_schedule_with_warmup(optimizer, math.ceil(0.1 * len(steps)), len(steps))

    bar = tqdm(steps, desc="training the reward model", unit="steps", mininterval=2)
    for step in bar:
        inputs = [
            reward_inputs.encode(tokenizer, reward.template, answered.messages, text, limit)[0]
            for answered in step
            for text in answered.texts
        ]
        # Weights stay float32. The frozen layers are the lower ones, so autograd records nothing for them.
        with torch.autocast(model.device.type, torch.bfloat16, enabled=dtypes.quick_at_bf16()):
            scores = reward_inputs.forward(model, inputs)
        value = loss(scores, *_targets(step, model.device))
        value.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=f"{value.item():.3f}", refresh=False)

    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model.config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return {
        "rows": len(examples),
        "steps": len(steps),
        "train_answers": sum(not math.isnan(label) for labelled in examples for label in labelled.safe),
        "train_pairs": sum(len(labelled.pairs) for labelled in examples),
    }


def _trained(model, layers: int) -> list[Tensor]:
    """Freeze a model except its head and its `layers` upper layers. Returns the trainable parameters."""
    stack = getattr(model.base_model, "layers", None)
    if stack is None or not hasattr(model, "score"):
        raise D2OError(
            f"{model.config.model_type}: its layers are not found, so no reward model can be trained on it; "
            f"choose a decoder such as Llama or Qwen2 as backbone"
        )
    model.requires_grad_(False)
    for module in (model.score, *stack[max(len(stack) - layers, 0) :]):
        module.requires_grad_(True)
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _steps(examples: Sequence[Example], answers: int, order: random.Random) -> list[list[Example]]:
    """One epoch in random order: steps of about `answers` answers, of similar length for less padding."""
    rows = max(1, answers // 2)
    shuffled = order.sample(examples, len(examples))
    steps = []
    for start in range(0, len(shuffled), 16 * rows):
        window = sorted(shuffled[start : start + 16 * rows], key=lambda e: max(map(len, e.texts)))
        steps += [window[i : i + rows] for i in range(0, len(window), rows)]
    return order.sample(steps, len(steps))


def _targets(step: Iterable[Example], device) -> tuple[Tensor, Tensor]:
    """Labels [N] and pairs [P, 2] of a step; indices count the answers of all its rows."""
    import torch

    safe: list[float] = []
    pairs: list[tuple[int, int]] = []
    for labelled in step:
        pairs += [(len(safe) + i, len(safe) + j) for i, j in labelled.pairs]
        safe += labelled.safe
    return torch.tensor(safe, device=device), torch.tensor(pairs, device=device, dtype=torch.long).view(-1, 2)


# Held-out agreement ------------------------------------------------------------------------------


def _held_out(reward: Reward, folder: Path, examples: Sequence[Example]) -> dict[str, Any]:
    """Facts for the manifest: how well the model agrees with held-out labels, as `agreement`.

    Answers are scored as in the stage `scores`.
    """
    answers = {(e.prompt_id, text): e.messages for e in examples for text in e.texts}
    model, tokenizer = reward_inputs.load(reward, folder)
    limit = reward_inputs.token_limit(model, reward.max_tokens)
    inputs = [
        reward_inputs.encode(tokenizer, reward.template, messages, text, limit)[0]
        for (_, text), messages in answers.items()
    ]
    owners = [prompt for prompt, _ in answers]
    values = reward_inputs.score_all(model, inputs, owners, reward.tokens, "scoring held-out answers")
    return agreement(dict(zip(answers, values, strict=True)), examples)


def agreement(scores: Mapping[tuple[str, str], float], examples: Sequence[Example]) -> dict[str, Any]:
    """Accuracy on pairs and AUC of safe against unsafe answers, with 95 % intervals over prompts.

    The two answers of a pair are to one prompt, so the accuracy of a scorer that knows prompts only is 0.5. Its AUC
    is not, where some prompts have more unsafe answers than others. Each distinct answer and pair counts once, equal
    scores as one half. A value is null if the labels do not allow it.

    Args:
        scores: by prompt and text of the answer.
    """
    safe = {
        (e.prompt_id, text): bool(label)
        for e in examples
        for text, label in zip(e.texts, e.safe, strict=True)
        if not math.isnan(label)
    }
    pairs = sorted({(e.prompt_id, e.texts[i], e.texts[j]) for e in examples for i, j in e.pairs})
    area = statistics.auc(
        np.array([scores[answer] for answer in safe]),
        np.array(list(safe.values()), bool),
        np.array([prompt for prompt, _ in safe]),
    )
    margins = np.array([scores[prompt, good] - scores[prompt, bad] for prompt, good, bad in pairs])
    accuracy = statistics.mean(
        statistics.Sample((np.sign(margins) + 1) / 2, np.array([prompt for prompt, *_ in pairs]))
    )
    return {
        "test_answers": len(safe),
        "test_pairs": len(pairs),
        **_facts("pair_accuracy", accuracy),
        **_facts("auc", area),
    }


def _facts(name: str, estimate: statistics.Estimate) -> dict[str, float | int | None]:
    """An estimate as facts of a manifest; NaN becomes null, because JSON has no NaN."""
    ends = {name: estimate.mean, f"{name}_low": estimate.low, f"{name}_high": estimate.high}
    return {key: None if math.isnan(end) else end for key, end in ends.items()} | {f"{name}_n": estimate.n}
