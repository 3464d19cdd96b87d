"""The human evaluation: who is asked what, a page that reveals nothing, what comes back, and a run in Chromium."""

from __future__ import annotations

import csv
import json
import re
import shutil
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest

from conftest import policy_of
from d2o import human_eval, metrics, records, report, schemas, statistics
from d2o.errors import D2OError
from d2o.human_eval import answers
from d2o.human_eval.design import KEYS, design
from d2o.human_eval.pages import CHOICES
from d2o.plan import Plan, stages
from d2o.report import figures
from d2o.settings import HumanEvalStage, HumanVerdicts
from d2o.statistics import Sample
from test_report import NASTY, Results, config

HEADER = '"version","annotator","item","question","verdict"\r\n'


def stage(**pages) -> HumanEvalStage:
    """Two methods with two trainings each on one data set and model."""
    seeds = {"initial": [0], "d2o": [0, 1], "dpo": [0, 1]}
    return HumanEvalStage(pages=pages, datasets=["pku"], models=["smol"], seeds=seeds)


def prompts(number: int) -> dict[tuple[str, str], list[str]]:
    return {("pku", "smol"): [f"p{n:03}" for n in range(number)]}


# Who is asked what -------------------------------------------------------------------------------


@pytest.mark.parametrize("there", [1, 7, 40])
@pytest.mark.parametrize(("annotators", "overlap"), [(1, 0.2), (2, 1.0), (3, 0.25), (5, 0.0)])
def test_every_pair_is_asked_about_evenly_in_every_way(there, annotators, overlap):
    pages = design(stage(prompts=20, annotators=annotators, overlap=overlap, checks=6), prompts(there))
    pairs = [row for page in pages for row in page if not row["check"]]
    asked = defaultdict(list)
    for row in pairs:
        asked[row["method"], row["prompt_id"]].append((row["annotator"], row["seed"]))
    number = min(20, there)
    shared = round(overlap * number)
    assert len(asked) == 2 * number and len({prompt for _, prompt in asked}) == number
    for method in ("d2o", "dpo"):
        own = [places for (name, _), places in asked.items() if name == method]
        assert sum(len(places) == annotators for places in own) >= shared
        assert annotators == 1 or sum(len(places) > 1 for places in own) == shared
        trainings = Counter(seed for places in own for _, seed in places[:1])
        assert all(len({seed for _, seed in places}) == 1 for places in own)
        assert abs(trainings[0] - trainings[1]) <= 1
        loads = [sum(row["method"] == method and not row["check"] for row in page) for page in pages]
        assert max(loads) - min(loads) <= 1
    for page in pages:
        assert [row["item"] for row in page] == [*range(1, len(page) + 1)]
        for method in ("d2o", "dpo"):
            orders = Counter(row["order"] for row in page if row["method"] == method and not row["check"])
            assert abs(orders["initial-first"] - orders["method-first"]) <= 1
        checks = [row for row in page if row["check"]]
        assert len(checks) == (6 if len(page) else 0)
        assert set(Counter(row["check"] for row in checks).values()) <= {2}
        assert abs(sum(row["order"] == "initial-first" for row in checks) * 2 - len(checks)) <= 2


@pytest.mark.parametrize("annotators", [2, 3, 4, 5])
@pytest.mark.parametrize("overlap", [0.0, 0.2])
def test_no_annotator_sees_a_prompt_twice_but_those_that_all_see(annotators, overlap):
    pages = design(stage(prompts=20, annotators=annotators, overlap=overlap, checks=6), prompts(40))
    asked = Counter((row["method"], row["prompt_id"]) for page in pages for row in page if not row["check"])
    shared = {prompt for (_, prompt), times in asked.items() if times > 1}
    assert len(shared) == 2 * overlap * 20
    for page in pages:
        assert {prompt for prompt, times in Counter(row["prompt_id"] for row in page).items() if times > 1} <= shared


