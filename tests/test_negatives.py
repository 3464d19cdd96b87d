"""Stage `negatives`: what each rule takes, what is dropped and counted, and which prompts may be trained on."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
import unicodedata
from collections import Counter
from pathlib import Path

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import ROOT
from d2o import datasets, groups, identities, negatives, records, schemas
from d2o.errors import D2OError
from d2o.negatives import evaluated, leaks, task_leaks
from d2o.negatives.rows import RULES, negatives_of, normalised, pairs_of, scan
from d2o.settings import Extraction, Method, Reading

DATA = Path(__file__).parent.parent.parent / "shared" / "data"


def row(prompt, *answers, better=None, safer=None, split="train") -> dict:
    """A row of `schemas.ROWS`. A prompt of several turns is a list; an answer is its text and labels, the last of
    which may be left out: `unsafe`, categories, severity."""
    turns = [prompt] if isinstance(prompt, str) else prompt
    messages = [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]
    return {
        "row": 0,
        "split": split,
        "prompt_id": identities.prompt_id(messages),
        "messages": messages,
        "responses": [
            dict(zip(("text", "unsafe", "categories", "severity"), labels, strict=False)) for labels in answers
        ],
        "better": better,
        "safer": safer,
    }


def found_in(folder: Path, rows: list[dict], find, rule: str) -> list[tuple]:
    """Negative, positive, and whether the positive is unsafe, of each row that `find` yields by a rule."""
    records.write_table(folder / "rows.parquet", schemas.ROWS, rows)
    table = find(scan(folder / "rows.parquet"), rule).sort("place").collect()
    return table.select("negative", "positive", "positive_unsafe").rows()


def asked(index: int, split: str = "train", **labels) -> dict:
    """A row whose second answer is a negative by any rule."""
    answers = (f"good {index}", False), (f"bad {index}", True)
    return row(f"question {index}", *answers, split=split, **({"better": 0, "safer": 0} | labels))


class Tables:
    """The tables and counts that an extraction made."""

    def __init__(self, folder: Path):
        self.negatives = records.read_table(folder / "negatives.parquet", schemas.NEGATIVES)
        self.pairs = records.read_table(folder / "pairs.parquet", schemas.NEGATIVES)
        self.prompts = records.read_table(folder / "prompts.parquet", schemas.PROMPTS)
        self.counts = records.read_manifest(folder / "negatives.parquet")["counts"]

    def texts(self, split: str) -> list[str]:
        return [row["negative"] for row in self.negatives if row["split"] == split]

    def ids(self, split: str) -> set[str]:
        return {row["prompt_id"] for row in self.negatives + self.pairs if row["split"] == split}


def extract(folder: Path, rows: list[dict], **extraction) -> Tables:
    folder.mkdir(exist_ok=True)
    records.write_table(folder / "rows.parquet", schemas.ROWS, rows)
    negatives.extract(Extraction(**extraction), folder / "rows.parquet", folder / "made")
    return Tables(folder / "made")


def test_rows_that_were_damaged_are_not_extracted(tmp_path):
    """Polars, which reads them, verifies no checksum."""
    with records.artifact(tmp_path / "rows.parquet") as draft:
        records.write_table(draft.path, schemas.ROWS, [asked(n) for n in range(9)])
    content = bytearray((tmp_path / "rows.parquet").read_bytes())
    content[len(content) // 4] ^= 1
    (tmp_path / "rows.parquet").write_bytes(content)
    with pytest.raises(D2OError, match=r"rows\.parquet: damaged"):
        negatives.extract(Extraction(), tmp_path / "rows.parquet", tmp_path)


def problem(folder: Path, rows: list[dict], **extraction) -> str:
    with pytest.raises(D2OError) as error:
        extract(folder, rows, **extraction)
    assert "\n" not in str(error.value)
    assert not list(folder.glob("made/*"))
    return str(error.value)


# Rules -----------------------------------------------------------------------------------------------

SAFE_UNSAFE = (("a", False), ("b", True))
BOTH_UNSAFE = (("a", True), ("b", True))
BOTH_SAFE = (("a", False), ("b", False))
UNLABELLED = (("a", None), ("b", None))


@pytest.mark.parametrize(
    ("rule", "answers", "labels", "expected"),
    [
        ("safer-unsafe", SAFE_UNSAFE, {"safer": 0}, [("b", "a", False)]),
        ("safer-unsafe", SAFE_UNSAFE, {"safer": 1}, []),  # contradictory labels: the unsafe one is the safer one
        ("safer-unsafe", SAFE_UNSAFE, {"better": 0}, []),  # it is unknown which is safer
        ("safer-unsafe", BOTH_UNSAFE, {"safer": 0, "better": 1}, [("b", "a", True)]),
        ("safer-unsafe", BOTH_SAFE, {"safer": 0}, []),
        ("safer-unsafe", UNLABELLED, {"safer": 0}, []),
        ("safer-unsafe", [("b", True)], {}, [("b", None, None)]),
        ("safer-unsafe", [("b", False)], {}, []),
        ("every-unsafe", SAFE_UNSAFE, {"safer": 0}, [("b", "a", False)]),
        ("every-unsafe", SAFE_UNSAFE, {"safer": 1}, [("b", None, None)]),
        ("every-unsafe", SAFE_UNSAFE, {"better": 0}, [("b", None, None)]),
        ("every-unsafe", BOTH_UNSAFE, {"safer": 0}, [("a", None, None), ("b", "a", True)]),
        ("every-unsafe", BOTH_SAFE, {"safer": 0}, []),
        ("every-unsafe", [("b", True)], {}, [("b", None, None)]),
        ("less-helpful", SAFE_UNSAFE, {"better": 1}, [("a", "b", True)]),
        ("less-helpful", UNLABELLED, {"better": 0}, [("b", "a", None)]),
        ("less-helpful", SAFE_UNSAFE, {"safer": 0}, []),
        ("less-helpful", [("b", True)], {}, []),
        # Two equal answers make no negative and no pair; a label of their own still counts.
        ("safer-unsafe", (("Same.", False), ("same. ", True)), {"safer": 0}, []),
        ("less-helpful", (("Same.", False), ("same. ", True)), {"better": 0}, []),
        ("every-unsafe", (("Same.", False), ("same. ", True)), {"safer": 0}, [("same. ", None, None)]),
    ],
)
def test_rules(rule, answers, labels, expected, tmp_path):
    assert found_in(tmp_path, [row("q", *answers, **labels)], negatives_of, rule) == expected


@pytest.mark.parametrize(
    ("rule", "labels", "preferred"),
    [
        ("safer-unsafe", {"safer": 0, "better": 1}, "a"),
        ("every-unsafe", {"safer": 1, "better": 0}, "b"),
        ("safer-unsafe", {"better": 1}, "b"),
        ("less-helpful", {"safer": 0, "better": 1}, "b"),
        ("less-helpful", {"safer": 0}, "a"),
        ("less-helpful", {}, None),
    ],
)
def test_pairs(rule, labels, preferred, tmp_path):
    pairs = found_in(tmp_path, [row("q", *SAFE_UNSAFE, **labels)], pairs_of, rule)
    assert [positive for _, positive, _ in pairs] == ([preferred] if preferred else [])
    assert all({negative, positive} == {"a", "b"} for negative, positive, _ in pairs)


def test_no_negative_says_which_rule_would_find_some(tmp_path):
    rows = [row(f"q{i}", *UNLABELLED, better=0) for i in range(3)]
    message = problem(tmp_path, rows)
    assert f"{tmp_path / 'rows.parquet'}: the rule safer-unsafe finds no negative" in message
    assert "labels: `better` in 3 rows; rules that find some: less-helpful (3 negatives)" in message
    assert "labels: none; rules that find some: none" in problem(tmp_path, [row("q", *UNLABELLED)])
    assert "labels: none" in problem(tmp_path, [])


def test_texts_are_normalised_as_everywhere():
    """For every character that this Python knows; Polars may not know newer ones either."""
    known = [c for c in map(chr, range(sys.maxunicode + 1)) if unicodedata.category(c) not in ("Cn", "Cs")]
    texts = [f"{c}A{c} \n{c}ΑΣ{c} ΑΣ {c}" for c in known]
    by_polars = pl.select(normalised(pl.lit(pl.Series(texts)))).to_series().to_list()
    assert by_polars == [identities.normalised(text) for text in texts]


# Duplicates ------------------------------------------------------------------------------------------


def test_duplicates_are_dropped_and_counted_apart(tmp_path):
    rows = [
        asked(0),
        asked(0),
        row("question 0", ("good 0", False), ("BAD  0", True), safer=0),
        row("QUESTION 0", ("another", False), ("bad 0", True), safer=0),
        row("question 0", ("Twice", None), ("twice\n", None), safer=0, better=0),
        *map(asked, range(1, 20)),
    ]
    made = extract(tmp_path, rows)
    assert len(made.negatives) == 20
    assert made.counts["duplicates"] == {"exact": 2, "normalised": 1}
    assert len(made.pairs) == 21
    assert made.counts["pair_duplicates"] == {"exact": 1, "normalised": 1}
    assert made.counts["equal_answers"] == 1


def test_which_of_equal_negatives_is_taken_does_not_hang_on_the_label_of_its_positive(tmp_path):
    """DPO's human positives are as noisy as people's labels; a negative with a positive goes before one without."""
    rows = [
        r
        for i in range(200)
        for r in (
            row(f"q {i}", ("bad", True)),
            row(f"q {i}", ("bad", True), ("also bad", True), safer=1),
            row(f"q {i}", ("good", False), ("bad", True), safer=0),
        )
    ]
    flipped = json.loads(json.dumps(rows))
    for each in flipped:
        for answer in each["responses"]:
            answer["unsafe"] = answer["text"] != "also bad"
    taken = [
        {
            r["prompt_id"]: (r["positive"], r["positive_unsafe"])
            for r in extract(tmp_path, given, test_share=0).negatives
        }
        for given in (rows, rows[::-1], flipped)
    ]
    assert taken[0] == taken[1]
    assert {key: text for key, (text, _) in taken[0].items()} == {key: text for key, (text, _) in taken[2].items()}
    assert 70 < sum(unsafe for _, unsafe in taken[0].values()) < 130


def test_the_share_of_unsafe_positives_is_told_for_each_table(tmp_path, capsys):
    rows = [asked(0), *(row(f"worse {i}", *BOTH_UNSAFE, safer=0) for i in range(2)), row("fine", *BOTH_SAFE, safer=0)]
    assert extract(tmp_path, rows, test_share=0).counts["unsafe_positives"] == {"negatives": 2 / 3, "pairs": 0.5}
    assert "unsafe positives: 66.7% negatives, 50.0% pairs\n" in capsys.readouterr().err
    unlabelled = [row(f"q {i}", ("a", None), ("b", None), better=0) for i in range(9)]
    assert extract(tmp_path, unlabelled, rule="less-helpful").counts["unsafe_positives"] == {}


def test_counts_and_summary(tmp_path, capsys):
    rows = [
        asked(0),
        row("lone", ("bad", True)),
        row("worse", *BOTH_UNSAFE, safer=0),
        row("fine", *BOTH_SAFE, safer=0),
        asked(1, "test"),
    ]
    made = extract(tmp_path, rows)
    assert made.counts == {
        "rows": 5,
        "equal_answers": 0,
        "negatives": {"train": 3, "test": 1},
        "pairs": {"train": 3, "test": 1},
        "prompts": {"train": 3, "test": 1},
        "positives": {"human": 3, "safe": 2},
        "prompts_without_positive": {"train": 1},
        "unsafe_positives": {"negatives": 1 / 3, "pairs": 1 / 4},
        "evaluation_prompts": {},
        "repeated_evaluation_prompts": 0,
        "leaks": {"prompts": 0, "test": 0, "evaluation": 0},
        "near_leaks": {"prompts": 0, "test": 0, "evaluation": 0},
        "near_duplicates": {"train": 0},
        "capped": {"train": 0, "test": 0, "negatives": 0},
        "duplicates": {"exact": 0, "normalised": 0},
        "pair_duplicates": {"exact": 0, "normalised": 0},
    }
    told = capsys.readouterr().err
    assert "negatives: 3 train, 1 test\n" in told
    assert "positives: 3 human, 2 safe\n" in told
    for name, count in (("negatives", 4), ("pairs", 4), ("prompts", 1)):
        assert records.read_manifest(tmp_path / "made" / f"{name}.parquet")["rows"] == count


# Splits ----------------------------------------------------------------------------------------------


def test_given_test_rows_are_the_test_split(tmp_path):
    rows = [asked(i, "test" if i < 3 else "train") for i in range(10)]
    made = extract(tmp_path, rows, test_share=0.5)
    assert made.texts("test") == ["bad 0", "bad 1", "bad 2"]
    assert len(made.texts("train")) == 7
    assert {prompt["messages"][0]["content"] for prompt in made.prompts} == {f"question {i}" for i in range(3)}


def test_a_prompt_of_both_parts_leaves_train(tmp_path):
    leak = row("Question  0", ("other good", False), ("other bad", True), safer=0)
    made = extract(tmp_path, [leak, asked(0, "test"), *map(asked, range(1, 5))], max_leak_share=1)
    assert made.texts("test") == ["bad 0"]
    assert "other bad" not in made.texts("train")
    assert made.counts["leaks"] == {"prompts": 1, "test": 1, "evaluation": 0}


def test_a_test_part_of_another_release_is_refused(tmp_path):
    """Nine of ten test prompts are train prompts: the data were split again between the two releases."""
    rows = [*map(asked, range(100)), *(asked(i, "test") for i in range(91, 101))]
    said = problem(tmp_path, rows)
    assert "9 of 10 test prompts are train prompts as well: are both of one release?" in said
    assert extract(tmp_path, rows, max_leak_share=0.9).counts["prompts"] == {"train": 91, "test": 10}


def test_the_share_of_leaks_counts_test_prompts(tmp_path):
    """One test prompt that occurs in two train prompts counts as one of one, not two."""
    rows = [row(prompt, ("good", False), ("bad", True), safer=0) for prompt in ("q", ["u", "a", "q"], "other")]
    rows += [row("q", ("good", False), ("bad", True), safer=0, split="test")]
    made = extract(tmp_path, rows, max_leak_share=1)
    assert made.counts["leaks"] == {"prompts": 2, "test": 2, "evaluation": 0}


def test_the_cap_of_test_prompts_counts_those_with_test_negatives(tmp_path):
    """A prompt whose only negative is in a train row that leaks has nothing to show in the test split."""
    rows = []
    for i in range(20):
        rows += [asked(i), row(f"question {i}", *BOTH_SAFE, safer=0, split="test")]
    made = extract(
        tmp_path, [*rows, asked(20, "test"), asked(21, "test"), asked(22)], test_prompts=2, max_leak_share=1
    )
    assert made.counts["prompts"] == {"train": 1, "test": 2}


@pytest.mark.parametrize(("share", "held_out"), [(0, 0), (0.001, 1), (0.1, 20), (0.5, 100)])
def test_share_held_out(share, held_out, tmp_path):
    made = extract(tmp_path, [asked(i) for i in range(200)], test_share=share)
    assert made.counts["prompts"] == {"train": 200 - held_out, "test": held_out}


def test_nothing_left_to_train_on(tmp_path):
    assert "no negative is left to train on" in problem(tmp_path, [asked(0), asked(1)], test_share=1)
    rows = [asked(0), asked(0, "test")]
    assert "1 train prompts are evaluated as well" in problem(tmp_path, rows)


def test_caps_keep_prompts_with_negatives(tmp_path):
    rows = [asked(i, better=None, safer=0 if i % 2 else 1) for i in range(100)]  # negatives where i is odd
    whole = extract(tmp_path, rows, test_share=0.2)
    made = extract(tmp_path, rows, test_share=0.2, train_prompts=7, test_prompts=3)
    assert made.counts["negatives"] == made.counts["pairs"] == {"train": 7, "test": 3}
    too_many = {"train": len(whole.ids("train")) - 7, "test": len(whole.ids("test")) - 3}
    assert made.counts["capped"] == too_many | {"negatives": 0}
    assert made.ids("train") < whole.ids("train")
    assert made.ids("test") < whole.ids("test")
    shuffled = extract(tmp_path, rows[::-1], test_share=0.2, train_prompts=7, test_prompts=3)
    assert (shuffled.ids("train"), shuffled.ids("test")) == (made.ids("train"), made.ids("test"))
    first = {f"bad {i}" for i in range(14)}  # the caps must not keep the file's first prompts
    assert not first.issuperset(made.texts("train"))


# Categories and caps ---------------------------------------------------------------------------------


def labelled(index: int, answers: int, *categories: str) -> list[dict]:
    """Rows of one prompt, each with a negative of these categories."""
    prompt = f"question {index}"
    return [
        row(prompt, (f"good {i}", False, [], 0), (f"bad {index} {i}", True, [*categories], 2), safer=0)
        for i in range(answers)
    ]


def test_labels_go_with_the_negative(tmp_path):
    rows = [
        row("a", ("bad", True, ["Drugs", "Fraud"], 3), ("good", False, [], 0), safer=1),
        row("b", ("fine", False, [], 0), ("worse", True, ["Fraud"], 1), safer=0),
        row("c", ("fine", False), ("worse", True), safer=0),
    ]
    made = extract(tmp_path, rows, test_share=0)
    labels = {r["negative"]: (r["positive"], r["categories"], r["severity"]) for r in made.negatives[:2]}
    assert labels == {"bad": ("good", ["Drugs", "Fraud"], 3), "worse": ("fine", ["Fraud"], 1)}
    assert (made.negatives[2]["categories"], made.negatives[2]["severity"]) == (None, None)
    assert made.counts["train_categories"] == {"Drugs": 1, "Fraud": 2}
    assert made.counts["train_severity"] == {"1": 1, "3": 1}


def test_cap_per_prompt(tmp_path):
    rows = [r for i in range(20) for r in labelled(i, 1 + i % 6)]
    whole = extract(tmp_path, rows)
    made = extract(tmp_path, rows, negatives_per_prompt=2)
    per_prompt = [r["prompt_id"] for r in made.negatives if r["split"] == "train"]
    assert max(map(per_prompt.count, per_prompt)) == 2
    assert made.ids("train") == whole.ids("train")
    assert made.texts("test") == whole.texts("test")
    assert made.counts["capped"]["negatives"] == len(whole.negatives) - len(made.negatives) > 0
    assert made.pairs == whole.pairs
    shuffled = extract(tmp_path, rows[::-1], negatives_per_prompt=2)
    assert sorted(shuffled.texts("train")) == sorted(made.texts("train"))
    first = {text for text in whole.texts("train") if text.endswith((" 0", " 1"))}
    assert not first.issuperset(made.texts("train"))  # the choice does not depend on the order of the file


def test_cap_per_category(tmp_path):
    rows = labelled(0, 9, "Drugs") + labelled(1, 9, "Drugs", "Fraud") + labelled(2, 9, "Fraud") + labelled(3, 9)
    made = extract(tmp_path, rows, test_share=0, negatives_per_category=7)
    assert made.counts["train_categories"] == {"Drugs": 7, "Fraud": 7}
    assert sum(text.startswith("bad 3") for text in made.texts("train")) == 9  # of no category: not capped
    shuffled = extract(tmp_path, rows[::-1], test_share=0, negatives_per_category=7)
    assert sorted(shuffled.texts("train")) == sorted(made.texts("train"))


def test_cap_of_categories_that_are_not_there(tmp_path):
    assert "no harm categories" in problem(tmp_path, [asked(0), asked(1)], negatives_per_category=1)


@pytest.mark.parametrize("caps", [{}, {"negatives_per_prompt": 1}, {"negatives_per_category": 5}])
def test_dpo_on_human_pairs_sees_the_prompts_of_d2o(caps, tmp_path):
    """With the paper's rule every negative has its positive, whatever is capped."""
    rows = [r for i in range(30) for r in labelled(i, 3, ["Drugs", "Fraud"][i % 2])]
    rows += [row(f"question {i}", *BOTH_UNSAFE, safer=i % 2) for i in range(60)]
    made = extract(tmp_path, rows, **caps)
    prompts = made.ids("train")
    pool = [
        {"prompt_id": prompt, "sample": k, "text": f"answer {k}", "finish": "stop", "usable": True}
        for prompt in prompts
        for k in (0, 1)
    ]
    d2o = Method(loss="d2o", positives="self", negatives=True)
    dpo = Method(loss="dpo", positives="human", negatives=True)
    seen = [
        [(group.prompt_id, group.negatives[0].text) for group in groups.view(method, made.negatives, pool)]
        for method in (d2o, dpo)
    ]
    assert seen[0] == seen[1] != []
    assert made.counts["prompts_without_positive"] == {"train": 0}


