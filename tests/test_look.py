"""`d2o look` and `d2o init`: how a file would be read, and a config for it that the pipeline can plan with."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from markdown_it import MarkdownIt

from conftest import ROOT
from d2o import formats, look, settings
from d2o.contracts import CONTRACTS
from d2o.errors import D2OError
from d2o.settings import Reading
from test_formats import argilla, cells, lines, said, task

ASKED = "Is it new?"


def chats(*feedback) -> list[dict]:
    asked = [[{"role": "user", "content": f"Why {i}?"}, said(f"So {i}.")] for i in range(len(feedback))]
    return [{"messages": messages, "feedback": one} for messages, one in zip(asked, feedback, strict=True)]


def table(folder: Path, *thumbs: str) -> Path:
    rows = "".join(f"{i};Why {i}?;So {i}.;{one}\n" for i, one in enumerate(thumbs))
    (folder / "a.csv").write_text("id;Question;Answer;thumb\n" + rows)
    return folder / "a.csv"


def pairs(count: int) -> list[dict]:
    return [{"prompt": f"Why {i}?", "chosen": f"Since {i}.", "rejected": f"So {i}."} for i in range(count)]


def sheet(path: Path, *args, **kwargs) -> str:
    return "\n".join(look.lines(str(path), *args, **kwargs))


# Which format ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("column", "rejects", "others"), [("is_safe", "false", 5), ("harmful", "true", 3)])
def test_a_label_of_an_unknown_name_is_asked_for(column, rejects, others, tmp_path):
    """Otherwise half of the answers would wrongly be trained away."""
    rows = [
        {"prompt": f"Why {i}?", "response": f"Since {i}.", "category": f"c{i % 3}", column: i < 3} for i in range(8)
    ]
    path = lines(tmp_path / "a.jsonl", rows)
    page, asks = (
        sheet(path),
        f"the column '{column}' (false or true) is not read: if it says which are, --label {column}",
    )
    assert f"not read   category, {column}\n" in page and asks in page
    with pytest.raises(D2OError, match=re.escape(asks)):
        look.write_config(str(path), tmp_path / "c.yaml")
    told = sheet(path, negative=[rejects], label=column)
    assert f"negatives  {others} by the rule" in told and "not read   category\n" in told
    assert "8 by the rule" in sheet(path, "negatives") and asks not in sheet(path, "negatives")
    with pytest.raises(D2OError, match="no format reads"):
        look.lines(str(path), label="nope")


def read_as(path: Path) -> dict:
    return yaml.safe_load(look.lines(str(path))[0].partition(": read as ")[2])


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([{"prompt": ASKED, "response": "No."}], {"format": "negatives"}),
        (pairs(1), {"format": "preference"}),
        ([{"prompt": ASKED, "completion": "No.", "label": False}], {"format": "unpaired"}),
        # A label beside the answer must not be overlooked.
        (
            [{"prompt": ASKED, "response": "No.", "label": 0}],
            {"format": "unpaired", "columns": {"completion": "response"}},
        ),
        (chats("thumbs_down", None), {"format": "chat"}),
        ([argilla(good=["bad"])], {"format": "argilla", "columns": {"label": "good"}}),
        ([task({"choices": ["bad"]})], {"format": "label-studio", "columns": {"label": "quality"}}),
        (
            [{"question": ASKED, "answer": f"No {i}.", "stars": i} for i in (1, 5)],
            {"format": "rated", "columns": {"prompt": "question", "response": "answer", "rating": "stars"},
             "label": {"below": 3.0}},
        ),
        # Numbers that do not mean yes or no are ratings, whatever the column's name.
        (
            [{"prompt": ASKED, "completion": f"No {i}.", "label": i or None} for i in range(6)],
            {"format": "unpaired", "label": {"below": 3.0}},
        ),
        (chats("1", "10", ""), {"format": "chat", "label": {"below": 5.5}}),
        (chats(-1, 0, 1, 2), {"format": "chat"}),
        (chats(1, 5, "bad"), {"format": "chat"}),
        ([argilla(good=[2, 4])], {"format": "argilla", "columns": {"label": "good"}, "label": {"below": 3.0}}),
        ([{key: f"\n\nHuman: A?\n\nAssistant: {key}." for key in ("chosen", "rejected")}], {"format": "hh-rlhf"}),
    ],
)  # fmt: skip
def test_the_format_that_fits(rows, expected, tmp_path):
    assert read_as(lines(tmp_path / "a.jsonl", rows)) == expected


UNRATED = [None] * 300


@pytest.mark.parametrize(("key", "labels"), [
    ("label", [*UNRATED, "thumbs_up"]), ("rating", [*UNRATED, 5]), ("feedback", ["👍", "👎"]),
    ("label", ["helpful", "unhelpful"]), ("liked", ["yes", "no"]), ("label", ["awful", "splendid"]),
])  # fmt: skip
def test_answers_that_may_be_liked_are_no_negatives(key, labels, tmp_path):
    """Labels that are still missing, or whose meaning is unknown; a user who knows the meaning states it."""
    path = lines(tmp_path / "a.jsonl", [{"prompt": f"{i}?", "response": "So.", key: x} for i, x in enumerate(labels)])
    assert "negatives  0 by the rule" in sheet(path)
    assert f"negatives  {len(labels)} by the rule" in sheet(path, "negatives")
    with pytest.raises(D2OError, match=r"no negative to train on: .*--negative LABEL"):
        look.write_config(str(path), tmp_path / "c.yaml")


def test_a_table_with_other_names(tmp_path):
    columns = {"prompt": "Question", "completion": "Answer", "label": "thumb"}
    assert read_as(table(tmp_path, "down", "up")) == {"format": "unpaired", "columns": columns}


def test_the_rows_of_the_page_about_data_are_what_it_says():
    text = (ROOT / "docs" / "data.md").read_text()
    tokens = [token for token in MarkdownIt().enable("table").parse(text) if token.type == "inline"]
    spans = [[c.content for c in t.children if c.type == "code_inline"] for t in tokens]
    shown = set()
    for names, (row, *_) in ((a, b) for a, b in zip(spans, spans[2:], strict=False) if b and b[0].startswith("{")):
        for name in names:
            label = {"label": {"below": 3}} if name == "rated" else {}
            [record] = formats.outcomes(json.loads(row), Reading(format=name, train=["a"], **label))
            assert record["responses"][-1]["text"] == "Who cares."
            shown.add(name)
    assert shown == set(formats.FORMATS)


def test_no_format_fits(tmp_path):
    path = lines(tmp_path / "a.jsonl", [{"\x1b[2Jtext": "a"}])
    with pytest.raises(
        D2OError, match=r"a\.jsonl: no format reads its first 1 rows; their columns: \\u001b\[2Jtext\."
    ):
        look.lines(str(path))
    with pytest.raises(D2OError, match=r"--format: 'trl' is none; there are: pku"):
        look.lines(str(path), "trl")
    with pytest.raises(D2OError, match="no such file"):
        look.lines(str(tmp_path / "b.jsonl"))


@pytest.mark.parametrize(("name", "text"), [("a.jsonl", "\n"), ("a.json", "[]"), ("a.csv", "prompt,response\n")])
def test_a_file_without_rows(name, text, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(D2OError, match=rf"{name}: it has no row$"):
        look.lines(str(tmp_path / name))


def test_where_no_format_fits_the_nearest_says_why(tmp_path):
    """Such as a table that pandas or `datasets` wrote from messages."""
    path = cells(tmp_path / "a.csv", [{key: [said(key)] for key in ("prompt", "chosen", "rejected")}], str)
    with pytest.raises(
        D2OError, match=r"a\.csv: no format reads .* As preference: `chosen` begins like messages and"
    ):
        look.lines(str(path))


# The sheet ---------------------------------------------------------------------------------------


def test_prompts_without_answers_are_told_where_they_belong(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("xs.csv").write_text("id,prompt,label\n1,How do I kill a process?,safe\n")
    with pytest.raises(D2OError, match=r"no format reads .*Prompts without answers are `evaluation_prompts`"):
        look.lines("xs.csv")


def test_what_is_counted(tmp_path):
    labels = ["down", "down", "up", None, "meh"]
    rows = [{"prompt": f"Why {i}?", "completion": f"So {i}.", "label": one} for i, one in enumerate(labels)]
    rows += [rows[0], {"prompt": "", "completion": "So.", "label": "up"}]
    told = sheet(lines(tmp_path / "a.jsonl", rows))
    assert "rows       7; 1 cannot be read (row 7: `prompt` is empty)" in told
    assert "left out   2 answers: no label yet (1), the label 'meh' is in neither list (1)" in told
    assert "prompts    3, 2 of them with a negative" in told
    assert "negatives  2 by the rule safer-unsafe, 0 of them with a preferred answer" in told
    assert "characters negatives: median 5, 95 % within 5, longest 5" in told
    assert "Of the first rows read: unpaired 4 of 7" in told


def test_the_counts_are_the_pipelines_own(tmp_path):
    from d2o import datasets, negatives, records

    source = ROOT / "tests" / "data" / "preferences.jsonl"
    datasets.read(Reading(format="pku-saferlhf-beta", train=[str(source)]), tmp_path / "rows.parquet")
    extraction = settings.Extraction(near_duplicates=None, test_share=0.0)
    negatives.extract(extraction, tmp_path / "rows.parquet", tmp_path)
    counts = records.read_manifest(tmp_path / "negatives.parquet")["counts"]
    counted = look.counted(Reading(format="pku-saferlhf-beta", train=[str(source)]))
    assert len(counted.negatives) == counts["negatives"]["train"]
    assert counted.negatives["prompt"].n_unique() == counts["prompts"]["train"]
    assert counted.pairs == counts["pairs"]["train"]


def of_positives(told: str) -> dict[str, tuple[str, set[str]]]:
    """For each kind of positives: the number of groups, or why there are none, and the losses."""
    block = re.search(r"losses that take them:\n(.*?)\n\n", told, re.DOTALL)[1]
    joined = re.sub(r"\n {13}", " ", block)
    parts = re.findall(r"^  (\S+) +(.*?): (.*)$", joined, re.MULTILINE)
    return {
        kind: (count, set(re.findall(r"[\w-]+", losses.replace("with `k: 1` also", ""))))
        for kind, count, losses in parts
    }


def test_what_is_lacking_for_which_losses(tmp_path):
    alone = of_positives(sheet(lines(tmp_path / "a.jsonl", [{"prompt": ASKED, "response": "No."}])))
    assert alone["none"] == ("1", {"npo", "ga", "unlikelihood"})
    assert alone["self"][0] == "1" and {"d2o", "kto", "sft"} <= alone["self"][1]
    assert alone["human"][0] == "none, for no negative has a preferred answer"
    assert {"dpo", "simpo", "sft"} <= alone["human"][1]
    assert alone["safe-human"][0] == "none, for no preferred answer is labelled safe"
    paired = of_positives(sheet(lines(tmp_path / "b.jsonl", pairs(3))))
    assert paired["human"] == ("3", alone["human"][1])
    assert set().union(*(losses for _, losses in alone.values())) == set(CONTRACTS)


def test_text_of_data_controls_no_terminal(tmp_path):
    row = {"prompt": "Why\x1b[2J\u202e?\n\nHow?", "response": "So\x07 " + "x" * 500}
    told = sheet(lines(tmp_path / "a.jsonl", [row]))
    assert r"prompt    Why\u001b[2J\u202e? How?" in told and r"negative  So\u0007 xxx" in told
    assert not re.search(r"[\x00-\x09\x0b-\x1f\u202e]", told)
    assert max(map(len, told.splitlines())) < 140


def test_only_so_many_rows_are_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(look, "_COUNTED", 3)
    path = lines(tmp_path / "a.jsonl", pairs(5))
    assert "rows       the first 3; 0 cannot be read" in sheet(path)
    assert "rows       3; 0" in sheet(lines(tmp_path / "b.jsonl", pairs(3)))


def test_labels_that_nobody_knows_are_asked_for(tmp_path):
    path = lines(tmp_path / "a.jsonl", chats("awful", "splendid"))
    told = sheet(path)
    assert "the label 'awful' is in neither list (1)" in told and "--negative LABEL" in told
    with pytest.raises(D2OError, match=r"no negative to train on: no label says .* --negative LABEL"):
        look.write_config(str(path), tmp_path / "c.yaml")
    assert not (tmp_path / "c.yaml").exists()
    look.write_config(str(path), tmp_path / "c.yaml", negative=["awful"])
    dataset = yaml.safe_load((tmp_path / "c.yaml").read_text())["datasets"]["mine"]
    assert dataset == {"format": "chat", "label": {"negative": ["awful"]}, "train": [str(path)]}


# A config ----------------------------------------------------------------------------------------


def written(source: Path, folder: Path) -> dict:
    look.write_config(str(source), folder / "mine.yaml")
    config = yaml.safe_load((folder / "mine.yaml").read_text())
    settings.load(config, "mine.yaml")
    return config


def test_a_config_compares_with_what_the_data_allows(tmp_path):
    assert written(table(tmp_path, "down", "up"), tmp_path)["experiments"]["mine"]["methods"] == ["initial", "d2o"]
    (tmp_path / "mine.yaml").unlink()
    config = written(lines(tmp_path / "b.jsonl", pairs(3)), tmp_path)
    assert config["experiments"]["mine"]["methods"] == ["initial", "d2o", "dpo"]
    assert config["datasets"]["mine"]["rule"] == "less-helpful"


def test_no_file_is_replaced(tmp_path):
    path = lines(tmp_path / "a.jsonl", pairs(3))
    (tmp_path / "config.yaml").write_text("mine")
    with pytest.raises(D2OError, match=r"config\.yaml: lies there already and is not replaced"):
        look.write_config(str(path), tmp_path / "config.yaml")
    assert (tmp_path / "config.yaml").read_text() == "mine"


def test_names_of_the_data_are_no_markup_of_the_config(tmp_path):
    folder = tmp_path / "a: &b {c} #d"
    folder.mkdir()
    path = lines(folder / "e f's.jsonl", [{"prompt": ASKED, "completion": "No.", "label": False}])
    assert written(path, tmp_path)["datasets"]["mine"]["train"] == [str(path)]


def test_the_commands(tmp_path):
    """As a user types them."""
    path = table(tmp_path, "down", "up", "")
    env = os.environ | {"HF_HUB_OFFLINE": "1"}

    def d2o(*words: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, "-m", "d2o", *words], cwd=tmp_path, capture_output=True, text=True, env=env
        )

    done = d2o("look", path.name)
    assert done.returncode == 0 and not done.stderr and "negatives  1 by the rule" in done.stdout
    (tmp_path / "config.yaml").touch()
    done = d2o("init", path.name)
    assert done.returncode == 1 and done.stderr.startswith("error: config.yaml: lies there already")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["table", "pairs"])
def test_snakemake_plans_with_the_config(kind, tmp_path):
    source = table(tmp_path, *["down"] * 9) if kind == "table" else lines(tmp_path / "a.jsonl", pairs(9))
    config = written(source, tmp_path)
    command = [sys.executable, "-m", "snakemake", "-n", "--cores", "1", "--quiet", "rules"]
    command += ["--snakefile", str(ROOT / "Snakefile"), "--configfile", "mine.yaml"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert re.search(rf"^train_method +{len(config['methods'])}$", done.stdout, re.MULTILINE), done.stdout