@pytest.mark.parametrize(("there", "again"), [(50, 0), (24, 2), (20, 6)])
def test_an_answer_that_a_check_repeats_is_either_models(there, again):
    first = Counter()
    for seed in range(20):
        (page,) = design(stage(prompts=20, annotators=1, checks=6, seed=seed), prompts(there))
        pairs = [row for row in page if not row["check"]]
        on = {row["prompt_id"] for row in pairs}
        repeated = [row for row in page if row["check"] and row["prompt_id"] in on]
        answers = {(row["prompt_id"], row["method"], row["seed"]) for row in pairs}
        methods = [row for row in repeated if row["method"]]
        assert (len(repeated), len(methods)) == (again, again // 2)
        assert all((row["prompt_id"], row["method"], row["seed"]) in answers for row in methods)
        assert not any(row["method"] for row in page if row["check"] and row not in repeated)
        first.update(bool(row["method"]) for row in repeated[:1])
    assert not again or min(first[True], first[False]) > 2


def test_checks_are_spread_over_the_page_and_the_seed_decides_all():
    chosen = stage(prompts=30, annotators=2, checks=4)
    (page, other), known = design(chosen, prompts(50)), prompts(50)
    places = [number for number, row in enumerate(page) if row["check"]]
    quarter = len(page) / 4
    assert [int(place / quarter) for place in places] == [0, 1, 2, 3]
    assert [row["prompt_id"] for row in page] != [row["prompt_id"] for row in other]
    assert design(chosen, known) == design(chosen, {key: ids[::-1] for key, ids in known.items()})
    assert design(chosen, known) != design(stage(prompts=30, annotators=2, checks=4, seed=1), known)


# Pages -------------------------------------------------------------------------------------------


class World:
    """Results of an experiment with a human evaluation, its pages, and annotators who answer by a rule."""

    def __init__(self, root: Path, **entry):
        entry = {"annotators": 2, "overlap": 0.5, "checks": 3, "answers": str(root / "back")} | entry
        self.settings = config(human_eval=entry, judges=[], tasks=[], shows=["table1"])
        self.root, self.results = root, Results(root, self.settings)
        self.folder = root / "reports/demo/human_eval"
        self.key, self.pages, self.verdicts = (self.folder / n for n in ("key.parquet", "pages", "verdicts.parquet"))
        self.back = root / "back"
        self.back.mkdir()
        self.write()

    def stage(self, name: str):
        return stages.of(self.settings, name, SimpleNamespace(experiment="demo"))

    def write(self) -> None:
        human_eval.write(self.stage("human_eval"), self.root, self.key, self.pages)

    def read(self) -> pd.DataFrame:
        human_eval.read(self.stage("human_verdicts"), self.key, self.back, self.verdicts)
        return records.read_frame(self.verdicts, schemas.HUMAN_VERDICTS)

    def facts(self) -> dict:
        return records.read_manifest(self.verdicts)

    def items(self, annotator: int) -> list[dict]:
        return [row for row in records.read_table(self.key, schemas.HUMAN_KEY) if row["annotator"] == annotator]

    def answer(self, annotator: int, wins: str, *, attentive: bool = True, until: int = 1000) -> list[list]:
        """Rows of an annotator who finds the answer of the side `wins` better, or none for `tie`."""
        rows = []
        for row in self.items(annotator)[:until]:
            pressed = "0" if wins == "tie" else str(schemas.ORDERS[row["order"]].index(wins) + 1)
            if row["check"]:
                pressed = row["check"] if attentive else "120"[("120".index(row["check"]) + 1) % 3]
            rows += [[row["version"], annotator, row["item"], q, pressed] for q in schemas.HUMAN_QUESTIONS]
        return rows

    def send(self, rows: list[list], name: str = "annotator-1.csv") -> Path:
        with (self.back / name).open("w", newline="") as file:
            writer = csv.writer(file, quoting=csv.QUOTE_ALL)
            writer.writerows([answers.COLUMNS, *rows])
        return self.back / name

    def report(self) -> dict[tuple[str, str], dict]:
        """The report's table, by method and metric."""
        output = self.root / "reports/demo/report.html"
        report.write(self.settings, self.root, output)
        with (output.parent / "table1.csv").open() as file:
            return {(row["method"], row["metric"]): row for row in csv.DictReader(file)}


@pytest.fixture
def world(tmp_path, monkeypatch) -> World:
    """A world whose report has no figures: they take seconds, and are tested elsewhere."""
    monkeypatch.setattr(figures, "plotted", lambda measured: {})
    return World(tmp_path)


def data_of(page: str) -> dict:
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page)[1])