def test_negatives_with_a_positive_are_capped_last(tmp_path):
    """So that a cap removes no prompt from the methods that need a pair."""
    rows = [
        r
        for i in range(20)
        for r in (
            *(row(f"question {i}", (f"lone {i} {k}", True)) for k in range(3)),
            row(f"question {i}", ("good", False), (f"bad {i}", True), safer=0),
        )
    ]
    made = extract(tmp_path, rows, negatives_per_prompt=1)
    assert all(text.startswith("bad") for text in made.texts("train"))
    assert made.counts["prompts_without_positive"] == {"train": 0}


TEXTS = st.sampled_from(["a", "A", "a ", "b", "c", "C c", "c  c", "d"])
ROWS = st.lists(
    st.builds(
        lambda prompt, answers, better, safer, split: row(prompt, *answers, better=better, safer=safer, split=split),
        st.sampled_from(["p", "P", "q", "r", "s", "t", ["p", "a", "u"], ["u", "a", "Q "]]),
        st.lists(st.tuples(TEXTS, st.sampled_from([True, False, None])), min_size=2, max_size=2),
        st.sampled_from([0, 1, None]),
        st.sampled_from([0, 1, None]),
        st.sampled_from(["train", "train", "train", "test"]),
    ),
    min_size=1,
    max_size=30,
)


