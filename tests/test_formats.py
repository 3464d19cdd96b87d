"""The common formats of preference rows: what each reads, against TRL's own functions, and its bad rows."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from d2o import datasets, formats, records, schemas
from d2o.errors import D2OError
from d2o.formats import BadRow, LeftOut
from d2o.settings import Reading

ASKED = [{"role": "user", "content": "Is it new?"}]
TALK = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Hi."},
    {"role": "user", "content": "A joke?"},
]


def said(text: str, **more) -> dict:
    return {"role": "assistant", "content": text} | more


def outcomes(format: str, row, **reading) -> list:
    return formats.outcomes(row, Reading(format=format, train=["a"], **reading))


def told(format: str, row, **reading) -> tuple[list, list, int | None]:
    """From a row's only record: the prompt, its answers with whether they are rejected, and the better one."""
    [record] = outcomes(format, row, **reading)
    if isinstance(record, Exception):
        raise record
    answers = [(answer["text"], answer["unsafe"]) for answer in record["responses"]]
    assert record["safer"] is None
    return record["messages"], answers, record["better"]


def why(format: str, row, **reading) -> str:
    """The reason why a row is left out, or bad."""
    [reason] = outcomes(format, row, **reading)
    assert isinstance(reason, Exception)
    return f"{type(reason).__name__}: {reason}"


def read(folder: Path, path: Path, format: str, **reading) -> tuple[list[dict], dict]:
    """The rows of a file, and the manifest."""
    datasets.read(Reading(format=format, train=[str(path)], **reading), folder / "rows.parquet")
    manifest = records.read_manifest(folder / "rows.parquet")
    return records.read_table(folder / "rows.parquet", schemas.ROWS), manifest


def problem(folder: Path, path: Path, format: str, **reading) -> str:
    with pytest.raises(D2OError) as error:
        read(folder, path, format, **reading)
    assert "\n" not in str(error.value) and str(path) in str(error.value)
    return str(error.value)


def lines(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


# Preference --------------------------------------------------------------------------------------

PAIR = ([("Yes.", None), ("No.", None)], 0)


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        ({"prompt": "Is it new?", "chosen": "Yes.", "rejected": "No."}, ASKED),
        ({"prompt": ASKED, "chosen": [said("Yes.")], "rejected": [said("No.")]}, ASKED),
        ({"prompt": TALK, "chosen": [said("Yes.")], "rejected": [said("No.")]}, TALK),
        ({"chosen": [*TALK, said("Yes.")], "rejected": [*TALK, said("No.")]}, TALK),
        # As in UltraFeedback: the prompt as a text beside whole dialogues.
        ({"prompt": "A joke?", "chosen": [*TALK, said("Yes.")], "rejected": [*TALK, said("No.")]}, TALK),
        ({"prompt": TALK, "chosen": [*TALK, said("Yes.")], "rejected": [*TALK, said("No.")]}, TALK),
    ],
)
def test_preference(row, messages):
    assert told("preference", row) == (messages, *PAIR)


TEXT = st.text(min_size=1, max_size=8).filter(str.strip)
DIALOGUE = st.lists(TEXT, min_size=1, max_size=5).filter(lambda turns: len(turns) % 2)


@pytest.fixture(scope="module")
def trl():
    pytest.importorskip("trl", reason="TRL is not installed")
    from trl import data_utils

    return data_utils


@settings(max_examples=50)
@given(turns=DIALOGUE, answers=st.lists(TEXT, min_size=2, max_size=2, unique=True))
def test_an_implicit_prompt_is_the_one_that_trl_extracts(trl, turns, answers):
    prompt = [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]
    row = {key: [*prompt, said(text)] for key, text in zip(("chosen", "rejected"), answers, strict=True)}
    explicit = trl.extract_prompt(row)
    assert told("preference", row) == told("preference", explicit)
    assert told("preference", row)[0] == explicit["prompt"]