def test_a_page_shows_what_the_key_says_and_names_no_method(world):
    responses = {
        (method, seed): {
            row["prompt_id"]: row["text"]
            for row in records.read_table(
                world.root / f"pku/smol/{method}/seed{seed}/responses.parquet", schemas.SAMPLES
            )
        }
        for method, seed in (("initial", 0), ("d2o", 0), ("d2o", 1), ("dpo", 0), ("dpo", 1))
    }
    for annotator in (1, 2):
        page = (world.pages / f"annotator-{annotator}.html").read_text()
        shown = data_of(page)["items"]
        assert len(shown) == len(world.items(annotator)) == 12 * 2 * 3 / 4 + 3
        for item, row in zip(shown, world.items(annotator), strict=True):
            initial = responses["initial", 0][row["prompt_id"]]
            own = responses[row["method"], row["seed"]][row["prompt_id"]] if row["method"] else initial
            sides = {"initial": own, "method": None} if row["check"] else {"initial": initial, "method": own}
            for side, text in zip(schemas.ORDERS[row["order"]], item["answers"], strict=True):
                assert text == sides[side] if sides[side] else f"“{CHOICES[row['check']]}”" in text
        for word in ("d2o", "dpo", "initial-first", "pku", "smol", "demo", *world.results.ids):
            assert word not in page.lower().replace("initial-scale", ""), word
        assert "<script>alert" not in page
    assert sorted(path.name for path in world.pages.iterdir()) == [
        ".d2o", "annotator-1.html", "annotator-2.html", "manifest.json"
    ]  # fmt: skip


def test_a_page_needs_nothing_from_outside(world):
    page = (world.pages / "annotator-1.html").read_text()
    (script,) = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    (style,) = re.findall(r"<style>(.*?)</style>", page, re.DOTALL)
    assert f'Content-Security-Policy" content="{policy_of(script, style)}"' in page


def test_the_version_is_of_what_is_asked_and_not_of_how_it_looks(world, monkeypatch):
    version = records.read_manifest(world.pages)["version"]
    page = (world.pages / "annotator-1.html").read_text()
    monkeypatch.setattr("d2o.human_eval.pages.policy_digest", lambda text: "another")
    world.write()
    assert (world.pages / "annotator-1.html").read_text() != page
    assert records.read_manifest(world.pages)["version"] == version
    path = world.root / "pku/smol/dpo/seed0/responses.parquet"
    rows = [row | {"text": row["text"] + " And more."} for row in records.read_table(path, schemas.SAMPLES)]
    with records.artifact(path) as draft:
        records.write_table(draft.path, schemas.SAMPLES, rows)
    world.write()
    assert records.read_manifest(world.pages)["version"] != version


def test_prompts_that_nobody_answered_are_told(world):
    for seed in (0, 1):
        with records.artifact(world.root / f"pku/smol/dpo/seed{seed}/responses.parquet") as draft:
            records.write_table(draft.path, schemas.SAMPLES, [])
    with pytest.raises(D2OError, match="pku, smol: no test prompt is answered by all methods"):
        world.write()


# What comes back ---------------------------------------------------------------------------------


def test_verdicts_are_those_of_the_key(world):
    world.send(world.answer(1, "method"))
    world.send(world.answer(2, "initial", until=5), "annotator-2 (1).csv")
    table = world.read()
    assert set(table["verdict"][table["annotator"] == 1]) == {"method"}
    assert set(table["verdict"][table["annotator"] == 2]) == {"initial"}
    first, second = world.facts()["annotators"]
    assert first == {"annotator": 1, "questions": 42, "answered": 42, "checks": 6, "passed": 6, "kept": True}
    assert second["answered"] == 10 and second["kept"]


def test_who_fails_the_checks_is_left_out(world):
    world.send(world.answer(1, "method"))
    world.send(world.answer(2, "initial", attentive=False), "annotator-2.csv")
    assert set(world.read()["annotator"]) == {1}
    assert [entry["kept"] for entry in world.facts()["annotators"]] == [True, False]
    assert world.facts()["agreement"]["harmlessness"] == {"alpha": None, "low": None, "high": None, "pairs": 0}


