"""The card of a trained model: its numbers are the report's, and nothing in it is invented."""

from __future__ import annotations

import csv
import json
import re
from itertools import pairwise
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from conftest import ROOT
from d2o import hub, identities, records, report, schemas, settings
from d2o.plan import Plan
from d2o.report import card
from d2o.settings import CardStage
from test_plan import wildcards
from test_report import Results, config, write

CHOSEN = config(judges=[], methods=["initial", "d2o"])
STATED = {"datasets.pku": "Apache-2.0", "models.smol": "apache-2.0"}
NASTY = "[mine](http://evil) `rm -rf` <b> | # no\n---\nlicense: mit"


def stage(chosen: settings.Settings = CHOSEN, seed: int = 0, **keys) -> CardStage:
    run = {"dataset": "pku", "model": "smol", "method": "d2o", "seed": seed}
    return CardStage(run=run, settings=chosen, **keys)


def written(results: Path, made: CardStage) -> ModelCard:
    output = results / f"pku/smol/d2o/seed{made.run.seed}/card.md"
    card.write(made, results, output)
    return ModelCard.load(output)


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Path:
    """The results of an experiment, with its report."""
    root = tmp_path_factory.mktemp("card") / "results"
    Results(root, CHOSEN, evaluation=3)
    report.write(CHOSEN, root, root / "reports/demo/report.html")
    return root


def test_its_numbers_are_those_of_the_report(results):
    made = written(results, stage(seed=1))
    index = {
        (one.metric_type, one.dataset_name): (one.metric_value, one.dataset_split) for one in made.data.eval_results
    }
    with (results / "reports/demo/table.csv").open() as file:
        rows = {(row["metric"], row["prompts"], row["method"], row["seed"]): row for row in csv.DictReader(file)}
    assert {metric for metric, _ in index} == {metric for metric, _, method, _ in rows if method == "d2o"}
    for metric, prompts, name in [
        ("reward/cost", "test", "pku"), ("reward/cost", "xstest.csv", "xstest.csv"), ("task/mmlu/acc", "", "mmlu"),
    ]:  # fmt: skip
        split = "test" if prompts == "test" else None
        assert index[metric, name] == (float(rows[metric, prompts, "d2o", "1"]["mean"]), split)
    shown = [
        f"{float(row['mean']):.2f} [{float(row['low']):.2f}, {float(row['high']):.2f}]"
        for method, seed in (("d2o", "1"), ("d2o", "all"), ("initial", "all"))
        for row in [rows["reward/cost", "test", method, seed]]
    ]
    assert f"| cost ↓ | test prompts | {' | '.join(shown)} | 12 |" in made.text
    assert "arXiv 2403.03419, Eq. 3" in made.text and "time: 1 min 15 s" in made.text


def test_the_worst_prompts_are_named_by_hash_and_no_text_of_data_is_in_it(results):
    made = written(results, stage())
    scores = records.read_table(results / "pku/smol/d2o/seed0/scores/harm.parquet", schemas.SCORES)
    tested = [identities.prompt_id([{"role": "user", "content": f"Question {i}?"}]) for i in range(1, 12)]
    worst = sorted((row["score"], row["prompt_id"]) for row in scores if row["prompt_id"] in tested)
    listed = re.findall(r"^\| `([0-9a-f]+)` \|", made.text, re.MULTILINE)
    assert len(listed) == card.WORST and listed[1:] == [prompt for _, prompt in worst[: card.WORST - 1]]
    assert "Question" not in made.content and "alert" not in made.content


@pytest.mark.parametrize(("harmful", "listed"), [(0, 0), (4, 4), (12, 10)])
def test_of_a_yes_or_no_those_are_listed_that_fail(tmp_path, harmful, listed):
    chosen = config(judges=[], tasks=[], rewards=["harm"], methods=["initial", "d2o"], seeds=[0])
    rule = settings.Reward.model_validate({"rule": {"any": ["x"]}, "better": "lower"})
    chosen = chosen.model_copy(update={"rewards": {"harm": rule}})
    made = Results(tmp_path, chosen)
    rows = [{"prompt_id": p, "sample": 0, "score": float(i < harmful)} for i, p in enumerate(made.ids)]
    write(tmp_path / "pku/smol/d2o/seed0/scores/harm.parquet", schemas.SCORES, rows)
    text = card._failures(card.Archive(tmp_path), stage(chosen))
    assert text.count("\n| `") == listed
    assert (f"{harmful} of them have the worst value, 100.0." in text) == bool(harmful)
    assert ("none of the 12 test prompts" in text) == (not harmful)


