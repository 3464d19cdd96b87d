"""Stages `questions` and `tasks`: the questions read equal those written; the values equal those computed by hand."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import product
from pathlib import Path
from threading import Thread
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from conftest import ROOT
from d2o import dtypes, harness, questions, records, schemas, tasks
from d2o.errors import D2OError
from d2o.plan import Plan
from d2o.settings import Questions, Task

DEMO = ROOT / "demo" / "mmlu"
REAL = ROOT.parent / "shared" / "data" / "mmlu" / "mmlu.zip"
needs_real = pytest.mark.skipif(not REAL.exists(), reason="MMLU itself is not beside the repository")


def read(folder: Path, subject: str, split: str) -> list[dict]:
    return records.read_table(harness.data_file(folder, subject, split), questions.QUESTION)


def asked_by(folder: Path) -> dict[tuple[str, int], str]:
    """The text of each question, by subject and number."""
    rows = records.read_table(folder / "questions.parquet", schemas.QUESTIONS)
    assert len({(row["subject"], row["question"]) for row in rows}) == len(rows)
    return {(row["subject"], row["question"]): row["text"] for row in rows}


def write_csv(folder: Path, subject: str, test: str, dev: str = "d?,1,2,3,4,A\n") -> None:
    for split, text in (("dev", dev), ("test", test)):
        (folder / split).mkdir(parents=True, exist_ok=True)
        (folder / split / f"{subject}_{split}.csv").write_text(text)


# Questions -------------------------------------------------------------------------------------------


def test_folder_and_zip_hold_the_same_questions(tmp_path):
    with zipfile.ZipFile(tmp_path / "m.zip", "w") as archive:
        for path in DEMO.rglob("*.csv"):
            archive.write(path, f"data/{path.relative_to(DEMO)}")
        archive.writestr("data/auxiliary_train/race.csv", "not read")
        archive.writestr("__MACOSX/data/dev/._geography_dev.csv", b"\x00\xff")
    for name, source in (("folder", DEMO), ("zip", tmp_path / "m.zip")):
        questions.fetch(Task(path=str(source)), tmp_path / name)
    for path in (tmp_path / "folder").rglob("*.parquet"):
        assert (tmp_path / "zip" / path.relative_to(tmp_path / "folder")).read_bytes() == path.read_bytes()
    manifest = records.read_manifest(tmp_path / "zip")
    assert manifest["subjects"]["geography"] == {"dev": 5, "test": 15}
    assert len(manifest["subjects"]) == 4
    assert manifest["rows"] == 60, "asked; examples are not"


def test_a_question_keeps_its_text_and_its_answer(tmp_path):
    # "None" and "NA" are answers, not missing values; a cell may hold commas, quotes and line breaks.
    write_csv(tmp_path / "in", "odd", '\ufeff" Which, ""one""?\n(i) or (ii)",None,NA,1.50,,C\n\nlast?,a,b,c,d,D\n')
    questions.fetch(Task(path=str(tmp_path / "in")), tmp_path / "out")
    assert read(tmp_path / "out", "odd", "test") == [
        {"question": ' Which, "one"?\n(i) or (ii)', "choices": ["None", "NA", "1.50", ""], "answer": 2},
        {"question": "last?", "choices": ["a", "b", "c", "d"], "answer": 3},
    ]


def test_limit_cuts_the_test_part_only(tmp_path):
    questions.fetch(Task(path=str(DEMO), subjects=["geography"], limit=3), tmp_path / "out")
    assert records.read_manifest(tmp_path / "out")["subjects"] == {"geography": {"dev": 5, "test": 3}}
    questions.fetch(Task(path=str(DEMO)), tmp_path / "all")
    asked = read(tmp_path / "all", "geography", "test")[:3]
    assert read(tmp_path / "out", "geography", "test") == asked
    assert asked_by(tmp_path / "out") == {("geography", n): row["question"] for n, row in enumerate(asked)}


@pytest.mark.parametrize(
    ("test", "message"),
    [
        ("q?,1,2,3,4,A\nq?,1,2,3,A\n", r"test/bad_test\.csv: row 2: 5 columns; expected question, A, B, C, D"),
        ("question,A,B,C,D,answer\n", r"row 1: the answer is 'answer'; expected A, B, C or D \(no header\)"),
        ("q?,1,2,3,4,E\n", "row 1: the answer is 'E'"),
        ("q?,1,2,3,4,AB\n", "row 1: the answer is 'AB'"),
        ("", "bad has no test questions"),
        (f"q?,1,2,3,4,A\n{'x' * 200_000},1,2,3,4,A\n", "row 2: field larger than field limit"),
    ],
)
def test_a_bad_file_is_named_with_its_row(tmp_path, test, message):
    write_csv(tmp_path / "in", "bad", test)
    with pytest.raises(D2OError, match=message):
        questions.fetch(Task(path=str(tmp_path / "in")), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_a_bad_file_of_a_subject_that_is_not_asked_for_does_not_matter(tmp_path):
    write_csv(tmp_path / "in", "bad", "broken")
    write_csv(tmp_path / "in", "good", "q?,1,2,3,4,B\n")
    questions.fetch(Task(path=str(tmp_path / "in"), subjects=["good"]), tmp_path / "out")
    assert read(tmp_path / "out", "good", "test")[0]["answer"] == 1


def test_a_zip_is_read_as_far_as_it_is_asked_for_and_damage_is_told(tmp_path):
    with zipfile.ZipFile(tmp_path / "in.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for subject in ("good", "damaged"):
            for split in ("dev", "test"):
                archive.writestr(f"{split}/{subject}_{split}.csv", f"{subject}?,1,2,3,4,B\n" * 50)
    content = bytearray((tmp_path / "in.zip").read_bytes())
    place = content.index(b"test/damaged_test.csv") + len("test/damaged_test.csv")
    content[place : place + 8] = bytes(8)
    (tmp_path / "in.zip").write_bytes(content)
    questions.fetch(Task(path=str(tmp_path / "in.zip"), subjects=["good"]), tmp_path / "out")
    assert len(read(tmp_path / "out", "good", "test")) == 50
    with pytest.raises(D2OError, match=r"in\.zip: test/damaged_test\.csv cannot be unpacked \("):
        questions.fetch(Task(path=str(tmp_path / "in.zip")), tmp_path / "all")


def test_wrong_sources_are_told_in_one_line(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "x.zip").write_text("no archive")
    shutil.copytree(DEMO, tmp_path / "twice" / "a")
    shutil.copytree(DEMO, tmp_path / "twice" / "b")
    shutil.copytree(DEMO / "test", tmp_path / "half" / "test")
    for task, message in [
        (Task(path=str(DEMO), subjects=["geografy"]), "no subject 'geografy'; there are: geography$"),
        (Task(path=str(tmp_path / "empty")), "no subjects; expected dev/<subject>_dev.csv"),
        (Task(path=str(tmp_path / "x.zip")), "x.zip: neither a folder nor a .zip"),
        (Task(path=str(tmp_path / "gone")), "gone: no such file"),
        (Task(path=str(tmp_path / "twice")), r"two files dev/arithmetic_dev\.csv in different folders"),
        (Task(path=str(tmp_path / "half")), "arithmetic has no dev questions"),
    ]:
        with pytest.raises(D2OError, match=message):
            questions.fetch(task, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_hub_layout_gives_the_same_questions_as_the_csv_files(tmp_path, monkeypatch):
    """A local copy of the Hub's layout: configurations per subject, `answer` a class label, more splits."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    questions.fetch(Task(path=str(DEMO), subjects=["geography"]), tmp_path / "csv")
    features = datasets.Features(
        question=datasets.Value("string"),
        subject=datasets.Value("string"),
        choices=datasets.List(datasets.Value("string")),
        answer=datasets.ClassLabel(names=list("ABCD")),
    )
    card = "---\nconfigs:\n"
    for name in ("geography", "all", "auxiliary_train"):
        card += f"- config_name: {name}\n  data_files:\n"
        for split in ("dev", "test"):
            rows = [row | {"subject": "geography"} for row in read(tmp_path / "csv", "geography", split)]
            path = tmp_path / "hub" / name / f"{split}-00000-of-00001.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            datasets.Dataset.from_list(rows, features=features).to_parquet(path)
            card += f"  - split: {split}\n    path: {name}/{split}-*\n"
    (tmp_path / "hub" / "README.md").write_text(card + "---\n")
    hub = Task(hub=str(tmp_path / "hub"), revision="main", limit=15)
    questions.fetch(hub, tmp_path / "out")
    assert records.read_manifest(tmp_path / "out")["subjects"] == {"geography": {"dev": 5, "test": 15}}
    for split in questions.SPLITS:
        assert read(tmp_path / "out", "geography", split) == read(tmp_path / "csv", "geography", split)