def test_what_trl_unpairs_is_read_as_a_negative_and_a_positive(trl):
    """The rows of the example in TRL's own documentation."""
    import datasets as hub

    example = {
        "prompt": ["The sky is", "The sun is"],
        "chosen": [" blue.", " up."],
        "rejected": [" green.", " here."],
    }
    rows = list(trl.unpair_preference_dataset(hub.Dataset.from_dict(example)))
    read = [told("unpaired", row) for row in rows]
    assert [answers for _, answers, _ in read] == [
        [(" blue.", False)], [(" up.", False)], [(" green.", True)], [(" here.", True)],
    ]  # fmt: skip
    assert [trl.is_conversational(row) for row in rows] == [False] * 4


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"chosen": "Yes.", "rejected": "No."}, "give one of `prompt` and `messages`"),
        ({"prompt": "Is it new?", "chosen": "Yes."}, "no `rejected`"),
        ({"prompt": "Is it new?", "chosen": "Yes.", "rejected": None}, "`rejected` is null, not a text"),
        ({"prompt": " ", "chosen": "Yes.", "rejected": "No."}, "`prompt` is empty"),
        ({"prompt": 3, "chosen": "Yes.", "rejected": "No."}, "`prompt` is a number, not a text"),
        ({"prompt": ASKED, "chosen": [], "rejected": [said("No.")]}, "`chosen` does not end with a turn of the"),
        ({"chosen": TALK, "rejected": [*TALK, said("No.")]}, "`chosen` does not end with a turn of the assistant"),
        ({"chosen": [*ASKED, said("Yes.")], "rejected": [*TALK, said("No.")]}, "the prompts of `chosen` and"),
        ({"prompt": ASKED, "chosen": [said("Yes."), *ASKED, said("Yes.")], "rejected": [said("No.")]}, "differ"),
        ({"prompt": ASKED, "chosen": [*TALK, said("a")], "rejected": [*TALK, said("b")]}, "does not begin with"),
        ({"prompt": TALK[:3], "chosen": [said("Yes.")], "rejected": [said("No.")]}, "does not alternate"),
        ({"chosen": [*ASKED, said("a", tool_calls=[{}])], "rejected": [*ASKED, said("b")]}, "calls tools"),
        ({"prompt": ASKED, "chosen": ["Yes."], "rejected": [said("No.")]}, "`chosen` is not a list of objects"),
    ],
)
def test_bad_preference(row, reason):
    assert why("preference", row).startswith("BadRow") and reason in why("preference", row)


# Labels ------------------------------------------------------------------------------------------

UNPAIRED = {"prompt": "Is it new?", "completion": "No.", "label": False}


@pytest.mark.parametrize(
    ("label", "rejected"),
    [(False, True), (0, True), (0.0, True), ("false", True), ("0", True), (" Thumbs_Down ", True), (-1, True),
     (True, False), (1, False), ("TRUE", False), ("good", False), ("+1", False)],
)  # fmt: skip
def test_usual_labels(label, rejected):
    assert told("unpaired", UNPAIRED | {"label": label}) == (ASKED, [("No.", rejected)], None)


def test_unpaired_messages():
    row = {"prompt": TALK, "completion": [said("No.")], "label": False}
    assert told("unpaired", row) == (TALK, [("No.", True)], None)
    assert told("unpaired", row | {"completion": [*TALK, said("No.")]}) == (TALK, [("No.", True)], None)


@pytest.mark.parametrize(
    ("label", "reason"),
    [
        (None, "LeftOut: no label yet"),
        ("", "LeftOut: no label yet"),
        ([], "LeftOut: no label yet"),
        (float("nan"), "LeftOut: no label yet"),
        ("meh", "LeftOut: the label 'meh' is in neither list"),
        (3, "LeftOut: the label 3 is in neither list"),
        ("\x1b[31m", r"LeftOut: the label '\\u001b[31m' is in neither list"),
        ([True, False], "LeftOut: as many raters for as against it"),
        ({"rating": 1}, "BadRow: the label is an object, not a text, a number, true or false"),
    ],
)
def test_a_label_that_says_nothing(label, reason):
    assert why("unpaired", UNPAIRED | {"label": label}) == reason


@pytest.mark.parametrize(("label", "rejected"), [("No", True), (False, True), ("yes", False), (True, False)])
def test_a_bare_no_of_yaml_is_the_label_no(label, rejected):
    named = yaml.safe_load("{negative: [no], positive: [yes]}")
    assert named == {"negative": [False], "positive": [True]}
    row = UNPAIRED | {"label": label}
    assert told("unpaired", row, label=named) == (ASKED, [("No.", rejected)], None)


def test_no_and_yes_are_no_usual_labels():
    assert why("unpaired", UNPAIRED | {"label": "no"}) == "LeftOut: the label 'no' is in neither list"


