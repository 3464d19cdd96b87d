"""The documents match the project: their commands, config examples, links, paths and keys exist in it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote

import pytest
import typer
import yaml
from markdown_it import MarkdownIt
from markdown_it.token import Token

from conftest import ROOT
from d2o import cli, layout, settings
from d2o.plan import Plan

PAGES = sorted(
    [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]
    + [ROOT / folder / "README.md" for folder in ("config", "demo", "organisms", "results")]
)


class Part(NamedTuple):
    """A code block, a code span or a link of a page; `kind` is a block's language, `span` or `link`."""

    page: str
    kind: str
    text: str


def parts() -> Iterator[Part]:
    def flat(tokens: list[Token]) -> Iterator[Token]:
        for token in tokens:
            yield token
            yield from flat(token.children or [])

    for path in PAGES:
        page = str(path.relative_to(ROOT))
        for token in flat(MarkdownIt().enable("table").parse(path.read_text())):
            match token.type:
                case "fence":
                    yield Part(page, token.info, token.content)
                case "code_block":
                    yield Part(page, "indented", token.content)
                case "code_inline":
                    yield Part(page, "span", token.content)
                case "link_open" | "image":
                    yield Part(page, "link", token.attrGet("href") or token.attrGet("src"))


PARTS = list(parts())
PROGRAMS = ("d2o", "make", "pytest", "python", "snakemake")


class Command(NamedTuple):
    """A command of a page: its words without environment variables and pipes, and the comment behind it."""

    page: str
    words: tuple[str, ...]
    comment: str

    def __str__(self):
        return f"{self.page}: {' '.join(self.words)}"


def commands(*programs: str) -> list[Command]:
    """Each command once: the lines of shell blocks, and the code spans that begin like commands."""
    seen: dict[tuple[str, ...], Command] = {}
    for page, kind, text in PARTS:
        for line in text.splitlines() if kind == "sh" else [text] if kind == "span" and " " in text else []:
            code, _, comment = line.partition(" # ")
            words = re.sub(r"^([A-Z_]+=\S* )+| [|>].*", "", code).split()
            if words and words[0] in programs:
                seen.setdefault(tuple(words), Command(page, tuple(words), comment.strip()))
    return list(seen.values())


def every(*programs: str):
    return pytest.mark.parametrize("command", commands(*programs), ids=str)


def test_every_block_is_of_a_kind_that_is_checked():
    for part in PARTS:
        assert part.kind in ("sh", "yaml", "python", "text", "span", "link"), part


def test_every_line_of_a_shell_block_is_a_command_that_is_checked():
    lines = {line for _, kind, text in PARTS if kind == "sh" for line in text.splitlines()}
    known = commands(*PROGRAMS)
    for line in lines:
        assert any(" ".join(command.words) in line for command in known), line


# Commands ----------------------------------------------------------------------------------------


@every("make")
def test_make_commands(command):
    makefile = (ROOT / "Makefile").read_text()
    for word in command.words[1:]:
        name, is_variable, _ = word.partition("=")
        pattern = rf"^{name} \?=" if is_variable else rf"^{name}:"
        assert re.search(pattern, makefile, re.MULTILINE), f"{command}: the Makefile has no {name}"


@every("d2o")
def test_d2o_commands(command):
    app = typer.main.get_command(cli.app)
    group, arguments, options = app, [], {"--help"}
    for word in command.words[1:]:
        options |= {option for parameter in group.params for option in parameter.opts}
        if group is app and word in app.commands:
            group = app.commands[word]
            arguments = [parameter for parameter in group.params if parameter.param_type_name == "argument"]
        elif word.startswith("-"):
            assert word in options, f"{command}: no option {word}"
        else:
            assert arguments, f"{command}: no subcommand {word}"


def test_every_command_that_no_rule_runs_stands_in_a_document():
    rules = "".join(path.read_text() for path in (ROOT / "workflow" / "rules").glob("*.smk"))
    told = {command.words[1] for command in commands("d2o")}
    for name in typer.main.get_command(cli.app).commands:
        assert name in told or re.search(rf"\bd2o .*{name} ", rules), f"d2o {name} stands in no document"