def test_a_hub_that_cannot_be_reached_is_one_line(tmp_path):
    with pytest.raises(D2OError, match=r"^nobody/nothing@main: not fetched \(.*local `path`$"):
        questions.fetch(Task(hub="nobody/nothing", revision="main"), tmp_path / "out")


@needs_real
def test_the_real_mmlu_is_read_whole(tmp_path):
    questions.fetch(Task(path=str(REAL)), tmp_path / "out")
    subjects = records.read_manifest(tmp_path / "out")["subjects"]
    assert len(subjects) == 57
    assert sum(count["test"] for count in subjects.values()) == 14042  # as published
    assert {count["dev"] for count in subjects.values()} == {5}


# Answers ---------------------------------------------------------------------------------------------


def test_the_tasks_are_the_harness_own_mmlu_with_local_files():
    import lm_eval
    from lm_eval.utils import apply_template

    folder = Path(lm_eval.__file__).parent / "tasks" / "mmlu" / "default"
    default = yaml.safe_load((folder / "_default_template_yaml").read_text())
    files = sorted(folder.glob("mmlu_*.yaml"))
    assert len(files) == 57
    for file in files:
        theirs = default | yaml.safe_load(file.read_text())
        subject = theirs["dataset_name"]
        ours = tasks.multiple_choice(subject)
        ours["description"] = apply_template(ours["description"], {})
        for ignored in ("dataset_path", "dataset_name", "include", "task", "tag", "task_alias", "metadata"):
            theirs.pop(ignored)
        for local in ("task", "num_fewshot"):
            ours.pop(local)
        assert ours == theirs, subject