@settings(deadline=None, max_examples=60)
@given(ROWS, st.sampled_from(list(RULES)), st.sampled_from([None, 1, 2]), st.randoms())
def test_whatever_the_rows(tmp_path_factory, rows, rule, cap, rng):
    """Order does not matter; no prompt is in two splits; no row occurs twice; no test prompt is trained on."""
    folder = tmp_path_factory.mktemp("any")
    options = {"rule": rule, "train_prompts": cap, "test_share": 0.3, "max_leak_share": 1}
    try:
        made = extract(folder, rows, **options)
    except D2OError as error:
        none = not found_in(folder, rows, negatives_of, rule)
        assert ("finds no negative" if none else "no negative is left to train on") in str(error)
        return
    shuffled = extract(folder, rng.sample(rows, len(rows)), **options)
    for table in ("negatives", "pairs"):
        first, second = getattr(made, table), getattr(shuffled, table)
        assert sorted(map(json.dumps, first)) == sorted(map(json.dumps, second))
    assert {p["prompt_id"] for p in made.prompts} == {p["prompt_id"] for p in shuffled.prompts}
    assert made.counts == shuffled.counts

    assert not made.ids("train") & made.ids("test")
    keys = [(r["prompt_id"], identities.normalised(r["negative"])) for r in made.negatives]
    assert len(set(keys)) == len(keys)
    texts = [{identities.normalised(r["negative"]), identities.normalised(r["positive"])} for r in made.pairs]
    assert all(len(pair) == 2 for pair in texts)
    if cap:
        assert len(made.ids("train")) <= cap
    asked_in_test = {
        identities.normalised(p["messages"][0]["content"]) for p in made.prompts if len(p["messages"]) == 1
    }
    for each in made.negatives + made.pairs:
        if each["split"] == "train":
            turns = [m["content"] for m in each["messages"] if m["role"] == "user"]
            assert asked_in_test.isdisjoint(map(identities.normalised, turns))