@every("python", "pytest")
def test_scripts_and_tests_exist(command):
    path = ROOT / command.words[1]
    assert path.is_file(), f"{command}: no such file"
    if "-k" in command.words:
        name = command.words[command.words.index("-k") + 1]
        assert re.search(rf"^def test_\w*{name}", path.read_text(), re.MULTILINE), f"{command}: no such test"


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """The project in a folder of its own, without results; users' files in `data/` exist, but are empty."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("workflow", "profiles", "envs", "organisms", "demo", "config"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    shutil.copy(ROOT / "Snakefile", folder)
    for config in (folder / "config").glob("*.yaml"):
        for file in re.findall(r"\bdata/[\w./-]+", config.read_text()):
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).touch()
    return folder


def planned(command: Command) -> tuple[str, ...]:
    return tuple(word for word in command.words[1:] if word != "-n")


@pytest.mark.slow
@pytest.mark.parametrize("command", {planned(c): c for c in commands("snakemake")}.values(), ids=str)
def test_snakemake_commands_have_a_plan(command, checkout):
    words = [*planned(command)]
    words += [] if "--rulegraph" in words else ["-n", "--quiet", "rules"]
    words += [] if {"--cores", "--profile"} & {*words} else ["--cores", "1"]
    done = subprocess.run(
        [sys.executable, "-m", "snakemake", *words], cwd=checkout, capture_output=True, text=True, env=os.environ
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
    if jobs := re.search(r"(\d+) jobs", command.comment):
        assert re.search(rf"^total +{jobs[1]}$", done.stdout, re.MULTILINE), f"{command}\n{done.stdout[-2000:]}"


# Targets -----------------------------------------------------------------------------------------


def targets(kind: str = "targets|asked|showing") -> set[str]:
    """Rules that only request files: of stages (`targets`, `asked`), or of the paper's exhibits (`showing`)."""
    rules = "\n".join(path.read_text() for path in (ROOT / "workflow" / "rules").glob("*.smk"))
    return set(re.findall(rf"^rule (\w+):\n    input:\n        plan\.(?:{kind})\(", rules, re.MULTILINE))


def test_the_table_of_stages_has_every_target():
    listed = re.findall(r"^\| `(\w+)` \|", (ROOT / "docs" / "pipeline.md").read_text(), re.MULTILINE)
    assert set(listed) == targets("targets|asked")
    assert len(listed) == len(set(listed))


@every("snakemake")
def test_targets_and_configs_of_commands_exist(command):
    for before, word in pairwise(command.words):
        if before in ("--configfile", "--profile"):
            assert (ROOT / word).exists(), f"{command}: no {word}"
        elif word.endswith("/report.html"):
            config = yaml.safe_load((ROOT / command.words[command.words.index("--configfile") + 1]).read_text())
            pages = [f"{config['results']}/reports/{name}/report.html" for name in config["experiments"]]
            assert word in pages, f"{command}: no experiment has this report"
        elif word.endswith("/restored.json"):
            demo = yaml.safe_load((ROOT / "config" / "config.yaml").read_text())
            names = layout.names_in("restored", word.removeprefix("results/"))
            assert names["seed"] == "0" and all(names[key] in demo[f"{key}s"] for key in names if key != "seed")
        elif not word.startswith("-") and before != "--cores":
            assert word in targets(), f"{command}: no target {word}"


@pytest.mark.parametrize("name", sorted(targets("asked|showing")))
def test_a_target_that_no_experiment_asks_for_ends_in_one_line(name, monkeypatch):
    """Not in an empty plan, which looks as if all were done."""
    monkeypatch.chdir(ROOT)
    rules = "\n".join(path.read_text() for path in (ROOT / "workflow" / "rules").glob("*.smk"))
    kind, place = re.search(rf'rule {name}:\n    input:\n        plan\.(\w+)\("(\w+)"\)', rules).groups()
    paper = yaml.safe_load((ROOT / "config" / "paper.yaml").read_text())
    data = {"datasets": [next(iter(paper["datasets"]))], "models": [next(iter(paper["models"]))]}
    plan = Plan(paper | {"experiments": {"bare": data | {"methods": ["initial"]}}}, "c.yaml")
    with pytest.raises(SystemExit, match=r"^c\.yaml: no experiment (asks for this|shows \w+); .* in one$"):
        getattr(plan, kind)(place)({})


