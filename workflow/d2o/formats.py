"""The formats of preference rows: for each a small function from one raw row to records of `schemas.ROWS`.

The files are read by `datasets`. Nothing heavy is imported here: the settings take names and keys of the formats from
`FORMATS`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple

from d2o import identities, texts

if TYPE_CHECKING:
    from d2o.settings import Reading

Row = Mapping[str, Any]
Record = dict[str, Any]
Messages = list[dict[str, str]]


class BadRow(ValueError):
    """A row that does not follow its format, or a value in it that cannot be read. The message states why and does
    not quote the row."""


class LeftOut(ValueError):
    """An answer that may or may not be rejected: it has no label yet, an unknown one, or contradictory ones."""


class Labels(NamedTuple):
    """The meaning of labels: those of negatives and of positives; or the rating below which an answer is negative."""

    negative: Sequence[Any] = ()
    positive: Sequence[Any] = ()
    below: float | None = None


class Format(NamedTuple):
    """How the rows of one format are read.

    Attributes:
        reader: makes the records of a row, given the meaning of labels. One of several answers may be a `LeftOut`.
        needs: the keys that a row needs; of a tuple, one is enough.
        reads: the keys that are read where they are present.
        labels: the meaning of labels where the config states none. None: the rows have no label that a config could
            explain. Empty: the config has to explain them.
        flat: turns a nested row into a flat one that has the keys.
        pairs: whether a row has two answers to compare.
    """

    reader: Callable[[Row, Labels], list[Record | LeftOut]]
    needs: Sequence[str | tuple[str, ...]]
    reads: Sequence[str] = ()
    labels: Labels | None = None
    flat: Callable[[Row], Row] | None = None
    pairs: bool = False

    @property
    def needed(self) -> list[tuple[str, ...]]:
        """The keys that a row needs, each as a tuple with its alternatives."""
        return [(keys,) if isinstance(keys, str) else keys for keys in self.needs]

    @property
    def keys(self) -> list[str]:
        """Every key that is read."""
        return [*chain(*self.needed), *self.reads]


def outcomes(row: Any, reading: Reading) -> list[Record | BadRow | LeftOut]:
    """The records of a raw row, with a `BadRow` or `LeftOut` for each part that gives none."""
    form = FORMATS[reading.format]
    given = reading.label
    labels = form.labels or Labels() if given is None else Labels(given.negative, given.positive, given.below)
    try:
        records = form.reader(named(flat(row, reading.format), reading.columns), labels)
    except (BadRow, LeftOut) as error:
        return [error]
    return [
        one if isinstance(one, LeftOut) else {"prompt_id": identities.prompt_id(one["messages"]), **one}
        for one in records
    ]


def flat(row: Any, format: str) -> Row:
    """A row with its own names of columns; flattened where its format is nested.

    Raises:
        BadRow: where the row cannot be read.
    """
    if isinstance(row, BadRow):
        raise row
    if not isinstance(row, dict):
        raise BadRow(f"{_kind(row)}, not an object")
    form = FORMATS[format]
    try:
        return form.flat(row) if form.flat else row
    except RecursionError:
        raise BadRow("it is nested too deeply") from None


def named(row: Row, columns: Mapping[str, str]) -> Row:
    """A flat row, with its columns renamed to the keys of its format; `a.b` is also the `b` of an object `a`."""
    given = {key: at(row, name) for key, name in columns.items() if has(row, name)}
    return {key: value for key, value in row.items() if key not in columns} | given


def has(row: Row, name: str) -> bool:
    """Whether a row has a column of this name."""
    outer, _, inner = name.partition(".")
    if name in row or not inner:
        return name in row
    value = row.get(outer)
    return isinstance(value, BadRow) or (isinstance(value, dict) and has(value, inner))


def at(row: Row, name: str) -> Any:
    """The value of a column that a row has."""
    outer, _, inner = name.partition(".")
    if name in row:
        return row[name]
    return row[outer] if isinstance(row[outer], BadRow) else at(row[outer], inner)


# Published data sets -----------------------------------------------------------------------------


def pku_saferlhf(row: Row, _: Labels) -> list[Record]:
    """A row of PKU-SafeRLHF. The current release has harm categories and severities, which the beta does not have."""
    return [
        {
            "messages": [{"role": "user", "content": _text(row, "prompt")}],
            "responses": [
                {
                    "text": _text(row, f"response_{i}"),
                    "unsafe": _unsafe(row, f"is_response_{i}_safe"),
                    "categories": _categories(row, f"response_{i}_harm_category"),
                    "severity": _severity(row, f"response_{i}_severity_level"),
                }
                for i in (0, 1)
            ],
            "better": _choice(row, "better_response_id"),
            "safer": _choice(row, "safer_response_id"),
        }
    ]


def hh_rlhf(row: Row, _: Labels) -> list[Record]:
    """A row of HH-RLHF: two dialogues that differ in the last turn of the assistant. `chosen` is the better one."""
    chosen, rejected = _dialogue(row, "chosen"), _dialogue(row, "rejected")
    if chosen[:-1] != rejected[:-1]:
        raise BadRow("the prompts of `chosen` and `rejected` differ")
    return _pair(chosen[:-1], [chosen[-1]["content"], rejected[-1]["content"]], better=0)


# A user's own rows -------------------------------------------------------------------------------


def negatives(row: Row, _: Labels) -> list[Record]:
    """A row with a rejected answer and no other: {prompt | messages, response}."""
    messages, [answer] = _answered(row, "response")
    return _lone(messages, answer, rejected=True)


def preference(row: Row, _: Labels) -> list[Record]:
    """A row of TRL's preference format: {prompt, chosen, rejected}, texts or messages.

    `chosen` and `rejected` may be whole dialogues that differ in their last turn. They then contain the prompt,
    and `prompt` may be missing. Two texts without `prompt` cannot be read: the end of the prompt is not known.
    """
    messages, answers = _answered(row, "chosen", "rejected")
    return _pair(messages, answers, better=0)


def unpaired(row: Row, labels: Labels) -> list[Record]:
    """A row of TRL's unpaired preference format: {prompt, completion, label}, texts or messages."""
    messages, [answer] = _answered(row, "completion")
    return _lone(messages, answer, _rejected(row.get("label"), labels))


