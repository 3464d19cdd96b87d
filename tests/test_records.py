"""Artifacts are whole or absent, and their schema is checked on the way in and out."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from random import Random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from d2o import checksums, identities, locks, model_folders, models, records, schemas, verify, weights
from d2o.errors import D2OError
from d2o.settings import Model, TrainedRun

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
    (tmp_path / "folder" / "manifest.json").write_text("{}")  # other programs write such files, too
    monkeypatch.chdir(tmp_path if folder == "folder" else tmp_path / "folder")
    for replace in (make_folder, records.empty_folder):
        with pytest.raises(
            D2OError, match=rf"^{re.escape(folder)}: not made by this pipeline .*; delete it yourself"
        ):
            replace(Path(folder))
    assert (tmp_path / "folder" / "thesis.txt").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_a_folder_that_came_while_another_was_made_is_not_replaced(tmp_path):
    with (
        pytest.raises(D2OError, match="not made by this pipeline"),
        records.artifact(tmp_path / "folder") as draft,
    ):
        draft.path.mkdir()
        (tmp_path / "folder").mkdir()
        (tmp_path / "folder" / "thesis.txt").write_text("mine")
    assert (tmp_path / "folder" / "thesis.txt").read_text() == "mine"


def test_a_folder_is_on_disk_before_the_one_that_it_replaces_goes(tmp_path, monkeypatch):
    make_folder(tmp_path / "folder", "old")
    synced = []
    monkeypatch.setattr(records, "sync_names", lambda folder: synced.append(folder))
    remove = records._remove

    def removed(path):
        assert not (path.name == ".folder.old" and path.exists()) or synced[-1:] == [tmp_path]
        remove(path)

    monkeypatch.setattr(records, "_remove", removed)
    make_folder(tmp_path / "folder", "new")
    assert (tmp_path / "folder" / "file").read_text() == "new" and not list(tmp_path.glob(".*"))


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
    """Deletion may remove the mark first."""

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
        models.fetch(Model(run=TrainedRun(**trained)), tmp_path / "run", tmp_path / "model")
    assert not any((tmp_path / "model" / name).is_symlink() for name in (".d2o", "manifest.json"))
    assert (tmp_path / "model" / "model.safetensors").is_symlink()
    assert records.read_manifest(tmp_path / "model")["settings"]["run"]["method"] == "d2o"
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before


@pytest.mark.parametrize("content", [b"", b"GGUF", b"GGUF" + os.urandom(4000), b"<html>"])
def test_what_is_no_gguf_file_is_told_in_a_line(content, tmp_path):
    (tmp_path / "a.gguf").write_bytes(content)
    with pytest.raises(D2OError, match=r"a\.gguf: not a GGUF file that transformers can read \(.*; fetch it again$"):
        models._convert_gguf(tmp_path / "a.gguf", tmp_path / "out")


def test_no_name_in_a_gguf_file_changes_the_terminal(tmp_path):
    import gguf

    written = gguf.GGUFWriter(tmp_path / "a.gguf", "\x1b[2J\x1b]0;mine\x07")
    written.write_header_to_file()
    written.write_kv_data_to_file()
    written.write_tensors_to_file()
    written.close()
    with pytest.raises(D2OError, match=r"a\.gguf: not a GGUF file .*\\u001b\[2J.*; fetch it again$") as error:
        models._convert_gguf(tmp_path / "a.gguf", tmp_path / "out")
    assert str(error.value).isprintable()


BROKEN = [b'{"a": ', b"[1]", b'{"a": "M\xfcller"}', b"[" * 100_000, b""]


@pytest.mark.parametrize("content", BROKEN)
@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "model.safetensors"])
def test_a_broken_file_of_a_model_is_named(name, content, tiny_model, tmp_path):
    shutil.copytree(tiny_model, tmp_path / "given")
    (tmp_path / "given" / name).write_bytes(content)
    with pytest.raises(
        D2OError, match=rf"given/{name}: (not JSON|not an object|no whole safe).*; fetch the model"
    ) as error:
        models.fetch(Model(path=str(tmp_path / "given")), None, tmp_path / "model")
    assert "\n" not in str(error.value) and not (tmp_path / "model").exists()


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
    assert sorted(path.name for path in tmp_path.iterdir()) == [".t.parquet.lock", ".t.parquet.tmp"]

    with records.artifact(tmp_path / "t.parquet") as draft:
        records.write_table(draft.path, schemas.SCORES, [ROW])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["t.parquet", "t.parquet.manifest.json"]


def test_two_writers_of_one_artifact(tmp_path):
    """With a fixed draft name, one once published half of the other's file."""
    target = tmp_path / "t.parquet"
    with records.artifact(target) as first:
        records.write_table(first.path, schemas.SCORES, [ROW])
        with (
            pytest.raises(D2OError, match=rf"t\.parquet: another process is at work here \(process {os.getpid()} on"),
            records.artifact(target),
        ):
            pytest.fail("the second writer began")
        assert first.path.exists()
    assert records.read_table(target, schemas.SCORES) == [ROW]
    make_folder(tmp_path / "folder")  # another artifact beside it
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "t.parquet", "t.parquet.manifest.json"]