def test_labels_that_the_config_names():
    label = {"negative": ["thumbs_down", 1, "bad"]}
    read = {
        one: told("unpaired", UNPAIRED | {"label": one}, label=label)[1] for one in ("bad", "1", 1.0, "Thumbs_Down")
    }
    assert set(map(str, read.values())) == {str([("No.", True)])}
    for other in (0, True, "good"):  # the usual values no longer count
        assert "in neither list" in why("unpaired", UNPAIRED | {"label": other}, label=label)


@pytest.mark.parametrize(
    ("ratings", "rejected"), [(2, True), (3, False), ("2.5", True), ([1, 5, 2], True), ([4, 4, 1], False)]
)
def test_ratings(ratings, rejected):
    row = {"messages": TALK, "response": "No.", "rating": ratings}
    assert told("rated", row, label={"below": 3}) == (TALK, [("No.", rejected)], None)


@pytest.mark.parametrize(
    ("rating", "reason"),
    [(None, "LeftOut: no label yet"), ([2, 4], "LeftOut: as many raters"), ("two", "BadRow: the rating is a text")],
)
def test_bad_ratings(rating, reason):
    assert reason in why("rated", {"prompt": "a", "response": "b", "rating": rating}, label={"below": 3})


@pytest.mark.parametrize(
    ("reading", "message"),
    [
        ({"format": "rated"}, r"label: say which ratings of rated reject an answer, such as \{below: 3\}"),
        ({"format": "negatives", "label": {"below": 3}}, "label: the rows of negatives need none; leave it out"),
        ({"format": "unpaired", "label": {"positive": [1]}}, "label: give `negative`, and `positive`"),
        ({"format": "unpaired", "label": {"negative": [1], "below": 3}}, "label: give `negative`"),
        (
            {"format": "unpaired", "label": {"negative": ["Bad"], "positive": [" bad"]}},
            "label: 'Bad' is in both `negative` and `positive`",
        ),
        ({"format": "unpaired", "label": {"negative": ["1"], "positive": [1]}}, "label: '1' is in both"),
        ({"format": "unpaired", "label": {"negative": [False], "positive": ["no"]}}, "label: False is in both"),
        (
            {"format": "unpaired", "columns": {"promt": "q"}},
            r"columns\.promt: the format unpaired reads no 'promt'; did",
        ),
        (
            {"format": "negatives", "columns": {"prompt": "text", "response": "text"}},
            r"columns\.prompt: 'text' is also",
        ),
        ({"format": "negatives", "columns": {"prompt": "response"}}, r"columns\.prompt: 'response' is also what"),
        ({"format": "unpaired", "columns": {"prompt": ""}}, r"columns\.prompt: String should have at least 1"),
        ({"format": "trl"}, "format: Input should be"),
    ],
)
def test_a_wrong_config_is_refused_before_anything_is_read(reading, message):
    from d2o.settings import validate

    with pytest.raises(D2OError, match=f"^c: {message}"):
        validate(Reading, {"train": ["a"]} | reading, "c")


# Chats -------------------------------------------------------------------------------------------


def test_feedback_about_the_last_answer():
    row = {"id": 1, "messages": [*TALK, said("No.")], "feedback": "thumbs_down"}
    assert told("chat", row) == (TALK, [("No.", True)], None)
    parts = [{"type": "text", "text": "No"}, {"type": "text", "text": "way."}]
    row["messages"] = [{"role": "developer", "content": "Be kind."}, *TALK[1:], said("x") | {"content": parts}]
    assert told("chat", row) == (TALK, [("No\nway.", True)], None)
    assert told("chat", row | {"messages": json.dumps(row["messages"])}) == told("chat", row), "in a cell of a table"


