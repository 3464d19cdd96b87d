"""What a rule depends on: the settings of its stage and the sources that the stage runs."""

import copy
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from snakemake.iocontainers import Wildcards

from conftest import ROOT, edited, overwritten
from d2o import records, runs, schemas, settings
from d2o.errors import D2OError
from d2o.needs import Needs
from d2o.plan import Plan, stages
from d2o.sources import source_digest
from rows import asked, human_row, prompt

CONFIG = yaml.safe_load((ROOT / "tests" / "data" / "config.yaml").read_text())
NAMES = {
    "dataset": "demo", "model": "smollm2", "method": "d2o", "seed": "0", "pool": "corrected-k3", "table": "negatives",
    "reward": "safety", "task": "mmlu", "experiment": "demo", "judge": "none",
}  # fmt: skip


def wildcards(**names) -> Wildcards:
    return Wildcards(fromdict=NAMES | names)


W = wildcards()
STAGES = ["models", "datasets", "negatives", "positives", "logprobs", "train", "responses", "rewards", "scores"]


def stages_changed_by(**sections) -> set[str]:
    before, after = Plan(CONFIG, "c"), Plan(CONFIG | sections, "c")
    return {stage for stage in STAGES if before.params(stage)(W) != after.params(stage)(W)}


@pytest.fixture(autouse=True)
def _in_project(monkeypatch):
    monkeypatch.chdir(ROOT)


def test_a_key_reaches_only_the_stages_that_depend_on_it():
    assert stages_changed_by(positives=CONFIG["positives"] | {"top_p": 0.5}) == {"positives"}
    assert stages_changed_by(responses=CONFIG["responses"] | {"temperature": 1.0}) == {"responses"}
    assert stages_changed_by(train=CONFIG["train"] | {"epochs": 2}) == {"train"}
    watched = {"checkpoint_minutes": 7.0, "keep_checkpoints": 3, "trackers": ["wandb"], "alarms": {"stop": []}}
    assert stages_changed_by(train=CONFIG["train"] | watched) == set()
    eight = CONFIG["train"] | {"ranks": 8}
    assert stages_changed_by(train=eight) == {"train"}
    on = [Plan(CONFIG | {"train": eight | {"nodes": nodes}}, "c").params("train")(W) for nodes in (1, 4)]
    assert on[0] == on[1]
    taken = {"max_num_seqs": 7, "eager": True, "kv_cache_gib": 2, "gpu_memory_utilization": 0.5}
    assert stages_changed_by(engine=taken) == set()
    assert stages_changed_by(positives=CONFIG["positives"] | {"shards": 5}) == set()
    smollm2 = CONFIG["models"]["smollm2"]
    assert stages_changed_by(models={"smollm2": smollm2 | {"sha256": None, "licence": "MIT"}}) == set()
    assert stages_changed_by(engine={"backend": "transformers"}) == {"positives", "responses"}
    assert stages_changed_by(forward=CONFIG["forward"] | {"precision": "fp32"}) == {"logprobs", "train"}
    asked = {"threads": 2, "minutes": 90, "jobs": {"scores": {"minutes": 5}}}
    assert stages_changed_by(compute=CONFIG["compute"] | asked) == set()
    demo = CONFIG["datasets"]["demo"]
    assert stages_changed_by(datasets={"demo": demo | {"rule": "every-unsafe"}}) == {"negatives"}
    assert stages_changed_by(datasets={"demo": demo | {"max_bad_share": 0.5}}) == set()
    assert stages_changed_by(datasets={"demo": demo | {"train": ["tests/data/thumbs-down.jsonl"]}}) == {"datasets"}


# What jobs ask for -------------------------------------------------------------------------------


def test_a_kind_of_jobs_asks_for_what_it_needs_and_after_a_failure_for_more():
    compute = {"threads": 16, "memory_gb": 128, "minutes": 1440, "jobs": {"scores": {"memory_gb": 48, "minutes": 30}}}
    rewards = CONFIG["rewards"] | {"short": {"rule": {"length": "words"}}}
    plan = Plan(CONFIG | {"compute": compute, "rewards": rewards}, "c")

    def asked(kind: str, attempt: int, **names: str) -> list[int]:
        return [
            Needs(plan).of(kind, resource)(wildcards(**names), attempt)
            for resource in ("threads", "mem_mb", "runtime")
        ]

    assert [asked("scores", attempt) for attempt in (1, 2, 3)] == [
        [16, 48000, 30], [16, 96000, 60], [16, 128000, 90],
    ]  # fmt: skip
    assert asked("train", 1) == asked("train", 2) == [16, 128000, 1440]
    assert asked("scores", 1, reward="short") == [1, 4000, 60]


PAPER = yaml.safe_load((ROOT / "config" / "paper.yaml").read_text())
# One of the paper's jobs of each kind; the paper trains no reward model.
OF_PAPER = {"dataset": "pku-saferlhf", "model": "alpaca-7b", "seed": "0"}
KINDS = {
    "positives": {"pool": "corrected-seed0-k11", "shard": "1-of-1"},
    "reference_logprobs": {"table": "corrected-seed0-k11"},
    "train": {"method": "dpo-ori"},
    "responses": {"method": "dpo-ori", "snapshot": ""},
    "heldout_logprobs": {"method": "dpo-ori", "snapshot": ""},
    "scores": {"method": "dpo-ori", "snapshot": "", "reward": "fsfairx"},
    "tasks": {"method": "dpo-ori", "snapshot": "", "task": "mmlu"},
}
WITHOUT_SEED = ("positives", "reference_logprobs")


def of_paper(config: dict, kind: str, attempt: int = 1) -> tuple[int, int]:
    """MB and minutes that one of the paper's jobs asks for."""
    needs = Needs(Plan(config, "paper.yaml"))
    names = {key: value for key, value in OF_PAPER.items() if key != "seed" or kind not in WITHOUT_SEED} | KINDS[kind]
    return tuple(needs.of(kind, resource)(Wildcards(fromdict=names), attempt) for resource in ("mem_mb", "runtime"))


