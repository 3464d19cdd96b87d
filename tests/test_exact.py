"""Exact scorers: each rule against a second, plain implementation, bad rules, and speed."""

from __future__ import annotations

import json
import random
import re
import sys
import time

import numpy as np
import pytest

import rows
from conftest import ROOT
from d2o import exact, records, schemas, scores
from d2o.errors import D2OError
from d2o.settings import Reward, Rule

WORDS = [
    "a",
    "kettle",
    "You",
    "FOOL",
    "fools",
    "foolish",
    "idiot",
    "{",
    '"x": 1}',
    "Вода",
    "水",
    "don’t",
    "é",
    "\n",
    "",
]
ANSWERS = [
    "",
    "You fool.",
    "tomfoolery is no insult",
    "Idiot! Idiot!\nidiot",
    "{}",
    '{"x": [1, 2, {"y": null}]}',
    '{"x": NaN}',
    "[1, 2",
    "Вода и kettle",
    "1234 !?",
    "\ufeff{}",
    *(" ".join(random.Random(i).choices(WORDS, k=i)) for i in range(60)),
]
INSULTS = [r"\bfools?\b", r"\bidiot"]


def applied(answers=ANSWERS, **rule) -> list[float]:
    return exact.apply(Rule(**rule), ["?"] * len(answers), answers).tolist()


def test_patterns_are_found_as_by_a_plain_search():
    insulting = [any(re.search(p, text, re.I | re.A) for p in INSULTS) for text in ANSWERS]
    assert 5 < sum(insulting) < len(ANSWERS) - 5
    assert applied(any=INSULTS) == [float(yes) for yes in insulting]
    assert applied(none=INSULTS) == [float(not yes) for yes in insulting]
    assert applied(count=INSULTS) == [sum(len(re.findall(p, text, re.I | re.A)) for p in INSULTS) for text in ANSWERS]


@pytest.mark.parametrize("pattern", ["^a", r"\bfoo", r"\bha", "a*b", "o$", "é"])
def test_a_match_is_counted_where_it_stands_in_the_answer(pattern):
    answers = ["aaa", "foofoo bar", "haha", "aabab\nb", "foo", "Éé", "a\x00a", ""]
    assert applied(answers, count=[pattern]) == [len(re.findall(pattern, text, re.I)) for text in answers]


def test_an_alternative_in_one_pattern_does_not_reach_into_the_next():
    assert applied(["xb", "ab", "a"], any=["^a|x", "b$"]) == [1, 1, 1]
    assert applied(["ac", "cb"], any=["(?:a|x)b"]) == [0, 0]


def test_length_and_its_limit():
    assert applied(length="words") == [len(text.split()) for text in ANSWERS]
    spaced = [f"{space}a{space}b{space}" for space in map(chr, range(0x3001)) if space.isspace()]
    assert applied(spaced, length="words") == [2] * len(spaced)
    assert applied(length="characters") == [len(text) for text in ANSWERS]
    assert applied(["one two", "one two three"], length="words", over=2) == [0, 1]


def test_json():
    def loads(text):
        try:
            return "NaN" not in text and (json.loads(text), True)[1]
        except ValueError:
            return False

    assert applied(valid="json") == [float(loads(text)) for text in ANSWERS]
    assert applied(["1" * 5000], valid="json") == [1]
    assert applied(["[" * 100_000], valid="json") == [0], "deep nesting is no JSON that anyone can read"


def test_script_is_the_share_of_the_letters():
    assert applied(["Вода", "Вода ab", "123", "", "вода, e\u0301."], script="Cyrillic") == [1, 4 / 6, 0, 0, 4 / 5]