def test_feedback_in_messages_is_about_each():
    messages = [*TALK[:2], said("Hi.", feedback="up"), TALK[3], said("No.", feedback="down"), *ASKED]
    good, bad = outcomes("chat", {"messages": messages})
    assert (good["messages"], good["responses"]) == (TALK[:2], [{"text": "Hi.", "unsafe": False}])
    assert (bad["messages"], bad["responses"]) == (TALK, [{"text": "No.", "unsafe": True}])
    messages[2]["feedback"] = "meh"
    left, bad = outcomes("chat", {"messages": messages})
    assert isinstance(left, LeftOut) and bad["responses"] == [{"text": "No.", "unsafe": True}]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": [*TALK, said("No.")]}, "LeftOut: no label yet"),
        ({"messages": TALK, "feedback": "down"}, "BadRow: `messages` do not end with an answer"),
        ({"messages": [], "feedback": "down"}, "BadRow: `messages` do not end with an answer"),
        ({"messages": [said("No.")], "feedback": "down"}, "does not alternate"),
        ({"messages": "Hello", "feedback": "down"}, "`messages` is not a list of objects"),
        ({"feedback": "down"}, "BadRow: no `messages`"),
        ({"messages": [*ASKED, {"role": "tool", "content": "{}"}, said("No.")], "feedback": "down"}, "calls tools"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}, said("No.")], "feedback": "down"},
            "a part that is no text, such as an image",
        ),
    ],
)
def test_bad_chats(row, reason):
    assert reason in why("chat", row)


# Exports -----------------------------------------------------------------------------------------

# As `Record.to_dict` of Argilla 2 builds it.
ARGILLA = {
    "id": "1",
    "fields": {"prompt": "Is it new?", "response": "No."},
    "metadata": {},
    "suggestions": {"quality": {"value": "good", "score": 0.9, "agent": "a model"}},
    "responses": {"quality": [{"value": "bad", "user_id": "a"}, {"value": "good", "user_id": "b"}]},
    "vectors": {},
    "status": "completed",
    "_server_id": None,
}
QUALITY = {"columns": {"label": "quality"}}


def argilla(**responses) -> dict:
    return ARGILLA | {
        "responses": {q: [{"value": v, "user_id": "a"} for v in values] for q, values in responses.items()}
    }


def test_argilla():
    read = told("argilla", argilla(quality=["bad", "bad", "good"]), **QUALITY)
    assert read == (ASKED, [("No.", True)], None)
    flat = {
        "prompt": "Is it new?",
        "response": "No.",
        "quality.responses": ["bad", "good"],
        "quality.suggestion": "good",
    }
    status = {"quality.responses.status": ["submitted", "draft"]}
    assert told("argilla", flat | status, **QUALITY) == (ASKED, [("No.", True)], None)
    talked = ARGILLA | {"fields": {"chat": TALK, "response": "No."}} | {"responses": argilla(stars=[1])["responses"]}
    stars = {"columns": {"messages": "chat", "label": "stars"}, "label": {"below": 3}}
    assert told("argilla", talked, **stars) == (TALK, [("No.", True)], None)


PAIRED = {"columns": {"response_1": "one", "response_2": "two", "label": "best"}}


@pytest.mark.parametrize(
    ("best", "better"), [(["two", "one"], None), ("response_2", 1), ("Response A", 0), ([], None)]
)
def test_argilla_compares_two_answers(best, better):
    row = argilla(best=[best]) | {"fields": {"prompt": "Is it new?", "one": "Yes.", "two": "No."}}
    if better is None:
        assert why("argilla", row, **PAIRED).startswith("LeftOut")
    else:
        assert told("argilla", row, **PAIRED) == (ASKED, [("Yes.", None), ("No.", None)], better)


COMPARED = {"prompt": "Is it new?", "response_1": "Yes.", "response_2": "No."}


FIRST = [1, 1.0, "1", "1.0", "a", " A ", "left", "response_1", "Response 1", "answer1", "answer-a", "model_answer_1"]
SECOND = [2, 2.0, "2", "2.0", "b", "right", "response_2", "Antwort 2", "option b", "the right", [2.0, 2.0, 1.0]]
NEITHER = [0, 3, 1.5, "12", "answer 12", "21", "-1", "no, not a", "not a", "no 1", "banana", "upright",
           "ab", "true", "both are bad, see a", "neither 1 nor 2", "a or b"]  # fmt: skip


@pytest.mark.parametrize(("labels", "better"), [(FIRST, 0), (SECOND, 1)])
def test_labels_that_prefer_an_answer(labels, better):
    read = {str(label): told("argilla", COMPARED | {"label": label})[2] for label in labels}
    assert read == dict.fromkeys(map(str, labels), better)


@pytest.mark.parametrize("label", NEITHER)
def test_labels_that_prefer_neither_answer(label):
    reason = f"LeftOut: the label {label!r} prefers neither answer"
    assert why("argilla", COMPARED | {"label": label}) == reason