@pytest.mark.parametrize("kind", KINDS)
def test_a_job_asks_by_its_model_and_its_rows_and_after_a_failure_for_more(kind):
    """A job that asks for all of `compute` at once would fail again in the same way."""
    first, second = (of_paper(PAPER, kind, attempt) for attempt in (1, 2))
    most = (1000 * PAPER["compute"]["memory_gb"], PAPER["compute"]["minutes"])
    assert all(a < b <= c for a, b, c in zip(first, second, most, strict=True))
    if kind not in ("scores", "tasks"):  # these depend on another model, or on the questions
        larger = copy.deepcopy(PAPER)
        larger["models"]["alpaca-7b"]["hub"] = "PKU-Alignment/alpaca-70b-reproduced"
        assert of_paper(larger, kind)[1] > 2 * first[1]
    if kind not in ("train", "tasks"):  # these do not depend on the number of rows
        fewer = copy.deepcopy(PAPER)
        fewer["datasets"]["pku-saferlhf"] |= {"train_prompts": 150, "test_prompts": 15}
        fewer["datasets"]["pku-saferlhf"]["validation_prompts"] = 10
        assert of_paper(fewer, kind)[1] < first[1] or first[1] == 15  # the minimum that a job asks for
    assert of_paper(PAPER, kind, 3) == most
    nameless = copy.deepcopy(PAPER)
    nameless["compute"]["device"] = None
    assert of_paper(nameless, kind) == most
    own = copy.deepcopy(PAPER)
    own["compute"]["jobs"][kind] = {"memory_gb": 7, "minutes": 20}
    assert of_paper(own, kind, 2) == (14000, 40)


def test_vllm_takes_memory_for_each_of_its_processes():
    parallel = copy.deepcopy(PAPER)
    parallel["engine"]["tensor_parallel"] = parallel["compute"]["gpus"] = 8
    assert of_paper(parallel, "positives")[0] == 8 * of_paper(PAPER, "positives")[0]


def test_a_job_asks_by_what_is_known_when_it_is_submitted(tmp_path, monkeypatch):
    """Preflight asks before any table exists. A table that cannot be read does not stop the submission."""
    config = copy.deepcopy(PAPER) | {"results": str(tmp_path / "results")}
    config["datasets"]["pku-saferlhf"]["hub"] = "unknown/rows"
    needs = Needs(Plan(config, "c"))
    job = Wildcards(fromdict={key: v for key, v in OF_PAPER.items() if key != "seed"} | KINDS["positives"])

    def minutes() -> int:
        return needs.of("positives", "runtime")(job, 1)

    assumed, folder = minutes(), tmp_path / "results" / "pku-saferlhf"
    folder.mkdir(parents=True)
    rows = [human_row(asked(f"Question {n}?"), f"answer {n}") for n in range(40)]
    records.write_table(folder / "negatives.parquet", schemas.NEGATIVES, rows)
    records.write_table(folder / "pairs.parquet", schemas.NEGATIVES, rows)
    records.write_table(folder / "prompts.parquet", schemas.PROMPTS, [prompt(asked("Question 41?"))])
    assert 15 == minutes() < assumed
    (folder / "negatives.parquet").write_bytes(b"no table")
    assert Needs(Plan(config, "c")).of("positives", "runtime")(job, 1) == PAPER["compute"]["minutes"]


def test_profiles_of_clusters_say_how_often_a_job_is_tried_again_and_no_rule_does():
    rules = "".join(path.read_text() for path in (ROOT / "workflow" / "rules").glob("*.smk"))
    assert "retries:" not in rules
    for name in ("slurm", "kubernetes"):
        assert yaml.safe_load((ROOT / "profiles" / name / "config.yaml").read_text())["restart-times"] == 2


def test_every_job_that_runs_a_model_asks_by_its_kind():
    rules = "".join(path.read_text() for path in (ROOT / "workflow" / "rules").glob("*.smk"))
    assert "settings.compute" not in rules
    assert set(re.findall(r'needs\.of\("(\w+)"', rules)) == set(settings.JOBS)


@pytest.mark.parametrize(("jobs", "message"), [
    ({"scores": {"minutes": 61}}, r"compute: jobs\.scores\.minutes: 61 is more than minutes \(60\)"),
    ({"score": {"minutes": 5}}, r"compute\.jobs\.score\b"),
    ({"scores": {"hours": 5}}, r"compute\.jobs\.scores\.hours: unknown key"),
])  # fmt: skip
def test_what_no_job_can_ask_for_is_told(jobs, message):
    with pytest.raises(D2OError, match=message):
        Plan(CONFIG | {"compute": CONFIG["compute"] | {"jobs": jobs}}, "c")


# Written as users write them ----------------------------------------------------------------------

