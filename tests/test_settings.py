"""A wrong config is reported in one line that names the key, before anything heavy is imported."""

import contextlib
import copy
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import hypothesis
import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from conftest import ROOT
from d2o import layout, runs, settings, trials
from d2o.contracts import CONTRACTS
from d2o.errors import D2OError
from d2o.plan import Plan
from d2o.settings import docs
from d2o.settings.checks import KINDS

EMA = {side: {"decay": 0.9, "every": 10} for side in ("positives", "negatives")}
SELF = {"loss": "sft", "positives": "self"}
ONLINE = {"start": 5, "every": 5, "share": 0.5}
CDPO = {"loss": "cdpo", "positives": "human", "negatives": True}
RUDE = {"texts": "organisms/rude.yaml"}
MADE = {"dataset": "demo", "model": "smollm2", "method": "d2o"}
DEMO = yaml.safe_load((ROOT / "tests" / "data" / "config.yaml").read_text())


def changed(path: str, value) -> dict:
    """The tests' config with one key set, or removed when `value` is None."""
    config = copy.deepcopy(DEMO)
    *parents, key = path.split(".")
    node = config
    for parent in parents:
        node = node[parent]
    if value is None:
        del node[key]
    else:
        node[key] = value
    return config


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("methods.d2o.betaa", 0.1, "config.yaml: methods.d2o.betaa: unknown key; did you mean 'beta'?"),
        ("positives.k", 0, "positives.k: Input should be greater than or equal to 1, not 0"),
        ("positives.k", "four", "positives.k: Input should be a valid integer"),
        ("positives.tempreature", 1, "positives.tempreature: unknown key; did you mean 'temperature'?"),
        ("experiments.demo.methods", ["dop"], "'dop' is not an entry of methods; did you mean 'dpo'?"),
        ("experiments.demo.rewards", ["x"], "'x' is not an entry of rewards; there are: safety"),
        ("experiments.demo.seeds", [-1], "experiments.demo.seeds[0]: Input should be greater than"),
        ("methods.d2o.loss", "d3o", "methods.d2o.loss: Input should be 'd2o'"),
        ("methods.d2o.extends", "ppo", "methods.d2o.extends: 'ppo' is not an entry of methods"),
        ("methods.d2o.extends", "d2o", "methods.d2o.extends: d2o → d2o is a circle"),
        ("methods.d2o.negatives", False, "methods.d2o: the loss d2o needs `negatives: true`"),
        ("methods.dpo.positives", "self", "methods.dpo: the loss dpo takes one positive a group: set `k: 1`"),
        ("methods.d2o.k", 5, "methods.d2o.k: 5 positives are asked of a pool of 3; raise positives.k"),
        ("methods.d2o.train", {"lr": 1}, "methods.d2o.train.lr: unknown key"),
        ("train", {"ranks": 8, "nodes": 3}, "train: nodes: 3 cannot share 8 ranks evenly; make `ranks` a multiple"),
        ("methods.d2o.train", {"nodes": 2}, "methods.d2o.train: nodes: 2 cannot share 1 ranks evenly; make"),
        ("methods.self-align-sft.gamma", 1, "methods.self-align-sft: the loss sft reads no `gamma`; it reads: none"),
        ("methods.dpo.alpha", 0.1, "methods.dpo: the loss dpo reads no `alpha`; it reads: beta"),
        ("methods.dpo.beta", 0, "methods.dpo: the loss dpo learns nothing with `beta: 0`"),
        ("methods.x", CDPO | {"epsilon": 0.5}, "methods.x.epsilon: Input should be less than 0.5, not 0.5"),
        ("methods.x", CDPO | {"loss": "npo"}, "methods.x: the loss npo takes no positives"),
        ("methods.x", CDPO | {"loss": "unlikelihood", "negatives": False}, "unlikelihood needs `negatives: true`"),
        ("methods.x", {"loss": "sft", "positives": "self", "ema": EMA}, "takes no moving references"),
        (
            "methods.x",
            SELF | {"filter": {"reward": "saftey", "best": 2}},
            "methods.x.filter.reward: 'saftey' is not an",
        ),
        (
            "methods.x",
            SELF | {"k": 3, "filter": {"reward": "safety", "best": 2}},
            "filter.best: 2 samples cannot give the 3",
        ),
        ("methods.x", CDPO | {"filter": {"reward": "safety", "best": 2}}, "filter: it chooses among self-generated"),
        (
            "engine",
            {"tensor_parallel": 2},
            "engine.tensor_parallel: 2 GPUs are to share a model, and a job has 0; raise",
        ),
        ("methods.x", SELF | {"online": ONLINE}, "set methods.x.train.steps to more than that, not null"),
        ("methods.x", SELF | {"online": ONLINE, "train": {"steps": 5}}, "the first round lies after step 5"),
        ("methods.x", CDPO | {"online": ONLINE}, "takes them with `positives: self` alone"),
        ("methods.x", SELF | {"loss": "kto", "online": ONLINE, "negatives": True}, "takes no online rounds"),
        ("models.smollm2.path", "x", "models.smollm2: give exactly one of hub, path, package, run"),
        ("models.smollm2.package", None, "models.smollm2: give exactly one of hub, path, package, run"),
        ("datasets.demo.hub", "a/b", "datasets.demo: `hub` needs a `revision`"),
        ("models.smollm2", {"hub": "a/b"}, "models.smollm2: `hub` needs a `revision`"),
        ("tasks.mmlu", {"hub": "a/b"}, "tasks.mmlu: `hub` needs a `revision`"),
        ("datasets.demo.train", None, "datasets.demo.train: this key is required"),
        ("methods.initial", SELF, "methods.initial: this name is taken in results/; choose another"),
        ("rewards.safety.better", "lower", "rewards.safety: a reward model trained here scores safe answers higher"),
        ("rewards.safety.template", "{prompt}", "rewards.safety: template: '{prompt}' is neither `chat` nor `pair`"),
        ("rewards.safety.template", "chatty", "rewards.safety: template: 'chatty' is neither `chat` nor `pair`"),
        (
            "rewards.safety.template",
            "{prompt}{prompt}{response}",
            "nor a text with {response}, or {prompt} and {response}, each once",
        ),
        ("rewards.safety.train.backbone", "gpt", "rewards.safety.train.backbone: 'gpt' is not an entry of models"),
        ("models.x", {"run": MADE | {"method": "dop"}}, "models.x.run.method: 'dop' is not an entry of methods; did"),
        ("models.x", {"run": MADE | {"model": "x"}}, "models.x.run: x → x is a circle"),
        ("models.x", {"run": MADE, "trust_remote_code": True}, "models.x: sha256 and trust_remote_code go with"),
        (
            "organisms",
            {"x": RUDE | {"flipped_labels": 1.5}},
            "organisms.x.flipped_labels: Input should be less than or",
        ),
        (
            "organisms",
            {"x": RUDE | {"prompts": 0}},
            "organisms.x.prompts: Input should be greater than or equal to 1",
        ),
        ("datasets.demo.organism", "rude", "datasets.demo.organism: 'rude' is not an entry of organisms"),
        ("models." + "x" * 65, {"path": "x"}, "at most 64 characters"),
        ("methods.DPO", SELF, "methods.DPO: dpo differs by case only, which some file systems do not see"),
        (
            "judges",
            {"gpt": {"base_url": "https://me:secret@judge.example/v1", "model": "gpt"}},
            "judges.gpt.base_url: no name, password, query or fragment: they would stand in logs",
        ),
        (
            "judges",
            {"gpt": {"base_url": "https://judge.example/v1?api_key=secret", "model": "gpt"}},
            "judges.gpt.base_url: no name, password, query or fragment: they would stand in logs",
        ),
        ("methods", {"tuned.json": SELF}, "methods.tuned.json: this is a name for a file; choose another"),
        ("datasets.organisms", {"format": "negatives", "train": ["x"]}, "datasets.organisms: this name is taken"),
    ],
)
def test_wrong_config_is_one_clear_line(path, value, message):
    with pytest.raises(D2OError) as error:
        settings.load(changed(path, value), "config.yaml")
    assert message in str(error.value)
    assert str(error.value).startswith("config.yaml: ")


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("https://judge.example/v1#key=planted", "no name, password, query or fragment"),
        ("https:/me:planted@judge.example/v1", "no URL of a server"),
        ("https:///me:planted@judge.example/v1", "no URL of a server"),
        ("https://me:pl/planted@judge.example/v1", "no URL of a server"),
        ("https://me:planted@[judge]/v1", "no URL of a server"),
        ("https://me:planted@judge\N{ACCOUNT OF}/v1", "no URL of a server"),
        ("me:planted@judge.example/v1", "no URL of a server"),
        ("me/planted@judge.example/v1", "no URL of a server"),
        ("localhost:8000/v1", "no URL of a server: write scheme, host and /v1, as in http://127.0.0.1:8000/v1"),
    ],
)
def test_a_judges_url_has_a_host_and_holds_no_secret_that_a_message_would_quote(url, message):
    with pytest.raises(D2OError, match=f"^config.yaml: judges.gpt.base_url: {message}") as error:
        settings.load(changed("judges", {"gpt": {"base_url": url, "model": "gpt"}}), "config.yaml")
    assert "planted" not in str(error.value)