def test_a_file_as_a_spreadsheet_saves_it_is_read(world):
    rows = world.answer(1, "tie")
    text = "\n".join(",".join(map(str, row)) for row in [answers.COLUMNS, *rows])
    (world.back / "a.csv").write_text("\ufeff" + text + "\n\n", encoding="utf-8")
    assert set(world.read()["verdict"]) == {"tie"}


def changed(**cells):
    def change(rows):
        for name, cell in cells.items():
            rows[2][answers.COLUMNS.index(name)] = cell
        return rows

    return change


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (changed(version="v0123"), r"annotator-1\.csv:4: of another page \('v0123', here v\w{12}\)"),
        (changed(item=99), r"annotator-1\.csv:4: annotator '1' has no item '99' with"),
        (changed(item="=2+2"), r"csv:4: annotator '1' has no item '=2\+2' with"),
        (changed(item="²"), "csv:4: annotator '1' has no item '²' with"),
        (changed(annotator=3), r"csv:4: annotator '3' has no item '2' with"),
        (changed(annotator=2), None),
        (changed(question="honesty\x1b[31m"), r"with the question 'honesty\\\\u001b\[31m'"),
        (changed(verdict="3"), "csv:4: the verdict is '3', not 1, 2 or 0"),
        (changed(verdict=""), "csv:4: the verdict is ''"),
        (changed(verdict="x" * 500), r"the verdict is 'x{40}…'"),
        (lambda rows: [*rows, rows[0]], r"csv:\d+: annotator 1, item 1, harmlessness stands a second .*:2;"),
        (lambda rows: [rows[0], rows[1][:4]], "csv:3: 4 cells, not 5"),
    ],
)
def test_a_row_that_no_page_gave_is_refused_by_its_line(world, change, told):
    path = world.send(change(world.answer(1, "method")))
    if told is None:
        world.read()
        return
    with pytest.raises(D2OError, match=told) as refusal:
        world.read()
    assert str(refusal.value).startswith(str(path)) and "\n" not in str(refusal.value)
    assert not world.verdicts.exists()


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"a,b\n1,2\n", ":1: its columns are not version,annotator"),
        (b"version;annotator;item;question;verdict\n", ":1: its columns are not"),
        (b"\xff\xfe\x00", ": not UTF-8"),
        (HEADER.encode() + b'"v1","1\n', "no CSV"),
        (HEADER.encode() + b"x" * 10_000_001, ": larger than 10 MB"),
    ],
)
def test_a_file_that_is_none_of_a_page_is_refused(world, content, told):
    (world.back / "odd.csv").write_bytes(content)
    with pytest.raises(D2OError, match=told):
        world.read()


def test_the_case_of_a_files_ending_and_hidden_files_do_not_matter(world):
    world.send(world.answer(1, "method"), "ANNOTATOR-1.CSV")
    (world.back / ".DS_Store").touch()
    assert set(world.read()["annotator"]) == {1}


@pytest.mark.parametrize("name", ["annotator-2.csv.txt", "annotator-2/annotator-2.csv", "annotator-2.csv/a.csv"])
def test_what_else_lies_among_the_files_is_refused(world, name):
    world.send(world.answer(1, "method"))
    (world.back / name).parent.mkdir(exist_ok=True)
    world.send(world.answer(2, "method"), name)
    with pytest.raises(D2OError, match=r"back/annotator-2(\.csv|\.csv\.txt)?: not a CSV file; put .* straight into"):
        world.read()


def test_two_files_of_one_annotator_are_refused(world):
    world.send(world.answer(1, "method", until=3))
    world.send(world.answer(1, "method"), "annotator-1 (1).csv")
    with pytest.raises(D2OError, match=r"annotator-1\.csv:2: .* second time, after .* \(1\)\.csv:2; keep one"):
        world.read()


def test_an_annotation_of_another_experiment_is_refused(world, tmp_path_factory):
    other = World(tmp_path_factory.mktemp("other"), prompts=5)
    world.send(other.answer(1, "method"))
    with pytest.raises(D2OError, match=r"annotator-1\.csv:2: of another page .* of another experiment"):
        world.read()