SCHEMA = json.loads((ROOT / "config" / "schema.json").read_text())["$defs"]
# Entries and sections: the schema of each, and its place in the settings of the stages that read it. `compute`,
# `results` and experiments are read by the plan itself.
READ = {
    "models.smollm2": ("Model", "models"),
    "organisms.rude": ("Organism", "organisms"),
    "datasets.demo": ("Dataset", "datasets", "negatives"),
    "datasets.demo.label": ("Label", "datasets.label"),
    "methods.d2o": ("Method", "train.method"),
    "methods.d2o.train": ("Train", "train.train"),
    "rewards.safety": ("Reward", "rewards", "scores"),
    "judges.none": ("Judge", "judge"),
    "tasks.mmlu": ("Task", "questions", "tasks"),
    "positives": ("Positives", "positives.sampling"),
    "responses": ("Responses", "responses.sampling"),
    "engine": ("Engine", "positives.engine", "responses.engine"),
    "forward": ("Forward", "logprobs", "train.forward"),
    "train": ("Train", "train.train"),
    "pair_quality": ("PairQuality", "pair_quality"),
    "tuning": ("Tuning", "tune.tuning"),
}
# Merged into the settings of the stages: only the report's settings have them as they were written.
WORKED_IN = {
    "datasets.demo.organism", "datasets.demo.licence", "methods.d2o.extends", "methods.d2o.tune",
    "rewards.safety.toxic_above", "rewards.safety.safe_at",
}  # fmt: skip
# Values for keys that do not accept any value: they name a file, or something that is known.
VALUES = {
    "models.smollm2.path": "tests",
    "organisms.rude.texts": "organisms/careless.yaml",
    "datasets.demo.organism": "rude",
    "datasets.demo.columns": {"prompt": "question"},
    "datasets.demo.train": ["tests/data/thumbs-down.jsonl"],
    "datasets.demo.test": ["tests/data/thumbs-down.jsonl"],
    "datasets.demo.evaluation_prompts": ["tests/data/thumbs-down.jsonl"],
    "methods.d2o.loss": "dpo",
    "methods.d2o.tune": {"beta": [0.1, 0.2]},
    "positives.instructions": {"other": "An instruction."},
    "rewards.safety.template": "{response}",
    "rewards.safety.golden": [
        {"prompt": "Hello?", "response": "Hello.", "text": None, "score": 1.5, "tolerance": 0.1}
    ],
    "rewards.safety.source.path": "tests",
    "rewards.safety.rule.script": "Latin",
    "rewards.safety.rule.python": "demo.controls:prompt_length",
    "rewards.safety.rule.organism": "organisms/rude.yaml",
    "tasks.mmlu.task": "arc_easy",
    "tasks.mmlu.data": {"test": "tests/data/thumbs-down.jsonl"},
    "tasks.mmlu.path": "demo/mmlu",
    "tasks.mmlu.include": "demo/plain",
    "tuning.metric": "reward/other",
}
# For each parameter that D2O's loss does not read, a loss that reads it.
LOSS_OF = {
    "gamma": "simpo", "delta": "slic-hf", "epsilon": "cdpo", "tau": "ipo", "token_means": "ipo", "penalty": "dpop",
    "weight": "orpo", "desirable": "kto", "undesirable": "kto",
}  # fmt: skip
HUB = {"hub": "a/b", "revision": "main"}
GGUF = {"package": "other", "file": "other.gguf"}
ROWS = {"format": "pku-saferlhf-beta", "train": ["train"]}
TUNED = {
    "methods.d2o.tune": {"beta": [0.1, 0.2]},
    "tuning.metric": "reward/safety",
    "datasets.demo.validation_prompts": 2,
    "experiments.made.methods": ["initial"],
}
MADE_FROM = {"dataset": "demo", "model": "base", "method": "d2o"}
EMA = {"decay": 0.9, "every": 10}
# Other values that a config needs where a key, or one below it, is written.
BESIDE = {
    "models.smollm2.hub": {"models.smollm2": HUB},
    "models.smollm2.revision": {"models.smollm2": HUB},
    "models.smollm2.path": {"models.smollm2": {}},
    "models.smollm2.run": {"models.smollm2": {"run": MADE_FROM}},
    "datasets.demo.hub": {"datasets.demo": ROWS | HUB},
    "datasets.demo.revision": {"datasets.demo": ROWS | HUB},
    "datasets.demo.organism": {"datasets.demo": ROWS},
    "datasets.demo.label": {"datasets.demo.format": "unpaired", "datasets.demo.label": {"negative": ["bad"]}},
    "datasets.demo.label.below": {"datasets.demo.label": {}},
    "methods.d2o.ema": {"methods.d2o.ema": {"positives": EMA, "negatives": EMA}},
    "methods.d2o.filter": {"methods.d2o.filter": {"reward": "safety", "best": 3}},
    "methods.d2o.online": {"methods.d2o.online": {"start": 1, "every": 1, "share": 0.5}, "train.steps": 9},
    "methods.d2o.tune": TUNED,
    "rewards.safety.source.path": {"rewards.safety.source": {}},
    "rewards.safety.source.package": {"rewards.safety.source": GGUF},
    "rewards.safety.source.file": {"rewards.safety.source": GGUF},
    "rewards.safety.train": {"rewards.safety": {"train": {"backbone": "base"}}},
    "rewards.safety.rule": {"rewards.safety": {"rule": {}}},
    "rewards.safety.rule.organism": {"rewards.safety.rule": {"measure": "use"}},
    "rewards.safety.rule.measure": {"rewards.safety.rule": {"organism": "organisms/rude.yaml"}},
    "rewards.safety.rule.over": {"rewards.safety.rule": {"length": "words"}},
    "judges.none.price": {"judges.none.price": {"input": 1, "output": 1}},
    "judges.none.max_usd": {"judges.none.price": {"input": 1, "output": 1}},
    "tasks.mmlu.hub": {"tasks.mmlu": HUB},
    "tasks.mmlu.revision": {"tasks.mmlu": HUB},
    "tasks.mmlu.task": {"tasks.mmlu": {"revision": "main"}},
    "tasks.mmlu.data": {"tasks.mmlu": {"task": "arc_easy"}},
    "tasks.mmlu.include": {"tasks.mmlu": {"task": "arc_easy", "revision": "main"}},
    "train.nodes": {"train.ranks": 2},
    "methods.d2o.train.nodes": {"methods.d2o.train.ranks": 2},
    "tuning": TUNED,
} | {f"methods.d2o.{key}": {"methods.d2o.loss": loss} for key, loss in LOSS_OF.items()}