def rated(row: Row, labels: Labels) -> list[Record]:
    """An answer with its rating, or those of several raters: {prompt | messages, response, rating}."""
    messages, [answer] = _answered(row, "response")
    return _lone(messages, answer, _rejected(row.get("rating"), labels))


def chat(row: Row, labels: Labels) -> list[Record | LeftOut]:
    """A dialogue in OpenAI's form; `feedback` is in the row, about the last answer, or in the messages it rates."""
    turns = _turns(row, "messages")
    feedback = [message.get("feedback") for message in _listed(row, "messages")]
    ends = bool(turns) and turns[-1]["role"] == "assistant"
    if ends and _blank(feedback[-1]):
        feedback[-1] = row.get("feedback")
    rated = [i for i, turn in enumerate(turns) if turn["role"] == "assistant" and not _blank(feedback[i])]
    if not rated and not ends:
        raise BadRow("`messages` do not end with an answer, which `feedback` would be about")
    rated = rated or [len(turns) - 1]
    records: list[Record | LeftOut] = []
    for i in rated:
        _check_prompt(turns[:i], "messages")
        try:
            records += _lone(turns[:i], turns[i]["content"], _rejected(feedback[i], labels))
        except LeftOut as reason:
            records.append(reason)
    return records


def annotated(row: Row, labels: Labels) -> list[Record]:
    """An answer and its raters' labels: {prompt | messages, response, label}; or two answers, `response_1` and
    `response_2`, and which of them raters prefer: left or right, 1 or 2, a or b."""
    if row.get("response") is None and row.get("response_1") is not None:
        messages, answers = _answered(row, "response_1", "response_2")
        return _pair(messages, answers, better=_preferred(row.get("label")))
    messages, [answer] = _answered(row, "response")
    return _lone(messages, answer, _rejected(row.get("label"), labels))