def test_a_licence_that_is_not_stated_is_said_and_none_is_invented(results, capsys):
    made = written(results, stage(licences={"models.smol": "Apache-2.0"}))
    assert made.data.license is None and "license" not in made.content.split("---")[1]
    assert "| `datasets.pku` | training data of `d2o` | local: `pku.jsonl` | licence not stated |" in made.text
    assert "Of a part that it was made from the licence is not known" in made.text
    told = capsys.readouterr().err
    assert "card: datasets.pku: licence not stated; name it in its key `licence`" in told
    assert "models.smol" not in told


@pytest.mark.parametrize(
    ("licences", "license"),
    [
        (STATED, "apache-2.0"),
        (STATED | {"datasets.pku": "CC-BY-NC-4.0"}, "other"),
        (dict.fromkeys(STATED, NASTY), "other"),
    ],
)
def test_its_licence_is_that_of_its_parts_where_all_state_one(results, licences, license):
    """A scorer of the answers is no part of the model: `rewards.cost` states no licence."""
    made = written(results, stage(licences=licences))
    assert made.data.license == license
    assert made.data.model_name == "d2o-pku-smol-seed0"
    tokens = MarkdownIt().enable("table").parse(made.text)
    inner = [child for token in tokens for child in token.children or []]
    assert [child.attrGet("href") for child in inner if child.type == "link_open"] == [
        "https://arxiv.org/abs/2403.03419"
    ]
    assert not any("html" in token.type for token in [*tokens, *inner])
    assert [token.tag for token in tokens if token.type == "heading_open"] == ["h1", *["h2"] * 4]


def test_a_models_own_card_or_licence_file_states_it(results, tmp_path):
    assert card._own_licence(tmp_path) is None
    (tmp_path / "LICENSE.txt").write_text("…")
    assert card._own_licence(tmp_path) == "that of its file LICENSE.txt"
    (tmp_path / "README.md").write_text("---\nlicense: [unclosed\n---\n# Model")
    assert card._own_licence(tmp_path) == "that of its file LICENSE.txt"
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n# Model")
    assert card._own_licence(tmp_path) == "mit"


BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{new}: &{new} [{','.join([f'*{old}'] * 9)}]\n" for old, new in pairwise("abcdefghijk")
)
MERGES = "- &a {x: y}\n" + "".join(
    f"- &{new} {{<<: [{','.join([f'*{old}'] * 9)}]}}\n" for old, new in pairwise("abcdefghijk")
)


@pytest.mark.parametrize(
    ("metadata", "licence"),
    [
        ("license: " + "[" * 2000, None),
        ("license: [" + "[" * 900 + "]" * 900 + "]", None),
        (BOMB + "license: *k", None),
        (BOMB + "license: mit", "mit"),
        ("license:\n" + BOMB.replace("\n", "\n  "), None),
        ("license:\n" + MERGES, None),
        ("license: {name: mit}", None),
        ("license: [[mit]]", None),
        ("license: ~", None),
        ("license:", None),
        ("license:\n" + "- mit\n" * 999, None),
        ("language: en\nlicense:\n- mit\n- apache-2.0\ntags:\n- a", "mit, apache-2.0"),
        ("license: 'a\n  b' # no\ntags: [license]", "a b"),
        ("license: other\nlicense_name: mine\nlicense_link: LICENSE", "mine"),
        ("tags: |\n  license: mit", None),
        ("license: mit\r\ntags: a\r", "mit"),
    ],
)
def test_of_a_models_card_the_licence_is_read_and_nothing_else(metadata, licence, tmp_path):
    """It is read last, after all training: what it cannot be read from is no licence."""
    (tmp_path / "README.md").write_bytes(f"---\n{metadata}\n---\nlicense: text".encode())
    assert card._own_licence(tmp_path) == licence


def test_a_models_card_need_not_be_utf8_nor_have_metadata(tmp_path):
    for content, licence in [
        (b"\xff\xfe", None), (b"license: mit", None), (b"---\nlicense: mit", None), (b"", None),
        (b"---\nname: M\xfcller\nlicense: mit\n---\n", "mit"), (b"\xef\xbb\xbf---\nlicense: mit\n---\n", "mit"),
    ]:  # fmt: skip
        (tmp_path / "README.md").write_bytes(content)
        assert card._own_licence(tmp_path) == licence


def test_all_that_came_before_is_named(monkeypatch):
    """In the demo, the organism that D2O starts from is itself trained on another data set."""
    monkeypatch.chdir(ROOT)
    plan = Plan(yaml.safe_load((ROOT / "config/config.yaml").read_text()), "c")
    made = settings.parse(CardStage, plan.params("card")(wildcards(dataset="rude", model="organism", method="d2o")))
    used = card._merged(card._materials(card.Archive(Path("none")), made))
    assert [(one.key, one.made_from, one.licence) for one in used] == [
        ("models.smollm2", True, "Apache-2.0"), ("organisms.rude", True, "CC0-1.0"),
    ]  # fmt: skip
    assert used[0].use == "initial model; backbone of `safety`, which scores the answers"
    assert used[1].use == "training data of `sft`; training data of `d2o`"