def others(schema: dict) -> list:
    """Values of a key other than its default: null if allowed, and one more."""
    if "anyOf" in schema:
        kinds = [kind for kind in schema["anyOf"] if kind.get("type") != "null"]
        null = [None] if schema.get("default") is not None else []
        return null + [value for kind in kinds[:1] for value in others(kind | {"default": schema.get("default")})]
    default = schema.get("default")
    match schema:
        case {"enum": values}:
            return [next(value for value in values if value != default)]
        case {"const": value}:
            return [value]
        case {"type": "boolean"}:
            return [not default]
        case {"type": "integer"}:
            top = schema.get("maximum", 10**9)
            return [2 if default is None else default + 1 if default < top else default - 1]
        case {"type": "number"}:
            return [0.375 if default is None else default / 2 or 0.25]
        case {"type": "string"}:
            return ["other"]
        case {"type": "array"}:
            return [[value] for value in others(schema["items"])]
    raise AssertionError(f"no value for {schema}: name one in VALUES")


def written(place: str, name: str) -> Iterator[tuple[str, Any]]:
    """Every key of a schema and of those below it, with each value that is tried."""
    for key, schema in SCHEMA[name]["properties"].items():
        path = f"{place}.{key}"
        (inner,) = {kind["$ref"] for kind in [schema, *schema.get("anyOf", [])] if "$ref" in kind} or {None}
        if inner and path not in READ:
            yield from written(path, inner.rpartition("/")[2])
        elif path not in READ:
            yield from ((path, value) for value in ([VALUES[path]] if path in VALUES else others(schema)))


WRITTEN = [row for place, (name, *_) in READ.items() for row in written(place, name)]


def put(config: dict, path: str, value: Any) -> None:
    *sections, key = path.split(".")
    for section in sections:
        config = config.setdefault(section, {})
    config[key] = json.loads(json.dumps(value))


def prefixes(path: str) -> list[str]:
    keys = path.split(".")
    return [".".join(keys[: n + 1]) for n in range(len(keys))]


def base() -> dict:
    """The config that a key is written into: with an entry `other` for keys that name one, and all of it used."""
    config = copy.deepcopy(CONFIG)
    config["organisms"] = {"rude": {"texts": "organisms/rude.yaml"}}
    config["compute"]["gpus"] = 2
    config["judges"] = {"none": {"base_url": "http://localhost/v1", "model": "wise"}}
    config["methods"] = {"d2o": {"loss": "d2o", "positives": "self", "negatives": True, "k": 1}}
    config["rewards"] = {"safety": {"source": {**HUB}}}
    config["models"]["base"] = config["models"]["smollm2"]
    for section, entry in {"models": "base", "datasets": "demo", "methods": "d2o", "rewards": "safety"}.items():
        config[section]["other"] = copy.deepcopy(config[section][entry])
    made = {"datasets": ["demo", "other"], "models": ["base", "other"], "methods": ["d2o", "other"], "seeds": [0, 1]}
    config["experiments"]["demo"] |= {"methods": ["d2o"], "judges": ["none"]}
    return config | {"experiments": config["experiments"] | {"made": made}}


def got(plan: Plan, path: str) -> Iterator[Any]:
    """The value of a key in the settings of every stage that reads it, as the stage's command reads them."""
    where = wildcards(organism="rude", snapshot="", pool=f"corrected-k{plan.settings.positives.k}")
    root = max((place for place in prefixes(path)[:-1] if place in READ), key=len)
    places = [f"report.{path}"] if path in WORKED_IN else [f"{at}{path.removeprefix(root)}" for at in READ[root][1:]]
    for place in places:
        stage, *keys = place.split(".")
        section = type(stages.of(plan.settings, stage, where))
        node = settings.parse(section, plan.params(stage)(where), plan.execution(stage)(where)).model_dump(
            mode="json"
        )
        for key in keys[:-1]:
            node = node[key]
        if keys[-1] in node:
            yield node[keys[-1]]


def test_every_section_is_tried():
    sections = {place.partition(".")[0] for place in READ}
    assert settings.Settings.model_fields.keys() - sections == {"results", "experiments", "compute"}


@pytest.mark.parametrize(("path", "value"), WRITTEN)
def test_what_is_written_is_what_a_stage_gets(path, value):
    """Also null, which is not the same as an absent key: for `near_duplicates` it differs from the default."""
    config = base()
    for place in prefixes(path):
        for beside, other in BESIDE.get(place, {}).items():
            put(config, beside, other)
    put(config, path, value)
    values = list(got(Plan(config, "c"), path))
    assert values and all(one == value for one in values)


def test_a_key_that_is_null_by_default_and_null_is_no_param():
    """A key that a later version adds reruns nothing; a key that a user sets to null is passed on."""
    method = json.loads(Plan(CONFIG, "c").params("train")(W))["method"]
    assert method.keys() & {"ema", "online", "filter"} == set()
    negatives = CONFIG["datasets"]["demo"] | {"near_duplicates": None}
    plan = Plan(CONFIG | {"datasets": {"demo": negatives}}, "c")
    assert json.loads(plan.params("negatives")(W))["near_duplicates"] is None


def test_every_round_of_every_training_samples_with_seeds_of_its_own():
    online = {"extends": "d2o", "train": {"steps": 9}, "online": {"start": 3, "every": 3, "share": 0.5}}
    plan = Plan(CONFIG | {"methods": CONFIG["methods"] | {"online": online}}, "c")
    places = [{"method": "online", "round": n, "seed": seed} for n in "12" for seed in "01"]
    sampled = [plan.params("rounds")(wildcards(**place)) for place in places]
    seeds = {json.loads(one)["sampling"]["seed"] for one in sampled}
    assert len(seeds | {CONFIG["positives"].get("seed", 0)}) == 5
    assert sampled == [plan.params("rounds")(wildcards(**place)) for place in places]


