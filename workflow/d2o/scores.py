"""Stage `scores`: one reward model's raw score for each answer, or an exact scorer's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from d2o import exact, records, reward_inputs, schemas
from d2o.errors import D2OError
from d2o.settings import Reward


def score(reward: Reward, model: Path | None, prompts: Path, responses: Path, output: Path) -> None:
    """Write one row of `schemas.SCORES` per response; none where an organism's measure gives no score.

    Args:
        model: folder of the stage `rewards`; None for a rule.
        prompts: a table with `prompt_id` and `messages`: `schemas.PROMPTS`, or `schemas.NEGATIVES`.
        responses: a table of answers to these prompts: `schemas.SAMPLES`, or `schemas.POOL`.
    Raises:
        D2OError: where there is no answer, an answer's prompt is unknown, or the model does not fit `reward`.
    """
    if (model is None) != (reward.rule is not None):
        raise D2OError("scores: a reward model needs --reward, its folder; a rule takes none")
    known = records.read_any(prompts, ["prompt_id", "messages"])
    messages = dict(zip(known["prompt_id"].to_pylist(), known["messages"].to_pylist(), strict=True))
    answers = records.read_any(responses, ["prompt_id", "sample", "text"])
    if not answers.num_rows:
        raise D2OError(f"{responses}: there is no answer to score; delete it and run again")
    unknown = pc.invert(pc.is_in(answers["prompt_id"], pa.array(messages, pa.string())))
    if strangers := answers["prompt_id"].filter(unknown).to_pylist():
        raise D2OError(
            f"{responses}: prompt {strangers[0]} is not in {prompts}; "
            f"the answers belong to other prompts: delete them and run again"
        )

    made_from = [model / "manifest.json"] if model else exact.files(reward.rule)
    with records.artifact(output, reward, [*made_from, prompts, responses]) as draft:
        owners = answers["prompt_id"].to_pylist()
        asked = [messages[prompt] for prompt in owners]
        if reward.rule:
            values = exact.apply(reward.rule, [turns[-1]["content"] for turns in asked], answers["text"])
        else:
            texts = answers["text"].to_pylist()
            values, draft.facts["truncated"] = _by_model(reward, model, asked, texts, owners)
        scored = answers.drop_columns("text").append_column("score", pa.array(values, pa.float64()))
        valid = ~np.isnan(values) if reward.rule else np.ones(len(values), bool)
        values, scored = np.asarray(values)[valid], scored.filter(pa.array(valid))
        spread = float(np.std(values, ddof=1)) if len(values) > 1 else None
        draft.facts |= {"rows": len(values), "mean": float(np.mean(values)), "sd": spread}
        draft.facts |= {"without_score": int((~valid).sum())} if not valid.all() else {}
        with records.TableWriter(draft.path, schemas.SCORES) as table:
            table.add_columns(scored.cast(schemas.SCORES))


def _by_model(
    reward: Reward, model: Path, asked: list[Any], texts: list[str], owners: list[str]
) -> tuple[list[float], int]:
    """A reward model's scores, and how many answers were too long for it."""
    network, tokenizer = reward_inputs.load(reward, model)
    limit = reward_inputs.token_limit(network, reward.max_tokens)
    _check_golden(reward, network, tokenizer, limit)
    encoded = [
        reward_inputs.encode(tokenizer, reward.template, messages, text, limit)
        for messages, text in zip(asked, texts, strict=True)
    ]
    inputs = [encoding for encoding, _ in encoded]
    values = reward_inputs.score_all(network, inputs, owners, reward.tokens, "scoring answers")
    return values, sum(cut for _, cut in encoded)


def _check_golden(reward: Reward, network: Any, tokenizer: Any, limit: int) -> None:
    """Check the scores of an entry's golden rows: a wrong head, or a wrong template, raises no error by itself."""
    for number, row in enumerate(reward.golden):
        if row.text is None:
            messages = [{"role": "user", "content": row.prompt}]
            encoding, _ = reward_inputs.encode(tokenizer, reward.template, messages, row.response, limit)
        else:
            encoding = {"input_ids": tokenizer(row.text).input_ids}
        (value,) = reward_inputs.forward(network, [encoding]).tolist()
        if not abs(value - row.score) <= row.tolerance:
            raise D2OError(
                f"golden.{number}: the model scores {value:.4g}, and {row.score:.4g} ± {row.tolerance:.2g} is "
                f"expected; check {'template, ' * (row.text is None)}score_weights, label and revision, "
                f"or mend the row"
            )
