"""Stage `datasets`: every format, every kind of file, and the errors of each."""

from __future__ import annotations

import csv
import gzip
import json
import lzma
import os
import random
import re
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from d2o import datasets, formats, identities, records, schemas
from d2o.errors import D2OError
from d2o.settings import Reading

ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
DATA = Path(__file__).parent.parent.parent / "shared" / "data"

PKU = {
    "prompt": "May I take it?",
    "response_0": "Take it.",
    "response_1": "Ask first.",
    "is_response_0_safe": False,
    "is_response_1_safe": True,
    "better_response_id": None,
    "safer_response_id": 1,
}
HH = {
    "chosen": "\n\nHuman: Hello\n\nAssistant: Hi.\n\nHuman: A joke?\n\nAssistant: Knock knock.",
    "rejected": "\n\nHuman: Hello\n\nAssistant: Hi.\n\nHuman: A joke?\n\nAssistant: No.",
}
LOG = {"prompt": "Is it new?", "response": "Who cares."}
TALK = [
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Hi."},
    {"role": "user", "content": "A joke?"},
]


def write(path: Path, rows: list) -> Path:
    """Write rows to a file of the kind that its suffixes name; a `str` row is written verbatim."""
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
        return path
    opened = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)
    if tables := {".csv", ".tsv"}.intersection(path.suffixes):
        with opened(path, "wt", encoding="utf-8", newline="") as file:
            table = csv.DictWriter(file, rows[0] if rows else [], delimiter="," if ".csv" in tables else "\t")
            table.writeheader()
            table.writerows(rows)
        return path
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    text = f"[{','.join(lines)}]" if ".json" in path.suffixes else "".join(f"{line}\n" for line in lines)
    with opened(path, "wt", encoding="utf-8", newline="") as file:
        file.write(text)
    return path


def read(format: str, train: list[Path], folder: Path, **reading) -> list[dict]:
    datasets.read(Reading(format=format, train=[str(path) for path in train], **reading), folder / "rows.parquet")
    return records.read_table(folder / "rows.parquet", schemas.ROWS)