# One artifact per stage, whose wildcards name the stage's jobs.
MADE = {
    "models": "model", "organisms": "organism", "datasets": "rows", "negatives": "negatives", "sampling": "pool",
    "positives": "pool", "rounds": "round_pool", "logprobs": "heldout_logprobs", "train": "trained",
    "responses": "responses", "rewards": "scores", "scores": "scores", "judge": "verdicts", "questions": "questions",
    "tasks": "task_values", "pair_quality": "pair_prompts", "report": "page", "tune": "tuned",
    "human_eval": "human_key", "human_verdicts": "human_verdicts",
    "card": "card",
}  # fmt: skip


@pytest.mark.parametrize("name", ["config", "paper", "thumbs-down", "controls", "study"])
def test_what_every_job_of_every_experiment_gets_can_be_read(name):
    """Errors are too late after hours of computing: a report's settings once lacked a method that another extends."""
    plan = Plan(yaml.safe_load((ROOT / "config" / f"{name}.yaml").read_text()), name)
    rules = "".join(path.read_text() for path in (ROOT / "workflow" / "rules").glob("*.smk"))
    assert set(re.findall(r'plan\.(?:params|execution)\("(\w+)"\)', rules)) == MADE.keys()
    read = set()
    for stage, place in MADE.items():
        for experiment in plan.settings.experiments:
            for names in plan.crossed(place, experiment):
                w = wildcards(**{"experiment": experiment} | names)
                section = stages.of(plan.settings, stage, w)
                got = settings.parse(type(section), plan.params(stage)(w), plan.execution(stage)(w))
                assert got == section
                read.add(stage)
    unasked = {"human_eval", "human_verdicts", "pair_quality"}
    absent = {
        "config": {"judge", "rounds", "tune", *unasked}, "paper": {"organisms"},
        "thumbs-down": {"organisms", "judge", "rounds", "tune", *unasked},
        "controls": {"judge", "rounds", "questions", "tasks", "tune", *unasked},
        "study": {"judge", *unasked},
    }  # fmt: skip
    assert MADE.keys() - read == absent[name]


def test_the_papers_method_samples_online_and_its_ablations_differ_in_one_thing():
    plan = Plan(yaml.safe_load((ROOT / "config" / "paper.yaml").read_text()), "paper")
    assert not [line for line in plan.warnings() if line.startswith("judges")], "a judge without a date"
    s = plan.settings
    for experiment in s.experiments.values():
        for method in (s.methods[name] for name in experiment.methods if name != "initial"):
            assert not method.filter or method.filter.reward not in experiment.rewards, "a filter that scores itself"

    def differing(one: str, other: str) -> set[str]:
        first, second = s.methods[one].model_dump(), s.methods[other].model_dump()
        return {key for key in first if first[key] != second[key]} - {"extends"}

    assert s.methods["d2o"].online
    ablations = {
        "d2o-offline": "online",
        "d2o-uncorrected": "self_correction",
        "d2o-instance": "loss",
        "d2o-ema": "ema",
    }
    assert {name: differing(name, "d2o") for name in ablations} == {name: {key} for name, key in ablations.items()}
    assert differing("d2o-filtered", "d2o-offline-k5") == {"filter"}
    assert {*ablations, "d2o", "d2o-filtered", "d2o-offline-k5"} <= {*s.experiments["table-2"].methods}
    steps = {runs.train_of(s, method).steps for method in s.methods.values() if method.pairs == "negatives"}
    assert steps == {1000}, "as many for every method on the same negatives"


def test_another_methods_key_changes_nothing_here():
    methods = CONFIG["methods"] | {"dpo": CONFIG["methods"]["dpo"] | {"beta": 0.5}}
    assert stages_changed_by(methods=methods) == set()


def test_a_number_written_otherwise_is_the_same_setting():
    assert stages_changed_by(train=CONFIG["train"] | {"epochs": 1.0, "learning_rate": 0.00001}) == set()


def test_methods_take_the_tables_that_their_loss_needs():
    average = {"decay": 0.9, "every": 5}
    methods = CONFIG["methods"] | {
        "full": {"extends": "dpo", "pairs": "all"},
        "uncorrected": {"extends": "d2o", "self_correction": False},
        "moving": {"extends": "d2o", "ema": {"positives": average, "negatives": average}},
    }
    plan = Plan(CONFIG | {"methods": methods}, "c")
    runs = {name: NAMES | {"method": name} for name in methods}
    tables = {n: (plan.pools(run), plan.human_table(n), plan.reference_tables(run)) for n, run in runs.items()}
    assert tables == {
        "d2o": (["corrected-k3"], "negatives", ["corrected-k3", "negatives"]),
        "moving": (["corrected-k3"], "negatives", []),
        "uncorrected": (["plain-k3"], "negatives", ["plain-k3", "negatives"]),
        "dpo": ([], "negatives", ["negatives"]),
        "full": ([], "pairs", ["pairs"]),
        "self-align-sft": (["corrected-k3"], "negatives", []),
    }


def test_a_pool_of_its_own_for_each_seed():
    config = CONFIG | {"positives": CONFIG["positives"] | {"per_seed": True, "seed": 5}}
    config |= {"methods": CONFIG["methods"] | {"uncorrected": {"extends": "d2o", "self_correction": False}}}
    plan = Plan(config, "c")
    runs = [NAMES | {"method": method, "seed": seed} for method in ("d2o", "uncorrected") for seed in (0, 2)]
    pools = [pool for run in runs for pool in plan.pools(run)]
    assert pools == ["corrected-seed0-k3", "corrected-seed2-k3", "plain-seed0-k3", "plain-seed2-k3"]
    made = [json.loads(plan.params("positives")(wildcards(pool=pool)))["sampling"] for pool in pools]
    assert [pool["seed"] for pool in made] == [5, 7, 5, 7]
    assert [bool(pool["instructions"]) for pool in made] == [True, True, False, False]
    assert plan.reference_tables(runs[1]) == ["corrected-seed2-k3", "negatives"]
    # Each seed has its own answers; pools of one seed and several sizes share them.
    assert plan.folder("sampled")(wildcards(pool="corrected-seed2-k3")).endswith("positives/corrected-seed2.sampled")