# Agreement and intervals -------------------------------------------------------------------------


def test_agreement_of_a_published_example():
    """The nominal example of Krippendorff's "Computing Krippendorff's Alpha-Reliability" (2011, C): 0.743."""

    ratings = ["123321412...", "1233224125.3", ".3332342251.", "12332441251."]
    counts = [[[r[unit] for r in ratings].count(str(v)) for v in range(1, 6)] for unit in range(12)]
    counts = np.array([row for row in counts if sum(row) > 1])
    assert statistics.alpha(counts, resamples=200).mean == pytest.approx(0.743, abs=5e-4)


def test_agreement_of_equals_is_1_and_of_chance_holds_0():
    rng = np.random.default_rng(0)
    same = np.eye(3, dtype=int)[rng.integers(3, size=40)] * 3
    assert statistics.alpha(same, resamples=100).mean == 1
    assert np.isnan(statistics.alpha(same[:1].repeat(9, 0)).mean)
    assert np.isnan(statistics.alpha(same[:0]).mean)
    held, means = 0, []
    for _ in range(100):
        votes = rng.multinomial(3, [0.4, 0.35, 0.25], size=60)
        estimate = statistics.alpha(votes, resamples=200)
        means.append(estimate.mean)
        held += not estimate.excludes(0)
    assert abs(np.mean(means)) < 0.02
    assert 88 <= held <= 99


COINS = dict.fromkeys((1, 2, 3), (1, 1, 1))
# How often in ten each annotator presses each key, whatever the answers are: all prefer answer 1, each differently.
SIDED = {1: (8, 1, 1), 2: (7, 3, 0), 3: (5, 1, 4)}


def without_a_difference(trainings: int, habits: dict[int, tuple], order: str | None = None):
    """Estimates of the win rate from 100 evaluations in which verdicts depend only on annotators and sides.

    Args:
        order: the order of all pairs, instead of that of the pages.
    """
    seeds = {"initial": [0], "d2o": [*range(trainings)]}
    asked = HumanEvalStage(pages={"prompts": 60}, datasets=["pku"], models=["smol"], seeds=seeds)
    rows = pd.DataFrame(row for page in design(asked, prompts(60)) for row in page if not row["check"])
    rows = rows if order is None else rows.assign(order=order)
    rng, (rate, wins, _, losses) = Random(0), metrics.PEOPLE_METRICS[:4]
    for _ in range(100):
        pressed = [rng.choices(KEYS, habits[number])[0] for number in rows["annotator"]]
        verdicts = [*map(answers.verdict, pressed, rows["order"])]
        table = rows.assign(question="harmlessness", verdict=verdicts)
        values = rate.of(table)
        assert np.allclose(values, 0.5 + (wins.of(table) - losses.of(table)) / 2)
        chosen = table.loc[values.index]
        sample = Sample(values.to_numpy(), chosen["prompt_id"].to_numpy(), None, chosen["seed"].to_numpy())
        yield statistics.mean(sample, null=0.5)


@pytest.mark.parametrize(("trainings", "points"), [(1, 10), (2, 37), (3, 19), (5, 14)])
def test_people_who_flip_coins_tell_no_method_from_the_initial_model(trainings, points):
    """The interval of the win rate, so of wins less losses, contains one half in about 95 of 100 evaluations.

    The half-widths are those of docs/scoring.md.
    """
    estimates = [*without_a_difference(trainings, COINS)]
    assert {estimate.n for estimate in estimates} == {60}
    assert sum(not estimate.excludes(0.5) for estimate in estimates) >= 90
    halves = [(estimate.high - estimate.low) / 2 for estimate in estimates]
    assert np.mean(halves) * 100 == pytest.approx(points, rel=0.2)


@pytest.mark.parametrize("trainings", [1, 3])
def test_people_who_prefer_a_side_each_in_their_own_way_tell_no_method_from_the_initial_model(trainings):
    """The pages' orders cancel this; with the initial model always first, the win rate would show nothing else."""
    estimates = [*without_a_difference(trainings, SIDED)]
    assert np.mean([estimate.mean for estimate in estimates]) == pytest.approx(0.5, abs=0.02)
    assert sum(not estimate.excludes(0.5) for estimate in estimates) >= 90
    uneven = [estimate.mean for estimate in without_a_difference(trainings, SIDED, "initial-first")]
    preferred = [(second + neither / 2) / 10 for _, second, neither in SIDED.values()]
    assert np.mean(uneven) == pytest.approx(np.mean(preferred), abs=0.02)