@pytest.mark.parametrize("url", ["http://127.0.0.1:8000/v1", "https://judge.example/v1", "http://[::1]:8000/v1/"])
def test_a_judges_url_may_be_of_any_host(url):
    assert settings.Judge(base_url=url, model="gpt").base_url == url


ENTRY = {section.removesuffix("s"): section for section in ("experiments", *KINDS)}


def folders_beside_entries() -> list[tuple[str, str]]:
    """Each section with each name of a folder that the rules create beside its entries."""
    rules = "".join(path.read_text() for path in sorted((ROOT / "workflow" / "rules").glob("*.smk")))
    places = {"results": ""} | {place: layout.pattern(place) for place in layout.PLACES}
    paths = [
        f"results/{places[place]}{rest}".replace("//", "/") for place, rest in re.findall(r'"<(\w+)>([^"]*)"', rules)
    ]
    children = defaultdict(set)
    for path in paths:
        *folders, _ = path.split("/")
        for depth, name in enumerate(folders):
            children["/".join(folders[:depth])].add(name)
    return sorted(
        {
            (ENTRY[entry[1:-1]], name)
            for names in children.values()
            for entry in names
            if entry[1:-1] in ENTRY
            for name in names
            if "{" not in name
        }
    )


def _places(node, at=()):
    """The place of every value in a config, as keys and indices from its top."""
    yield at
    inside = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in inside:
        yield from _places(value, (*at, key))