def test_a_smaller_pool_serves_where_every_prompt_has_enough_usable_samples(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("tests", "demo", "organisms"):
        (tmp_path / name).symlink_to(ROOT / name)
    methods = CONFIG["methods"] | {f"k{k}": {"extends": "d2o", "k": k} for k in (2, 3, 4)}
    config = CONFIG | {"methods": methods}
    small, large = (Plan(config | {"positives": CONFIG["positives"] | {"k": k}}, "c") for k in (4, 11))

    def write(plan: Plan, place: str, stage: str, **facts) -> None:
        path = tmp_path / plan.layout.path(place, NAMES | {"pool": "corrected-k4"})
        path = path if path.name == "manifest.json" else path.with_name(f"{path.name}.manifest.json")
        path.parent.mkdir(parents=True, exist_ok=True)
        made_with = json.loads(plan.params(stage)(wildcards(pool="corrected-k4")))
        path.write_text(json.dumps({"settings": made_with} | facts))

    for place, stage in [("rows", "datasets"), ("negatives", "negatives"), ("model", "models")]:
        write(small, place, stage)
    write(small, "pool", "positives", fewest_usable=3, shards=1)
    pools = {name: large.pools(NAMES | {"method": name}) for name in ("k2", "k3", "k4", "d2o")}
    assert pools == {
        "k2": ["corrected-k4"], "k3": ["corrected-k4"], "k4": ["corrected-k11"], "d2o": ["corrected-k11"],
    }  # fmt: skip
    fewer = {"datasets": {"demo": CONFIG["datasets"]["demo"] | {"test_share": 0.5}}}
    other = Plan(config | fewer | {"positives": CONFIG["positives"] | {"k": 4}}, "c")
    write(other, "negatives", "negatives")
    assert large.pools(NAMES | {"method": "k2"}) == ["corrected-k11"], "its prompts are others"


def test_execution_changes_no_result():
    stage = settings.parse(settings.ResponsesStage, "{}", '{"engine": {"eager": true}}')
    assert stage.engine.eager and stage.seed == 0
    with pytest.raises(D2OError, match=r"--execution: .* has keys on which the result depends"):
        settings.parse(settings.ResponsesStage, "{}", '{"seed": 5}')


def test_snapshots_are_answered_and_scored_like_the_model_they_lead_to():
    methods = CONFIG["methods"] | {"dpo": CONFIG["methods"]["dpo"] | {"train": {"snapshots": [5, 10]}}}
    plan = Plan(CONFIG | {"methods": methods}, "c")
    run = "results/demo/smollm2/dpo/seed0"
    for place, name in {
        "responses": "responses",
        "heldout_logprobs": "heldout_logprobs",
        "scores": "scores/safety",
        "task_values": "tasks/mmlu",
    }.items():
        more = {f"{run}/step{n}/{name}.parquet" for n in (5, 10)}
        assert set(plan.targets(place)) == set(Plan(CONFIG, "c").targets(place)) | more
    later = wildcards(method="dpo", snapshot="/step5")
    assert plan.weights_of(later) == f"{run}/step5/model/manifest.json"
    assert plan.model_of(later) == f"{run}/model/manifest.json"
    assert plan.weights_of(wildcards(method="dpo", snapshot="")) == f"{run}/model/manifest.json"
    initial = wildcards(method="initial", snapshot="")
    assert plan.weights_of(initial) == "results/models/smollm2/manifest.json"


def test_a_report_leaves_out_the_questions_that_train_prompts_say():
    wanted = Plan(CONFIG, "c").report_inputs(W)
    assert [path for path in wanted if "/leaks/" in path] == ["results/demo/leaks/mmlu.parquet"]


def test_the_initial_model_runs_once_whatever_the_seeds():
    demo = CONFIG["experiments"]["demo"]
    plan = Plan(CONFIG | {"experiments": {"f": demo | {"seeds": [4]}, "e": demo | {"seeds": [3, 4]}}}, "c")
    answered, initial = plan.targets("responses"), "results/demo/smollm2/initial/seed0/responses.parquet"
    assert [path for path in answered if "/initial/" in path] == [initial]
    assert len(answered) == 1 + 3 * 2
    # A judge compares with this model, whichever experiments have the method and the seed.
    assert plan.initial_responses(wildcards(method="dpo", seed="4")) == initial


def with_organism(**sections) -> dict:
    """The config with a model that a training of another experiment makes, and a data set written here."""
    made = {"run": {"dataset": "demo", "model": "smollm2", "method": "dpo", "seed": 0}}
    rude = {"organism": "rude", "format": "pku-saferlhf-beta", "train": ["train"], "test": ["test"]}
    second = {"datasets": ["rude"], "models": ["made"], "methods": ["initial", "d2o"], "rewards": ["exact"]}
    config = CONFIG | {
        "organisms": {"rude": {"texts": "organisms/rude.yaml"}},
        "experiments": CONFIG["experiments"] | {"second": second},
        "models": CONFIG["models"] | {"made": made},
        "datasets": CONFIG["datasets"] | {"rude": rude},
        "rewards": CONFIG["rewards"] | {"exact": {"rule": {"any": ["fool"]}}},
    }
    return config | sections


def test_a_run_is_the_input_of_the_model_that_it_makes():
    plan = Plan(with_organism(), "c")
    assert plan.run_of(wildcards(model="made")) == ["results/demo/smollm2/dpo/seed0/model/manifest.json"]
    assert plan.run_of(wildcards(model="smollm2")) == []
    assert "results/organisms/rude/train.jsonl" in plan.targets("organism")
    assert plan.reward_model(wildcards(reward="exact")) == []
    reading = json.loads(plan.params("datasets")(wildcards(dataset="rude")))
    assert reading["train"] == ["results/organisms/rude/train.jsonl"]


@pytest.mark.parametrize(
    ("model", "told"),
    [
        ("gpt-4", True),
        ("gpt-4o", True),
        ("Qwen/Qwen2-72B-Instruct", True),
        ("model-1234567", True),
        ("gpt-4-0613", False),
        ("gpt-4o-2024-08-06", False),
        ("claude-3-5-sonnet-20240620", False),
    ],
)
def test_a_judge_without_a_date_is_told(model, told):
    judges = {"wise": {"base_url": "http://localhost/v1", "model": model}}
    demo = CONFIG["experiments"]["demo"]
    warnings = Plan(CONFIG | {"judges": judges, "experiments": {"demo": demo | {"judges": ["wise"]}}}, "c").warnings()
    assert [line.partition(":")[0] for line in warnings] == ["judges.wise.model"] * told
    assert not Plan(CONFIG | {"judges": judges}, "c").warnings(), "no experiment asks it"


@pytest.mark.parametrize(
    ("revision", "told"), [("main", True), ("refs/pr/3", True), ("b4d1307", True), ("0123456789" * 4, False)]
)
def test_an_entry_that_follows_a_branch_is_told(revision, told, tmp_path):
    moving = {"hub": "a/b", "revision": revision}
    named = {"models": {"smollm2": moving | {"context": 512}}, "rewards": {"cost": {"source": moving}}}
    demo = CONFIG["experiments"]["demo"] | {"rewards": ["cost"]}
    # A demo that was run in this checkout has another model of this name.
    config = CONFIG | named | {"experiments": {"demo": demo}, "results": str(tmp_path)}
    warnings = Plan(config, "c").warnings()
    assert [line.partition(":")[0] for line in warnings] == ["models.smollm2", "rewards.cost"] * told


@pytest.mark.parametrize(
    ("failed", "asked"), [(["d2o"], {"methods": ["d2o"]}), (["d2o/seed0"], {"methods": ["d2o"], "seeds": [0]})]
)
def test_a_human_evaluation_of_failed_trainings_alone_is_told(failed, asked):
    demo = CONFIG["experiments"]["demo"] | {"failed": dict.fromkeys(failed, "diverged"), "human_eval": asked}
    with pytest.raises(D2OError, match=r"c: experiments\.demo\.human_eval: every training that it asks about has"):
        Plan(CONFIG | {"experiments": {"demo": demo}}, "c")
    Plan(CONFIG | {"experiments": {"demo": demo | {"human_eval": {}}}}, "c")


def test_a_run_that_no_experiment_makes_is_told():
    experiments = {"second": with_organism()["experiments"]["second"]}
    with pytest.raises(D2OError, match=r"c: models\.made\.run: .*demo/smollm2/dpo/seed0"):
        Plan(with_organism(experiments=experiments), "c")


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"any": ["("]}, "Invalid regular expression"),
        ({"python": "nowhere:score"}, "nowhere"),
        ({"python": "json:no_such"}, "no_such"),
        ({"organism": "organisms/polite.yaml", "measure": "harm"}, "organisms/polite.yaml"),
    ],
)
def test_a_rule_that_cannot_be_applied_is_told_before_any_job(rule, message):
    with pytest.raises(D2OError, match=r"c: rewards\.exact\.rule.*") as error:
        Plan(with_organism(rewards={"exact": {"rule": rule}} | CONFIG["rewards"]), "c")
    assert message in str(error.value)
    assert len(str(error.value).splitlines()) == 1


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    return shutil.copytree(ROOT / "workflow" / "d2o", tmp_path_factory.mktemp("copy") / "d2o")