def test_what_chose_the_positives_went_into_the_model():
    """The filter's reward model and its backbone did; one that only scores the answers did not."""
    chosen = config(methods=["initial", "d2o-best"], rewards=["cost"], judges=[])
    run = {"dataset": "pku", "model": "smol", "method": "d2o-best"}
    made = CardStage(run=run, settings=chosen, licences={"models.smol": "MIT"})
    used = {one.key: one for one in card._merged(card._materials(card.Archive(Path("none")), made))}
    assert used["models.smol"].use == "initial model; backbone of `harm`, which chose the positives"
    assert {key: one.made_from for key, one in used.items()} == {
        "models.smol": True, "datasets.pku": True, "rewards.cost": False,
    }  # fmt: skip


def test_what_chose_the_positives_is_no_base_of_the_model():
    """The card names only the models and data sets that the policy itself descends from."""
    chosen = config(methods=["initial", "d2o-best"], rewards=["cost"], judges=[]).model_dump()
    chosen["models"] |= {
        "smol": {"hub": "a/policy", "revision": "main"},
        "other": {"hub": "a/backbone", "revision": "main"},
        "mended": {"run": {"dataset": "old", "model": "smol", "method": "d2o-best", "seed": 0}},
    }
    chosen["rewards"]["harm"]["train"]["backbone"] = "other"
    rows = {"format": "pku-saferlhf", "train": ["train"], "revision": "main"}
    chosen["datasets"] = {"pku": rows | {"hub": "a/rows"}, "old": rows | {"hub": "a/old"}}
    s = settings.Settings.model_validate(chosen)
    run = {"dataset": "pku", "model": "smol", "method": "d2o-best", "seed": 0}
    told = [card._on_the_hub(s, settings.TrainedRun(**run | {"model": model})) for model in ("smol", "mended")]
    assert told == [
        {"base_model": ["a/policy"], "datasets": ["a/rows"]},
        {"base_model": ["a/policy"], "datasets": ["a/rows", "a/old"]},
    ]


def test_energy_is_told_where_watts_are_given(results):
    assert "kWh" not in written(results, stage()).text
    assert "energy: 0.00833 kWh: the time × 1 × 400 W, not measured" in written(results, stage(watts=400)).text


def test_a_licence_and_watts_reach_the_cards_alone(monkeypatch):
    monkeypatch.chdir(ROOT)
    config = yaml.safe_load((ROOT / "config/thumbs-down.yaml").read_text())
    plans = [Plan(config, "c")]
    config["models"]["smollm2"]["licence"] = config["datasets"]["thumbs-down"]["licence"] = "mine"
    config["compute"]["watts"] = 90
    plans.append(Plan(config, "c"))
    names = wildcards(dataset="thumbs-down", experiment="thumbs-down")
    for stage_name in ("models", "datasets", "negatives", "train", "report"):
        assert len({plan.params(stage_name)(names) for plan in plans}) == 1
    before, after = (json.loads(plan.params("card")(names)) for plan in plans)
    assert after["licences"] == {"models.smollm2": "mine", "datasets.thumbs-down": "mine"} != before["licences"]
    assert after["watts"] == 90 and "watts" not in before


def test_the_hub_is_asked_where_nothing_else_states_it(monkeypatch):
    asked = []
    monkeypatch.setattr(hub, "licence", lambda *names: asked.append(names) or "cc-by-4.0")
    entry = settings.Dataset(format="pku-saferlhf", hub="a/rows", revision="main", train=["train"])
    assert card._stated(stage(), "datasets.pku", entry) == "cc-by-4.0" and asked == [("a/rows", "main", "dataset")]
    assert card._stated(stage(licences=STATED), "datasets.pku", entry) == "Apache-2.0" and len(asked) == 1


def test_a_hub_that_is_not_reached_is_told_as_such(results, monkeypatch, capsys):
    """The card does not claim that no licence is stated."""
    monkeypatch.setattr(hub, "licence", lambda *_: None)
    rows = settings.Dataset(format="pku-saferlhf", hub="a/rows", revision="main", train=["train"])
    away = CHOSEN.model_copy(update={"datasets": CHOSEN.datasets | {"pku": rows}})
    made = written(results, stage(away, licences={"models.smol": "mit"}))
    assert "| `a/rows` at `main`, `train` | licence not asked: the Hub is not reached |" in made.text
    assert made.data.license is None and "the licence is not known" in made.text
    told = capsys.readouterr().err
    assert "card: datasets.pku: licence not asked: the Hub is not reached; name it in its key `licence`\n" in told
    assert f"card: rewards.cost: {card.NOT_STATED};" in told
