"""The bundle of an experiment: the same bytes for the same state, a valid RO-Crate, and errors that name damage."""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from d2o import bundle, human_eval, records, report, schemas, settings
from d2o.errors import D2OError
from d2o.plan import stages
from d2o.report import card
from test_report import NASTY, Results

CONFIG = {
    "experiments": {
        "demo": {
            "datasets": ["pku"],
            "models": ["smol"],
            "methods": ["initial", "npo"],
            "rewards": ["cost"],
            "human_eval": {"prompts": 3, "annotators": 1, "checks": 1},
        },
    },
    "models": {"smol": {"path": "smol"}},
    "datasets": {"pku": {"format": "pku-saferlhf", "train": ["pku.jsonl"]}},
    "methods": {"npo": {"loss": "npo", "negatives": True}},
    "rewards": {"cost": {"source": {"path": "smol"}, "better": "lower"}},
}


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """A folder with a config, and the results of its experiment with report and cards."""
    folder = tmp_path_factory.mktemp("bundle")
    (folder / "smol").mkdir()
    (folder / "pku.jsonl").touch()
    # A config with an absolute path of this machine, and a comment.
    config = CONFIG | {"models": {"smol": {"path": str(folder / "smol")}}}
    (folder / "config.yaml").write_text(f"# mine\n{yaml.safe_dump(config)}")
    chosen = settings.load(config, "c").only("demo")
    before = Path.cwd()
    os.chdir(folder)  # manifests name their inputs from where the pipeline ran
    try:
        Results(Path("results"), chosen)
        people(chosen)
        report.write(chosen, Path("results"), Path("results/reports/demo/report.html"))
        run = {"dataset": "pku", "model": "smol", "method": "npo", "seed": 0}
        output = Path("results/pku/smol/npo/seed0/card.md")
        card.write(settings.CardStage(run=run, settings=chosen), Path("results"), output)
    finally:
        os.chdir(before)
    return folder