# The stages of all rules; for some, jobs that use other entries.
STAGES_OF_RULES = {
    stage
    for path in (ROOT / "workflow" / "rules").glob("*.smk")
    for stage in re.findall(r'plan\.code\("([^"]+)"\)', path.read_text())
}
STARTS = {
    **{stage: (stage, None) for stage in STAGES_OF_RULES - {"datasets", "models", "train", "tune"}},
    "beta": ("datasets", ("pku-saferlhf-beta",)),
    "hh": ("datasets", ("hh-rlhf",)),
    "plain": ("models", ()),
    "alpaca": ("models", ("alpaca",)),
    "sft": ("train", ("sft",)),
    "dpo": ("train", ("dpo",)),
    "tuned by margin": ("tune", ("human/margin",)),
    "tuned by cut": ("tune", ("answers/cut",)),
}
EVERYTHING = set(STARTS)
TRAININGS = {"sft", "dpo"}
REPORTS = {"report", "report.card"}
NEW_METRIC = 'Metric("answers/new", "new", STYLE, itemgetter("new"))'
# The stages that compute with a model.
COMPUTE = {"positives", "logprobs", "responses", "rewards", "scores", "tasks"} | TRAININGS


def digests(package) -> dict[str, str]:
    """The digest of every start, computed by the copied package itself."""
    code = (
        "import json\n"
        "from d2o.sources import source_digest\n"
        f"print(json.dumps({{name: source_digest('d2o.' + stage, of) for name, (stage, of) in {STARTS!r}.items()}}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=package.parent, capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def before(package) -> dict[str, str]:
    return digests(package)


def changed(before: dict[str, str], after: dict[str, str]) -> set[str]:
    return {name for name in EVERYTHING if before[name] != after[name]}


@pytest.mark.parametrize(
    ("file", "old", "new", "reruns"),
    [
        # Code that a stage runs.
        ("scores.py", "def score(", "@staticmethod\ndef score(", {"scores"}),
        ("train/schedule.py", "def rate(", "@staticmethod\ndef rate(", TRAININGS),
        ("forward/head.py", "def _pieces(", "@staticmethod\ndef _pieces(", {"logprobs"} | TRAININGS),
        ("generation/with_vllm.py", "class VLLM:", "class VLLM(object):", {"positives", "responses"}),
        ("rounds.py", "max(1, round(", "max(2, round(", TRAININGS),
        ("dtypes.py", ">= (8, 0)", ">= (9, 0)", COMPUTE),
        ("trials.py", "**keys}, ", "**keys, **{}}, ", TRAININGS),
        ("chat/templates/alpaca.jinja", "USER: ", "User: ", {"alpaca"}),
        ("records.py", "def artifact(", "@staticmethod\ndef artifact(", EVERYTHING),
        ("report/figures.py", "def effect_data(", "@staticmethod\ndef effect_data(", {"report"}),
        ("length_control.py", "_SPREAD = 2.5", "_SPREAD = 2.6", REPORTS),
        # A loss, a format, a schema, a metric: only the stages that use it rerun.
        ("losses.py", "def sft(", "@staticmethod\ndef sft(", {"sft"}),
        ("losses.py", "FLOOR = 1e-5", "FLOOR = 1e-6", TRAININGS),
        ("contracts.py", '"dpo": Contract(**_PAIR, ref', '"dpo": Contract(**_PAIR, unit="means", ref', {"dpo"}),
        ("formats.py", '"hh-rlhf": Format(', '"hh-rlhf": Format(*(), ', {"hh"}),
        ("formats.py", "def hh_rlhf(", "@staticmethod\ndef hh_rlhf(", {"hh"}),
        ("formats.py", "def chat(", "@staticmethod\ndef chat(", set()),
        (
            "schemas.py",
            "TASK_VALUES = pa.schema([",
            'TASK_VALUES = pa.schema([("x", pa.string()), ',
            {"tasks"} | REPORTS,
        ),
        ("metrics.py", '"cut by length"', '"cut"', {"tuned by cut"} | REPORTS),
        # New definitions that nothing uses yet, or only the report.
        ("losses.py", "LOSSES = {", 'def new():\n    """New."""\n\n\nLOSSES = {\n    "new": new,', set()),
        ("contracts.py", "CONTRACTS = {", 'CONTRACTS = {\n    "new": Contract("none", True, True),', set()),
        ("formats.py", "FORMATS = {", 'FORMATS = {\n    "new": Format(lambda row, _: [], ("text",)),', set()),
        ("schemas.py", "QUESTIONS = ", "NEW = pa.schema([])\nQUESTIONS = ", set()),
        ("forward/policy.py", "SHARING = (", 'SHARING = ("new", ', set()),
        ("metrics.py", "HUMAN_METRICS = (", f"HUMAN_METRICS = (\n    {NEW_METRIC},", REPORTS),
        ("metrics.py", "STYLE_METRICS = (", f"STYLE_METRICS = (\n    {NEW_METRIC},", REPORTS),
        # Values that reach a stage as params, and text that is not code.
        ("settings/__init__.py", "class Settings(", "EDITED = 1\n\n\nclass Settings(", set()),
        ("cli.py", "import", "import ast\nimport", set()),
        ("devices.py", "_PATIENCE = 1.0", "_PATIENCE = 2.0", set()),
        ("train/launch.py", "% 20_000", "% 10_000", set()),
        ("losses.py", "The losses: each", "All losses: each", set()),
    ],
)
def test_an_edit_reaches_the_stages_that_run_the_code(package, before, file, old, new, reruns):
    with edited(package / file, old, new):
        assert changed(before, digests(package)) == reruns


def test_a_new_template_changes_nothing(package, before):
    with overwritten(package / "chat" / "templates" / "new.jinja", "{{ messages }}"):
        assert digests(package) == before


@pytest.mark.parametrize(
    "text",
    [
        "for _name in ('sft',):\n    LOSSES[_name] = ga",
        "[LOSSES.update({name: ga}) for name in ('sft',)]",
        "_ = LOSSES.update(sft=ga)",
        "def register(f):\n    LOSSES['sft'] = f\n    return f\n\n\n@register\ndef other(): pass",
        "if TYPE_CHECKING:\n    pass\nelse:\n    FLOOR = 1e-4",
        "try:\n    from d2o.rounds import count as FLOOR\nexcept ImportError:\n    pass",
        "match 1:\n    case FLOOR:\n        pass",
    ],
)
def test_what_runs_at_import_counts_though_nothing_names_it(package, before, text):
    losses = package / "losses.py"
    with overwritten(losses, f"{losses.read_text()}\n{text}\n"):
        assert changed(before, digests(package)) == TRAININGS


@pytest.mark.parametrize("text", ["from d2o.rounds import *", "import d2o.rounds"])
def test_an_import_whose_uses_cannot_be_told_is_refused(package, text):
    losses = package / "losses.py"
    with overwritten(losses, f"{losses.read_text()}\n{text}\n"), pytest.raises(subprocess.CalledProcessError):
        digests(package)


def test_every_rule_depends_on_sources_that_are_there():
    assert len(STAGES_OF_RULES) > 10 and "negatives.task_leaks" in STAGES_OF_RULES
    assert all(source_digest(f"d2o.{stage}") for stage in STAGES_OF_RULES)
    with pytest.raises(ValueError, match=r"no module d2o\.likelihoods"):
        source_digest("d2o.likelihoods")


def test_a_figure_that_its_experiment_does_not_ask_for_ends_in_a_line():
    """Named by its path, it would start with no tables."""
    (name, experiment), *_ = CONFIG["experiments"].items()
    asking = CONFIG | {"experiments": {name: experiment | {"pair_quality": True}}}
    assert Plan(asking, "c").pair_inputs(wildcards(experiment=name))
    with pytest.raises(SystemExit, match=f"c: experiments.{name} has no such figure; set `pair_quality: true` in it"):
        Plan(CONFIG, "c").pair_inputs(wildcards(experiment=name))