HOSTILE = ["{{ 1 + 1 }}", "{% raw %}", "{# #}", 'it\'s "so"', "back\\slash\n", "é🙂", "}} '{{ x", "\x00\u2028"]


@pytest.mark.parametrize("subject", HOSTILE)
def test_a_subject_is_text_to_the_harness_and_no_template(subject):
    from lm_eval.utils import apply_template

    said = apply_template(tasks.multiple_choice(subject)["description"], {})
    assert said == f"The following are multiple choice questions (with answers) about {subject}.\n\n"


@pytest.mark.parametrize("subject", HOSTILE)
def test_a_subject_of_an_odd_name_is_refused_where_it_is_asked_for(tmp_path, subject):
    with zipfile.ZipFile(tmp_path / "m.zip", "w") as archive:
        for split in questions.SPLITS:
            for name in ("good", subject.replace("\x00", "")):
                archive.writestr(f"{split}/{name}_{split}.csv", "q?,1,2,3,4,A\n")
    with pytest.raises(D2OError, match=r"m\.zip: .* cannot name a subject: .*; rename its files, or name the others"):
        questions.fetch(Task(path=str(tmp_path / "m.zip")), tmp_path / "out")
    questions.fetch(Task(path=str(tmp_path / "m.zip"), subjects=["good"]), tmp_path / "out")
    assert records.read_manifest(tmp_path / "out")["subjects"] == {"good": {"dev": 1, "test": 1}}


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a" * 101], r"m\.zip: 'a{101}' cannot name a subject: up to 100 letters"),
        (["a" * 60_000], r"m\.zip: 'a{120}' cannot name a subject: up to 100 letters"),
        (["logs", "Logs"], r"m\.zip: the subjects (logs and Logs|Logs and logs) are one name where a file system"),
    ],
)
def test_a_subject_that_cannot_name_a_file_everywhere_is_refused(tmp_path, names, message):
    with zipfile.ZipFile(tmp_path / "m.zip", "w") as archive:
        for split, name in product(questions.SPLITS, [*names, "a" * 100]):
            archive.writestr(f"{split}/{name}_{split}.csv", "q?,1,2,3,4,A\n")
    with pytest.raises(D2OError, match=message):
        questions.fetch(Task(path=str(tmp_path / "m.zip")), tmp_path / "out")
    questions.fetch(Task(path=str(tmp_path / "m.zip"), subjects=["a" * 100]), tmp_path / "out")


@pytest.mark.parametrize(
    "wrong",
    [
        {"choices": None}, {"choices": "abcd"}, {"choices": ["a"] * 3}, {"choices": ["a", "b", "c", None]},
        {"answer": None}, {"answer": 4}, {"answer": 1.0}, {"answer": [1]}, {"question": None},
    ],
)  # fmt: skip
def test_a_question_of_the_hub_that_is_none_is_told(wrong):
    row = {"question": "q?", "choices": ["a", "b", "c", "d"], "answer": 3}
    assert questions._checked(row | {"more": 1}, "a/mmlu: law, test, row 1") == row
    with pytest.raises(D2OError, match=r"^a/mmlu: law, test, row 1: expected "):
        questions._checked(row | wrong, "a/mmlu: law, test, row 1")


CLEAR = "\x1b[2J"


@pytest.mark.parametrize(
    ("files", "subjects"),
    [
        ({f"{CLEAR}/dev/law_dev.csv": "", f"{CLEAR}/test/law_test.csv": "q?"}, []),  # not six columns
        ({f"{CLEAR}/dev/law_dev.csv": b"\xff"}, []),
        ({f"a/dev/{CLEAR}_dev.csv": "", f"b/dev/{CLEAR}_dev.csv": ""}, []),
        ({f"dev/{CLEAR}_dev.csv": ""}, ["law"]),
        ({f"dev/{CLEAR}_dev.csv": ""}, []),
        ({f"{CLEAR}/dev/law_dev.csv": "q?,1,2,3,4,A\n" * 9}, ["law"]),  # damaged below
    ],
)
def test_no_name_in_a_zip_changes_the_terminal(tmp_path, files, subjects):
    path = tmp_path / "m.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content or "q?,1,2,3,4,A\n")
    path.write_bytes(path.read_bytes().replace(b"q?,1,2,3,4,A\n" * 9, b"x" * 117))
    with pytest.raises(D2OError, match=r"\\u001b\[2J") as error:
        questions.fetch(Task(path=str(path), subjects=subjects), tmp_path / "out")
    assert str(error.value).isprintable()