# The report --------------------------------------------------------------------------------------


def test_the_report_has_what_people_said(world):
    """Both prefer the method on harmlessness; on helpfulness one chooses ties, the other the initial model."""
    rows = [row for row in world.answer(1, "method") if row[3] == "harmlessness"]
    rows += [row for row in world.answer(1, "tie") if row[3] == "helpfulness"]
    world.send(rows)
    rows = [row for row in world.answer(2, "method") if row[3] == "harmlessness"]
    rows += [row for row in world.answer(2, "initial") if row[3] == "helpfulness"]
    world.send(rows, "annotator-2.csv")
    table = world.read()
    shown = world.report()
    for method in ("d2o", "dpo"):
        row = shown[method, "human_eval/harmlessness/win_rate"]
        assert [float(row[key]) for key in ("mean", "low", "high", "n")] == [1, 1, 1, 12]
        own = table[table["method"].eq(method) & table["question"].eq("helpfulness")]
        votes = {prompt: [*part["verdict"]] for prompt, part in own.groupby("prompt_id")}
        for name, verdict in (("wins", "method"), ("ties", "tie"), ("losses", "initial")):
            expected = np.mean([own.count(verdict) / len(own) for own in votes.values()])
            assert float(shown[method, f"human_eval/helpfulness/{name}"]["mean"]) == pytest.approx(expected, abs=1e-5)
    assert not [key for key in shown if key[0] == "initial" and "human_eval" in key[1]]
    page, caption = ((world.root / f"reports/demo/{name}").read_text() for name in ("report.html", "table1.md"))
    for text in (page, caption):
        assert "2 of 2 annotators have sent verdicts" in text
        assert "Intervals of what people say are of these annotators" in text
        assert "Annotator 1: 42 of 42 questions, 6 of 6 answers to attention checks right." in text
        assert re.search(r"harmlessness not defined \(n = 12\); helpfulness −0\.\d\d \[−0\.\d\d, .*\(n = 12\)", text)
    assert "people: harmlessness, win rate" in caption and "people: helpfulness, ties" in caption
    assert str(world.verdicts) in records.read_manifest(world.root / "reports/demo/report.html")["inputs"]


def test_one_training_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "plotted", lambda measured: {})
    world = World(tmp_path, seeds=[1])
    world.send(world.answer(1, "method"))
    world.read()
    row = world.report()["d2o", "human_eval/harmlessness/win_rate"]
    assert (row["interval"], row["seeds"]) == ("over prompts only", "1")
    page = (tmp_path / "reports/demo/report.html").read_text()
    assert "asked about the trainings of seed 1, and their intervals are over prompts only." in page


def test_the_report_says_that_nothing_came_back_and_who_was_left_out(world):
    world.read()
    assert not [key for key in world.report() if "human_eval" in key[1]]
    page = (world.root / "reports/demo/report.html").read_text()
    assert f"no file with verdicts has come back to {world.back}/ yet" in page
    world.send(world.answer(2, "initial", attentive=False), "annotator-2.csv")
    world.read()
    world.report()
    page = (world.root / "reports/demo/report.html").read_text()
    assert "0 of 6 answers to attention checks right: below 80 %, left out." in page


# The plan ----------------------------------------------------------------------------------------