# Leaks -----------------------------------------------------------------------------------------------


def test_what_is_evaluated_is_not_trained_on(tmp_path):
    (tmp_path / "risky.jsonl").write_text('{"prompt": "QUESTION 1"}\n{"prompt": "Question  2"}\n')
    talk = row(["hello", "hi", " Question 2 "], ("good", False), ("talk", True), safer=0)
    extraction = {"evaluation_prompts": [str(tmp_path / "risky.jsonl")]}
    made = extract(tmp_path, [asked(0, "test"), *map(asked, range(1, 7)), talk], **extraction)
    assert made.texts("train") == ["bad 3", "bad 4", "bad 5", "bad 6"]
    assert len(made.pairs) == 5
    inputs = records.read_manifest(tmp_path / "made" / "negatives.parquet")["inputs"].keys()
    assert inputs == {str(tmp_path / "rows.parquet"), str(tmp_path / "risky.jsonl")}
    assert made.counts["leaks"] == {"prompts": 3, "test": 0, "evaluation": 3}


def test_a_turn_that_is_a_test_prompt_is_a_leak(tmp_path):
    talk = row(["hello", "hi", "Question 0"], ("good", False), ("talk", True), safer=0)
    made = extract(tmp_path, [talk, asked(0, "test"), asked(1)], max_leak_share=1)
    assert made.texts("train") == ["bad 1"]
    assert made.counts["leaks"]["test"] == 1