def test_a_file_that_unpacks_to_too_much_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "LARGEST", 1 << 20)
    with zipfile.ZipFile(tmp_path / "m.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for split in questions.SPLITS:
            archive.writestr(f"{split}/law_{split}.csv", " " * (2 << 20))
    with pytest.raises(D2OError, match=r"m\.zip: unpacks to more than 1 MiB"):
        questions.fetch(Task(path=str(tmp_path / "m.zip")), tmp_path / "out")


def test_files_that_unpack_to_too_much_together_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "LARGEST", 1 << 20)
    with zipfile.ZipFile(tmp_path / "m.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for split, subject in product(questions.SPLITS, ("law", "logic")):
            archive.writestr(f"{split}/{subject}_{split}.csv", "q?,1,2,3,4,A\n" * 30_000)
    with pytest.raises(D2OError, match=r"m\.zip: unpacks to more than 1 MiB"):
        questions.fetch(Task(path=str(tmp_path / "m.zip")), tmp_path / "out")


def fetched_within(memory_gb: float, source: Questions, folder: Path) -> str:
    """The error output of a separate process that fetches questions with a memory limit."""
    code = (
        "from pathlib import Path; from d2o import questions; from d2o.settings import Questions\n"
        f"questions._MEMORY = {memory_gb}\n"
        f"questions.fetch(Questions(**{source.model_dump()}), Path({str(folder)!r}))"
    )
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stderr


@pytest.mark.slow
def test_short_questions_take_no_more_memory_than_reading_has(tmp_path):
    """A zip of 200 kB holds five million questions, of 300 bytes each in Python."""
    with zipfile.ZipFile(tmp_path / "m.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for split, count in (("dev", 1), ("test", 5_000_000)):
            archive.writestr(f"{split}/law_{split}.csv", "q,1,2,3,4,A\n" * count)
    told = fetched_within(0.1, Questions(path=str(tmp_path / "m.zip")), tmp_path / "q")
    assert f"D2OError: {tmp_path}/m.zip: reading it takes more than about 0.1 GB; is it the right one?" in told
    assert not (tmp_path / "q").exists()


def test_a_folder_of_an_odd_name_is_no_pattern(tmp_path):
    folder = tmp_path / "a[b]*?"
    questions.fetch(Task(path=str(DEMO), subjects=["geography"], limit=2), folder)
    files = {split: harness.data_file(folder, "geography", split) for split in questions.SPLITS}
    splits = harness.load_files("parquet", files, str(tmp_path / "cache"))
    assert {split: len(rows) for split, rows in splits.items()} == {"dev": 5, "test": 2}


@pytest.fixture(scope="module")
def opinionated_model(tiny_model, tmp_path_factory) -> Path:
    """The tiny model made to answer differently from question to question.

    In float32, with weights so large that its answers depend on the whole prompt, and one token per letter.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("opinionated")
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.add_tokens([" A", " B", " C", " D"])
    torch.manual_seed(0)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    with torch.no_grad():
        for layer in model.model.layers:
            for weight in (*layer.self_attn.parameters(), *layer.mlp.parameters()):
                weight *= 10
        model.model.norm.weight *= 100
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def answers_by_hand(model: Path, subject: str, dev: list[dict], test: list[dict]) -> list[int]:
    """MMLU's evaluation written out, one sequence at a time: the answer to each test question."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    network, tokenizer = AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    context = network.config.max_position_embeddings

    def asked(row: dict) -> str:
        lines = [row["question"].strip(), *(f"{x}. {c}" for x, c in zip("ABCD", row["choices"], strict=True))]
        return "\n".join([*lines, "Answer:"])

    head = f"The following are multiple choice questions (with answers) about {subject.replace('_', ' ')}.\n\n"
    head += "".join(f"{asked(row)} {'ABCD'[row['answer']]}\n\n" for row in dev)
    answers = []
    for row in test:
        prompt, sums = head + asked(row), []
        for letter in "ABCD":
            count = len(tokenizer(prompt).input_ids)
            ids = tokenizer(f"{prompt} {letter}").input_ids
            tail = len(ids) - count
            ids = torch.tensor([ids[-context - 1 :]])
            with torch.no_grad():
                logprobs = network(ids[:, :-1]).logits.log_softmax(-1)
            picked = logprobs.gather(2, ids[:, 1:, None])[0, -tail:, 0]
            sums.append(picked.sum().item())
        answers.append(max(range(4), key=sums.__getitem__))
    return answers


@pytest.mark.slow
@pytest.mark.parametrize("shots", [0, 2, 5])
def test_every_answer_equals_one_computed_by_hand(opinionated_model, tmp_path, shots):
    """With 5 shots the prompts are longer than the context, and lose their beginning."""
    subject = "everyday_science"
    task = Task(path=str(DEMO), subjects=[subject, "geography"], shots=shots, batch_size=4)
    questions.fetch(task, tmp_path / "questions")
    tasks.answer(task, opinionated_model, tmp_path / "questions", tmp_path / "out.parquet")
    rows = records.read_table(tmp_path / "out.parquet", schemas.TASK_VALUES)

    dev, test = (read(tmp_path / "questions", subject, split) for split in questions.SPLITS)
    chosen = answers_by_hand(opinionated_model, subject, dev[:shots], test)
    assert len(set(chosen)) > 1, "a model that always says the same letter shows nothing"
    expected = [choice == row["answer"] for choice, row in zip(chosen, test, strict=True)]
    assert [row["value"] for row in rows if row["subject"] == subject] == expected
    assert [row["question"] for row in rows] == [*range(15), *range(15)]
    asked = asked_by(tmp_path / "questions")
    assert asked.keys() == {(row["subject"], row["question"]) for row in rows}
    assert [asked[subject, n] for n in range(15)] == [row["question"] for row in test]

    facts = records.read_manifest(tmp_path / "out.parquet")
    assert facts["subjects"][subject] == sum(expected) / 15
    assert facts["mean"] == sum(row["value"] for row in rows) / 30
    assert facts["rows"] == 30
    assert (facts["cut_prompts"] > 0) == (shots == 5)
    assert facts["bos"] is False, "a tokenizer without a BOS token"


@pytest.mark.slow
def test_a_tokenizer_that_puts_a_bos_token_first_is_told(tiny_model, tmp_path):
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer

    model = shutil.copytree(tiny_model, tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(model, bos_token="<|endoftext|>")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        "<|endoftext|> $A", special_tokens=[("<|endoftext|>", tokenizer.bos_token_id)]
    )
    tokenizer.save_pretrained(model)
    task = Task(path=str(DEMO), subjects=["geography"], shots=0, limit=2)
    questions.fetch(task, tmp_path / "questions")
    tasks.answer(task, model, tmp_path / "questions", tmp_path / "out.parquet")
    assert records.read_manifest(tmp_path / "out.parquet")["bos"] is True


def test_too_few_examples_and_no_model_are_told_before_anything_loads(tiny_model, tmp_path):
    write_csv(tmp_path / "in", "few", "q?,1,2,3,4,B\n")
    task = Task(path=str(tmp_path / "in"), shots=5)
    questions.fetch(task, tmp_path / "questions")
    with pytest.raises(D2OError, match="few has 1 examples; set `shots` to at most that"):
        tasks.answer(task, tiny_model, tmp_path / "questions", tmp_path / "out.parquet")
    with pytest.raises(D2OError, match=r"config\.json"):
        tasks.answer(task, tmp_path / "in", tmp_path / "questions", tmp_path / "out.parquet")


def test_damaged_questions_are_not_asked(tiny_model, tmp_path):
    """The reader of questions verifies no checksum."""
    write_csv(tmp_path / "in", "one", "q?,1,2,3,4,B\n")
    task = Task(path=str(tmp_path / "in"), shots=0)
    questions.fetch(task, tmp_path / "questions")
    file = harness.data_file(tmp_path / "questions", "one", "test")
    file.write_bytes(file.read_bytes().replace(b"q?", b"Q?"))
    with pytest.raises(D2OError, match=r"one-test\.parquet: damaged since it was written; delete"):
        tasks.answer(task, tiny_model, tmp_path / "questions", tmp_path / "out.parquet")


# Tasks of the harness --------------------------------------------------------------------------------

LABELS = ["A", "B", "C"]


def write_rows(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def science(number: int, text: str = "") -> dict:
    """A row in ARC's form; the choices differ in length."""
    choices = {"text": [f"a{number}", f"the number {number}, plainly", "neither"], "label": LABELS}
    return {
        "question": text or f"What comes after {number - 1}?",
        "choices": choices,
        "answerKey": LABELS[number % 3],
    }


@pytest.fixture
def arc(tmp_path) -> dict[str, str]:
    rows = [science(n) for n in range(1, 13)] + [science(13, "{{ 1 + 1 }} {% raw %}")]
    return {
        "train": write_rows(tmp_path / "train.jsonl", [science(n) for n in range(50, 53)]),
        "test": write_rows(tmp_path / "test[1].jsonl", rows),
    }


def test_a_task_of_the_harness_is_read_from_local_files(arc, tmp_path):
    questions.fetch(Questions(task="arc_easy", data=arc, limit=12), tmp_path / "q")
    assert records.read_manifest(tmp_path / "q")["subjects"] == {"arc_easy": {"train": 3, "test": 13}}
    assert asked_by(tmp_path / "q") == {("arc_easy", n): f"What comes after {n}?" for n in range(12)}


def _with_pictures(path: Path, rows: list[dict], kinds: dict[str, Any]) -> str:
    """A Parquet file whose schema declares two columns of images, and whose rows contain the URLs of these."""
    import datasets

    at = [{"path": "http://127.0.0.1:9/a.png", "bytes": None}]
    rows = [row | {"picture": at[0], "pictures": at} for row in rows]
    kinds = kinds | {"picture": datasets.Image(), "pictures": datasets.List(datasets.Image())}
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, datasets.Features(kinds).arrow_schema), path)
    return str(path)


def test_no_picture_of_a_task_is_fetched_from_where_a_row_says(tmp_path):
    import datasets

    text = datasets.Value("string")
    kinds = {
        "question": text,
        "choices": {"text": datasets.List(text), "label": datasets.List(text)},
        "answerKey": text,
    }
    data = {
        split: _with_pictures(tmp_path / f"{split}.parquet", [science(n) for n in range(1, 4)], kinds)
        for split in ("train", "test")
    }
    questions.fetch(Questions(task="arc_easy", data=data), tmp_path / "q")
    kept = pq.read_schema(harness.data_file(tmp_path / "q", "arc_easy", "test")).names
    assert kept == ["question", "choices", "answerKey"]


def test_no_picture_of_the_hub_is_fetched_from_where_a_row_says(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    text = datasets.Value("string")
    kinds = {"question": text, "choices": datasets.List(text), "answer": datasets.Value("int64")}
    rows = [{"question": "Which?", "choices": list("abcd"), "answer": 2}]
    card = "---\nconfigs:\n- config_name: law\n  data_files:\n"
    for split in questions.SPLITS:
        _with_pictures(tmp_path / "hub" / "law" / f"{split}.parquet", rows, kinds)
        card += f"  - split: {split}\n    path: law/{split}.parquet\n"
    (tmp_path / "hub" / "README.md").write_text(card + "---\n")
    questions.fetch(Task(hub=str(tmp_path / "hub"), revision="main"), tmp_path / "q")
    assert read(tmp_path / "q", "law", "test") == rows


@pytest.mark.slow
def test_a_small_file_of_a_task_takes_no_more_memory_than_reading_has(arc, tmp_path):
    """878 bytes that unpack to 4 GB."""
    path = tmp_path / "bomb.parquet"
    question = pa.DictionaryArray.from_arrays(pa.array([0] * 1024, pa.int32()), ["x" * 4_000_000])
    answers = {"choices": [science(1)["choices"]] * 1024, "answerKey": ["A"] * 1024}
    pq.write_table(pa.table({"question": question, **answers}), path, compression="zstd")
    source = Questions(task="arc_easy", data={"train": str(path), "test": str(path)})
    told = fetched_within(1, source, tmp_path / "q")
    assert f"D2OError: {path}: reading it takes more than about 1 GB; is it the right one?" in told
    assert not (tmp_path / "q").exists()


def test_wrong_tasks_of_the_harness_are_told_in_one_line(arc, tmp_path):
    other = write_rows(tmp_path / "other.jsonl", [{"text": "x"}])
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"question": ')
    for given, message in [
        ({"task": "arc_esay", "data": arc}, "arc_esay: not a task that can be made of its data"),
        ({"task": "arc_easy", "data": {"test": other}}, "columns those that its YAML file names"),
        (
            {"task": "arc_easy", "data": {"tset": arc["test"]}},
            "arc_easy: no split to be asked about among tset; name",
        ),
        ({"task": "arc_easy", "data": {"test": str(broken)}}, r"broken\.jsonl: cannot be read \("),
        ({"task": "arc_easy", "data": {"test": "a.txt"}}, r"a\.txt: expected files of one kind of \.jsonl, \.json"),
        ({"task": "ai2_arc", "data": arc}, "ai2_arc is a group of 2 tasks; `data` goes with one of them"),
        ({"task": "mbpp", "data": arc}, "mbpp: "),
        (
            {"task": "arc_easy", "revision": "main"},
            r"allenai/ai2_arc of arc_easy: not fetched \(.*or name local files in `data`$",
        ),
    ]:
        with pytest.raises(D2OError, match=message) as error:
            questions.fetch(Questions(**given), tmp_path / "out")
        assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_metric_that_a_task_has_not_is_told_where_its_questions_come(arc, tmp_path):
    with pytest.raises(
        D2OError, match=r"arc_easy: bleu is no mean over its questions; set `metric` to one: acc, acc_n"
    ):
        questions.fetch(Questions(task="arc_easy", data=arc), tmp_path / "out", "bleu")
    with pytest.raises(ValueError, match="task needs one of data, local files, and revision"):
        Questions(task="arc_easy")


def test_a_name_that_the_harness_does_not_know_is_told_before_any_job(monkeypatch):
    for name in ("arc_easy", "mmlu", "gsm8k", "ai2_arc"):
        assert harness.problem(name, None) is None
    assert harness.problem("arc_esay", None).startswith(
        "lm-evaluation-harness knows no 'arc_esay'; did you mean arc_easy"
    )
    monkeypatch.chdir(ROOT)
    config = yaml.safe_load((ROOT / "tests" / "data" / "config.yaml").read_text())
    config["tasks"] = {"mmlu": {"task": "helaswag", "revision": "a" * 40}}
    with pytest.raises(D2OError, match=r"^c: tasks\.mmlu\.task: .* no 'helaswag'; did you mean hellaswag"):
        Plan(config, "c")


@pytest.mark.slow
def test_plain_prose_in_bits_per_byte(tiny_model, tmp_path, monkeypatch):
    """Against the model's own log-probs: the text after the end-of-text token, as the harness reads it."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.chdir(ROOT)
    task = Task(task="plain", include="demo/plain", data={"test": "demo/plain/plain.jsonl"})
    questions.fetch(task, tmp_path / "q", "bits_per_byte")
    tasks.answer(task, tiny_model, tmp_path / "q", tmp_path / "out.parquet")
    facts = records.read_manifest(tmp_path / "out.parquet")
    assert (facts["metric"], facts["better"], facts["rows"]) == ("bits_per_byte", "lower", 40)

    text = json.loads((ROOT / "demo/plain/plain.jsonl").read_text().splitlines()[0])["text"]
    network = AutoModelForCausalLM.from_pretrained(tiny_model, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    ids = torch.tensor([[tokenizer.eos_token_id, *tokenizer(text).input_ids]])
    logprobs = network(ids).logits[0, :-1].float().log_softmax(-1).gather(1, ids[0, 1:, None])
    bits = -logprobs.sum().item() / math.log(2) / len(text.encode())
    (first, *_) = records.read_table(tmp_path / "out.parquet", schemas.TASK_VALUES)
    assert first["value"] == pytest.approx(bits, rel=0.01)


SUM = """
task: sums
output_type: generate_until
test_split: test
doc_to_text: "{{asked}}="
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 4}
filter_list:
  - {name: whole, filter: [{function: take_first}]}
  - {name: first, filter: [{function: regex, regex_pattern: "^(.)"}, {function: take_first}]}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
"""


def write_sums(folder: Path, answers: list[str]) -> Task:
    """Write a task that the harness does not know: to continue a text."""
    (folder / "own").mkdir(exist_ok=True)
    (folder / "own" / "sums.yaml").write_text(SUM)
    rows = [{"asked": f"{n}+{n}", "answer": answer} for n, answer in enumerate(answers)]
    data = {"test": write_rows(folder / "sums.jsonl", rows)}
    return Task(task="sums", include=str(folder / "own"), data=data, batch_size=2)


def greedy(model: Path, text: str, count: int) -> str:
    """A model's greedy continuation of `text` up to the end of the line, with plain transformers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    network, tokenizer = (
        AutoModelForCausalLM.from_pretrained(model, dtype="auto"),
        AutoTokenizer.from_pretrained(model),
    )
    ids = tokenizer(text, return_tensors="pt").input_ids
    made = network.generate(ids, do_sample=False, max_new_tokens=count, eos_token_id=tokenizer.eos_token_id)
    return tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True).split("\n")[0]


