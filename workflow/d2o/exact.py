"""Exact scorers: rules that say of each answer, without error, whether or how much something holds of it.

Patterns run in RE2, by way of Arrow: in linear time whatever the pattern, and a column of answers at once.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from d2o import sources
from d2o.errors import D2OError
from d2o.settings import Rule


def fault(rule: Rule) -> str | None:
    """Why a rule cannot be applied, with its key first; None where it can. No code of the user's is run."""
    for key in ("any", "none", "count"):
        for pattern in getattr(rule, key) or ():
            try:
                pc.match_substring_regex(pa.array([""]), pattern)
            except pa.ArrowInvalid as error:
                return f"{key}: {pattern!r}: {error}"
    if rule.script and not _is_class(rf"\p{{{rule.script}}}"):
        return f"script: {rule.script!r} is no script of Unicode; take a name such as Latin, Cyrillic, Han or Arabic"
    if rule.python:
        module, _, function = rule.python.partition(":")
        if not function.isidentifier():
            return f"python: {rule.python!r} is not `package.module:function`"
        path = sources.module_file(module)
        if path is None:
            return f"python: no module {module} in {Path.cwd()} or among the installed ones"
        if function not in sources.names_of(path):
            return f"python: {path} defines no {function}"
    return None


def files(rule: Rule) -> list[Path]:
    """The files that a rule's scores depend on: an organism's texts, or the user's module and what it imports."""
    if rule.organism:
        from d2o.organisms import files

        return files(Path(rule.organism))
    return sorted(sources.files(rule.python.partition(":")[0])) if rule.python else []


def apply(rule: Rule, prompts: Sequence[str], answers: Sequence[str] | pa.ChunkedArray) -> np.ndarray:
    """The score of each answer.

    Args:
        prompts: [N] the last turn of each answer's prompt.
        answers: [N] texts.
    Returns:
        [N] float64.
    Raises:
        D2OError: where the function of a `python` rule fails, or gives other than N finite numbers; where a prompt is
            none of the organism's.
    """
    column = answers if isinstance(answers, pa.ChunkedArray) else pa.chunked_array([pa.array(answers, pa.string())])
    values = np.asarray(_scores(rule, prompts, column), float)
    return values if rule.over is None else (values > rule.over).astype(float)


def _scores(rule: Rule, prompts: Sequence[str], answers: pa.ChunkedArray) -> Sequence[float] | np.ndarray:
    if rule.any or rule.none:
        patterns = "|".join(f"(?:{pattern})" for pattern in rule.any or rule.none)
        found = pc.match_substring_regex(answers, patterns, ignore_case=True).to_numpy()
        return found if rule.any else ~found
    if rule.count:
        return sum(_count(answers, pattern) for pattern in rule.count)
    if rule.length:
        return _count(answers, r"\S+") if rule.length == "words" else pc.utf8_length(answers).to_numpy()
    if rule.valid:
        return [_is_json(answer) for answer in answers.to_pylist()]
    if rule.script:
        # Of letters a mark or a digit belongs to no script of its own.
        letters = _count(answers, r"\p{L}")
        own = letters - _count(pc.replace_substring_regex(answers, rf"\p{{{rule.script}}}+", ""), r"\p{L}")
        return own / np.maximum(letters, 1)
    if rule.organism:
        from d2o.organisms import MEASURES

        return MEASURES[rule.measure](Path(rule.organism), prompts, answers.to_pylist())
    return _by_function(rule.python, prompts, answers.to_pylist())


def _count(answers: pa.ChunkedArray, pattern: str) -> np.ndarray:
    return pc.count_substring_regex(answers, pattern, ignore_case=True).to_numpy()


def _is_json(text: str) -> bool:
    try:
        # NaN and Infinity are Python's own.
        json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return False
    return True


def _refuse(constant: str) -> None:
    raise ValueError(constant)


def _by_function(name: str, prompts: Sequence[str], answers: Sequence[str]) -> np.ndarray:
    module, _, function = name.partition(":")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        given = list(getattr(importlib.import_module(module), function)(list(prompts), list(answers)))
        values = np.array(given, float)
    except Exception as error:  # whatever the user's code does
        raise D2OError(
            f"{name}: {type(error).__name__}: {error}; call it on two lists of texts to see where"
        ) from error
    if values.shape != (len(answers),):
        raise D2OError(f"{name}: gave {len(given)} values for {len(answers)} answers; it must give a number for each")
    if (bad := np.flatnonzero(~np.isfinite(values))).size:
        text = answers[bad[0]]
        raise D2OError(f"{name}: gave {values[bad[0]]}, which is not finite, for the answer {text[:60]!r}")
    return values


def _is_class(pattern: str) -> bool:
    try:
        pc.match_substring_regex(pa.array([""]), pattern)
    except pa.ArrowInvalid:
        return False
    return True