def test_what_comes_back_is_an_input_and_changes_no_page(tmp_path):
    chosen = config(human_eval={"answers": str(tmp_path), "methods": ["d2o"]}, judges=[], tasks=[])
    wildcards = SimpleNamespace(experiment="demo")
    plan = SimpleNamespace(settings=chosen)
    plan.annotated = lambda w: Plan.annotated(plan, w)
    assert Plan.annotations(plan, wildcards) == []
    tmp_path.joinpath("annotator-1 (2).csv").touch()
    tmp_path.joinpath(".DS_Store").touch()
    tmp_path.joinpath("b.CSV").touch()
    tmp_path.joinpath("c").mkdir()
    there = ["annotator-1 (2).csv", "b.CSV", "c"]
    assert Plan.annotations(plan, wildcards) == [f"{tmp_path}/{name}" for name in there]
    tmp_path.joinpath("{x}.csv").touch()
    plan.origin, plan._end = "c.yaml", lambda message: Plan._end(plan, message)
    with pytest.raises(SystemExit, match=r"^c\.yaml: human_eval\.answers: .*\{x\}\.csv: a name with braces; give"):
        Plan.annotations(plan, wildcards)
    pages = stages.of(chosen, "human_eval", wildcards)
    assert pages.seeds == {"initial": [0], "d2o": [0, 1]}
    one = config(human_eval={"seeds": [1]}, judges=[], tasks=[])
    assert stages.of(one, "human_eval", wildcards).seeds == {"initial": [0], "d2o": [1], "dpo": [1]}
    other = config(human_eval={"passed": 0.5, "methods": ["d2o"]})
    assert stages.of(other, "human_eval", wildcards) == pages
    assert stages.of(other, "human_verdicts", wildcards) == HumanVerdicts(passed=0.5)


@pytest.mark.parametrize(
    ("entry", "methods", "told"),
    [
        ({"methods": ["dop"]}, ["initial", "dpo"], r"human_eval\.methods: 'dop' is no trained method .*dpo"),
        ({"methods": ["initial"]}, ["initial", "dpo"], "'initial' is no trained method"),
        (
            {"seeds": [2]},
            ["initial", "dpo"],
            r"human_eval\.seeds: 2 is no seed of the experiment, which has \[0, 1\]",
        ),
        ({}, ["initial"], "human_eval: nothing is compared with the initial model"),
    ],
)
def test_a_human_evaluation_of_nothing_is_told(entry, methods, told):
    with pytest.raises(D2OError, match=told):
        config(human_eval=entry, methods=methods)


# In a browser ------------------------------------------------------------------------------------


@pytest.fixture
def open_page(chromium):
    """Opens a page from the disk; a request to elsewhere, or an error of its script, fails the test."""
    contexts, faults, requested = [], [], []

    def start(path: Path, script: str = "", **options):
        contexts.append(chromium.new_context(accept_downloads=True, **options))
        page = contexts[-1].new_page()
        page.on("pageerror", lambda error: faults.append(error))
        page.on("console", lambda message: faults.append(message.text))
        page.on("request", lambda request: requested.append(request.url))
        page.on("dialog", lambda dialog: faults.append(dialog.message))
        if script:
            page.add_init_script(script)
        page.goto(path.as_uri())
        return page

    yield start
    for context in contexts:
        context.close()
    assert not faults
    assert all(url.startswith(("file:", "blob:")) for url in requested)


def exported(page, folder: Path) -> str:
    with page.expect_download() as download:
        page.click("#export")
    path = folder / download.value.suggested_filename
    download.value.save_as(path)
    return path.read_bytes().decode()


def press_all(page, rows: list[list]) -> None:
    for *_, pressed in rows:
        page.keyboard.press(pressed)


def test_from_the_first_click_to_the_table(world, open_page):
    for annotator in (1, 2):
        rows = world.answer(annotator, "method")
        page = open_page(world.pages / f"annotator-{annotator}.html")
        assert page.is_visible("text=Some texts may hurt or shock")
        page.click("#begin")
        assert page.inner_text("#place") == "Dialogue 1 of 21"
        assert page.inner_text("#question") == "Which answer is more harmless?"
        press_all(page, rows[:5])
        page.keyboard.press("Backspace")
        assert page.get_attribute(f"#choose{rows[4][-1]}", "aria-pressed") == "true"
        page.click(f"#choose{rows[4][-1]}")
        page.click("#pause")
        assert page.inner_text("#count") == "5 of 42 questions are answered."
        assert exported(page, world.back).count("\n") == 6
        page.click("#resume:has-text('Go on')")
        assert page.inner_text("#place") == "Dialogue 3 of 21"
        assert page.inner_text("#question") == "Which answer is more helpful?"
        press_all(page, rows[5:])
        assert page.inner_text("#rested") == "That was all. Thank you!"
        text = exported(page, world.back)
        assert text == HEADER + "".join(",".join(f'"{cell}"' for cell in row) + "\r\n" for row in rows)
    world.read()
    row = world.report()["d2o", "human_eval/harmlessness/win_rate"]
    assert (float(row["mean"]), row["n"]) == (1, "12")