CONFIGS = {name: yaml.safe_load((ROOT / "config" / name).read_text()) for name in ("config.yaml", "study.yaml")}
PLACES = [(name, at) for name, config in CONFIGS.items() for at in _places(config) if at]
ODD = [None, True, 0, -1, 3, float("inf"), float("nan"), "", "a", "../a", "\ud800", "a" * 300]
ODD += [[], [[]], ["a"], [None], {}, {"a": 1}, {"a": {}}, {1: 2}]


@given(st.sampled_from(PLACES), st.sampled_from(ODD))
@hypothesis.settings(max_examples=150, deadline=None)
@example(("study.yaml", ("methods", "d2o-k1", "extends")), ["a"])
@example(("study.yaml", ("methods", "d2o-long", "train")), 3)
@example(("config.yaml", ("tasks", "mmlu", "path")), "a" * 300)
def test_whatever_a_value_is_a_config_is_planned_or_refused(place, odd):
    name, (*keys, last) = place
    config = copy.deepcopy(CONFIGS[name])
    node = config
    for key in keys:
        node = node[key]
    node[last] = odd
    try:
        with contextlib.chdir(ROOT):
            Plan(config, origin=name)
    except D2OError as error:
        assert str(error).startswith(name)


def test_folders_are_found_beside_the_entries_of_every_section_but_judges():
    assert {section for section, _ in folders_beside_entries()} == {*KINDS, "experiments"} - {"judges"}