@pytest.mark.slow
@pytest.mark.parametrize("name", ["figure1", "table2"])
def test_snakemake_shows_that_line_and_no_traceback(name, checkout):
    command = [sys.executable, "-m", "snakemake", "-n", "--cores", "1", name]
    done = subprocess.run(command, cwd=checkout, capture_output=True, text=True, env=os.environ)
    assert done.returncode == 1
    assert re.search(r"^config/config.yaml: no experiment .* in one$", done.stderr, re.MULTILINE)
    assert "Exception" not in done.stderr + done.stdout and "Traceback" not in done.stderr + done.stdout


# Config ------------------------------------------------------------------------------------------


def blocks(kind: str):
    return pytest.mark.parametrize("part", [part for part in PARTS if part.kind == kind], ids=lambda part: part.page)


@blocks("yaml")
def test_config_examples_are_valid(part):
    """Each alone, merged into a shipped config: its entries are added, its keys replace the config's."""
    changes = yaml.safe_load(part.text)
    name = "thumbs-down" if "thumbs-down" in changes.get("datasets", {}) else "config"
    config = yaml.safe_load((ROOT / "config" / f"{name}.yaml").read_text())
    for section, entries in changes.items():
        config[section] = config.get(section, {}) | entries if isinstance(entries, dict) else entries
    settings.load(config, part.page)


@blocks("python")
def test_python_examples_compile(part):
    compile(part.text, part.page, "exec")


def keys(section: str) -> set[str]:
    """The keys of a section of the config, or of the entries of one that is a mapping."""
    schema = settings.Settings.model_json_schema()
    field = schema["properties"][section]
    reference = json.dumps(field.get("additionalProperties", field))
    return set(schema["$defs"][re.search(r'#/\$defs/(\w+)"', reference)[1]]["properties"])


def test_keys_that_are_named_exist():
    """`section.key` in a code span; a span that ends like a file name is no key."""
    unknown = []
    for page, kind, text in PARTS:
        named = re.fullmatch(r"([a-z_]+)\.([a-z_]+)(: .*)?", text) if kind == "span" else None
        if named and named[1] in settings.Settings.model_fields and not is_file(text):
            unknown += [f"{page}: {text}"] if named[2] not in keys(named[1]) else []
    assert not unknown


def is_file(text: str) -> bool:
    return text.endswith((".parquet", ".csv", ".jsonl", ".json", ".py", ".yaml", ".smk", ".svg", ".html"))


# Links and paths ---------------------------------------------------------------------------------


def anchors(path: Path) -> set[str]:
    """The headings of a page as GitHub links to them."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_lead_somewhere():
    broken = []
    for page, kind, target in PARTS:
        if kind == "link" and not re.match(r"https?://", target):
            place, _, anchor = unquote(target).partition("#")
            path = (ROOT / page).parent / place if place else ROOT / page
            if not path.exists() or (anchor and anchor not in anchors(path)):
                broken.append(f"{page}: {target}")
    assert not broken


def test_paths_of_the_project_that_are_named_exist():
    path = re.compile(r"(benchmarks|config|containers|demo|docs|envs|organisms|profiles|tests|workflow)/[\w./-]*")
    named = [part for part in PARTS if part.kind == "span" and path.fullmatch(part.text)]
    assert len(named) > 10
    assert not [f"{page}: {text}" for page, _, text in named if not (ROOT / text).exists()]


def test_every_page_is_linked_from_the_first():
    linked = {target.partition("#")[0] for page, kind, target in PARTS if page == "README.md" and kind == "link"}
    assert {f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")} <= linked


def test_the_first_page_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120
