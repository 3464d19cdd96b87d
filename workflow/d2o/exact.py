"""Exact scorers: rules that score an answer without error.

Patterns run in RE2 through Arrow: in linear time for every pattern, one column of answers at a time.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from d2o import sources
from d2o.errors import D2OError
from d2o.settings import Rule

# A word: a run without white space, by Unicode's definition, which `str.split` uses too.
_WORD = r"[^\s\v\x1c-\x1f\x85\p{Z}]+"
# Replaces each match while matches are counted. It is removed from the answers first.
_MARK = "\x00"


def problem(rule: Rule) -> str | None:
    """The reason why a rule cannot be applied, beginning with its key; None if it can. Runs no code of the user."""
    for key in ("any", "none", "count"):
        patterns = getattr(rule, key) or []
        # First each pattern alone, so that the message names it; then all together, as they run.
        for shown, expression in [*((repr(p), p) for p in patterns), ("together", _joined(patterns))]:
            if error := _pattern_problem(expression):
                return f"{key}: {shown}: {error}"
    if rule.script and (not rule.script.isidentifier() or len(rule.script) < 3 or _pattern_problem(_script(rule))):
        return f"script: {rule.script!r} is no script of Unicode; take a name such as Latin, Cyrillic, Han or Arabic"
    if rule.python:
        module, _, function = rule.python.partition(":")
        if not function.isidentifier():
            return f"python: {rule.python!r} is not `package.module:function`"
        path = sources.module_file(module)
        if path is None:
            return f"python: no module {module} in {Path.cwd()} or among the installed ones"
        try:
            if function not in sources.names_of(path):
                return f"python: {path} defines no {function}"
            sources.files(module)
        except (SyntaxError, UnicodeDecodeError) as error:
            return f"python: {path} or what it imports is no Python ({' '.join(str(error).split())})"
    if rule.organism:
        from d2o.organisms import load

        try:
            load(Path(rule.organism))
        except D2OError as error:
            return f"organism: {error}"
    return None


def files(rule: Rule) -> list[Path]:
    """The files that the scores of a rule depend on.

    These are the texts of an organism, or the user's module and the modules that it imports; else none.
    """
    if rule.organism:
        from d2o.organisms import files

        return files(Path(rule.organism))
    return sorted(sources.files(rule.python.partition(":")[0])) if rule.python else []


def is_share(rule: Rule) -> bool:
    """Whether all scores of a rule lie between 0 and 1, so that their mean is a share."""
    return rule.over is not None or (rule.count, rule.length, rule.python) == (None, None, None)


def apply(rule: Rule, prompts: Sequence[str], answers: Sequence[str] | pa.ChunkedArray) -> np.ndarray:
    """Score each answer.

    Args:
        prompts: [N] the last turn of the prompt of each answer.
        answers: [N] texts.
    Returns:
        [N] float64; NaN where an organism's measure needs its own prompts and the prompt is another one.
    Raises:
        D2OError: if the function of a `python` rule fails or does not return N finite numbers; if the organism of
            an `organism` rule asks none of the prompts.
    """
    column = answers if isinstance(answers, pa.ChunkedArray) else pa.chunked_array([pa.array(answers, pa.string())])
    values = np.asarray(_scores(rule, prompts, column), float)
    return values if rule.over is None else (values > rule.over).astype(float)


def _scores(rule: Rule, prompts: Sequence[str], answers: pa.ChunkedArray) -> Sequence[float] | np.ndarray:
    if rule.any or rule.none:
        matched = pc.match_substring_regex(answers, _joined(rule.any or rule.none), ignore_case=True).to_numpy()
        return matched if rule.any else ~matched
    if rule.count:
        return sum(_count(answers, pattern) for pattern in rule.count)
    if rule.length:
        return _count(answers, _WORD) if rule.length == "words" else pc.utf8_length(answers).to_numpy()
    if rule.valid:
        return [_is_json(answer) for answer in answers.to_pylist()]
    if rule.script:
        # Only letters are counted: marks and digits are shared by many scripts.
        letters = pc.replace_substring_regex(answers, r"\PL+", "")
        others = pc.replace_substring_regex(letters, f"{_script(rule)}+", "")
        count = pc.utf8_length(letters).to_numpy()
        return (count - pc.utf8_length(others).to_numpy()) / np.maximum(count, 1)
    if rule.organism:
        from d2o.organisms import MEASURES

        return MEASURES[rule.measure](Path(rule.organism), prompts, answers.to_pylist())
    return _by_function(rule.python, prompts, answers.to_pylist())


def _count(answers: pa.ChunkedArray, pattern: str) -> np.ndarray:
    # Arrow's own count treats the rest after each match as a new text: it finds `^a` three times in "aaa".
    bare = pc.replace_substring(answers, _MARK, " ")
    return pc.count_substring(pc.replace_substring_regex(bare, f"(?i:{pattern})", _MARK), _MARK).to_numpy()


def _joined(patterns: Sequence[str]) -> str:
    return "|".join(f"(?:{pattern})" for pattern in patterns)


def _script(rule: Rule) -> str:
    return rf"\p{{{rule.script}}}"


def _pattern_problem(pattern: str) -> str | None:
    try:
        pc.match_substring_regex(pa.array([""]), pattern, ignore_case=True)
    except pa.ArrowInvalid as error:
        return str(error)
    return None


def _is_json(text: str) -> bool:
    try:
        # Python reads NaN and Infinity, which are not JSON.
        json.loads(text, parse_constant=_refuse, parse_int=str)
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
        given = getattr(importlib.import_module(module), function)(list(prompts), list(answers))
        if isinstance(given, str | Mapping):
            raise TypeError(f"it gave one {type(given).__name__}, not a number for each answer")
        values = np.array(given := list(given), float)
    except (Exception, SystemExit) as error:  # the user's code may raise anything
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise D2OError(f"{name}: {reason}; call it on two lists of texts to see where") from error
    if values.shape != (len(answers),):
        raise D2OError(f"{name}: gave {len(given)} values for {len(answers)} answers; it must give a number for each")
    if (bad := np.flatnonzero(~np.isfinite(values))).size:
        text = answers[bad[0]]
        raise D2OError(f"{name}: gave {values[bad[0]]}, which is not finite, for the answer {text[:60]!r}")
    return values