def rejected(folder: Path) -> list[dict]:
    text = (folder / "rows.parquet.rejected.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def problem(format: str, path: Path, **reading) -> str:
    """The message of the error that reading `path` ends in: one line that names the file."""
    with pytest.raises(D2OError) as error:
        read(format, [path], path.parent, **reading)
    message = str(error.value)
    assert "\n" not in message
    assert str(path) in message
    assert not (path.parent / "rows.parquet").exists()
    return message


# Formats ---------------------------------------------------------------------------------------------


def answer(text: str, unsafe: bool | None, categories: list[str] | None = None, severity: int | None = None) -> dict:
    return {"text": text, "unsafe": unsafe, "categories": categories, "severity": severity}


@pytest.mark.parametrize("format", ["pku-saferlhf-beta", "pku-saferlhf"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_pku(format, name, tmp_path):
    extra = {
        "response_0_harm_category": {"Violence": True, "Drugs": False, "Cybercrime": True},
        "response_0_severity_level": 2,
        "response_1_harm_category": {"Violence": False, "Drugs": False, "Cybercrime": False},
        "response_1_severity_level": 0,
    }
    [row] = read(format, [write(tmp_path / name, [PKU | extra])], tmp_path)
    assert row == {
        "row": 0,
        "split": "train",
        "prompt_id": identities.prompt_id(row["messages"]),
        "messages": [{"role": "user", "content": "May I take it?"}],
        "responses": [
            answer("Take it.", True, ["Violence", "Cybercrime"], 2),
            answer("Ask first.", False, [], 0),
        ],
        "better": None,
        "safer": 1,
    }


def test_pku_without_categories(tmp_path):
    [row] = read("pku-saferlhf-beta", [write(tmp_path / "a.parquet", [PKU])], tmp_path)
    assert row["responses"] == [answer("Take it.", True), answer("Ask first.", False)]


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("response_0_harm_category", ["Violence"], "not an object of true and false"),
        ("response_0_harm_category", {"Violence": 1}, "not an object of true and false"),
        ("response_0_harm_category", {"\ud800": True}, "an object with a name that is half a character"),
        ("response_1_severity_level", 4, "neither 0, 1, 2, 3 nor null"),
        ("response_1_severity_level", True, "neither 0, 1, 2, 3 nor null"),
        ("response_1_severity_level", "2", "neither 0, 1, 2, 3 nor null"),
    ],
)
def test_wrong_label(key, value, reason, tmp_path):
    message = problem("pku-saferlhf", write(tmp_path / "a.jsonl", [json.dumps(PKU | {key: value})]))
    assert f"`{key}` is {reason}" in message


def test_hh_keeps_all_turns(tmp_path):
    [row] = read("hh-rlhf", [write(tmp_path / "a.jsonl", [HH])], tmp_path)
    assert row["messages"] == TALK
    assert row["responses"] == [answer("Knock knock.", None), answer("No.", None)]
    assert (row["better"], row["safer"]) == (0, None)


@pytest.mark.parametrize(
    ("asked", "messages"),
    [
        ({"prompt": "Is it new?"}, [{"role": "user", "content": "Is it new?"}]),
        ({"messages": TALK}, TALK),
        (
            {"prompt": None, "messages": [{"role": "system", "content": "Be kind."}, *TALK]},
            [{"role": "system", "content": "Be kind."}, *TALK],
        ),
    ],
)
def test_negatives(asked, messages, tmp_path):
    [row] = read("negatives", [write(tmp_path / "a.jsonl", [asked | {"response": "No."}])], tmp_path)
    assert row["messages"] == messages
    assert row["responses"] == [answer("No.", True)]
    assert (row["better"], row["safer"]) == (None, None)


TURN = st.text(min_size=1).map(str.strip).filter(lambda t: t and "Human:" not in t and "Assistant:" not in t)


@given(turns=st.lists(TURN, min_size=2).filter(lambda turns: len(turns) % 2 == 0), other=TURN)
def test_hh_dialogue_comes_back(turns, other):
    names = ["Human", "Assistant"] * (len(turns) // 2)

    def told(turns):
        return "".join(f"\n\n{name}: {turn}" for name, turn in zip(names, turns, strict=True))

    [record] = formats.hh_rlhf({"chosen": told(turns), "rejected": told([*turns[:-1], other])}, formats.Labels())
    assert [message["content"] for message in record["messages"]] == turns[:-1]
    assert [answer["text"] for answer in record["responses"]] == [turns[-1], other]


@settings(deadline=None, max_examples=25)
@given(text=st.text(min_size=1).filter(str.strip))
def test_any_text_survives_every_kind_of_file(text, tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    for name in ("a.jsonl", "a.json", "a.parquet", "a.csv", "a.tsv"):
        [row] = read("negatives", [write(folder / name, [LOG | {"response": text}])], folder)
        assert row["responses"][0]["text"] == text


# Files -----------------------------------------------------------------------------------------------


def test_every_kind_of_file_reads_alike(tmp_path):
    rows = [LOG | {"prompt": f'"Größe"; {i},\t\u2028\r\n?'} for i in range(3)]
    names = [f"rows{suffix}" for suffix in datasets._SUFFIXES] + ["ROWS.JSONL"]
    files = [write(tmp_path / name, rows) for name in names]
    table = read("negatives", files, tmp_path)
    prompts = [row["messages"][0]["content"] for row in table]
    assert prompts == [row["prompt"] for row in rows] * len(files)
    assert [row["row"] for row in table] == list(range(3 * len(files)))


@pytest.mark.parametrize(
    ("like", "name"),
    [
        ("a.jsonl", "x.csv.jsonl"), ("a.jsonl", "x.TSV.JSONL"), ("a.jsonl.gz", "x.csv.jsonl.gz"),
        ("a.tsv", "x.csv.tsv"), ("a.json", "x.jsonl.json"), ("a.json", "x.csv.json"), ("a.csv", "x.tsv.csv"),
        ("a.csv.xz", "x.tsv.csv.xz"), ("a.csv", "x.jsonl.csv"), ("a.csv", "x.gz.csv"),
    ],
)  # fmt: skip
def test_the_last_suffix_counts(like, name, tmp_path):
    path = write(tmp_path / like, [LOG | {"prompt": 'Is "it", new?'}]).rename(tmp_path / name)
    [row] = read("negatives", [path], tmp_path)
    assert row["messages"][0]["content"] == 'Is "it", new?'


def test_json_may_hold_lines_and_a_byte_order_mark(tmp_path):
    lines = "\n\n  " + json.dumps(LOG) + "\r\n" + json.dumps(LOG) + "\r\n"
    (tmp_path / "a.json").write_text(lines, encoding="utf-8-sig")
    (tmp_path / "b.json").write_text("\n" + json.dumps([LOG, LOG], indent=2), encoding="utf-8-sig")
    assert len(read("negatives", [tmp_path / "a.json", tmp_path / "b.json"], tmp_path)) == 4


def test_splits_and_manifest(tmp_path):
    train, test = write(tmp_path / "a.jsonl", [LOG] * 2), write(tmp_path / "b.jsonl", [LOG])
    rows = read("negatives", [train], tmp_path, test=[str(test)])
    assert [row["split"] for row in rows] == ["train", "train", "test"]
    manifest = records.read_manifest(tmp_path / "rows.parquet")
    assert manifest["counts"] == {"train": 2, "test": 1, "rejected": 0, "left_out": 0}
    assert manifest["inputs"].keys() == {str(train), str(test)}
    assert rejected(tmp_path) == []


def test_parquet_written_by_pandas(tmp_path):
    import pandas

    rows = [PKU | {"better_response_id": 1}, PKU]  # pandas makes 1.0 and null of 1 and None
    pandas.DataFrame(rows).to_parquet(tmp_path / "a.parquet")
    assert pq.read_schema(tmp_path / "a.parquet").field("better_response_id").type == pa.float64()
    table = read("pku-saferlhf", [tmp_path / "a.parquet"], tmp_path)
    assert [row["better"] for row in table] == [1, None]


def test_hub_splits(tmp_path):
    """A folder stands for the repository: `load_dataset` reads both alike."""
    hub = tmp_path / "repository"
    hub.mkdir()
    write(hub / "train.jsonl", [PKU] * 3)
    write(hub / "test.jsonl", [PKU, PKU | {"prompt": ""}])
    reading = Reading(
        format="pku-saferlhf", hub=str(hub), revision="b4d1307", train=["train"], test=["test"],
        max_bad_share=0.5,
    )  # fmt: skip
    datasets.read(reading, tmp_path / "rows.parquet")
    rows = records.read_table(tmp_path / "rows.parquet", schemas.ROWS)
    assert [row["split"] for row in rows] == ["train"] * 3 + ["test"]
    assert rejected(tmp_path) == [{"file": f"{hub}, split test", "row": 2, "reason": "`prompt` is empty"}]
    with pytest.raises(D2OError, match=r"split dev, revision b4d1307: .*check hub"):
        datasets.read(reading.model_copy(update={"train": ["dev"]}), tmp_path / "rows.parquet")


def test_hub_out_of_reach(tmp_path):
    reading = Reading(format="hh-rlhf", hub="nobody/nothing", revision="0", train=["train"])
    with pytest.raises(D2OError, match=r"nobody/nothing, split train, revision 0: .*check hub") as error:
        datasets.read(reading, tmp_path / "rows.parquet")
    assert "\n" not in str(error.value)


# Bad rows --------------------------------------------------------------------------------------------


def without(row: dict, key: str) -> dict:
    return {k: v for k, v in row.items() if k != key}


BAD = [
    ("negatives", "[1]", "a list, not an object"),
    ("negatives", "null", "null, not an object"),
    ("negatives", '{"prompt": "a"', "invalid JSON"),
    ("negatives", "[" * 100_000, "invalid JSON"),
    ("negatives", "9" * 5000, "invalid JSON"),
    ("negatives", {"response": "No."}, "give one of `prompt` and `messages`"),
    ("negatives", LOG | {"messages": TALK}, "give one of `prompt` and `messages`"),
    ("negatives", LOG | {"prompt": " \n"}, "`prompt` is empty"),
    ("negatives", LOG | {"response": ""}, "`response` is empty"),
    ("negatives", without(LOG, "response"), "no `response`"),
    ("negatives", LOG | {"response": 3}, "`response` is a number, not a text"),
    ("negatives", LOG | {"response": None}, "`response` is null, not a text"),
    ("negatives", '{"prompt": "a", "response": "\\ud83d"}', "`response` holds half a character"),
    ("negatives", {"messages": "Hello", "response": "No."}, "`messages` is not a list"),
    ("negatives", {"messages": [], "response": "No."}, "does not alternate"),
    ("negatives", {"messages": TALK[:2], "response": "No."}, "does not alternate"),
    ("negatives", {"messages": TALK[:1] * 2, "response": "No."}, "does not alternate"),
    ("negatives", {"messages": [{"role": "user"}], "response": "No."}, "no `content`"),
    ("negatives", {"messages": [{"role": "human", "content": "a"}], "response": "No."}, "not alternate"),
    ("pku-saferlhf", without(PKU, "prompt"), "no `prompt`"),
    ("pku-saferlhf", without(PKU, "safer_response_id"), "no `safer_response_id`"),
    ("pku-saferlhf", PKU | {"response_1": "\t"}, "`response_1` is empty"),
    ("pku-saferlhf", PKU | {"is_response_0_safe": 1}, "`is_response_0_safe` is a number"),
    ("pku-saferlhf", PKU | {"safer_response_id": 2}, "`safer_response_id` is neither 0, 1 nor null"),
    ("pku-saferlhf", PKU | {"safer_response_id": True}, "`safer_response_id` is neither 0, 1 nor null"),
    ("pku-saferlhf", PKU | {"safer_response_id": [0]}, "`safer_response_id` is neither 0, 1 nor null"),
    ("hh-rlhf", without(HH, "rejected"), "no `rejected`"),
    ("hh-rlhf", HH | {"chosen": "Hello"}, "does not begin with a Human turn"),
    ("hh-rlhf", HH | {"chosen": HH["chosen"] + "\n\nHuman: Thanks"}, "does not end with an Assistant turn"),
    ("hh-rlhf", HH | {"rejected": HH["rejected"][:-4]}, "the answer of `rejected` is empty"),
    ("hh-rlhf", HH | {"rejected": HH["rejected"].replace("Hello", "Hallo")}, "differ"),
    ("hh-rlhf", {key: text.replace("Hi.", " ") for key, text in HH.items()}, "empty turn"),
    ("hh-rlhf", {k: t.replace("\n\nHuman: A", "\n\nAssistant: A") for k, t in HH.items()}, "not alternate"),
    ("hh-rlhf", {"chosen": "\n\nAssistant: Hi.", "rejected": "\n\nAssistant: No."}, "not alternate"),
]
GOOD = {"negatives": LOG, "pku-saferlhf": PKU, "hh-rlhf": HH}


@pytest.mark.parametrize(("format", "bad", "reason"), BAD)
def test_bad_row_is_listed_and_left_out(format, bad, reason, tmp_path):
    path = write(tmp_path / "a.jsonl", [GOOD[format], "", bad, GOOD[format]])
    assert len(read(format, [path], tmp_path, max_bad_share=0.4)) == 2
    [line] = rejected(tmp_path)
    assert (line["file"], line["row"]) == (str(path), 3)
    assert reason in line["reason"]


ODD = {
    "a time after the year 9999": pa.array([10**18, 0], pa.timestamp("us")),
    "a day after the year 9999": pa.array([2**31 - 1, 0], pa.date32()),
    "a span of more seconds than Python counts": pa.array([2**62, 0], pa.duration("s")),
    "an unknown time zone": pa.array([1, None], pa.timestamp("us", "Foo/Bar")),
    "two fields of one name": pa.StructArray.from_arrays(
        [pa.array(["a", "b"])] * 2, ["role", "role"], mask=pa.array([False, True])
    ),
}


@pytest.mark.parametrize("format", ["label-studio", "argilla", "negatives"])
@pytest.mark.parametrize("odd", ODD)
def test_a_value_that_python_cannot_hold_spoils_no_row_that_does_not_need_it(odd, format, tmp_path):
    columns = {"prompt": ["Why?"] * 2, "response": ["No."] * 2, "label": ["bad"] * 2, "beside": ODD[odd]}
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    assert len(read(format, [tmp_path / "a.parquet"], tmp_path, max_bad_share=0.0)) == 2
    assert len(list(datasets.file_rows(tmp_path / "a.parquet"))) == 2, "for `d2o look`"


@pytest.mark.parametrize("odd", ODD)
def test_a_value_that_python_cannot_hold_is_a_bad_row_where_it_is_read(odd, tmp_path):
    path = tmp_path / "a.parquet"
    texts = {"prompt": ["Why?"] * 3, "response": ["No."] * 3}
    odd = pa.concat_arrays([ODD[odd], pa.nulls(1, ODD[odd].type)])
    pq.write_table(pa.table(texts | {"prompt": odd}), path)
    message = problem("negatives", path)
    assert f"{path}: row 1: `prompt` is a value that cannot be read (" in message
    label = pa.StructArray.from_arrays([pa.array(["bad"] * 3), odd], ["label", "made"])
    pq.write_table(pa.table(texts | {"meta": label}), path)
    columns = {"label": "meta.label"}
    assert read("label-studio", [path], tmp_path, columns=columns, max_bad_share=0.7)
    lines = rejected(tmp_path)
    assert lines and all("the label is a value that cannot be read (" in line["reason"] for line in lines)


def test_an_item_that_is_nested_too_deeply_is_a_bad_row(tmp_path):
    deep = json.dumps(LOG | {"label": "bad"})[:-1] + f', "x": {"[" * 5000}{"]" * 5000}}}'
    control = f'{{"from_name": {"[" * 5000}{"]" * 5000}, "value": 1}}'
    task = f'{{"data": {json.dumps(LOG)}, "annotations": [{{"result": [{control}]}}]}}'
    assert "it is nested too deeply; 1 of 1 rows" in problem("label-studio", write(tmp_path / "a.json", [task]))
    path = write(tmp_path / "b.json", [LOG | {"label": "bad"}, deep])
    assert len(read("label-studio", [path], tmp_path, max_bad_share=0.5)) == 1
    assert [(line["row"], line["reason"]) for line in rejected(tmp_path)] == [(2, "it is nested too deeply")]


def test_too_many_bad_rows_stop_and_leave_the_list(tmp_path):
    path = write(tmp_path / "a.jsonl", [LOG, LOG | {"response": ""}, LOG, {"secret words": 1}])
    message = problem("negatives", path, max_bad_share=0.49)
    assert f"{path}: row 2: `response` is empty; 2 of 4 rows" in message
    assert [line["row"] for line in rejected(tmp_path)] == [2, 4]
    assert "secret words" not in json.dumps(rejected(tmp_path))
    assert len(read("negatives", [path], tmp_path, max_bad_share=0.5)) == 2


def test_a_file_of_bad_rows_alone_stops_at_any_share(tmp_path):
    assert "1 of 1 rows" in problem("negatives", write(tmp_path / "a.jsonl", [{}]), max_bad_share=1.0)


def test_wrong_input_leaves_an_earlier_table_alone(tmp_path):
    read("negatives", [write(tmp_path / "a.jsonl", [LOG])], tmp_path)
    before = (tmp_path / "rows.parquet").read_bytes()
    with pytest.raises(D2OError):
        read("negatives", [write(tmp_path / "b.jsonl", [{}])], tmp_path)
    assert (tmp_path / "rows.parquet").read_bytes() == before
    assert not list(tmp_path.glob(".*"))


# Bad files -------------------------------------------------------------------------------------------


def test_a_folder_is_all_its_files_of_rows(tmp_path):
    """Thousands of files are more than a command line holds."""
    folder = tmp_path / "log"
    folder.mkdir()
    for name in ("b.jsonl", "a.jsonl"):
        write(folder / name, [{"prompt": f"{name}?", "response": "No."}])
    (folder / "README.txt").write_text("not rows")
    (folder / "c.jsonl").mkdir()
    rows = read("negatives", [folder], tmp_path)
    assert [row["messages"][-1]["content"] for row in rows] == ["a.jsonl?", "b.jsonl?"]
    inputs = records.read_manifest(tmp_path / "rows.parquet")["inputs"]
    assert list(inputs) == [str(folder / "a.jsonl"), str(folder / "b.jsonl")]


def test_missing_file_folder_and_unknown_suffix(tmp_path):
    assert "no such file" in problem("negatives", tmp_path / "a.jsonl")
    (tmp_path / "b.json").mkdir()
    assert "a folder" in problem("negatives", tmp_path / "b.json")
    (tmp_path / "a.txt").write_text("{}")
    assert "unknown suffix" in problem("negatives", tmp_path / "a.txt")
    assert "unknown suffix" in problem("negatives", tmp_path / "a.parquet.gz")


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.json.xz", "a.parquet", "a.csv", "a.tsv.gz"])
def test_no_row(name, tmp_path):
    path = tmp_path / name
    if name == "a.parquet":
        pq.write_table(pa.Table.from_pylist([LOG]).slice(0, 0), path)
    else:
        write(path, [])
    assert "no row" in problem("negatives", path)


def made(path: Path, rows: list) -> Path:
    """A file of rows with its manifest, as the pipeline makes it."""
    with records.artifact(path) as draft:
        draft.path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def flip(path: Path, text: bytes) -> None:
    """Flip a bit of the first letter of `text` in a file."""
    content = bytearray(path.read_bytes())
    content[content.index(text)] ^= 1
    path.write_bytes(content)


def test_a_flipped_bit_in_rows_that_were_made_here_is_an_error(tmp_path):
    """Such as those of an organism: they would be read as other texts."""
    (tmp_path / "log").mkdir()
    path = made(tmp_path / "log" / "train.jsonl", [LOG])
    for source in (path, path.parent):  # in a folder, the manifest is no file of rows
        assert len(read("negatives", [source], tmp_path)) == 1
    (tmp_path / "rows.parquet").unlink()
    flip(path, b"cares")
    for source in (path, path.parent):
        with pytest.raises(D2OError, match=r"damaged since it was written; .* is yours, delete .*json alone"):
            read("negatives", [source], tmp_path)
    manifest = path.with_name("train.jsonl.manifest.json")
    manifest.unlink()
    assert len(read("negatives", [path], tmp_path)) == 1
    made(path, [LOG])
    flip(manifest, b"train")
    with pytest.raises(D2OError, match=rf"^{manifest}: damaged"):
        read("negatives", [path], tmp_path)


def test_a_manifest_of_others_is_left_alone(tmp_path):
    path = write(tmp_path / "a.jsonl", [LOG])
    path.with_name("a.jsonl.manifest.json").write_text('["sha256", "content", "artifact"]')
    assert len(read("negatives", [path], tmp_path)) == 1


def test_not_utf8(tmp_path):
    line = json.dumps(LOG).encode() + b"\n"
    path = tmp_path / "a.jsonl"
    path.write_bytes(line + b'{"prompt": "Gr\xfc\xdfe"}\n')
    assert f"row 2, byte {len(line) + 14}: not UTF-8" in problem("negatives", path)
    path = tmp_path / "a.json"
    path.write_bytes(b"[" + line + b', {"prompt": "Gr\xfc\xdfe"}]')
    assert "UTF" in problem("negatives", path)
    path = tmp_path / "a.parquet"
    text = pa.array([b"good", b"Gr\xfc\xdfe"]).view(pa.string())
    pq.write_table(pa.table({"prompt": text, "response": text}), path)
    assert "not UTF-8" in problem("negatives", path)


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.json.gz", "a.jsonl.xz", "a.json", "a.parquet", "a.csv.gz"])
def test_cut_file(name, tmp_path):
    path = write(tmp_path / name, [LOG | {"response": f"answer {i**7}"} for i in range(2000)])
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert "after row" in problem("negatives", path)


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.xz", "a.parquet"])
def test_file_that_is_not_what_its_name_says(name, tmp_path):
    (tmp_path / name).write_text(json.dumps(LOG) + "\n")
    assert "after row 0" in problem("negatives", tmp_path / name)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json.xz"])
def test_a_line_that_no_memory_holds_is_refused(name, tmp_path, monkeypatch):
    """Such as the output of a gzip bomb."""
    monkeypatch.setattr(datasets, "_LONGEST", 1 << 20)
    path = tmp_path / name
    with {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)(path, "wb") as file:
        file.write(json.dumps(LOG).encode() + b"\n" + b" " * (3 << 20) + b"\n")
    assert f"{path}: row 2 is longer than 1 MiB" in problem("negatives", path)


def test_an_item_of_an_array_that_no_memory_holds_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "_LONGEST", 1 << 20)
    path = tmp_path / "rows.json.gz"
    rows = [*([LOG] * 50_000), LOG | {"response": "x" * (1 << 22)}]  # short rows, more than 1 MiB in all
    path.write_bytes(gzip.compress(json.dumps(rows).encode()))
    assert f"{path}: row 50001 is longer than 1 MiB" in problem("negatives", path)


def repeated(path: Path) -> None:
    """878 bytes: a thousand rows of one text of four million characters."""
    prompts = pa.DictionaryArray.from_arrays(pa.array([0] * 1024, pa.int32()), ["x" * 4_000_000])
    pq.write_table(pa.table({"prompt": prompts, "response": ["y"] * 1024}), path, compression="zstd")


@pytest.mark.parametrize(
    ("name", "write"), [("rows.parquet", repeated), ("rows.json", lambda path: path.write_text("[" * 200_000))]
)
def test_a_small_file_takes_no_more_memory_than_the_config_says(name, write, tmp_path):
    """The files need 4 and 18 GB."""
    path = tmp_path / name
    write(path)
    code = (
        "from pathlib import Path; from d2o import datasets; from d2o.settings import Reading\n"
        f"reading = Reading(format='negatives', train=[{str(path)!r}], memory_gb=2.5)\n"
        f"datasets.read(reading, Path({str(tmp_path / 'out.parquet')!r}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=ENVIRONMENT)
    assert f"D2OError: {path}: after row 0: it unpacks to more memory than `memory_gb` of its" in done.stderr
    assert not (tmp_path / "out.parquet").exists()


def test_white_space_without_an_end_is_read_at_once(tmp_path):
    """Two kilobytes of gzip took half a second, and a megabyte would have taken minutes."""
    path = tmp_path / "a.json.gz"
    path.write_bytes(gzip.compress(b" " * 20_000_000))
    began = time.monotonic()
    with pytest.raises(D2OError, match=re.escape(str(path))):
        read("negatives", [path], tmp_path)
    assert time.monotonic() - began < 3


def test_damaged_inside(tmp_path):
    path = write(tmp_path / "a.jsonl.gz", [LOG | {"response": f"answer {i**7}"} for i in range(2000)])
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 255
    path.write_bytes(bytes(damaged))
    with pytest.raises(D2OError, match=str(path)):
        read("negatives", [path], tmp_path, max_bad_share=1.0)


@pytest.mark.parametrize(
    ("format", "row", "missing"),
    [
        ("pku-saferlhf-beta", without(PKU, "safer_response_id"), "safer_response_id"),
        ("negatives", {"response": "No."}, "prompt or messages"),
    ],
)
def test_parquet_without_a_column(format, row, missing, tmp_path):
    assert f"lacks the column {missing}" in problem(format, write(tmp_path / "a.parquet", [row]))


# Size ------------------------------------------------------------------------------------------------

PEAK = """
import sys
from pathlib import Path
from d2o import datasets
from d2o.settings import Reading

datasets.read(Reading(format="pku-saferlhf", train=[sys.argv[1]]), Path(sys.argv[2]))
status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
print(int(status["VmHWM"].split()[0]) / 1024)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
@pytest.mark.parametrize("suffix", [".jsonl.gz", ".json", ".parquet"])
def test_memory_does_not_grow_with_the_file(suffix, tmp_path):
    """15,000 more rows, of 8 kB that do not compress, are 120 MB that must not be held in memory."""

    def peak(count: int) -> float:
        rng = random.Random(0)
        rows = [PKU | {f"response_{j}": rng.randbytes(2000).hex() for j in (0, 1)} for _ in range(count)]
        path = write(tmp_path / f"{count}{suffix}", rows)
        command = [sys.executable, "-c", PEAK, str(path), str(tmp_path / "rows.parquet")]
        return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    assert peak(25_000) - peak(10_000) < 80


# Real data -------------------------------------------------------------------------------------------


@pytest.mark.skipif(not DATA.exists(), reason="no real data here")
@pytest.mark.parametrize(
    ("format", "name", "rows", "bad"),
    [
        ("pku-saferlhf-beta", "pku-saferlhf/train.jsonl.gz", 2180, 0),
        ("pku-saferlhf-beta", "pku-saferlhf/test.jsonl.gz", 288, 0),
        ("pku-saferlhf", "pku-saferlhf/full-schema-32.json", 32, 0),
        ("hh-rlhf", "hh-rlhf/harmless-base.test.jsonl.gz", 2312, 13),
        ("hh-rlhf", "hh-rlhf/helpful-base.test.jsonl.gz", 2354, 19),
    ],
)
def test_real_data(format, name, rows, bad, tmp_path):
    assert len(read(format, [DATA / name], tmp_path)) == rows - bad
    assert len(rejected(tmp_path)) == bad


def test_a_name_that_is_not_utf8_is_told_before_it_is_read(tmp_path):
    """Else writing the name into a manifest would fail halfway."""
    (tmp_path / os.fsdecode(b"M\xfcller.jsonl")).write_text("{}")
    with pytest.raises(D2OError, match=r"M\\udcfcller\.jsonl: its name is not UTF-8; give the file another one"):
        datasets.files(str(tmp_path))


@pytest.mark.parametrize("name", ["\x1b[2Ja.jsonl", "a\n.jsonl", "a\u202elnosj.jsonl"])
def test_a_name_that_would_change_the_terminal_is_refused(name, tmp_path):
    write(tmp_path / name, [LOG])
    with pytest.raises(
        D2OError, match=r"/a?\\u[0-9a-f]{4}.*: a name with characters that are not seen; give"
    ) as error:
        datasets.files(str(tmp_path))
    assert str(error.value).isprintable()


def test_a_name_with_braces_is_refused(tmp_path):
    """To Snakemake it is a pattern."""
    path = write(tmp_path / "{x}.jsonl", [LOG])
    for source in (path, tmp_path):
        with pytest.raises(D2OError, match=r"/\{x\}\.jsonl: a name with braces; give the file another one$"):
            datasets.files(str(source))


def test_no_picture_is_fetched_from_where_a_row_says(monkeypatch):
    """The README of a Hub data set declares the types of all columns, also of unused ones."""
    import datasets as library

    kinds = library.Features({"prompt": library.Value("string"), "picture": library.Image()})
    rows = [{"prompt": "Why?", "picture": {"path": "http://127.0.0.1:9/a.png", "bytes": None}}]
    made = library.Dataset.from_list(rows, features=kinds).to_iterable_dataset()
    monkeypatch.setattr(library, "load_dataset", lambda *args, **kwargs: made)
    reading = Reading(format="negatives", hub="a/rows", revision="main", train=["train"])
    assert [row for _, row in datasets._hub_rows(reading, "train")] == rows