def test_two_writers_where_the_file_system_knows_no_locks(tmp_path, monkeypatch):
    """The last one's content stays, beside its own manifest."""

    def unknown(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(locks.fcntl, "flock", unknown)
    target, pid = tmp_path / "t.parquet", os.getpid()
    with records.artifact(target, "second") as second:
        records.write_table(second.path, schemas.SCORES, [ROW])
        monkeypatch.setattr(records.os, "getpid", lambda: pid + 1)
        with records.artifact(target, "first") as first:
            records.write_table(first.path, schemas.SCORES, [])
        assert records.read_table(target, schemas.SCORES) == []
    records.check_file(target)
    assert records.read_table(target, schemas.SCORES) == [ROW]
    assert records.read_manifest(target)["settings"] == "second"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["t.parquet", "t.parquet.manifest.json"]


COUNTING = """
import sys, time
from pathlib import Path
from d2o import locks
from d2o.errors import D2OError
count = Path(sys.argv[1])
for _ in range(100):
    while True:
        try:
            lock = locks.hold(count)
            break
        except D2OError:
            time.sleep(0.0005)
    number = int(count.read_text())
    count.write_text(str(number + 1))
    locks.release(lock)
"""


def test_a_lock_is_held_by_one_at_a_time(tmp_path):
    """Its file is removed at the end: a process that opened it before would hold a lock on nothing."""
    count = tmp_path / "count"
    count.write_text("0")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", COUNTING, str(count)]
    processes = [subprocess.Popen(command, env=environment) for _ in range(4)]
    assert [process.wait() for process in processes] == [0] * 4
    assert count.read_text() == "400"


@pytest.mark.parametrize("what", ["sync", "write_json"])
def test_a_disk_that_fails_leaves_no_manifest_beside_another_content(what, tmp_path, monkeypatch):
    target = tmp_path / "t.parquet"
    for value in (1.0, 2.0):
        if value == 2.0:
            monkeypatch.setattr(records, what, failing)
        with suppress(OSError), records.artifact(target) as draft:
            records.write_table(draft.path, schemas.SCORES, [ROW | {"score": value}])
    score, manifest = (
        records.read_table(target, schemas.SCORES)[0]["score"],
        target.with_name("t.parquet.manifest.json"),
    )
    assert (score, manifest.exists()) == ((1.0, True) if what == "sync" else (2.0, False))
    assert not list(tmp_path.glob(".*"))


def failing(*_):
    raise OSError(28, "No space left on device")


# Damage ------------------------------------------------------------------------------------------


def flipped(content: bytes, random: Random) -> bytes:
    """The content with one bit flipped, or with a page of zeros."""
    changed = bytearray(content)
    place = random.randrange(len(content))
    if random.random() < 0.2:
        changed[place : place + 4096] = bytes(len(changed[place : place + 4096]))
    else:
        changed[place] ^= 1 << random.randrange(8)
    return bytes(changed)


@pytest.mark.parametrize("compressible", [True, False])
def test_a_damaged_table_is_never_read_as_another(compressible, tmp_path):
    """Without checksums, 185 of 300 flipped bits silently gave other data."""
    random = Random(5)
    rows = [
        {"prompt_id": f"{0 if compressible else random.getrandbits(64):016x}", "sample": n % 4, "score": n / 7}
        for n in range(500)
    ]
    table = tmp_path / "t.parquet"
    records.write_table(table, schemas.SCORES, rows)
    content, told = table.read_bytes(), 0
    for _ in range(300):
        table.write_bytes(flipped(content, random))
        try:
            assert records.read_table(table, schemas.SCORES) == rows, "silently other data"
        except D2OError as error:
            told += 1
            assert str(error).startswith(f"{table}: ") and "\n" not in str(error)
    assert told > 200


def test_no_bit_of_a_table_silently_takes_rows_away(tmp_path):
    """No checksum covers the headers of pages: 39 of these bits gave an empty table, others a UnicodeDecodeError."""
    rows = [{"prompt_id": f"p{n}", "sample": n % 4, "score": n / 7} for n in range(20)]
    table = tmp_path / "t.parquet"
    records.write_table(table, schemas.SCORES, rows)
    content = table.read_bytes()
    for bit in Random(3).sample(range(8 * len(content)), 1500):
        changed = bytearray(content)
        changed[bit // 8] ^= 1 << bit % 8
        table.write_bytes(changed)
        with suppress(D2OError):
            assert records.read_table(table, schemas.SCORES) == rows


def test_a_table_of_any_schema_is_compared_with_its_manifest(tmp_path):
    table = tmp_path / "t.parquet"
    with records.artifact(table) as draft:
        records.write_table(draft.path, schemas.SCORES, [{"prompt_id": "p", "sample": 0, "score": 0.5}])
    assert records.read_any(table, ["score"])["score"].to_pylist() == [0.5]
    with pytest.raises(D2OError, match=r"t\.parquet: no table with sum") as error:
        records.read_any(table, ["sum"])
    assert "\n" not in str(error.value)
    table.write_bytes(table.read_bytes().replace(b"score", b"scora"))
    with pytest.raises(D2OError, match=r"t\.parquet: gone or damaged since it was written"):
        records.read_any(table, ["scora"])


@pytest.mark.parametrize("name", [".t.parquet.lock", ".t.parquet.manifest.json.tmp"])
def test_a_link_in_results_leads_no_write_elsewhere(name, tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / name).symlink_to(tmp_path / "thesis.txt")
    with suppress(D2OError), records.artifact(tmp_path / "results" / "t.parquet") as draft:
        draft.path.write_text("rows")
    assert (tmp_path / "thesis.txt").read_text() == "mine"


def test_a_draft_of_a_small_file_follows_no_link(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    (tmp_path / ".train.jsonl.tmp").symlink_to(tmp_path / "thesis.txt")
    records.write_text(tmp_path / "train.jsonl", "steps")
    assert (tmp_path / "thesis.txt").read_text() == "mine" and (tmp_path / "train.jsonl").read_text() == "steps"


def test_what_a_manifest_says_is_no_terminal_code(tmp_path):
    with records.artifact(tmp_path / "a.txt", {"name": "\x9b2J\x1b[2J\u202e"}) as draft:
        draft.path.write_text("x")
    content = {"content": {"\x1b[2Jgone": "0" * 64}}
    (tmp_path / "b").mkdir()
    records.write_json(tmp_path / "b" / "manifest.json", checksums.seal(content))
    shown = subprocess.run([sys.executable, "-m", "d2o", "show", tmp_path / "a.txt"], capture_output=True, text=True)
    verified = subprocess.run([sys.executable, "-m", "d2o", "verify", tmp_path], capture_output=True, text=True)
    assert "u009b2J" in shown.stdout and "u202e" in shown.stdout and "u001b[2Jgone: is gone" in verified.stdout
    missing = subprocess.run(
        [sys.executable, "-m", "d2o", "show", tmp_path / "\x1b[2J"], capture_output=True, text=True
    )
    assert missing.stderr.startswith("error: ") and "u001b[2J: no manifest" in missing.stderr
    printed = (shown.stdout, verified.stdout, verified.stderr, missing.stderr)
    assert not {"\x9b", "\x1b", "\u202e"} & {*"".join(printed)}


def test_a_damaged_line_is_never_read_as_another():
    random = Random(7)
    row = {
        "identity": "0f",
        "prompt_id": "ab",
        "text": "Grüße, \u2028 😀 " * 5,
        "tokens": 12,
        "finish": "stop",
    }
    line = checksums.sealed(row)
    assert checksums.unsealed(line) == row and json.loads(line)["text"] == row["text"]
    told = 0
    for _ in range(400):
        damaged = flipped(line.encode(), random).decode(errors="replace")
        read = checksums.unsealed(damaged)
        assert read in (None, row)
        told += read is None
    assert told > 380
    for part in ("", "{}", "[]", "3", '{"crc": 0}', line[:-1], line.replace('"crc"', '"sum"')):
        assert checksums.unsealed(part) is None


def test_a_damaged_table_is_told_before_another_reader_sees_it(tmp_path):
    with records.artifact(tmp_path / "t.parquet") as draft:
        records.write_table(draft.path, schemas.SCORES, [ROW])
    records.check_table(tmp_path / "t.parquet", schemas.SCORES)
    with (tmp_path / "t.parquet").open("ab") as file:
        file.write(b"PAR1")
    with pytest.raises(D2OError, match=r"t\.parquet: damaged"):
        records.check_table(tmp_path / "t.parquet", schemas.SCORES)


@pytest.fixture
def results(tmp_path):
    """A folder with a table, and a run whose model has weights."""
    with records.artifact(tmp_path / "results" / "t.parquet") as draft:
        records.write_table(draft.path, schemas.SCORES, [ROW])
    with records.artifact(tmp_path / "results" / "seed0" / "model") as draft:
        (draft.path / "adapter").mkdir(parents=True)
        for name in ("model.safetensors", "config.json", "adapter/adapter_model.safetensors"):
            (draft.path / name).write_bytes(os.urandom(5000))
    return tmp_path / "results"


def test_what_is_as_it_was_written_is_verified(results):
    assert verify.verify(results) == ([], "2 artifacts, 4 files, 0 not whole")
    with pytest.raises(D2OError, match="holds no artifact"):
        verify.verify(results / "seed0" / "model" / "adapter")


@pytest.mark.parametrize(
    "name", ["t.parquet", "seed0/model/model.safetensors", "seed0/model/config.json", "t.parquet.manifest.json"]
)
@pytest.mark.parametrize("damage", ["flip", "gone"])
def test_damage_is_found_and_the_way_out_told(results, name, damage):
    path = results / name
    if damage == "gone":
        path.unlink()
    else:
        first, *rest = path.read_bytes()
        path.write_bytes(bytes([first ^ 1, *rest]))  # random weights may begin with any byte
    problems, counted = verify.verify(results)
    if (name, damage) == ("t.parquet.manifest.json", "gone"):
        assert problems == []  # nothing to compare with: Snakemake makes the table again when it is asked for
        return
    (line,) = problems
    # The file that Snakemake then misses, and makes again.
    missed = results / ("t.parquet" if name.startswith("t.") else "seed0/model/manifest.json")
    way_out = f"; delete {missed} and run again"
    if missed == path and damage == "gone":
        way_out = f"; run again, or delete {path}.manifest.json if nothing that is asked for needs it"
    assert line.startswith(f"{path}: ") and line.endswith(way_out)
    assert counted.endswith(
        "1 not whole; what no target needs any more is made again by its name: snakemake --cores all FILE"
    )


@pytest.mark.parametrize("name", ["step2/model", "tensorboard"])
def test_what_comes_with_a_model_is_made_again_with_it(results, name):
    """No rule makes a snapshot or TensorBoard's files: deleting their own manifest would make nothing again."""
    folder = results / "seed0" / name
    with records.artifact(folder) as draft:
        draft.path.mkdir()
        (draft.path / "file").write_text("x")
    (folder / "file").write_text("y")
    way_out = f"delete {results}/seed0/model/manifest.json and run again"
    assert verify.verify(results)[0] == [f"{folder}/file: damaged; {way_out}"]
    with pytest.raises(D2OError, match=re.escape(way_out)):
        records.check_content(folder)


@pytest.mark.parametrize("name", ["t.parquet", "seed0/model"])
def test_a_digit_of_a_manifest_is_no_other_number(results, name):
    path = records.manifest_path(results / name)
    assert "crc" not in records.read_manifest(path)
    path.write_text(path.read_text().replace('"seconds": ', '"seconds": 1'))
    missed = results / name if name == "t.parquet" else path
    with pytest.raises(
        D2OError, match=f"{re.escape(str(path))}: damaged; delete {re.escape(str(missed))} and run again"
    ):
        records.read_manifest(results / name)
    assert verify.verify(results)[0] == [f"{path}: damaged; delete {missed} and run again"]


@pytest.mark.parametrize(("keep", "files"), [("adapter", 1), ("nothing", 2)])
def test_released_weights_are_no_damage(results, keep, files):
    weights.release(keep, results / "seed0")
    (results / "seed0" / ".model.old").mkdir()
    (results / "seed0" / ".model.old" / "manifest.json").write_text("{}")  # what a kill left
    problems, counted = verify.verify(results)
    assert problems == [] and f"; {files} files of weights were released" in counted


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_damaged_model_is_not_loaded(results, name):
    model = results / "seed0" / "model"
    records.check_content(model)
    file = model / name
    file.write_bytes(flipped(file.read_bytes(), Random(1)))
    command = [sys.executable, "-m", "d2o", "responses", "--settings", "{}", "--model", str(model)]
    command += ["--prompts", str(results / "t.parquet"), "--output", str(results / "r.parquet")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 1 and done.stderr.startswith(f"error: {file}: damaged since it was written; delete")


@pytest.mark.parametrize(
    ("marked", "said", "trusted"),
    [(True, True, True), (True, False, False), (True, "true", False), (False, True, False)],
)
def test_a_models_code_is_trusted_only_where_we_wrote_that_it_is(tmp_path, marked, said, trusted):
    (tmp_path / "manifest.json").write_text(json.dumps({"trust_remote_code": said}))  # as a download may hold one
    if marked:
        (tmp_path / ".d2o").touch()
    assert model_folders.trusts_code(tmp_path) is trusted


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "no such file; make it with: snakemake"),
        (lambda path: path.write_text("nonsense"), "no Parquet file"),
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