def test_preferences_that_pandas_made_floats(tmp_path):
    rows = [COMPARED | {"label.responses": [label]} for label in (1.0, 2.0)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    kept, manifest = read(tmp_path, tmp_path / "a.parquet", "argilla")
    assert [row["better"] for row in kept] == [0, 1] and manifest["left_out"] == {}


def test_argilla_ranks_two_answers():
    row = argilla(best=[["response_2", "response_1"]] * 2 + [["response_1", "response_2"]])
    row["fields"] = {"prompt": "Is it new?", "one": "Yes.", "two": "No."}
    assert told("argilla", row, **PAIRED)[2] == 1


BAD_OR_RUDE = {"label": {"negative": ["bad", "rude"], "positive": ["good"]}}


@pytest.mark.parametrize("format", ["argilla", "label-studio"])
@pytest.mark.parametrize(("raters", "reads"), [
    ([["bad", "rude"], ["good"]], "LeftOut: as many raters for as against it"),
    ([["bad", "rude"], ["bad"], ["good", "meh"]], [("No.", True)]),
    ([["bad", "good"]], "LeftOut: its labels say both"),
    ([["bad", "good"], ["rude"]], [("No.", True)]),
])  # fmt: skip
def test_a_rater_who_ticks_two_labels_has_one_vote(format, raters, reads):
    row = argilla(quality=raters) if format == "argilla" else task(*({"choices": one} for one in raters))
    read = told(format, row, **QUALITY, **BAD_OR_RUDE)[1] if isinstance(reads, list) else None
    assert (read or why(format, row, **QUALITY, **BAD_OR_RUDE)) == reads


def test_the_labels_in_a_row_of_one_annotator_are_theirs():
    flat = {"prompt": "Is it new?", "response": "No.", "quality": {"choices": ["bad", "good"]}}
    assert why("label-studio", flat, **QUALITY, **BAD_OR_RUDE) == "LeftOut: its labels say both"


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (ARGILLA, "LeftOut: as many raters for as against it"),
        (ARGILLA | {"responses": {}, "status": "pending"}, "LeftOut: no label yet"),
        (argilla(quality=["meh"]), "LeftOut: the label 'meh' is in neither list"),
        (argilla(quality=[{"a": 1}]), "BadRow: the label is an object"),
        (ARGILLA | {"fields": None}, "BadRow: `fields` and `responses` are not objects"),
        (ARGILLA | {"responses": {"quality": ["bad"]}}, "BadRow: `responses` has an answer that is not an object"),
        (ARGILLA | {"responses": {"quality": True}}, "BadRow: `responses` has an answer that is not an object"),
        ({"quality.responses": True}, "BadRow: `quality.responses` or its status is not a list"),
        ({"quality.responses": ["bad"], "quality.responses.status": 1}, "BadRow: `quality.responses` or its status"),
        (argilla(quality=["bad"]) | {"fields": {"prompt": "Is it new?"}}, "BadRow: no `response`"),
    ],
)
def test_bad_argilla(row, reason):
    assert why("argilla", row, **QUALITY).startswith(reason)


def task(*annotations, **data) -> dict:
    """A task as Label Studio writes it, with the annotation of each annotator."""
    results = [[{"from_name": "quality", "to_name": "text", "type": "choices", "value": one}] for one in annotations]
    told = [{"id": i, "result": result, "was_cancelled": False} for i, result in enumerate(results)]
    return {
        "id": 1,
        "data": {"prompt": "Is it new?", "response": "No."} | data,
        "annotations": told,
        "predictions": [],
    }


def test_label_studio():
    assert told("label-studio", task({"choices": ["bad"]}), **QUALITY) == (ASKED, [("No.", True)], None)
    several = task({"choices": ["bad"]}, {"choices": ["good"]}, {"choices": ["bad"]})
    assert told("label-studio", several, **QUALITY)[1] == [("No.", True)]
    several["annotations"][2]["was_cancelled"] = True
    assert why("label-studio", several, **QUALITY) == "LeftOut: as many raters for as against it"
    stars = QUALITY | {"label": {"below": 3}}
    assert told("label-studio", task({"rating": 2}), **stars)[1] == [("No.", True)]
    flat = {"id": 1, "prompt": "Is it new?", "response": "No.", "quality": "bad", "annotator": 1}
    assert told("label-studio", flat, **QUALITY)[1] == [("No.", True)]
    for rating in ([{"rating": 2}], '[{"rating":2}]'):  # in JSON-MIN, in CSV
        assert told("label-studio", flat | {"quality": rating}, **stars)[1] == [("No.", True)]