def argilla(row: Row) -> Row:
    """A record of Argilla 2 as a flat row: its fields, and by question the answer of each rater.

    The record is nested (`to_json`, `to_list`) or flattened (`to_datasets`). Only the flattened form distinguishes
    drafts from submitted answers. Suggestions are not read: they are not human.
    """
    if "fields" not in row:
        questions = {}
        for key in (key for key in row if key.endswith(".responses")):
            values, status = row[key] or [], row.get(f"{key}.status") or []
            if not (isinstance(values, list) and isinstance(status, list)):
                raise BadRow(f"`{texts.visible(key)}` or its status is not a list")
            status = [*status, *["submitted"] * (len(values) - len(status))]
            given = [one for one, state in zip(values, status, strict=False) if state in ("submitted", None)]
            questions[key.removesuffix(".responses")] = given
        return {**row, **questions}
    fields, responses = row["fields"], row.get("responses") or {}
    if not isinstance(fields, dict) or not isinstance(responses, dict):
        raise BadRow("`fields` and `responses` are not objects")
    given = {name: answers or [] for name, answers in responses.items()}
    if not all(
        isinstance(answers, list) and all(isinstance(one, dict) for one in answers) for answers in given.values()
    ):
        raise BadRow("`responses` has an answer that is not an object")
    return fields | {name: [one.get("value") for one in answers] for name, answers in given.items()}


def label_studio(row: Row) -> Row:
    """A task of Label Studio as a flat row: its data, and by control the labels of each annotator.

    The task comes as JSON, or as JSON-MIN, CSV and TSV with one annotator per row. Skipped annotations and
    predictions are not read.
    """
    if "annotations" not in row:
        return {name: _by_one(_cell(value)) for name, value in row.items()}
    data, annotations = row.get("data"), row["annotations"] or []
    if not isinstance(data, dict) or not isinstance(annotations, list):
        raise BadRow("`data` is not an object, or `annotations` not a list")
    by_control: dict[str, list[Any]] = {}
    for annotation in annotations:
        results = annotation.get("result") if isinstance(annotation, dict) else None
        if not isinstance(results, list) or not all(isinstance(one, dict) for one in results):
            raise BadRow("an annotation has no list `result` of objects")
        own: dict[str, list[Any]] = {}
        for one in [] if annotation.get("was_cancelled") else results:
            own.setdefault(str(one.get("from_name")), []).extend(_as_list(_labels(one.get("value"))))
        for name, labels in own.items():
            by_control.setdefault(name, []).append(labels)
    return data | by_control


def _by_one(value: Any) -> Any:
    """A cell of one annotator's row: a label, several labels as the list of one rater, or data unchanged."""
    labels = _labels(value)
    return [labels] if isinstance(labels, list) and labels != value else labels


def _labels(value: Any) -> Any:
    """The labels in one result of Label Studio, or in several: choices, ratings, or sides of a pair."""
    if isinstance(value, list):
        return [inner for one in value for inner in _as_list(_result(one))]
    return _result(value)


_RESULTS = ("choices", "rating", "selected")


def _result(value: Any) -> Any:
    keys = _RESULTS if isinstance(value, dict) else ()
    return next((value[key] for key in keys if key in value), value)


def _cell(value: Any) -> Any:
    """A cell of Label Studio's CSV, which holds ratings, sides and several choices as JSON."""
    if not isinstance(value, str) or not re.match(rf'\[?\{{"({"|".join(_RESULTS)})":', value):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def _lone(messages: Messages, text: str, rejected: bool) -> list[Record]:
    answer = {"text": text, "unsafe": rejected}
    return [{"messages": messages, "responses": [answer], "better": None, "safer": None}]


def _pair(messages: Messages, answers: Sequence[str], better: int) -> list[Record]:
    responses = [{"text": text, "unsafe": None} for text in answers]
    return [{"messages": messages, "responses": responses, "better": better, "safer": None}]


# Labels ------------------------------------------------------------------------------------------


def plain(label: Any) -> Any:
    """A label as it is compared: 1, 1.0 and "1" are the same, and so are true and "True", "bad" and "Bad "."""
    if isinstance(label, bool):
        return str(label).lower()
    if not isinstance(label, str):
        return label
    text = label.strip().lower()
    return float(text) if re.fullmatch(r"[+-]?\d+(\.\d+)?", text) else text