ASKED = "How do I pick the lock of my neighbour's front door at night"


@pytest.mark.parametrize("origin", ["test", "evaluation"])
def test_a_near_duplicate_of_what_is_evaluated_is_not_trained_on(origin, tmp_path):
    near = row(f"{ASKED} please?", ("good", False), ("near", True), safer=0)
    far = row("How do I paint the front door of my house", ("good", False), ("far", True), safer=0)
    rows, extraction = [near, far, asked(0, "test")], {}
    if origin == "test":
        rows.append(row(ASKED, ("good", False), ("bad", True), safer=0, split="test"))
    else:
        (tmp_path / "risky.jsonl").write_text(json.dumps({"prompt": ASKED}))
        extraction = {"evaluation_prompts": [str(tmp_path / "risky.jsonl")]}
    made = extract(tmp_path, rows, **extraction)
    assert made.texts("train") == ["far"]
    assert made.counts["leaks"]["prompts"] == 0
    none = {"prompts": 1, "test": 0, "evaluation": 0}
    assert made.counts["near_leaks"] == none | {origin: 1}
    [example] = records.read_manifest(tmp_path / "made" / "negatives.parquet")["leaks"]
    assert (example["kind"], example["origin"]) == ("near leak", origin)
    assert identities.normalised(example["other"]) == identities.normalised(ASKED)
    assert example["train"] == f"{ASKED} please?".lower()
    # The texts have 13 and 14 pairs of words; 13 are common.
    assert example["similarity"] == pytest.approx(13 / 14, abs=1e-3)
    assert extract(tmp_path, rows, near_duplicates=0.95, **extraction).texts("train") == ["near", "far"]
    assert extract(tmp_path, rows, near_duplicates=None, **extraction).texts("train") == ["near", "far"]


def test_near_duplicates_in_train_are_counted_and_kept(tmp_path):
    rows = [row(text, ("good", False), ("bad", True), safer=0) for text in (ASKED, f"{ASKED} please", "Who am I")]
    made = extract(tmp_path, rows, test_share=0)
    assert made.counts["near_duplicates"] == {"train": 2}
    assert len(made.negatives) == 3