def people(chosen: settings.Settings) -> None:
    """A human evaluation with one answer, in a file that has its annotator's name."""
    evaluated, names = Path("results/reports/demo/human_eval"), SimpleNamespace(experiment="demo")
    key = evaluated / "key.parquet"
    human_eval.write(stages.of(chosen, "human_eval", names), Path("results"), key, evaluated / "pages")
    row = records.read_table(key, schemas.HUMAN_KEY)[0]
    Path("human_eval").mkdir()
    with Path("human_eval/jane.roe.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["version", "annotator", "item", "question", "verdict"])
        writer.writerow([row["version"], 1, row["item"], schemas.HUMAN_QUESTIONS[0], "1"])
    stage = stages.of(chosen, "human_verdicts", names)
    human_eval.read(stage, key, Path("human_eval"), evaluated / "verdicts.parquet")


@pytest.fixture
def packed(project, tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(project)
    bundle.write(Path("config.yaml"), "demo", tmp_path / "demo.zip")
    return tmp_path / "demo.zip"


def contents(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_two_bundles_of_one_state_are_the_same_bytes(packed, project):
    for file in (project / "results").rglob("*"):
        os.utime(file, (1, 1))
    bundle.write(Path("config.yaml"), "demo", packed.with_name("again.zip"))
    assert packed.read_bytes() == packed.with_name("again.zip").read_bytes()
    assert [path.name for path in packed.parent.iterdir() if path.name.endswith(".tmp")] == []


def test_it_holds_what_the_numbers_rest_on_and_no_weights_texts_or_folders(packed, project):
    files = contents(packed)
    assert files["config.yaml"] == (project / "config.yaml").read_bytes()
    assert b"torch==" in files["environment.lock.txt"]
    assert files["report/table.csv"] == (project / "results/reports/demo/table.csv").read_bytes()
    assert files["cards/pku/smol/npo/seed0.md"].startswith(b"---\n")
    assert {"report/report.html", "report/figures/methods.pdf", "settings.json", "README.md"} <= files.keys()
    manifests = {name for name in files if name.startswith("manifests/")}
    run = "manifests/pku/smol/npo/seed0"
    assert {
        "manifests/reports/demo/report.html.manifest.json", "manifests/pku/negatives.parquet.manifest.json",
        f"{run}/model/manifest.json", f"{run}/scores/cost.parquet.manifest.json", f"{run}/card.md.manifest.json",
    } <= manifests  # fmt: skip
    assert not [name for name in files if name.endswith((".parquet", ".safetensors", ".jsonl"))]
    assert not [name for name in files if name.startswith("report/human_eval")]
    verdicts = json.loads(files["manifests/reports/demo/human_eval/verdicts.parquet.manifest.json"])
    assert [re.sub(r"\d", "1", name) for name in verdicts["inputs"]] == [
        "results/reports/demo/human_eval/key.parquet", "…1/1.csv",
    ]  # fmt: skip
    assert not any(b"jane" in data for data in files.values())
    assert json.loads(files["settings.json"])["models"]["smol"]["path"].endswith("/smol")
    for name in manifests | {"settings.json", "cards/pku/smol/npo/seed0.md", "README.md", bundle.METADATA}:
        assert not any(text.encode() in files[name] for text in (str(project), "Question", NASTY[:8]))


def test_what_lies_beside_the_page_and_is_not_of_it_stays_out(packed, project):
    beside = project / "results/reports/demo/notes.csv"
    with records.artifact(beside) as draft:
        draft.path.write_text("mine")
    bundle.write(Path("config.yaml"), "demo", packed)
    assert "report/notes.csv" not in contents(packed)
    beside.unlink()


def test_examples_and_folders_stay_out_of_its_manifests():
    inputs = {
        "/home/me/rows.jsonl": "1", "/home/you/rows.jsonl": "2", "/home/me/jane.roe.csv": "3", "back/jane.csv": "4",
        "/r/a/b.parquet": "5",
    }  # fmt: skip
    manifest = {"inputs": inputs, "leaks": [{"prompt": "said"}], "examples": ["said"], "rows": 3}
    names = bundle._Names("/r")
    told = names.portable(bundle._without_texts(manifest))
    assert told.keys() == {"inputs", "rows"} and [*told["inputs"].values()] == [*"12345"]
    assert [*told["inputs"]] == ["…1/1.jsonl", "…2/2.jsonl", "…1/3.csv", "…3/4.csv", "results/a/b.parquet"]
    assert names.portable({"inputs": {"/home/you/rows.jsonl": "2"}}) == {"inputs": {"…2/2.jsonl": "2"}}


def test_only_what_is_a_path_loses_its_folder():
    """A text in a config may begin with a slash."""
    names = bundle._Names("out")
    said = {
        "instructions": {"short": "/no_think Be kind."},
        "template": "/{prompt}",
        "train": ["/data/a.jsonl", "/data/b.jsonl", "demo/c.jsonl"],
        "data": {"dev": "/data/d.csv"},
        "source": {"path": "/models/smol"},
        "results": str(Path("out").absolute()),
    }
    assert names.portable(said) == {
        "instructions": {"short": "/no_think Be kind."},
        "template": "/{prompt}",
        "train": ["…1/a.jsonl", "…1/b.jsonl", "demo/c.jsonl"],
        "data": {"dev": "…1/d.csv"},
        "source": {"path": "…2/smol"},
        "results": "results",
    }


def test_every_setting_that_names_a_file_or_folder_is_known():
    sections = [one for one in vars(settings).values() if isinstance(one, type) and issubclass(one, settings.Section)]
    named = {
        key
        for section in sections
        for key, entry in section.model_fields.items()
        if re.match(r"(local |as `train`|an organism's )?(files?|folder|as `train`)\b", entry.description or "")
    }
    assert {"train", "path", "texts", "answers"} <= named <= bundle._PATHS


def test_its_metadata_have_what_the_specification_requires(packed):
    """RO-Crate 1.1: the descriptor, the root data set with its four properties, and one entity per file."""
    files = contents(packed)
    crate = json.loads(files[bundle.METADATA])
    assert crate["@context"][0] == "https://w3id.org/ro/crate/1.1/context"
    entities = {entity["@id"]: entity for entity in crate["@graph"]}
    assert len(entities) == len(crate["@graph"])
    descriptor, root = entities["ro-crate-metadata.json"], entities["./"]
    assert descriptor["@type"] == "CreativeWork" and descriptor["about"] == {"@id": "./"}
    assert descriptor["conformsTo"] == {"@id": "https://w3id.org/ro/crate/1.1"}
    assert root["@type"] == "Dataset" and all(
        root[key] for key in ("name", "description", "datePublished", "license")
    )
    parts = {part["@id"] for part in root["hasPart"]}
    assert parts == files.keys() - {bundle.METADATA}
    assert all(entities[part]["@type"] == "File" for part in parts)

    def references(node):
        match node:
            case {"@id": identity, **rest} if not rest:
                yield identity
            case dict():
                for value in node.values():
                    yield from references(value)
            case list():
                for value in node:
                    yield from references(value)

    assert {*references(crate["@graph"])} <= entities.keys() | {"https://w3id.org/ro/crate/1.1"}


def test_ro_crates_own_library_reads_it(packed, tmp_path):
    from rocrate.rocrate import ROCrate

    with zipfile.ZipFile(packed) as archive:
        archive.extractall(tmp_path / "crate")
    crate = ROCrate(tmp_path / "crate")
    told = {entity.id: entity for entity in crate.data_entities}
    assert told.keys() == contents(packed).keys() - {bundle.METADATA}
    assert told["report/table.csv"]["encodingFormat"] == "text/csv"
    assert crate.dereference("#d2o")["softwareVersion"] == bundle._version()


def rewritten(path: Path, files: dict[str, bytes], *more: tuple[str, bytes]) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in (*files.items(), *more):
            archive.writestr(name, data)


def test_a_flipped_bit_of_any_file_is_named(packed):
    assert bundle.verify(packed)[0] == []
    whole = packed.read_bytes()
    with zipfile.ZipFile(packed) as archive:
        entries = archive.infolist()
    for entry in entries:
        start = entry.header_offset + 30 + len(entry.filename)
        for place in {start, start + entry.compress_size // 2, start + entry.compress_size - 1}:
            damaged = bytearray(whole)
            damaged[place] ^= 4
            packed.write_bytes(damaged)
            if entry.filename == bundle.METADATA:
                with pytest.raises(D2OError, match=r"ro-crate-metadata\.json is damaged"):
                    bundle.verify(packed)
                continue
            assert bundle.verify(packed) == (
                [f"{packed}: {entry.filename} is damaged; get it again"],
                f"{len(entries) - 1} files, 1 not whole",
            )


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("change", ["other", "gone", "extra", "twice"])
def test_what_is_missing_too_much_or_replaced_is_named(packed, change):
    files, more = contents(packed), []
    match change:
        case "other":
            files["report/table.csv"] += b"\n"
        case "gone":
            del files["report/table.csv"]
        case "extra":
            files["report/\x1b[31m.csv"] = b""
        case "twice":
            more = [("report/table.csv", files["report/table.csv"])]
    rewritten(packed, files, *more)
    told = {
        "other": "report/table.csv is damaged", "gone": "report/table.csv is gone",
        "extra": "report/\\u001b[31m.csv is not of it", "twice": "report/table.csv is not of it",
    }  # fmt: skip
    assert bundle.verify(packed)[0] == [f"{packed}: {told[change]}; get it again"]


@pytest.mark.parametrize(
    "metadata",
    [None, b"{", b"[]", b'{"@graph": 1}', b'{"@graph": [{"@id": "a", "@type": "File"}]}', b"[" * 100_000],
)
def test_metadata_that_are_none_end_in_one_line(packed, metadata):
    files = contents(packed) | {bundle.METADATA: metadata}
    rewritten(packed, {name: data for name, data in files.items() if data is not None})
    with pytest.raises(D2OError, match=r"^.*demo\.zip: no bundle of d2o, or a damaged one \(.*\); get it again$"):
        bundle.verify(packed)


def test_what_is_no_archive_or_unpacks_to_too_much_is_refused(packed, monkeypatch):
    monkeypatch.setattr(records, "LARGEST", 1 << 20)
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(bundle.METADATA, b"0" * (2 << 20))
    with pytest.raises(D2OError, match=r"demo\.zip: unpacks to more than 1 MiB"):
        bundle.verify(packed)
    monkeypatch.setattr(records, "LARGEST", 1000)
    with pytest.raises(D2OError, match=r"again\.zip: not written: .* most of all \S+; split the experiment demo"):
        bundle.write(Path("config.yaml"), "demo", packed.with_name("again.zip"))
    assert [*packed.parent.iterdir()] == [packed]
    packed.write_bytes(b"no archive")
    with pytest.raises(D2OError, match=r"demo\.zip: no bundle of d2o, or a damaged one"):
        bundle.verify(packed)


def test_the_commands(project, tmp_path):
    output = tmp_path / "demo.zip"
    line = [sys.executable, "-m", "d2o"]
    arguments = ["bundle", "demo", "--config", "config.yaml", "--output", str(output)]
    subprocess.run([*line, *arguments], cwd=project, check=True)
    done = subprocess.run([*line, "verify", str(output)], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.endswith(" files, 0 not whole\n")
    rewritten(output, contents(output) | {"README.md": b""})
    done = subprocess.run([*line, "verify", str(output)], capture_output=True, text=True)
    assert done.returncode == 1 and "README.md is damaged; get it again" in done.stdout


def test_what_is_not_ready_is_not_packed(project, tmp_path, monkeypatch):
    monkeypatch.chdir(project)

    def refused(message: str, config: str = "config.yaml", experiment: str = "demo") -> None:
        with pytest.raises(D2OError, match=message):
            bundle.write(Path(config), experiment, tmp_path / "x.zip")
        assert [*tmp_path.iterdir()] == []

    refused("config.yaml: no experiment 'dmo'; did you mean 'demo'", experiment="dmo")
    (project / "other.yaml").write_text(
        (project / "config.yaml").read_text().replace("better: lower", "better: higher")
    )
    refused(r"report\.html: made with other settings \(.*better.*\); run snakemake again", "other.yaml")
    made, aside = project / "results/pku/smol/npo/seed0/card.md", project / "aside"
    made.rename(aside)
    refused(r"card\.md: no such file; make it with: snakemake --cores all cards --configfile config\.yaml$")
    aside.rename(made)
    table = project / "results/reports/demo/table.csv"
    before = table.read_bytes()
    table.write_bytes(before + b"\n")
    refused(r"table\.csv: damaged since it was written")
    table.write_bytes(before)