# Written by argilla 2.8.0 and label-studio-sdk 2.1.2, from a few answers that up to three raters labelled. In the
# last two files each row is from one annotator.
EXPORTS = Path(__file__).parent / "data" / "exports"


@pytest.mark.parametrize(("file", "format", "by_choice", "by_stars"), [
    ("argilla-nested.jsonl", "argilla", [True, False, True], [True, False, True]),
    ("argilla-flat.jsonl", "argilla", [True, False, True], [True, False, True]),
    ("label-studio.json", "label-studio", [True, False], [True, False]),
    ("label-studio-min.json", "label-studio", [True, True, False, False], [True, True, False, False]),
    ("label-studio.csv", "label-studio", [True, True, False, False], [True, True, False, False]),
])  # fmt: skip
def test_what_their_own_packages_write_is_read(file, format, by_choice, by_stars, tmp_path):
    label = {"negative": ["bad", "rude"], "positive": ["good"]}
    for column, says, rejected in (("quality", label, by_choice), ("stars", {"below": 3}, by_stars)):
        rows, manifest = read(tmp_path, EXPORTS / file, format, columns={"label": column}, label=says)
        assert [answer["unsafe"] for row in rows for answer in row["responses"]] == rejected
        assert manifest["left_out"] == ({"no label yet": 1} if format == "argilla" else {})


@pytest.mark.parametrize(("side", "better"), [("left", 0), ("right", 1)])
def test_label_studio_compares_two_answers(side, better):
    row = task({"selected": side}, one="Yes.", two="No.")
    columns = {"response_1": "one", "response_2": "two", "label": "quality"}
    del row["data"]["response"]
    assert told("label-studio", row, columns=columns) == (ASKED, [("Yes.", None), ("No.", None)], better)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (task(), "LeftOut: no label yet"),
        (task({"choices": []}), "LeftOut: no label yet"),
        (task({"text": ["a remark"]}), "BadRow: the label is an object"),
        (task(json.loads("[" * 400 + "]" * 400)), "BadRow: the label is a list"),
        (task({"choices": ["bad"]}) | {"data": None}, "BadRow: `data` is not an object"),
        (
            task({"choices": ["bad"]}) | {"annotations": [{"result": None}]},
            "BadRow: an annotation has no list `result`",
        ),
        (task({"choices": ["bad"]}, response=""), "BadRow: `response` is empty"),
    ],
)
def test_bad_label_studio(row, reason):
    assert why("label-studio", row, **QUALITY).startswith(reason)


ROWS = [None, [], 3, {}, {"fields": 1}, {"annotations": 1}, {"annotations": [1]}, {"messages": [1]}, {"prompt": {}},
        {"quality.responses": None, "quality.responses.status": None}]  # fmt: skip


@pytest.mark.parametrize("format", formats.FORMATS)
@pytest.mark.parametrize("row", ROWS)
def test_no_row_is_a_crash(format, row):
    label = {"label": {"below": 3}} if format == "rated" else {}
    assert all(isinstance(one, BadRow | LeftOut) for one in outcomes(format, row, **label))


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)
KEYS = sorted({key for form in formats.FORMATS.values() for key in form.keys})
EXPORTED = ["fields", "responses", "data", "annotations", "label.responses", "label.responses.status"]


@settings(max_examples=300)
@given(row=st.dictionaries(st.sampled_from(KEYS + EXPORTED), JSON), format=st.sampled_from(list(formats.FORMATS)))
def test_any_row_is_read_or_has_a_reason(row, format):
    label = {"label": {"below": 3}} if format == "rated" else {}
    for one in outcomes(format, row, **label):
        assert isinstance(one, BadRow | LeftOut | dict)


# Files -------------------------------------------------------------------------------------------

CSV = '\ufeffquestion;answer;thumb\r\n"Is it\nnew; or old?";"He said ""no"".";down\r\nWhy?;Yes.;up\r\nHow?;So.;\r\n'
MAPPED = {
    "columns": {"prompt": "question", "completion": "answer", "label": "thumb"},
    "label": {"negative": ["down"], "positive": ["up"]},
}