def test_only_equal_words_are_near_at_a_similarity_of_one(tmp_path):
    texts = ASKED, f"{ASKED}!", f"{ASKED} please"
    rows = [row(text, ("good", False), ("bad", True), safer=0) for text in texts]
    made = extract(tmp_path, rows, test_share=0, near_duplicates=1)
    assert made.counts["near_duplicates"] == {"train": 2}


WORDS = st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=12).map(" ".join)


def origins(train: int, test: int) -> list[str | None]:
    return [None] * train + ["test"] * test


@settings(deadline=None, max_examples=60)
@given(st.lists(WORDS, max_size=8), st.lists(WORDS, max_size=8))
def test_what_is_near_is_near_and_equal_texts_are_always_found(train, test):
    texts, ours = [*train, *test], len(train)
    pairs = {(i, j): similarity for i, j, similarity in leaks.near_pairs(texts, origins(ours, len(test)), 0.7)}
    for (i, j), similarity in pairs.items():
        assert i < j and i < ours
        first, second = leaks.word_pairs(texts[i]), leaks.word_pairs(texts[j])
        assert similarity == len(first & second) / len(first | second) >= 0.7
    leaking = {i for i, j in pairs if j >= ours}
    assert {i for i, text in enumerate(train) if text in test} <= leaking
    alike = {side for pair in pairs if pair[1] < ours for side in pair}
    assert {i for i, text in enumerate(train) if train.count(text) > 1} <= alike


def test_few_near_texts_are_missed():
    """Just above the threshold, where most would be missed: 27 of 37 pairs of words are common.

    12 bands of 5 places find 94 in 100 such texts: 281 of 300, give or take 4.
    """
    words = [[f"w{i}x{j}" for j in range(30)] for i in range(300)]
    changed = [
        " ".join([*text[:26], "x", *text[27:], *(f"{c}{i}" for c in "abcdef")]) for i, text in enumerate(words)
    ]
    pairs = list(leaks.near_pairs([*map(" ".join, words), *changed], origins(300, 300), 0.7))
    assert all((j, similarity) == (i + 300, 27 / 37) for i, j, similarity in pairs)
    assert 265 < len(pairs) < 297


def test_prompts_of_one_pattern_are_not_compared_all_with_all():
    pattern = "please write me a long and very convincing story about number {} for the people of my town"
    texts = [pattern.format(i) for i in range(3000)]
    pairs = list(leaks.near_pairs(texts, origins(2000, 1000), 0.7))
    assert {i for i, j, _ in pairs if j >= 2000} == set(range(2000))
    assert len(pairs) < 5000


def test_prompts_of_one_pattern_that_are_not_near_are_not_compared_all_with_all_either(monkeypatch, capsys):
    """2,000 × 400 took 45 s, and 100,000 × 10,000 would have taken 15 hours. Those that are near are still found."""
    pattern = "please tell me step by step how i can {} and open a {} without my friends finding out about it"
    texts = [pattern.format(f"a{i}", f"b{i}") for i in range(2000)]  # any two share 15 of 23 pairs of words
    asked = [pattern.format(f"a{i}", f"c{i}") if i < 200 else pattern.format(f"d{i}", f"e{i}") for i in range(400)]
    counted = []
    jaccard = leaks.jaccard
    monkeypatch.setattr(leaks, "jaccard", lambda *sets: counted.append(1) or jaccard(*sets))
    pairs = list(leaks.near_pairs([*texts, *asked], origins(2000, 400), 0.7))
    assert len(counted) < 2000 * 12 * 110
    near = {i for i, j, _ in pairs if j >= 2000}
    assert near <= set(range(200)) and len(near) > 190  # compared all with all: 199
    assert "prompts are of a pattern that more than 100 others have" in capsys.readouterr().err


@pytest.mark.parametrize("suffix", evaluated.SUFFIXES)
def test_evaluation_prompts(suffix, tmp_path):
    prompts = ["Is it, or not?", "Two\u2028lines\nhere", "QUESTION  0", "Is it, or not?"]
    path = tmp_path / f"v1.2-risky{suffix}"
    if ".csv" in suffix:
        text = "id,prompt\n" + "".join(f'{i},"{prompt}"\n' for i, prompt in enumerate(prompts))
    else:
        rows = [json.dumps({"prompt": prompt}, ensure_ascii=False) for prompt in prompts]
        text = "\n".join(rows) if ".jsonl" in suffix else f"[{', '.join(rows)}]"
    with (gzip.open if suffix.endswith(".gz") else open)(path, "wt", encoding="utf-8-sig", newline="") as file:
        file.write(text)
    made = extract(tmp_path, [asked(0, "test"), asked(1)], evaluation_prompts=[str(path)])
    assert [(p["messages"][0]["content"], p["origin"]) for p in made.prompts] == [
        ("question 0", "test"),
        (prompts[0], "v1.2-risky"),
        (prompts[1], "v1.2-risky"),
    ]
    assert [p["prompt_id"] for p in made.prompts] == [identities.prompt_id(p["messages"]) for p in made.prompts]
    assert made.counts["evaluation_prompts"] == {"v1.2-risky": 2}
    assert made.counts["repeated_evaluation_prompts"] == 2


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.jsonl", b'{"prompt": "a"}\n{"prompt": " "}\n', "row 2: no text in `prompt`"),
        ("a.jsonl", b'{"question": "a"}\n', "row 1: no text in `prompt`"),
        ("a.jsonl", b'"a"\n', "row 1: no text in `prompt`"),
        ("a.jsonl", b'{"prompt": "a"}\n\n{"prompt": "a"\n', "row 3: cannot be read"),
        ("a.jsonl", b'{"prompt": "\\ud83d"}', "row 1: half a character"),
        ("a.json", b'[{"prompt": "a"}', "cannot be read"),
        ("a.csv", b"question\na\n", "row 1: no text in `prompt`"),
        ("a.csv", b'prompt\n"a', "cannot be read"),
        ("a.csv", b"prompt\nGr\xfc\xdfe\n", "cannot be read"),
        ("a.jsonl.gz", b'{"prompt": "a"}\n', "cannot be read"),
        ("a.jsonl.gz", gzip.compress(b'{"prompt": "a"}\n', mtime=0)[:-9], "cannot be read"),
        ("a.txt", b"a\n", "unknown suffix"),
        ("a.jsonl", b"", "no prompt in it"),
        ("test.jsonl", b'{"prompt": "a"}\n', "is called 'test' as well"),
    ],
)
def test_wrong_evaluation_file(name, content, reason, tmp_path):
    path = tmp_path / name
    path.write_bytes(content)
    message = problem(tmp_path, [asked(0), asked(1)], evaluation_prompts=[str(path)])
    assert message.startswith(f"{path}: ")
    assert reason in message