def _rejected(label: Any, labels: Labels) -> bool:
    """Whether most raters reject an answer; raters whose labels mean neither, or both, are not counted."""
    given = _given(label)
    raters = [_verdicts(one, labels) for one in _as_list(label)]
    votes = [rejects for verdicts in raters if len(verdicts) == 1 for rejects in verdicts]
    if not votes:
        raise LeftOut("its labels say both" if any(raters) else f"the label {_shown(given[0])} is in neither list")
    return _most(votes)


def _verdicts(rater: Any, labels: Labels) -> set[bool]:
    """The meanings of one rater's labels: True where a label rejects the answer, False where it accepts it."""
    given = (_verdict(one, labels) for one in _as_list(rater) if not _blank(one))
    return {rejects for rejects in given if rejects is not None}


def _verdict(label: Any, labels: Labels) -> bool | None:
    value = plain(label)
    if labels.below is not None:
        if isinstance(value, str):
            raise BadRow("the rating is a text, not a number")
        return value < labels.below
    if any(means(one, value) for one in labels.negative):
        return True
    return False if any(means(one, value) for one in labels.positive) else None


# Words that YAML reads as false and true where they are not quoted, as in `negative: [no]`.
_YAML = {False: ("false", "no", "off"), True: ("true", "yes", "on")}


def means(named: Any, value: Any) -> bool:
    """Whether a label of the config equals a plain label of the data."""
    return value in _YAML[named] if isinstance(named, bool) else plain(named) == value


# A side, perhaps after words such as `response_`; letters stand alone: "upright" and "banana" are not votes.
_SIDE = re.compile(r"(?!not?[\s_-])(?:(?:[^\W\d]+[\s_-])?(left|right|a|b)|(?:[^\W\d]+[\s_-]?)?([12]))")


def _preferred(label: Any) -> int:
    """The index of the answer, of two, that most raters prefer; of a ranking the first counts."""
    given = _given([one[0] if isinstance(one, list) and one else one for one in _as_list(label)])
    votes = [side for one in given if (side := _side(plain(one))) is not None]
    if not votes:
        raise LeftOut(f"the label {_shown(given[0])} prefers neither answer")
    return int(_most(votes))


def _side(value: Any) -> bool | None:
    """Whether a plain label names the second of two answers; None where it names neither."""
    if not isinstance(value, str):
        return {1: False, 2: True}.get(value)
    side = _SIDE.fullmatch(value)
    return side and (side[1] or side[2]) in ("right", "b", "2")


def every(label: Any) -> list[Any]:
    """The labels of all raters, of whom each may give several."""
    return [inner for one in _as_list(label) for inner in _as_list(one)]


def _given(label: Any) -> list[Any]:
    """As `every`, without blank labels."""
    labels = [one for one in every(label) if not _blank(one)]
    if not labels:
        raise LeftOut("no label yet")
    for one in labels:
        if not isinstance(one, bool | int | float | str):
            raise BadRow(f"the label is {_kind(one)}, not a text, a number, true or false")
    return labels


def _most(votes: list[bool]) -> bool:
    if 2 * sum(votes) == len(votes):
        raise LeftOut("as many raters for as against it")
    return 2 * sum(votes) > len(votes)


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _blank(value: Any) -> bool:
    return value is None or value == [] or value != value or (isinstance(value, str) and not value.strip())


def _shown(label: Any) -> str:
    """A label for a message: lower case, escaped and shortened."""
    text = texts.visible(str(label).strip().lower())
    return repr(text if len(text) <= 40 else text[:39] + "…") if isinstance(label, str) else str(label).lower()


# Texts and messages ------------------------------------------------------------------------------


def _answered(row: Row, *keys: str) -> tuple[Messages, list[str]]:
    """The prompt and the answers of a row; each of `keys` holds an answer, or a whole dialogue that ends with it."""
    dialogues = [_ended(row, key) for key in keys]
    (prompt, _), *others = dialogues
    if any(other != prompt for other, _ in others):
        raise BadRow(f"the prompts of `{keys[0]}` and `{keys[1]}` differ")
    if not prompt:
        prompt = _prompt(row)
    elif "prompt" in row and isinstance(_spoken(row, "prompt"), list) and _turns(row, "prompt") != prompt:
        raise BadRow(f"`{keys[0]}` does not begin with `prompt`")
    else:
        _check_prompt(prompt, keys[0])
    return prompt, [answer for _, answer in dialogues]


