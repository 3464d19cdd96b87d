"""Stage `scores`: one reward model's raw score for each answer."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean, stdev

from d2o import records, reward_inputs
from d2o.errors import D2OError
from d2o.settings import Reward


def score(reward: Reward, model: Path, prompts: Path, responses: Path, output: Path) -> None:
    """Write one row of `records.SCORES` per response.

    Args:
        model: folder of the stage `rewards`.
        prompts: a table with `prompt_id` and `messages`: `records.PROMPTS`, or `records.COMPARISONS`.
        responses: a table of answers to these prompts: `records.SAMPLES`, or `records.POOL`.
    Raises:
        D2OError: where there is no answer, an answer's prompt is unknown, or the model does not fit `reward`.
    """
    messages = {row["prompt_id"]: row["messages"] for row in records.read_any(prompts, ["prompt_id", "messages"])}
    answers = records.read_any(responses, ["prompt_id", "sample", "text"])
    if not answers:
        raise D2OError(f"{responses}: there is no answer to score; delete it and run again")
    for answer in answers:
        if answer["prompt_id"] not in messages:
            raise D2OError(
                f"{responses}: prompt {answer['prompt_id']} is not in {prompts}; "
                f"the answers belong to other prompts: delete them and run again"
            )

    with records.artifact(output, reward, [model / "manifest.json", prompts, responses]) as draft:
        network, tokenizer = reward_inputs.load(reward, model)
        limit = reward_inputs.token_limit(network, reward.max_tokens)
        encoded = [
            reward_inputs.encode(tokenizer, reward.template, messages[answer["prompt_id"]], answer["text"], limit)
            for answer in answers
        ]
        scores = reward_inputs.score_all(
            network, [encoding for encoding, _ in encoded], reward.tokens, "scoring answers"
        )
        draft.facts |= {
            "rows": len(scores),
            "mean": fmean(scores),
            "sd": stdev(scores) if len(scores) > 1 else None,
            "truncated": sum(cut for _, cut in encoded),
        }
        rows = (
            {"prompt_id": answer["prompt_id"], "sample": answer["sample"], "score": value}
            for answer, value in zip(answers, scores, strict=True)
        )
        records.write_table(draft.path, records.SCORES, rows)