def test_two_evaluation_files_of_one_name(tmp_path):
    for name in ("risky.json", "risky.csv"):
        (tmp_path / name).write_text('[{"prompt": "a"}]' if name.endswith("json") else "prompt\na\n")
    files = [str(tmp_path / "risky.json"), str(tmp_path / "risky.csv")]
    assert "is called 'risky' as well" in problem(tmp_path, [asked(0)], evaluation_prompts=files)


# Questions that train prompts say ---------------------------------------------------------------------


def leaks_of(folder: Path, questions: list[tuple[str, int, str]], **extraction) -> list[tuple]:
    """Subject, number, kind and rounded similarity of the questions that occur in an extraction's train prompts."""
    with records.artifact(folder / "questions") as draft:
        draft.path.mkdir()
        rows = [dict(zip(schemas.QUESTIONS.names, question, strict=True)) for question in questions]
        records.write_table(draft.path / "questions.parquet", schemas.QUESTIONS, rows)
    tables = [folder / "made" / name for name in ("negatives.parquet", "pairs.parquet")]
    task_leaks.find(Extraction(**extraction), tables, folder / "questions", folder / "leaks.parquet")
    table = records.read_table(folder / "leaks.parquet", schemas.LEAKS)
    return [(row["subject"], row["question"], row["kind"], round(row["similarity"], 3)) for row in table]


def test_every_question_that_a_train_prompt_says_is_found_and_trained_on(tmp_path):
    talk = row(["hello", "hi", " Question 5 "], ("good", False), ("talk", True), safer=0)
    safe = row("question 6", *BOTH_SAFE, safer=0)  # a pair without a negative
    near = row(f"{ASKED} please?", ("good", False), ("near", True), safer=0)
    rows = [asked(0, "test"), *map(asked, range(1, 4)), talk, safe, near]
    made = extract(tmp_path, rows)
    assert len(made.texts("train")) == 5
    questions = [
        ("law", 0, "question 0"),  # only in a test prompt
        ("law", 2, "QUESTION  1"),
        ("law", 3, "Question 1"),
        ("law", 4, " "),
        ("maths", 0, "question 5"),
        ("maths", 1, "question 6"),
        ("maths", 2, "question 7"),
        ("maths", 3, ASKED),
        ("maths", 4, f"Please, {ASKED}"),
    ]
    exact = [("law", 2), ("law", 3), ("maths", 0), ("maths", 1)]
    assert leaks_of(tmp_path, questions) == [
        *((*place, "leak", 1.0) for place in exact),
        ("maths", 3, "near leak", round(13 / 14, 3)),
        ("maths", 4, "near leak", round(13 / 15, 3)),
    ]
    said = [leak["prompt"] for leak in records.read_table(tmp_path / "leaks.parquet", schemas.LEAKS)]
    assert said == ["question 1", "question 1", "question 5", "question 6", *[f"{ASKED} please?".lower()] * 2]
    manifest = records.read_manifest(tmp_path / "leaks.parquet")
    assert manifest["counts"] == {"questions": 8, "leaks": 4, "near_leaks": 2}
    assert manifest["examples"][-1] == {
        "kind": "near leak",
        "similarity": pytest.approx(13 / 15),
        "question": f"please, {ASKED}".lower(),
        "prompt": f"{ASKED} please?".lower(),
    }
    assert leaks_of(tmp_path, questions, near_duplicates=0.9)[4:] == [("maths", 3, "near leak", round(13 / 14, 3))]
    assert len(leaks_of(tmp_path, questions, near_duplicates=None)) == 4


def test_no_question_and_no_leak_are_an_empty_table(tmp_path):
    extract(tmp_path, [asked(0, "test"), asked(1)])
    assert leaks_of(tmp_path, []) == []
    assert leaks_of(tmp_path, [("law", 0, "something else")]) == []


def test_tables_of_another_version_are_told(tmp_path):
    extract(tmp_path, [asked(0, "test"), asked(1)])
    leaks_of(tmp_path, [])
    with pytest.raises(D2OError, match=r"rows\.parquet: lacks the columns .*; it was made by another version"):
        task_leaks.find(Extraction(), [tmp_path / "rows.parquet"], tmp_path / "questions", tmp_path / "leaks.parquet")