@pytest.mark.parametrize(("name", "separator"), [("a.csv", ";"), ("a.csv", ","), ("a.csv", "\t"), ("a.tsv", "\t")])
def test_tables_of_texts(name, separator, tmp_path):
    """With a byte order mark, cells of several lines, and a label that is still missing."""
    (tmp_path / name).write_bytes(CSV.replace("; or", "\0 or").replace(";", separator).replace("\0", ";").encode())
    rows, manifest = read(tmp_path, tmp_path / name, "unpaired", **MAPPED)
    assert rows[0]["messages"][0]["content"] == "Is it\nnew; or old?"
    assert [row["responses"][0]["text"] for row in rows] == ['He said "no".', "Yes."]
    assert [row["responses"][0]["unsafe"] for row in rows] == [True, False]
    assert manifest["counts"] == {"train": 2, "test": 0, "rejected": 0, "left_out": 1}
    assert manifest["left_out"] == {"no label yet": 1}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prompt,response\na,b,c\n", "row 1: 3 cells, and the header has 2"),
        ("prompt,response\na\n", "row 1: no `response`"),
        ('prompt,response\na,b\n"a,b\n', "after row 1: unexpected end of data"),
        ('prompt,response\n"a"x,b\n', "after row 0: ',' expected after '\"'"),
        ("prompt,prompt,response\na,b,c\n", "several columns are called 'prompt'"),
        ("prompt,answer\na,b\n", "lacks the column response, which negatives needs, and has prompt, answer"),
        ("", "there is no row in it"),
    ],
)
def test_bad_tables_of_texts(text, message, tmp_path):
    (tmp_path / "a.csv").write_text(text)
    assert message in problem(tmp_path, tmp_path / "a.csv", "negatives")


SIDES = {"chosen": [said("It's new.")], "rejected": [said("No.")]}


def cells(path: Path, rows: list[dict], write) -> Path:
    """Write rows to a table, their messages turned into texts by `write`."""
    with path.open("w", newline="") as file:
        table = csv.DictWriter(file, rows[0])
        table.writeheader()
        table.writerows(
            {key: write(value) if isinstance(value, list) else value for key, value in row.items()} for row in rows
        )
    return path


@pytest.mark.parametrize("write", [json.dumps, lambda value: json.dumps(value, indent=2)])
@pytest.mark.parametrize(
    ("format", "row"),
    [
        ("preference", {"prompt": TALK} | SIDES),
        ("preference", {key: TALK + turns for key, turns in SIDES.items()}),
        ("preference", {"prompt": TALK} | {key: TALK + turns for key, turns in SIDES.items()}),
        ("unpaired", {"prompt": TALK, "completion": [said("No.")], "label": "bad"}),
        ("negatives", {"messages": TALK, "response": [said("No.")]}),
        ("chat", {"messages": [*TALK, said("No.")], "feedback": "bad"}),
    ],
)  # fmt: skip
def test_messages_in_the_cells_of_a_table(format, row, write, tmp_path):
    [kept], manifest = read(tmp_path, cells(tmp_path / "a.csv", [row], write), format)
    assert (kept["messages"], [one["text"] for one in kept["responses"]]) == (
        told(format, row)[0],
        [text for text, _ in told(format, row)[1]],
    )
    assert kept["messages"] == TALK and manifest["counts"]["rejected"] == 0


@pytest.mark.parametrize(
    "write", [str, lambda value: json.dumps(value)[:-9], lambda value: "\n".join(map(str, value)).join("[]")]
)
@pytest.mark.parametrize("key", ["prompt", "chosen", "rejected"])
def test_messages_that_are_no_json_are_not_trained_on_as_a_text(key, write):
    """Messages as Python prints them, cut off, and as numpy prints them. The row's other messages are valid."""
    row = {"prompt": TALK} | SIDES
    reason = f"BadRow: `{key}` begins like messages and is not JSON; write it as JSON (json.dumps)"
    assert why("preference", row | {key: write(row[key])}) == reason
    assert why("unpaired", UNPAIRED | {"completion": write(SIDES["rejected"])}) == reason.replace(key, "completion")
    assert why("chat", {"messages": write(TALK), "feedback": "bad"}) == reason.replace(key, "messages")