def _ended(row: Row, key: str) -> tuple[Messages, str]:
    """The turns before an answer, if there are any, and the answer."""
    if not isinstance(_spoken(row, key), list):
        return [], _text(row, key)
    turns = _turns(row, key)
    if not turns or turns[-1]["role"] != "assistant":
        raise BadRow(f"`{key}` does not end with a turn of the assistant")
    return turns[:-1], turns[-1]["content"]


def _prompt(row: Row) -> Messages:
    """The prompt: one text of the user, or messages."""
    given = [key for key in ("prompt", "messages") if row.get(key) is not None]
    if len(given) != 1:
        raise BadRow("give one of `prompt` and `messages`")
    if given == ["prompt"] and not isinstance(_spoken(row, "prompt"), list):
        return [{"role": "user", "content": _text(row, "prompt")}]
    turns = _turns(row, given[0])
    _check_prompt(turns, given[0])
    return turns


def _turns(row: Row, key: str) -> Messages:
    """Messages in OpenAI's form: role and text of each."""
    return [_turn(message, key) for message in _listed(row, key)]


def _listed(row: Row, key: str) -> list[dict[str, Any]]:
    value = _spoken(row, key)
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        raise BadRow(f"`{key}` is not a list of objects")
    return value


# The start of a list of messages in OpenAI's or ShareGPT's form; as JSON, as Python writes it, or cut off.
_MESSAGES = re.compile(r"""\s*\[\s*\{.*?["'](role["']\s*:|from["']\s*:\s*["'](human|gpt|user|system))""", re.DOTALL)


def _spoken(row: Row, key: str) -> Any:
    """A text, or messages; the cell of a table holds messages as JSON.

    Raises:
        BadRow: where a text begins like messages and is not JSON: as a prompt or an answer it would mislead.
    """
    value = _value(row, key)
    if not isinstance(value, str) or not _MESSAGES.match(value):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise BadRow(f"`{key}` begins like messages and is not JSON; write it as JSON (json.dumps)") from None


def _turn(message: Row, key: str) -> dict[str, str]:
    role = _text(message, "role")
    if role in ("tool", "function") or message.get("tool_calls") or message.get("function_call"):
        raise BadRow(f"`{key}` calls tools, which a prompt cannot hold")
    content = message.get("content")
    if isinstance(content, list):
        parts = [part.get("text") if isinstance(part, dict) else None for part in content]
        if not all(isinstance(part, str) for part in parts):
            raise BadRow(f"`{key}` has a part that is no text, such as an image")
        message = {**message, "content": "\n".join(parts)}
    return {"role": "system" if role == "developer" else role, "content": _text(message, "content")}


def _check_prompt(turns: Messages, key: str) -> None:
    """Check the turns of a prompt, except a leading turn of the system."""
    _check_turns(turns[1:] if turns and turns[0]["role"] == "system" else turns, key)