# `make bench` writes into the first of the two, and no rule does; the second is tracked.
OTHERS = [("datasets", "benchmarks"), ("datasets", "README.md")]


@pytest.mark.parametrize(("section", "name"), [*folders_beside_entries(), *OTHERS])
def test_an_entry_cannot_have_the_name_of_what_lies_beside_it(section, name):
    """It would be emptied with the entry, or mixed up with it."""
    entries = DEMO.get(section) or {"x": {"texts": "organisms/rude.yaml"}}
    for one in (name, name.title()):  # some file systems ignore case
        with pytest.raises(D2OError, match=rf"{section}\.{one}: this name is taken in results/"):
            settings.load(DEMO | {section: entries | {one: next(iter(entries.values()))}}, "config.yaml")


def test_a_model_may_not_be_made_from_itself_by_way_of_others():
    filtered = SELF | {"k": 1, "filter": {"reward": "scorer", "best": 2}}
    config = DEMO | {
        "models": DEMO["models"] | {"x": {"run": MADE | {"model": "y"}}, "y": {"run": MADE | {"method": "filtered"}}},
        "methods": DEMO["methods"] | {"filtered": filtered},
        "rewards": {"scorer": {"train": {"backbone": "x"}}} | DEMO["rewards"],
    }
    with pytest.raises(
        D2OError, match=r"models\.x\.run: x → y → x is a circle; a model cannot be made from itself"
    ) as error:
        settings.load(config, "config.yaml")
    assert len(str(error.value).splitlines()) == 1


def test_a_split_that_an_organism_does_not_have_is_named():
    config = DEMO | {"organisms": {"rude": RUDE}}
    config["datasets"] = {"demo": {"organism": "rude", "format": "pku-saferlhf-beta", "train": ["trian"]}}
    with pytest.raises(D2OError, match=r"datasets\.demo: .trian. is no split of an organism; did you mean .train."):
        settings.load(config, "config.yaml")


def test_all_that_does_not_fit_together_is_told_at_once():
    config = changed("methods.d2o.k", 5) | {"engine": {"tensor_parallel": 2}}
    with pytest.raises(D2OError) as error:
        settings.load(config, "config.yaml")
    lines = str(error.value).splitlines()
    assert [line.split(": ")[1] for line in lines] == ["engine.tensor_parallel", "methods.d2o.k"]


