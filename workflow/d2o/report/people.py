"""A summary in words of the annotators of a human evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from d2o.settings import HumanEval


def summary(entry: HumanEval, facts: Mapping[str, Any]) -> list[str]:
    """Lines on who answered, who was left out and why, and how far annotators agree.

    Args:
        facts: the manifest of the verdicts.
    """
    came = [annotator for annotator in facts["annotators"] if annotator["answered"]]
    if not came:
        return [f"Human evaluation: no file with verdicts has come back to {entry.answers}/ yet."]
    lines = [
        f"Human evaluation: {len(came)} of {len(facts['annotators'])} annotators have sent verdicts. "
        + " ".join(_of(annotator, entry.passed) for annotator in came)
    ]
    agreements = "; ".join(f"{question} {_agreement(own)}" for question, own in facts["agreement"].items())
    lines.append(f"Agreement of the annotators who count (Krippendorff's α, 95 % interval over pairs): {agreements}.")
    lines.append(
        "Intervals of what people say are of these annotators: how other people would judge is not in them, though "
        "one person alone judges each pair that not all have seen."
    )
    if entry.seeds:
        only = ", and their intervals are over prompts only" if len(entry.seeds) == 1 else ""
        lines.append(f"People were asked about the trainings of seed {', '.join(map(str, entry.seeds))}{only}.")
    return lines


def _of(annotator: Mapping[str, Any], passed: float) -> str:
    checks = f"{annotator['passed']} of {annotator['checks']} answers to attention checks right"
    out = "" if annotator["kept"] else f": below {passed * 100:g} %, left out"
    questions = f"{annotator['answered']} of {annotator['questions']} questions"
    return f"Annotator {annotator['annotator']}: {questions}, {checks}{out}."


def _agreement(own: Mapping[str, Any]) -> str:
    if own["alpha"] is None:
        return f"not defined (n = {own['pairs']})"
    interval = "" if own["low"] is None else f" [{own['low']:.2f}, {own['high']:.2f}]"
    return f"{own['alpha']:.2f}{interval} (n = {own['pairs']})".replace("-", "−")