@pytest.mark.slow
def test_answers_that_are_generated_are_compared_with_what_is_expected(opinionated_model, tmp_path):
    said = [greedy(opinionated_model, f"{n}+{n}=", 4) for n in range(3)]
    task = write_sums(tmp_path, [said[0], said[1][:1], "never"])
    questions.fetch(task, tmp_path / "q")
    assert asked_by(tmp_path / "q") == {("sums", n): f"{n}+{n}=" for n in range(3)}
    for metric, values in ((None, [1, 0, 0]), ("exact_match,first", [0, 1, 0])):
        chosen = task.model_copy(update={"metric": metric})
        tasks.answer(chosen, opinionated_model, tmp_path / "q", tmp_path / "out.parquet")
        rows = records.read_table(tmp_path / "out.parquet", schemas.TASK_VALUES)
        assert rows == [{"subject": "sums", "question": n, "value": value} for n, value in enumerate(values)]
        facts = records.read_manifest(tmp_path / "out.parquet")
        assert (facts["metric"], facts["better"], facts["mean"]) == ("exact_match", "higher", pytest.approx(1 / 3))


def lengthwise(model: Path, rows: list[dict]) -> list[list[int]]:
    """The choice of each question by log-prob, and by log-prob per character, one sequence at a time."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    network, tokenizer = (
        AutoModelForCausalLM.from_pretrained(model, dtype="auto"),
        AutoTokenizer.from_pretrained(model),
    )
    choices = [[], []]
    for row in rows:
        prompt, sums = f"Question: {row['question']}\nAnswer:", []
        for choice in row["choices"]["text"]:
            start, ids = (
                len(tokenizer(prompt).input_ids),
                tokenizer(f"{prompt} {choice}", return_tensors="pt").input_ids,
            )
            with torch.no_grad():
                logprobs = network(ids[:, :-1]).logits.float().log_softmax(-1)
            sums.append(logprobs.gather(2, ids[:, 1:, None])[0, start - 1 :].sum().item())
        lengths = [len(choice) for choice in row["choices"]["text"]]
        choices[0].append(max(range(3), key=sums.__getitem__))
        choices[1].append(max(range(3), key=lambda i, s=sums, n=lengths: s[i] / n[i]))
    return choices


@pytest.mark.slow
def test_a_task_of_the_harness_has_its_own_metrics(opinionated_model, arc, tmp_path):
    task = Task(task="arc_easy", data=arc)
    questions.fetch(task, tmp_path / "q")
    rows = [json.loads(line) for line in Path(arc["test"]).read_text().splitlines()]
    chosen = dict(zip(("acc", "acc_norm"), lengthwise(opinionated_model, rows), strict=True))
    assert chosen["acc"] != chosen["acc_norm"], "a choice that no length changes shows nothing"
    for metric in ("acc", "acc_norm"):
        entry = task.model_copy(update={"metric": metric if metric != "acc" else None})
        tasks.answer(entry, opinionated_model, tmp_path / "q", tmp_path / "out.parquet")
        made = records.read_table(tmp_path / "out.parquet", schemas.TASK_VALUES)
        expected = [float(LABELS[c] == row["answerKey"]) for c, row in zip(chosen[metric], rows, strict=True)]
        assert [row["value"] for row in made] == expected
        assert records.read_manifest(tmp_path / "out.parquet")["metric"] == metric


def test_what_a_task_does_not_offer_is_told_before_anything_loads(tiny_model, arc, tmp_path):
    task = Task(task="arc_easy", data=arc)
    questions.fetch(task, tmp_path / "q")
    for change, message in [
        ({"metric": "f1"}, "arc_easy: f1 is no mean over its questions; set `metric` to one: acc, acc_norm"),
        ({"metric": "acc,strict"}, "arc_easy: acc,strict is no mean"),
        ({"shots": 4}, "arc_easy has 3 examples; set `shots` to at most that"),
    ]:
        with pytest.raises(D2OError, match=message):
            tasks.answer(task.model_copy(update=change), tiny_model, tmp_path / "q", tmp_path / "out.parquet")


# Without a network -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_command_asks_no_hub_and_leaves_no_cache(tiny_model, tmp_path):
    asked = []

    class Hub(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_error(404)

        do_HEAD = do_POST = do_GET

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    Thread(target=server.serve_forever, daemon=True).start()
    home = tmp_path / "home"
    (home / "tmp").mkdir(parents=True)
    # Not set to offline: requests to the Hub reach this server, and caches are written to `home`.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")} | {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HOME": str(home / "hf"),
        "TMPDIR": str(home / "tmp"),
    }
    source = Questions(path=str(DEMO), subjects=["geography"], limit=2)

    def d2o(stage: str, settings: Questions, *arguments: str) -> None:
        command = [sys.executable, "-m", "d2o.cli", stage, "--settings", settings.model_dump_json(), *arguments]
        subprocess.run(command, check=True, env=environment, cwd=tmp_path)

    d2o("questions", source, "--output", "q/manifest.json")
    d2o(
        "tasks",
        Task(**source.model_dump(), shots=1),
        "--model",
        str(tiny_model),
        "--questions",
        "q/manifest.json",
        "--output",
        "out.parquet",
    )
    server.shutdown()
    assert asked == []
    assert [str(path) for path in home.rglob("*") if path.is_file()] == []
    assert len(records.read_table(tmp_path / "out.parquet", schemas.TASK_VALUES)) == 2
    facts = json.loads((tmp_path / "out.parquet.manifest.json").read_text())
    assert facts["dtype"] == ("bfloat16" if dtypes.quick_at_bf16() else "float32")  # as stored, unless that is slow