def test_messages_of_another_form_are_not_trained_on_as_a_text():
    sharegpt = [{"from": "human", "value": "Is it new?"}]
    assert why("preference", SIDES | {"prompt": json.dumps(sharegpt)}) == "BadRow: no `role`"
    assert "is not JSON" in why("preference", SIDES | {"prompt": str(sharegpt)})


@pytest.mark.parametrize(
    "text", ['[{"name": "weather", "arguments": {"from": "Rome"}}]', "[{'a': 1}]", "[1]", '["role": 1]', "[{"]
)
def test_an_answer_of_objects_is_a_text(text):
    assert told("negatives", {"prompt": "Is it new?", "response": text})[1] == [(text, True)]


def test_not_utf8_table(tmp_path):
    (tmp_path / "a.csv").write_bytes("prompt,response\nWie?,Größe\n".encode("latin-1"))
    assert "row 2, byte 23: not UTF-8" in problem(tmp_path, tmp_path / "a.csv", "negatives")


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet", "a.csv"])
def test_a_column_that_no_row_has_is_told_with_those_it_has(name, tmp_path):
    row = {"question": "Is it new?", "completion": "No.", "thumb": "down"}
    path = tmp_path / name
    if name == "a.parquet":
        pq.write_table(pa.Table.from_pylist([row]), path)
    elif name == "a.csv":
        path.write_text(",".join(row) + "\n" + ",".join(row.values()) + "\n")
    else:
        lines(path, [row])
    columns = {"prompt": "question", "label": "thumbs"}
    message = problem(tmp_path, path, "unpaired", columns=columns)
    assert "thumbs" in message and "question, completion, thumb" in message


def test_columns_of_nested_rows(tmp_path):
    row = {"input": {"text": "Is it new?"}, "completion": "No.", "meta": {"user": {"thumb": -1}}, "prompt": 7}
    columns = {"prompt": "input.text", "label": "meta.user.thumb"}
    assert told("unpaired", row, columns=columns) == (ASKED, [("No.", True)], None)
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "a.parquet")
    rows, _ = read(tmp_path, tmp_path / "a.parquet", "unpaired", columns=columns)
    assert rows[0]["responses"][0]["unsafe"]


def test_openais_preference_format_is_a_matter_of_names():
    row = {"input": {"messages": TALK}, "preferred_output": [said("Yes.")], "non_preferred_output": [said("No.")]}
    columns = {"messages": "input.messages", "chosen": "preferred_output", "rejected": "non_preferred_output"}
    assert told("preference", row, columns=columns) == (TALK, *PAIR)


def test_what_is_left_out_is_counted_by_reason_and_no_bad_row(tmp_path):
    labels = ["down", "up", None, "meh", "meh", *(f"word {i}" for i in range(99))]
    path = lines(tmp_path / "a.jsonl", [UNPAIRED | {"label": label} for label in labels])
    rows, manifest = read(tmp_path, path, "unpaired", max_bad_share=0.0)
    assert len(rows) == 2 and manifest["counts"]["left_out"] == 102 and manifest["counts"]["rejected"] == 0
    reasons = manifest["left_out"]
    assert reasons["no label yet"] == 1 and reasons["the label 'meh' is in neither list"] == 2
    assert reasons["other labels"] == 51 and sum(reasons.values()) == 102


def test_labels_of_which_none_says_anything(tmp_path):
    path = lines(tmp_path / "a.jsonl", [UNPAIRED | {"label": "meh"}] * 3)
    message = problem(tmp_path, path, "unpaired")
    assert (
        "no answer has a label that says anything: the label 'meh' is in neither list: 3; name its column" in message
    )


@pytest.mark.parametrize("format", ["argilla", "label-studio"])
def test_exports_in_every_kind_of_file(format, tmp_path):
    row = argilla(quality=["bad"]) if format == "argilla" else task({"choices": ["bad"]})
    lines(tmp_path / "a.jsonl", [row])
    (tmp_path / "a.json").write_text(json.dumps([row]))
    row = {key: value for key, value in row.items() if value not in ({}, [])}  # Parquet has no type for nothing
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.json", "a.parquet"):
        rows, _ = read(tmp_path, tmp_path / name, format, **QUALITY)
        assert rows[0]["responses"][0] == {"text": "No.", "unsafe": True, "categories": None, "severity": None}