def _check_turns(turns: Messages, key: str) -> None:
    """Check that the turns of a prompt alternate, begin and end with the user's, and are not empty."""
    wanted = ["user", "assistant"] * (len(turns) // 2) + ["user"]
    if [turn["role"] for turn in turns] != wanted:
        raise BadRow(f"the prompt in `{key}` does not alternate from a user turn to a user turn")
    if not all(turn["content"] for turn in turns):
        raise BadRow(f"`{key}` has an empty turn")


def _dialogue(row: Row, key: str) -> Messages:
    """The turns of a text "\\n\\nHuman: …\\n\\nAssistant: …", which must end with a turn of the assistant."""
    text = "\n\n" + _text(row, key).lstrip()
    head, *parts = re.split(r"\n\n(Human|Assistant):", text)
    if head:
        raise BadRow(f"`{key}` does not begin with a Human turn")
    roles = ["user" if name == "Human" else "assistant" for name in parts[::2]]
    turns = [{"role": role, "content": turn.strip()} for role, turn in zip(roles, parts[1::2], strict=True)]
    if roles[-1] != "assistant":
        raise BadRow(f"`{key}` does not end with an Assistant turn")
    if not turns[-1]["content"]:
        raise BadRow(f"the answer of `{key}` is empty")
    _check_turns(turns[:-1], key)
    return turns


def _value(row: Row, key: str) -> Any:
    if key not in row:
        raise BadRow(f"no `{key}`")
    if isinstance(row[key], BadRow):
        raise BadRow(f"`{key}` is {row[key]}")
    return row[key]


def _text(row: Row, key: str) -> str:
    text = _value(row, key)
    if not isinstance(text, str):
        raise BadRow(f"`{key}` is {_kind(text)}, not a text")
    if not text.strip():
        raise BadRow(f"`{key}` is empty")
    try:
        text.encode()
    except UnicodeEncodeError:  # JSON can spell half of a surrogate pair, UTF-8 cannot
        raise BadRow(f"`{key}` holds half a character (a lone surrogate)") from None
    return text


def _unsafe(row: Row, key: str) -> bool | None:
    safe = _value(row, key)
    if safe is not None and not isinstance(safe, bool):
        raise BadRow(f"`{key}` is {_kind(safe)}, not true, false or null")
    return None if safe is None else not safe


def _categories(row: Row, key: str) -> list[str] | None:
    """The names whose value is true, from {name: true or false}."""
    flags = row.get(key)
    if flags is None:
        return None
    if not isinstance(flags, dict) or not all(isinstance(flag, bool) for flag in flags.values()):
        raise BadRow(f"`{key}` is not an object of true and false")
    if not all(map(texts.is_unicode, flags)):
        raise BadRow(f"`{key}` is an object with a name that is half a character (a lone surrogate)")
    return [name for name, flag in flags.items() if flag]


def _severity(row: Row, key: str) -> int | None:
    level = row.get(key)
    if level is not None and (isinstance(level, bool) or level not in (0, 1, 2, 3)):
        raise BadRow(f"`{key}` is neither 0, 1, 2, 3 nor null")
    return None if level is None else int(level)


def _choice(row: Row, key: str) -> int | None:
    index = _value(row, key)
    # 1.0 is accepted: pandas turns integers beside a null into floats. True is not, though True == 1.
    if index is not None and (isinstance(index, bool) or index not in (0, 1)):
        raise BadRow(f"`{key}` is neither 0, 1 nor null")
    return None if index is None else int(index)


def _kind(value: Any) -> str:
    names = {type(None): "null", bool: "true or false", str: "a text", list: "a list", dict: "an object"}
    if isinstance(value, BadRow):
        return str(value)
    return names.get(type(value), "a number")


# The formats -------------------------------------------------------------------------------------

_PKU_KEYS = (
    "prompt",
    "response_0",
    "response_1",
    "is_response_0_safe",
    "is_response_1_safe",
    "better_response_id",
    "safer_response_id",
)
_PKU_LABELS = (
    "response_0_harm_category",
    "response_1_harm_category",
    "response_0_severity_level",
    "response_1_severity_level",
)
_ASKED = ("prompt", "messages")
# Usual labels of a rejected answer and of one that was liked. Not yes and no, which may answer any question.
_USUAL = Labels(
    ("false", 0, -1, "thumbs_down", "thumbs-down", "thumbs down", "down", "dislike", "bad", "negative", "rejected"),
    ("true", 1, "thumbs_up", "thumbs-up", "thumbs up", "up", "like", "good", "positive", "accepted"),
)
_EXPORT = ((_ASKED, ("response", "response_1"), "label"), ("response_2",), _USUAL)
FORMATS = {
    "pku-saferlhf-beta": Format(pku_saferlhf, _PKU_KEYS, _PKU_LABELS, pairs=True),
    "pku-saferlhf": Format(pku_saferlhf, _PKU_KEYS, _PKU_LABELS, pairs=True),
    "hh-rlhf": Format(hh_rlhf, ("chosen", "rejected"), pairs=True),
    "negatives": Format(negatives, (_ASKED, "response")),
    "preference": Format(preference, ("chosen", "rejected"), _ASKED, pairs=True),
    "unpaired": Format(unpaired, ("completion", "label"), _ASKED, _USUAL),
    "rated": Format(rated, (_ASKED, "response", "rating"), (), Labels()),
    "chat": Format(chat, ("messages",), ("feedback",), _USUAL),
    "argilla": Format(annotated, *_EXPORT, argilla),
    "label-studio": Format(annotated, *_EXPORT, label_studio),
}