def test_missing_local_file_is_named_with_its_key(monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(
        D2OError, match=r"config\.yaml: datasets\.demo\.train: no such file or folder: nowhere\.jsonl"
    ):
        Plan(changed("datasets.demo.train", ["nowhere.jsonl"]), "config.yaml")


def test_more_files_than_a_command_line_holds_are_refused_and_their_folder_is_taken(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    folder = tmp_path / "log"
    folder.mkdir()
    with pytest.raises(D2OError, match=r"^c\.yaml: datasets\.demo: .*log: a folder without any file of rows"):
        Plan(changed("datasets.demo.train", [str(folder)]), "c.yaml")
    paths = [folder / f"part-{number:05}-of-03500.jsonl" for number in range(3500)]
    for path in paths:
        path.touch()
    told = r"^c\.yaml: experiments\.demo: its data sets name 3,500 files, more than .*; put them in a folder"
    with pytest.raises(D2OError, match=told):
        Plan(changed("datasets.demo.train", [*map(str, paths)]), "c.yaml")
    half = changed("datasets.demo.train", [*map(str, paths[:1750])])
    half["datasets"]["one.more"] = half["datasets"]["demo"] | {"train": [*map(str, paths[1750:])]}
    half["experiments"]["demo"]["datasets"] = ["demo", "one.more"]
    with pytest.raises(D2OError, match=told):  # the report gets both
        Plan(half, "c.yaml")
    (tmp_path / "ж").mkdir()
    two_bytes = [tmp_path / "ж" / f"{number:03}{'ж' * 100}.jsonl" for number in range(450)]
    for path in two_bytes:
        path.touch()
    with pytest.raises(D2OError, match="name 450 files"):
        Plan(changed("datasets.demo.train", [*map(str, two_bytes)]), "c.yaml")
    plan, names = Plan(changed("datasets.demo.train", [str(folder)]), "c.yaml"), SimpleNamespace(dataset="demo")
    assert plan.dataset_files(names) == [*map(str, paths)]
    assert len(plan.params("datasets")(names)) < 1000


def test_extending_merges_train_key_by_key():
    config = changed("methods.d2o.train", {"epochs": 2, "learning_rate": 1e-4})
    config["methods"]["child"] = {"extends": "d2o", "beta": 0.5, "train": {"epochs": 3}}
    loaded = settings.load(config, "c")
    child = loaded.methods["child"]
    assert (child.loss, child.beta, child.alpha) == ("d2o", 0.5, 0.1)
    assert runs.train_of(loaded, child).epochs == 3
    assert runs.train_of(loaded, child).learning_rate == 1e-4
    assert runs.train_of(loaded, child).groups_per_step == DEMO["train"]["groups_per_step"]


def test_a_parameter_left_out_or_null_takes_the_default_of_the_loss():
    simpo = settings.Method(loss="simpo", gamma=0.5)
    assert (simpo.beta, simpo.gamma, simpo.alpha) == (2.0, 0.5, None)
    assert settings.Method(loss="dpo", beta=None).beta == 0.1


def test_extending_hands_down_only_what_the_new_loss_reads():
    config = changed("methods.sft", {"extends": "dpo", "loss": "sft", "negatives": False})
    config["methods"]["simpo"] = {"extends": "dpo", "loss": "simpo"}
    loaded = settings.load(config, "c")
    assert loaded.methods["sft"].beta is None
    assert (loaded.methods["simpo"].beta, loaded.methods["simpo"].gamma) == (0.1, 1.0)
    config["methods"]["sft"]["beta"] = 0.1
    with pytest.raises(D2OError, match=r"methods\.sft: the loss sft reads no `beta`"):
        settings.load(config, "c")


@pytest.mark.parametrize("positives", ["none", "self"])
def test_unlikelihood_takes_positives_or_none(positives):
    config = changed("methods.x", {"loss": "unlikelihood", "negatives": True, "positives": positives})
    assert settings.load(config, "c").methods["x"].positives == positives


def test_settings_survive_the_command_line():
    stage = settings.TrainStage(method=settings.Method(loss="dpo", positives="human", negatives=True), seed=3)
    assert settings.parse(settings.TrainStage, stage.model_dump_json(exclude_none=True)) == stage


SHIPPED = sorted([*(ROOT / "config").glob("*.yaml"), *(ROOT / "demo").glob("*.yaml")])


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_configs_are_valid(path, monkeypatch):
    """Also configs that need a user's own rows; their only error is that these files are missing."""
    monkeypatch.chdir(ROOT)
    config = yaml.safe_load(path.read_text())
    datasets = settings.load(config, path.name).datasets.values()
    yours = [file for dataset in datasets for file in [*dataset.train, *dataset.test] if file.startswith("data/")]
    absent = [file for file in yours if not Path(file).exists()]
    with (
        pytest.raises(D2OError, match=f"no such file or folder: {absent[0]}") if absent else contextlib.nullcontext()
    ):
        Plan(config, path.name)


def test_generated_files_have_not_drifted():
    assert (ROOT / "config" / "schema.json").read_text() == docs.schema(), "run `make settings`"
    assert (ROOT / "config" / "README.md").read_text() == docs.settings_page(), "run `make settings`"


def test_the_table_of_losses_names_each_with_its_source():
    rows = docs.settings_page().split("## Losses")[1].splitlines()
    for loss, contract in CONTRACTS.items():
        (row,) = (row for row in rows if row.startswith(f"| `{loss}` |"))
        assert all(f"`{key}`" in row for key in contract.parameters)


def test_settings_are_read_without_heavy_imports():
    heavy = "{'torch', 'transformers', 'vllm', 'deepspeed', 'numpy', 'datasets'}"
    code = f"import sys, d2o.cli, d2o.plan; sys.exit(bool({heavy} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_command_line_tells_wrong_settings_in_one_line():
    command = [sys.executable, "-m", "d2o", "logprobs", "--model", "x", "--negatives", __file__]
    done = subprocess.run(
        [*command, "--output", "y", "--settings", '{"precison": "bf16"}'], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stderr == "error: --settings: precison: unknown key; did you mean 'precision'?\n"


TUNED = {
    "experiments": {"e": {"datasets": ["d"], "models": ["m"], "methods": ["a", "b"], "rewards": ["r"]}},
    "models": {"m": {"path": "m"}},
    "datasets": {"d": {"format": "negatives", "train": ["d.jsonl"], "validation_prompts": 5}},
    "methods": {
        name: {"loss": "npo", "negatives": True, "tune": {"beta": [0.1, 0.2], "train.epochs": [1, 2]}}
        for name in "ab"
    },
    "rewards": {"r": {"rule": {"any": ["x"]}}},
    "tuning": {"metric": "reward/r"},
}


def test_trials_are_methods_of_their_own():
    methods = settings.load(TUNED, "c").methods
    names = {method: trials.names(method, methods[method].tune) for method in "ab"}
    assert list(methods) == ["a", "b", *names["a"], *names["b"]] and len(set(names["a"])) == 4
    values = [(methods[name].beta, methods[name].train["epochs"]) for name in names["a"]]
    assert values == [(0.1, 1), (0.1, 2), (0.2, 1), (0.2, 2)]
    assert not any(methods[name].tune for name in names["a"])
    assert set(names["a"]) < set(trials.names("a", {"beta": [0.3, 0.1, 0.2], "train.epochs": [1, 2]}))
    taken = {names["a"][1]: TUNED["methods"]["a"] | {"tune": {}}}
    with pytest.raises(D2OError, match=rf"c: methods\.{names['a'][1]}: this is the name of a trial of a; choose"):
        settings.load(TUNED | {"methods": TUNED["methods"] | taken}, "c")
    kept = settings.load(TUNED, "c").only("e")
    assert settings.parse(settings.Settings, kept.model_dump_json()) == kept
    assert kept.methods.keys() == methods.keys() and kept.rewards.keys() == {"r"}


@pytest.mark.parametrize(
    ("section", "entry", "change", "message"),
    [
        ("methods", "a", {"tune": {"beta": [0.1]}}, "b is tuned in 4 trials and a in 1, which is no fair comparison"),
        ("methods", "a", {"tune": {}}, "b is tuned in 4 trials and a in 1"),
        ("methods", "a", {"tune": {"loss": ["ga"]}}, "methods.a.tune: loss cannot be tuned; make a method for each"),
        ("methods", "a", {"tune": {"betta": [1, 2, 3, 4]}}, ".betta"),
        ("methods", "a", {"tune": {"train.epoch": [1, 2, 3, 4]}}, ".train.epoch"),
        ("datasets", "d", {"validation_prompts": 0}, "set datasets.d.validation_prompts"),
        (
            "tuning",
            None,
            {"metric": "task/mmlu/acc"},
            "tuning.metric: set it to a metric of answers or log-probs",
        ),
        ("tuning", None, {"metric": None}, "such as reward/NAME, not null"),
        ("tuning", None, {"metric": "reward/other"}, "such as reward/NAME, not reward/other"),
    ],
)
def test_wrong_tuning_is_told_with_the_config(section, entry, change, message):
    part = TUNED[section]
    part = part | change if entry is None else part | {entry: part[entry] | change}
    with pytest.raises(D2OError) as error:
        settings.load(TUNED | {section: part}, "c")
    assert message in str(error.value)