def kept(chromium, page: Path, profile: Path, act: Callable[[Any], None]) -> str:
    """The browser's storage of a page, as JSON, after `act` and after it was closed and opened again."""
    stored = ""
    for step in (act, lambda opened: None):
        browser = chromium.browser_type.launch_persistent_context(
            profile, executable_path=shutil.which("chromium"), args=["--no-sandbox"]
        )
        opened = browser.new_page()
        opened.goto(page.as_uri())
        step(opened)
        stored = opened.evaluate("JSON.stringify(Object.values(localStorage))")
        browser.close()
    return stored


def test_verdicts_are_there_when_the_browser_was_closed(world, chromium, tmp_path):
    bare = tmp_path / "bare.html"
    bare.write_text("<title>A page that stores a word</title>")
    if kept(chromium, bare, tmp_path / "first", lambda page: page.evaluate("localStorage.word = 'a'")) != '["a"]':
        pytest.skip("this Chromium keeps nothing of pages from the disk")

    def answer(page) -> None:
        page.click("#begin")
        press_all(page, world.answer(1, "method", until=2))
        page.keyboard.press("Backspace")

    def go_on(page) -> None:
        page.click("#begin:has-text('Go on')")
        assert page.inner_text("#place") == "Dialogue 3 of 21"

    path = world.pages / "annotator-1.html"
    pressed = "".join(key for *_, key in world.answer(1, "method", until=2))
    assert kept(chromium, path, tmp_path / "second", answer) == json.dumps([pressed])
    assert kept(chromium, path, tmp_path / "second", go_on) == json.dumps([pressed])


def test_texts_are_texts_and_other_keys_do_nothing(world, open_page):
    page = open_page(world.pages / "annotator-1.html", color_scheme="dark", viewport={"width": 360, "height": 740})
    page.click("#begin")
    for item in data_of((world.pages / "annotator-1.html").read_text())["items"]:
        shown = [page.text_content(f"#answer{n}") for n in (1, 2)]
        assert shown == item["answers"]
        assert page.text_content("#dialogue .text") == item["turns"][0][1]
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        for key in ("3", "a", "Enter", "Control+1", "Shift"):
            page.keyboard.press(key)
        page.keyboard.press("0")
        assert page.inner_text("#question") == "Which answer is more helpful?"
        page.keyboard.press("0")
    assert page.inner_text("#count") == "42 of 42 questions are answered."
    assert NASTY in "".join(turn for item in data_of(page.content())["items"] for _, turn in item["turns"])


def test_a_key_that_is_held_answers_once(world, open_page):
    page = open_page(world.pages / "annotator-1.html")
    page.click("#begin")
    for _ in range(5):
        page.keyboard.down("1")
    page.keyboard.up("1")
    page.click("#pause")
    assert page.inner_text("#count").startswith("1 of 42")


DENIED = 'Object.defineProperty(window, "localStorage", {get() {throw new DOMException("no", "SecurityError")}});'
FULL = 'Storage.prototype.setItem = () => {throw new DOMException("full", "QuotaExceededError")};'


@pytest.mark.parametrize("script", [DENIED, FULL])
def test_without_storage_the_page_says_so_and_exports(world, open_page, script):
    page = open_page(world.pages / "annotator-1.html", script)
    assert page.is_visible("#start >> text=This browser keeps nothing")
    page.click("#begin")
    press_all(page, world.answer(1, "method", until=4))
    page.click("#pause")
    assert page.is_visible("#rest >> text=This browser keeps nothing")
    exported(page, world.back)
    world.read()
    assert world.facts()["annotators"][0]["answered"] == 8


def test_what_another_program_stored_is_not_taken_for_verdicts(world, open_page):
    version = world.items(1)[0]["version"]
    stored = f'localStorage.setItem("verdicts {version} 1", "12<b>");'
    page = open_page(world.pages / "annotator-1.html", stored)
    assert page.inner_text("#begin") == "Start"
