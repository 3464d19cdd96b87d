"""Artifacts are whole or absent, and their schema is checked on the way in and out."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from d2o import identities, models, records, schemas
from d2o.errors import D2OError
from d2o.settings import Model, Run

ROW = {"prompt_id": "a", "sample": 0, "score": 1.5}


def test_table_round_trip_and_manifest(tmp_path):
    source = tmp_path / "source.txt"
    source.write_text("x")
    with records.artifact(tmp_path / "t.parquet", {"beta": 0.1}, [source]) as draft:
        draft.facts["rows"] = records.write_table(draft.path, schemas.SCORES, [ROW] * 5000)
    assert records.read_table(tmp_path / "t.parquet", schemas.SCORES) == [ROW] * 5000
    manifest = records.read_manifest(tmp_path / "t.parquet")
    assert manifest["rows"] == 5000
    assert manifest["settings"] == {"beta": 0.1}
    assert manifest["inputs"] == {str(source): records.file_digest(source)}


def test_nothing_is_left_after_a_failure(tmp_path):
    with pytest.raises(RuntimeError), records.artifact(tmp_path / "t.parquet") as draft:
        records.write_table(draft.path, schemas.SCORES, [ROW])
        raise RuntimeError
    with pytest.raises(RuntimeError), records.artifact(tmp_path / "folder") as draft:
        draft.path.mkdir()
        (draft.path / "half").write_text("x")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_a_failed_remake_keeps_the_old_folder(tmp_path):
    for content in ("old", None):
        try:
            with records.artifact(tmp_path / "folder") as draft:
                draft.path.mkdir()
                (draft.path / "file").write_text(content)
        except TypeError:
            pass
    assert (tmp_path / "folder" / "file").read_text() == "old"
    assert json.loads((tmp_path / "folder" / "manifest.json").read_text())["artifact"] == "folder"


def make_folder(target, content="new"):
    with records.artifact(target) as draft:
        draft.path.mkdir()
        (draft.path / "file").write_text(content)


@pytest.mark.parametrize("folder", ["folder", "."])
def test_a_folder_that_is_not_ours_is_not_replaced(tmp_path, monkeypatch, folder):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.txt").write_text("mine")
    (tmp_path / "folder" / "manifest.json").write_text("{}")  # also another program's file
    monkeypatch.chdir(tmp_path if folder == "folder" else tmp_path / "folder")
    for replace in (make_folder, records.empty_folder):
        with pytest.raises(
            D2OError, match=rf"^{re.escape(folder)}: not made by this pipeline .*; delete it yourself"
        ):
            replace(Path(folder))
    assert (tmp_path / "folder" / "thesis.txt").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


@pytest.mark.parametrize("there", [None, "empty", "ours", "link"])
def test_a_folder_of_ours_or_an_empty_one_is_replaced(tmp_path, there):
    target = tmp_path / "folder"
    if there == "empty":
        target.mkdir()
    elif there == "ours":
        make_folder(target, "old")
        (target / "manifest.json").unlink()  # as Snakemake does before it makes it again
    elif there == "link":
        make_folder(tmp_path / "elsewhere", "old")
        target.symlink_to(tmp_path / "elsewhere")
    make_folder(target)
    assert (target / "file").read_text() == "new"
    if there == "link":
        assert (tmp_path / "elsewhere" / "file").read_text() == "old"
    else:
        assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_a_folder_is_emptied_where_its_link_leads(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "large-disk")
    for _ in range(2):
        records.empty_folder(tmp_path / "link")
        (tmp_path / "link" / "step1").mkdir()
    assert (tmp_path / "large-disk" / "step1").is_dir()
    records.remove_folder(tmp_path / "link")
    assert [path.name for path in tmp_path.iterdir()] == ["link"]


def test_a_kill_while_an_old_folder_is_deleted_leaves_one_that_may_be_replaced(tmp_path, monkeypatch):
    """Deleting may take the mark first."""

    def killed(path, **_):
        (path / ".d2o").unlink()
        raise KeyboardInterrupt

    for end in (records.remove_folder, records.empty_folder, make_folder):
        records.empty_folder(tmp_path / "folder")
        (tmp_path / "folder" / "file").write_text("old")
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(records.shutil, "rmtree", killed)
            end(tmp_path / "folder")
        make_folder(tmp_path / "folder")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_a_model_out_of_a_run_has_a_mark_and_a_manifest_of_its_own(tiny_model, tmp_path):
    trained = {"dataset": "d", "model": "m", "method": "d2o"}
    with records.artifact(tmp_path / "run") as draft:
        shutil.copytree(tiny_model, draft.path)
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    for _ in range(2):
        models.fetch(Model(run=Run(**trained)), tmp_path / "run", tmp_path / "model")
    assert not any((tmp_path / "model" / name).is_symlink() for name in (".d2o", "manifest.json"))
    assert (tmp_path / "model" / "model.safetensors").is_symlink()
    assert records.read_manifest(tmp_path / "model")["settings"]["run"]["method"] == "d2o"
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before


def test_a_killed_writer_leaves_no_final_name(tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from d2o import records, schemas\n"
        "with records.artifact(Path(sys.argv[1])) as draft:\n"
        "    records.write_table(draft.path, schemas.SCORES, [])\n"
        "    print('written', flush=True); time.sleep(60)"
    )
    child = subprocess.Popen([sys.executable, "-c", code, tmp_path / "t.parquet"], stdout=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "written\n"
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    assert not (tmp_path / "t.parquet").exists()
    assert [path.name for path in tmp_path.iterdir()] == [".t.parquet.tmp"]

    with records.artifact(tmp_path / "t.parquet") as draft:
        records.write_table(draft.path, schemas.SCORES, [ROW])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["t.parquet", "t.parquet.manifest.json"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "no such file; make it with: snakemake"),
        (lambda path: path.write_text("nonsense"), "not a Parquet file"),
        (lambda path: pq.write_table(pa.table({"prompt_id": ["a"]}), path), "lacks the columns sample, score"),
        (
            lambda path: pq.write_table(pa.table({"prompt_id": ["a"], "sample": [1.5], "score": [1.0]}), path),
            "has columns of other types",
        ),
    ],
)
def test_wrong_tables_are_named(tmp_path, make, message):
    make(tmp_path / "t.parquet")
    with pytest.raises(D2OError, match=r"t\.parquet: ") as error:
        records.read_table(tmp_path / "t.parquet", schemas.SCORES)
    assert message in str(error.value)


def test_a_row_with_another_column_is_refused(tmp_path):
    with pytest.raises(ValueError, match="are not those of the schema"):
        records.write_table(tmp_path / "t.parquet", schemas.SCORES, [ROW | {"extra": 1}])


def test_identities():
    a = [{"role": "user", "content": "How  do I\ncheat?"}]
    b = [{"role": "user", "content": "how do i cheat?"}]
    c = [{"role": "assistant", "content": "how do i cheat?"}]
    assert identities.prompt_id(a) == identities.prompt_id(b) != identities.prompt_id(c)
    assert identities.response_id("p", "x") != identities.response_id("q", "x") != identities.response_id("q", "X")
    assert identities.derived_seed(0, "p", 1) != identities.derived_seed(0, "p", 2)
    assert 0 <= identities.derived_seed("any") < 2**31