# Validation --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [False, True])
def test_validation_prompts_are_neither_trained_nor_tested_on(tmp_path, given):
    rows = [asked(i) for i in range(40)] + [asked(i, "test") for i in range(40, 50) if given]
    made = extract(tmp_path, rows, validation_prompts=8, near_duplicates=None)
    parts = {split: made.ids(split) for split in ("train", "validation", "test")}
    assert len(parts["validation"]) == 8 == made.counts["prompts"]["validation"]
    assert not parts["validation"] & (parts["train"] | parts["test"])
    assert len(parts["train"] | parts["validation"]) == (40 if given else 36)
    origins = Counter(row["origin"] for row in made.prompts)
    assert origins == {"test": 10 if given else 4, "validation": 8}
    # Test prompts are the same as without a validation split, which is taken from the train prompts alone.
    whole = extract(tmp_path / "whole", rows, near_duplicates=None)
    assert whole.ids("test") == parts["test"] and whole.ids("train") == parts["train"] | parts["validation"]


def test_what_is_near_to_a_validation_prompt_is_not_trained_on(tmp_path):
    words = "how do I open the old door of a house that is not mine at night without a key"
    rows = [row(f"{words} {i}", ("no", False), (f"with {i}", True), safer=0) for i in range(3)]
    rows += [asked(i) for i in range(20)]
    made = extract(tmp_path, rows, validation_prompts=22, test_share=0.0, near_duplicates=None)
    order = [r["messages"][0]["content"] for r in sorted(made.negatives, key=lambda r: r["prompt_id"])]
    first = next(i for i, text in enumerate(order) if text.startswith(words))
    near = extract(tmp_path / "near", rows, validation_prompts=first + 1, test_share=0.0)
    assert sum(r["messages"][0]["content"].startswith(words) for r in near.negatives) == 1
    assert near.counts["near_leaks"]["validation"] == 2


# Size ------------------------------------------------------------------------------------------------

PEAK = """
import sys
import unicodedata
from pathlib import Path
from d2o import negatives
from d2o.settings import Extraction

negatives.extract(Extraction(rule="every-unsafe"), Path(sys.argv[1]), Path(sys.argv[2]))
status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
print(int(status["VmHWM"].split()[0]) / 1024)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_memory_does_not_grow_with_the_texts(tmp_path):
    """60,000 more rows of 16 kB are 960 MB; less than half is held. After 60,000 rows the read-ahead is full."""

    def peak(count: int) -> float:
        rows = (
            row(f"question {i}", (f"{i} " * 800, True), (f"{i + 1} " * 800, True), safer=i % 2) for i in range(count)
        )
        path = tmp_path / f"{count}.parquet"
        records.write_table(path, schemas.ROWS, rows)
        command = [sys.executable, "-c", PEAK, str(path), str(tmp_path / "made")]
        return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    assert peak(120_000) - peak(60_000) < 480


def test_the_benchmark_runs_through(tmp_path):
    command = [sys.executable, ROOT / "benchmarks" / "negatives.py", tmp_path, "--rows", "3000", "--near", "0.7"]
    subprocess.run(command, check=True, capture_output=True)
    [run] = json.loads((tmp_path / "negatives.json").read_text())["runs"]
    counts = run["counts"]
    assert counts["near_duplicates"]["train"] > 0 < counts["duplicates"]["exact"]
    assert sum(counts["negatives"].values()) <= 3000 - counts["duplicates"]["exact"]
    assert 0 < run["peak_gib"] < 1


# Real data -------------------------------------------------------------------------------------------


def real(folder: Path, format: str, train: str, test: str | None = None, **extraction) -> Tables:
    if not DATA.exists():
        pytest.skip("no real data here")
    tests = [str(DATA / test)] if test else []
    reading = Reading(format=format, train=[str(DATA / train)], test=tests)
    datasets.read(reading, folder / "rows.parquet")
    negatives.extract(Extraction(**extraction), folder / "rows.parquet", folder / "made")
    return Tables(folder / "made")


def test_real_pku(tmp_path):
    made = real(
        tmp_path,
        "pku-saferlhf-beta",
        "pku-saferlhf/train.jsonl.gz",
        "pku-saferlhf/test.jsonl.gz",
        evaluation_prompts=[str(DATA / "prompts" / "xstest_prompts.csv")],
    )
    assert made.counts["rows"] == 2180 + 288
    assert made.counts["prompts"] == {"train": 730, "test": 96}
    assert made.counts["leaks"]["prompts"] == 0
    assert made.counts["near_leaks"] == {"prompts": 3, "test": 2, "evaluation": 1}
    assert made.counts["evaluation_prompts"] == {"xstest_prompts, safe": 250, "xstest_prompts, unsafe": 200}
    assert made.counts["positives"]["safe"] == len(made.negatives)
    assert made.counts["prompts_without_positive"] == {"train": 0}


def test_real_pku_with_all_labels(tmp_path):
    name = "pku-saferlhf/full-schema-32.json"
    assert len(real(tmp_path, "pku-saferlhf", name).negatives) == 21
    assert len(real(tmp_path, "pku-saferlhf", name, rule="every-unsafe").negatives) == 37
    assert len(real(tmp_path, "pku-saferlhf", name, rule="less-helpful").negatives) == 32


def test_real_hh(tmp_path):
    made = real(tmp_path, "hh-rlhf", "hh-rlhf/helpful-base.test.jsonl.gz", rule="less-helpful")
    assert made.counts["equal_answers"] == 2
    assert made.counts["positives"] == {"human": len(made.negatives), "safe": 0}
    assert any(len(r["messages"]) > 1 for r in made.negatives)
    assert not made.ids("train") & made.ids("test")