def test_a_function_of_the_users(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    package = tmp_path / "mine"
    package.mkdir()
    package.joinpath("__init__.py").write_text("")
    package.joinpath("lists.py").write_text("BRANDS = ['acme']\n")
    package.joinpath("rules.py").write_text(
        "from .lists import BRANDS\n"
        "import beside, json\n"
        "if True:\n    def chosen(prompts, answers): return '11'\n"
        "def stops(prompts, answers): raise SystemExit(0)\n"
        "def brand(prompts, answers):\n"
        "    return [float(any(b in a for b in BRANDS) and p != 'skip') for p, a in zip(prompts, answers)]\n"
        "nan = lambda prompts, answers: [float('nan')] * len(answers)\n"
        "def short(prompts, answers): return [1.0]\n"
        "def broken(prompts, answers): return answers[99]\n"
    )
    tmp_path.joinpath("beside.py").write_text("")
    tmp_path.joinpath("bad.py").write_text("def f(:\n")
    rule = Rule(python="mine.rules:brand")
    assert exact.problem(rule) is None
    assert "mine.rules" not in sys.modules, "looking for it runs nothing"
    assert exact.apply(rule, ["a", "skip", "b"], ["acme kettle", "acme", "kettle"]).tolist() == [1, 0, 0]
    assert [path.name for path in exact.files(rule)] == ["beside.py", "__init__.py", "lists.py", "rules.py"]
    for name, message in {
        "nan": "mine.rules:nan: gave nan, which is not finite, for the answer 'one'",
        "short": "mine.rules:short: gave 1 values for 2 answers",
        "broken": "mine.rules:broken: IndexError",
        "chosen": "mine.rules:chosen: TypeError: it gave one str, not a number for each answer",
        "stops": "mine.rules:stops: SystemExit: 0",
    }.items():
        assert exact.problem(Rule(python=f"mine.rules:{name}")) is None
        with pytest.raises(D2OError, match=re.escape(message)):
            exact.apply(Rule(python=f"mine.rules:{name}"), ["?", "?"], ["one", "two"])
    assert exact.problem(Rule(python="mine.rules:brnad")).endswith("rules.py defines no brnad")
    assert "no module mine.rulez" in exact.problem(Rule(python="mine.rulez:brand"))
    assert "is not `package.module:function`" in exact.problem(Rule(python="mine.rules"))
    assert "bad.py or what it imports is no Python (invalid syntax" in exact.problem(Rule(python="bad:f"))
    assert "no module bad.json" in exact.problem(Rule(python="bad.json:dumps"))


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"any": ["fine", "("]}, "any: '(': Invalid regular expression: missing )"),
        ({"count": ["(?=x)"]}, "count: '(?=x)': Invalid regular expression: invalid perl operator"),
        ({"script": "Klingon"}, "script: 'Klingon' is no script of Unicode"),
        ({"script": "Latin}|("}, "script: 'Latin}|(' is no script of Unicode"),
        ({"script": "L"}, "script: 'L' is no script of Unicode"),
        ({"any": [r"\Qfoo", "bar"]}, "any: together: Invalid regular expression: missing )"),
        ({"organism": "organisms/topics.yaml", "measure": "use"}, "organism: organisms/topics.yaml: "),
        ({"python": "d2o.nothing:f"}, "python: no module d2o.nothing"),
        ({"python": "__import__('os').system('x'):f"}, "python: no module __import__('os')"),
    ],
)
def test_a_rule_that_cannot_be_applied_is_told(rule, message, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert message in exact.problem(Rule(**rule))


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({}, "give exactly one of any, none, count, length, valid, script, python, organism"),
        ({"any": ["x"], "length": "words"}, "give exactly one of"),
        ({"any": []}, "at least 1 item"),
        ({"any": [""]}, "at least 1 character"),
        ({"python": ""}, "at least 1 character"),
        ({"any": ["x"], "over": 3}, "over: the rule says 0 or 1 already"),
        ({"organism": "rude.yaml"}, "organism and measure go together"),
        ({"any": ["x"], "measure": "harm"}, "organism and measure go together"),
    ],
)
def test_a_rule_is_one_thing(rule, message):
    with pytest.raises(ValueError, match=message):
        Rule(**rule)


def test_the_stage_scores_by_a_rule_without_a_model(tmp_path):
    prompts = [rows.prompt(rows.asked(str(i)), prompt_id=f"{i:02}") for i in range(5)]
    responses = [rows.sample(f"{i % 5:02}", i // 5, f"{'fool ' * i}end") for i in range(10)]
    records.write_table(tmp_path / "prompts.parquet", schemas.PROMPTS, prompts)
    records.write_table(tmp_path / "responses.parquet", schemas.SAMPLES, responses)
    reward, output = Reward(rule={"count": [r"\bfool\b"]}, better="lower"), tmp_path / "scores.parquet"
    scores.score(reward, None, tmp_path / "prompts.parquet", tmp_path / "responses.parquet", output)
    table = records.read_table(output, schemas.SCORES)
    assert [(row["prompt_id"], row["sample"], row["score"]) for row in table] == [
        (f"{i % 5:02}", i // 5, float(i)) for i in range(10)
    ]
    assert records.read_manifest(output)["mean"] == 4.5
    with pytest.raises(D2OError, match="a rule takes none"):
        scores.score(reward, tmp_path, tmp_path / "prompts.parquet", tmp_path / "responses.parquet", output)


@pytest.mark.parametrize(
    "rule", [{"any": INSULTS}, {"count": INSULTS}, {"length": "words"}, {"valid": "json"}, {"script": "Latin"}]
)
def test_100_000_answers_a_second(rule):
    words = ["the", "lamp", "wipe", "it", "with", "a", "soft", "cloth", "before", "you", "fool", "unplug", "kettle"]
    answers = [" ".join(random.Random(i).choices(words, k=40)) for i in range(20_000)]
    rates = []
    for _ in range(3):
        start = time.process_time()
        exact.apply(Rule(**rule), answers, answers)
        rates.append(len(answers) / (time.process_time() - start))
    assert max(rates) > 100_000, rates
    assert np.isfinite(rates).all()
