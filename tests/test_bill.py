"""The bill of a config: formulas against numbers computed by hand, jobs against the rules, all against a run."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pyarrow as pa
import pytest
import yaml

from conftest import ROOT
from d2o import bill, chat, groups, layout, schemas, settings
from d2o.bill import arithmetic, hardware, jobs, rows, shapes
from d2o.bill.jobs import Job
from d2o.bill.rows import Human
from d2o.bill.shapes import Shape
from d2o.bill.work import Bill
from d2o.errors import D2OError
from d2o.layout import PLACES
from d2o.plan import Plan
from d2o.settings import Method
from d2o.train import sizes
from rows import asked, human_row

LLAMA, _ = shapes.of_name("alpaca-7b-reproduced")
SMALL = Shape(layers=2, hidden=4, inner=8, queries=4, keys=2, vocabulary=10)
CONFIG = ROOT / "tests" / "data" / "config.yaml"


# Models ------------------------------------------------------------------------------------------


def test_the_size_of_a_model_is_known_by_its_name():
    assert LLAMA.parameters == pytest.approx(6.738e9, rel=0.001)
    assert shapes.of_name("SmolLM2-135M-Instruct.Q4_1.gguf")[0].parameters == pytest.approx(134.5e6, rel=0.001)
    assert shapes.of_name("microsoft/Phi-3-mini-4k-instruct")[0].parameters == pytest.approx(3.82e9, rel=0.01)
    assert shapes.of_name("Qwen/Qwen2-1.5B-Instruct")[0].parameters == pytest.approx(1.54e9, rel=0.01)
    sizes = {"some-30B": 30e9, "llm-v0.1-1.1b": 1.1e9, "tiny_410M": 410e6, "gemma-2-27b-it": 27e9, "vicuna-13b": 13e9,
             "Qwen3-1.7B": 1.7e9, "deepseek-llm-67b": 67e9, "Mixtral-8x7B": 47e9}  # fmt: skip
    for name, size in sizes.items():
        assert shapes.of_name(name)[0].parameters == pytest.approx(size, rel=0.35), name
    assert shapes.of_name("FsfairX-LLaMA3-RM-v0.1")[0].parameters == pytest.approx(8.03e9, rel=0.01)
    assert "no size" in shapes.of_name("mystery")[1]


def test_the_folder_of_a_model_goes_before_its_name(tmp_path):
    assert shapes.of_folder(tmp_path) is None
    config = {"num_attention_heads": 2, "hidden_size": 4, "num_hidden_layers": 2, "intermediate_size": 8}
    config |= {"num_key_value_heads": 1, "vocab_size": 10, "tie_word_embeddings": False, "model_type": "llama"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert shapes.of_folder(tmp_path) == SMALL
    assert SMALL.linear == 2 * (4 * 4 * 2 + 4 * 2 * 2 + 3 * 4 * 8)
    assert SMALL.parameters == SMALL.linear + 2 * 40


# Formulas ----------------------------------------------------------------------------------------


def test_a_forward_pass_takes_two_operations_a_weight_and_token():
    assert arithmetic.forward_flops(SMALL, 3, 0, 3) == 2 * 3 * (SMALL.linear + SMALL.head)
    # Scores and their sum: 2 operations each, over 5 tokens, 4 wide, in 2 layers.
    assert arithmetic.forward_flops(SMALL, 1, 5, 0) - 2 * SMALL.linear == 2 * 2 * 5 * 4 * 2
    # 6 N per token: the known cost of a training step.
    assert 3 * arithmetic.forward_flops(LLAMA, 1, 0, 1) == pytest.approx(6 * LLAMA.parameters, rel=0.03)


def test_a_group_takes_what_a_training_says_of_itself():
    from d2o.train import watch

    members = [groups.Response(str(n), [0] * 6) for n in range(3)]
    group = groups.Group("p", [0] * 8, members[:2], members[2:])
    shape = watch.ModelSizes(SMALL.linear, SMALL.head, SMALL.attention, trained=True)
    assert 3 * arithmetic.group_flops(SMALL, 8, 6, 3) == shape.flops([group])


def test_memory_by_zero_stage():
    """7.5B weights on 64 devices, as in ZeRO's Figure 1: 15 GB of weights, and 90 GB of optimizer in 64 parts."""
    at = [arithmetic.states(7.5e9, 7.5e9, stage, 64, half=True) for stage in range(4)]
    assert [state.weights / 1e9 for state in at] == [15, 15, 15, pytest.approx(15 / 64)]
    assert [state.optimizer / 1e9 for state in at] == [90, *[pytest.approx(90 / 64)] * 3]
    assert [state.gradients / 1e9 for state in at] == [45, 45, *[pytest.approx(1 + 30 / 64)] * 2]
    assert arithmetic.states(1e9, 1e9, 0, 1, half=False).total == 16e9
    for half, stage, optimizer in ((True, 0, 20e9), (True, 2, 20e9 / 8), (False, 0, 16e9)):
        assert arithmetic.states(1e9, 1e9, stage, 8, half, moving=True).optimizer == optimizer
    adapters = arithmetic.states(7.5e9, 2e7, 2, 8, half=True)
    assert adapters.total == pytest.approx(15e9, rel=0.01)
    assert sizes.checkpoint(6.74e9, 2, False) / 1e9 == pytest.approx(94.4, abs=0.1)


def test_keys_and_values_of_a_token():
    assert LLAMA.kv_bytes == 2 * 32 * 4096 * 2


def test_decoding_waits_for_the_weights_or_for_the_products():
    few = arithmetic.decode_seconds(LLAMA, 100, 0, 1, (1e18, 1e12))
    assert few == pytest.approx(100 * 2 * LLAMA.parameters / 1e12)
    many = arithmetic.decode_seconds(LLAMA, 100, 0, 100, (1e12, 1e18))
    assert many == pytest.approx(100 * 2 * (LLAMA.linear + LLAMA.head) / 1e12)


def test_activations_of_a_measured_step():
    """docs/measured.md: 4 groups of 2,200 tokens at 135M, 7.8 GB over weights and gradients."""
    shape, _ = shapes.of_name("smollm2-135m")
    kept = arithmetic.activations(shape, 8800, False) + arithmetic.head_pieces(shape, 256 << 20)
    assert kept / 1e9 == pytest.approx(7.8, rel=0.15)
    assert arithmetic.activations(shape, 8800, True) < 0.2 * arithmetic.activations(shape, 8800, False)


# Jobs --------------------------------------------------------------------------------------------


def test_every_rule_has_a_line_and_its_benchmark():
    text = "".join(path.read_text() for path in sorted((ROOT / "workflow" / "rules").glob("*.smk")))
    rules = re.findall(r"^(?:use )?rule (\w+)(?: as (\w+) with)?:(.*?)(?=^(?:use )?rule |\Z)", text, re.M | re.S)
    written = {
        new or name: benchmark[1]
        for name, new, body in rules
        if (benchmark := re.search(r'benchmark:\n +"(.+)\.benchmark\.tsv"', body))
    }
    assert written == {name: rule.benchmark for name, rule in jobs.RULES.items()}


def test_every_rule_that_is_no_table_or_report_is_estimated():
    assert not [name for name, r in jobs.RULES.items() if r.kind != jobs.OTHERS and not hasattr(Bill, f"_{name}")]


def test_the_names_of_a_path_are_those_that_it_was_made_of():
    names = {name: f"{name}-1.5" for place in PLACES for name in layout.wildcards(place)} | {"snapshot": "/step50"}
    for place in PLACES:
        assert layout.names_in(place, layout.below(place, names)) == {n: names[n] for n in layout.wildcards(place)}
    assert layout.names_in("responses", "d/m/d2o/seed0/responses.parquet")["snapshot"] == ""
    assert layout.names_in("responses", "d/m/d2o/seed0/other.parquet") == {}


SUMMARY = "output_file\tdate\trule\tlog-file(s)\tstatus\tplan\n" + "".join(
    f"results/{path}\t-\t{rule}\t-\tmissing\tupdate pending\n"
    for rule, path in [
        ("write_report", "reports/demo/report.html"),
        ("write_report", "reports/demo/table.csv"),
        ("fetch_model", "models/smollm2/manifest.json"),
        ("extract_negatives", "demo/negatives.parquet"),
        ("extract_negatives", "demo/pairs.parquet"),
        ("sample_positives", "demo/smollm2/positives/corrected-k3.shards/1-of-1.parquet"),
        ("train_method", "demo/smollm2/d2o/seed0/model/manifest.json"),
        ("train_method", "demo/smollm2/d2o/seed0/train.jsonl"),
        ("answer_prompts", "demo/smollm2/d2o/seed0/responses.parquet"),
        ("answer_prompts", "demo/smollm2/d2o/seed0/step6/responses.parquet"),
        ("write_organism", "organisms/rude/demonstrations.jsonl"),
        ("write_organism", "organisms/rude/train.jsonl"),
    ]
)


def test_a_job_is_counted_once_whatever_the_number_of_its_outputs():
    made = jobs.parsed(SUMMARY, "results")
    assert [job.rule for job in made] == [
        "write_report", "fetch_model", "extract_negatives", "sample_positives", "train_method", "answer_prompts",
        "answer_prompts", "write_organism",
    ]  # fmt: skip
    snapshot = made[6]
    assert snapshot.kind == "responses"
    assert snapshot.names["snapshot"] == "/step6"
    assert str(snapshot.benchmark("results")).endswith("d2o/seed0/step6/logs/responses.benchmark.tsv")


@pytest.mark.parametrize("rule", [name for name, about in jobs.RULES.items() if about.kind in settings.JOBS])
def test_the_wildcards_of_a_rule_tell_what_its_job_takes(rule):
    about = jobs.RULES[rule]
    names = dict.fromkeys(layout.wildcards(about.place), "name")
    job = Job.of(about.kind, names)
    assert (job.kind, job.names) == (about.kind, names)
    assert job.rule == rule or {job.rule, rule} == {"train_method", "train_again"}


# Rows --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [
    {"loss": "d2o", "positives": "self", "negatives": True, "k": 2},
    {"loss": "dpo", "positives": "human", "negatives": True},
    {"loss": "sft", "positives": "safe-human"},
    {"loss": "sft", "positives": "self", "k": 2},
    {"loss": "ga", "negatives": True},
])  # fmt: skip
def test_groups_are_counted_as_a_training_makes_them(method):
    human = [
        {"prompt_id": f"p{n // 3}", "split": "train", "messages": [], "negative": f"n{n}",
         "positive": f"y{n}" if n % 2 else None, "positive_unsafe": n == 1}
        for n in range(9)
    ]  # fmt: skip
    pool = [
        {"prompt_id": f"p{n}", "sample": k, "text": f"s{k}", "finish": "stop", "usable": True}
        for n in range(3)
        for k in range(2)
    ]
    wanted = Method.model_validate(method)
    made = list(groups.view(wanted, human, pool))
    columns = pa.schema([schemas.NEGATIVES.field(name) for name in rows._COUNTED])
    counted = rows._human(pa.Table.from_pylist(human, columns))
    assert counted.groups(wanted, by_prompt=False) == len(made)
    assert counted.groups(wanted, by_prompt=True) == len(groups.merged(made))


def test_what_is_capped_is_counted_as_capped(monkeypatch):
    monkeypatch.chdir(ROOT)
    plan = Plan(yaml.safe_load(CONFIG.read_text()), "c")
    data = rows.of(plan.settings, "demo", "smollm2")
    lines = len(Path("tests/data/preferences.jsonl").read_text().splitlines())
    assert data.train.prompts == min(40, 0.75 * lines)
    assert data.asked == 0.25 * lines


def test_more_rows_of_a_prompt_stay_in_proportion():
    assert Human(9, 3, 6, 3, 12).scaled(1) == Human(3, 1, 2, 1, 4)


# The whole ---------------------------------------------------------------------------------------


def small(tmp_path: Path, monkeypatch, **sections) -> Path:
    """A config in a folder of its own, whose plan is `SUMMARY`."""
    monkeypatch.chdir(ROOT)
    config = tmp_path / "small.yaml"
    config.write_text(yaml.safe_dump(yaml.safe_load(CONFIG.read_text()) | {"results": str(tmp_path)} | sections))
    monkeypatch.setattr(jobs, "planned", lambda *_: jobs.parsed(SUMMARY, "results"))
    return config


def test_the_bill_of_a_small_config(tmp_path, monkeypatch):
    config = small(tmp_path, monkeypatch, compute={"threads": 1, "memory_gb": 2, "minutes": 60})
    page = bill.lines(config, [], "cpu")
    by_kind = {line.split("  ")[0]: line.split() for line in page if line[:1].strip()}
    assert "core-hours" in page[0]
    assert by_kind["responses"][1] == "2"
    assert by_kind["all"][1] == "8"
    weights = 2 * 134.5e6 / 1e9
    assert float(by_kind["train"][-1]) == pytest.approx(weights, abs=0.05)
    assert any(re.match(r"train: a job takes \d of memory_gb, and compute.memory_gb is 2", line) for line in page)
    assert any("0.134B weights" in line and "smollm2-135m" in line for line in page)


def test_models_that_are_released_are_counted_while_they_are_there(tmp_path, monkeypatch):
    def passing(keep: str) -> float:
        experiments = yaml.safe_load(CONFIG.read_text())["experiments"]
        kept = {name: experiment | {"keep": keep} for name, experiment in experiments.items()}
        (line,) = [
            line
            for line in bill.lines(small(tmp_path, monkeypatch, experiments=kept), [], "cpu")
            if line.startswith("Beside what is left")
        ]
        assert ("until they are released" in line) == (keep != "model")
        return float(re.search(r"([\d.]+) GB for each training", line)[1])

    weights = 2 * 134.5e6 / 1e9
    assert passing("nothing") - passing("model") == pytest.approx(weights, abs=0.1)


def test_checkpoints_of_trainings_that_wait_for_a_round_are_counted_once_a_training(tmp_path, monkeypatch):
    methods = yaml.safe_load(CONFIG.read_text())["methods"]
    methods["d2o"] |= {"online": {"start": 1, "every": 1, "share": 1.0}, "train": {"steps": 3}}
    config = small(tmp_path, monkeypatch, methods=methods)
    policies = [f"demo/smollm2/d2o/seed{seed}/rounds/{n}/policy/manifest.json" for seed in (0, 1) for n in (1, 2)]
    rounds = "".join(f"results/{path}\t-\ttrain_to_round\t-\tmissing\tupdate pending\n" for path in policies)
    monkeypatch.setattr(jobs, "planned", lambda *_: jobs.parsed(SUMMARY + rounds, "results"))
    (line,) = [line for line in bill.lines(config, [], "cpu") if line.startswith("Beside what is left")]
    checkpoints = 2 * sizes.checkpoint(134.5e6, 2, False) / 1e9
    assert line.endswith(f"; {checkpoints:.1f} GB of checkpoints if all that are online wait for a round.")


def test_the_memory_of_a_training_over_nodes_is_that_of_one(tmp_path, monkeypatch):
    def host(nodes: int) -> float:
        train = yaml.safe_load(CONFIG.read_text())["train"] | {"ranks": 4, "nodes": nodes}
        plan = Plan(yaml.safe_load(small(tmp_path, monkeypatch, train=train).read_text()), "c")
        job = next(job for job in jobs.planned() if job.rule == "train_method")
        return Bill(plan, hardware.DEVICES["H100"]).of(job).host

    assert host(nodes=4) == pytest.approx(host(nodes=1) / 4, rel=0.01)  # each node maps all groups


def test_a_training_with_moving_references_takes_two_float32_copies_more(tmp_path, monkeypatch):
    def host(ema: dict | None) -> float:
        methods = yaml.safe_load(CONFIG.read_text())["methods"]
        methods["d2o"] |= {"ema": ema}
        plan = Plan(yaml.safe_load(small(tmp_path, monkeypatch, methods=methods).read_text()), "c")
        job = next(job for job in jobs.planned() if job.rule == "train_method")
        return Bill(plan, hardware.DEVICES["cpu"]).of(job).host

    average = {"decay": 0.9, "every": 2}
    more = host({"positives": average, "negatives": average}) - host(None)
    assert more == pytest.approx(8 * 134.5e6, rel=0.01)


@pytest.mark.parametrize(("prompts", "seconds"), [(43_333, 40), (130_000, 100)])
def test_the_groups_of_a_training_take_what_was_measured(tmp_path, monkeypatch, prompts, seconds):
    """docs/measured.md: 130,000 groups of eleven positives and a negative; three share a prompt, or none do."""
    methods = yaml.safe_load(CONFIG.read_text())["methods"]
    methods["d2o"] |= {"k": 11}
    sections = {"methods": methods, "positives": {"k": 11}}
    plan = Plan(yaml.safe_load(small(tmp_path, monkeypatch, **sections).read_text()), "c")
    estimate = Bill(plan, hardware.DEVICES["H100"])
    train = Human(130_000, prompts, 130_000, 130_000, 260_000)
    data = rows.DatasetSize(train, train, train, 100, 100, 40, 230, "made up")
    monkeypatch.setattr(estimate, "data", lambda *_: data)
    job = next(job for job in jobs.planned() if job.rule == "train_method")
    encoding = estimate.of(job).starting - hardware.DEVICES["H100"].starts["train"]
    assert encoding == pytest.approx(seconds, rel=0.05)


def test_what_is_unknown_ends_in_one_line(tmp_path, monkeypatch):
    config = small(tmp_path, monkeypatch)
    with pytest.raises(D2OError, match="no experiment 'dmo'; there are: demo"):
        bill.lines(config, ["dmo"], "H100")
    with pytest.raises(D2OError, match="--device: there is no 'H10'; did you mean 'H100'"):
        bill.lines(config, [], "H10")
    with pytest.raises(D2OError, match="no job is finished"):
        bill.check(config, [], "cpu")


def test_a_finished_job_is_compared(tmp_path, monkeypatch):
    config = small(tmp_path, monkeypatch)
    run = tmp_path / "demo" / "smollm2" / "d2o" / "seed0"
    (run / "logs").mkdir(parents=True)
    plan = Plan(yaml.safe_load(config.read_text()), "c")
    job = next(job for job in jobs.planned() if job.rule == "train_method")
    work = Bill(plan, hardware.DEVICES["cpu"]).of(job)
    measured = f"s\tmax_rss\n{2 * work.seconds}\t{work.host / 2**20}\n"
    (run / "logs" / "train.benchmark.tsv").write_text(measured)
    (run / "train.jsonl").write_text(json.dumps({"seconds": 2.0, "tokens_per_second": work.tokens / 4}) + "\n")
    page = bill.check(config, [], "cpu")
    assert page[0] == "cpu: 2.00 times as slow as assumed, by its trainings"
    (line,) = (line.split() for line in page if line.startswith("train"))
    assert (line[4], line[7], line[10]) == ("1.00", "0.50", "1.00")


@pytest.mark.slow
def test_the_paper_is_counted_as_snakemake_plans_it(monkeypatch):
    """README and docs/cluster.md state the same figures."""
    monkeypatch.chdir(ROOT)

    def total(page: list[str]) -> list[str]:
        return next(line.replace(",", "").split() for line in page if line.startswith("all"))

    page = bill.lines(Path("config/paper.yaml"), [], "H100")
    count, hours, left = total(page)[1], float(total(page)[3]), float(total(page)[-1])
    planned = re.search(r"the plan: (\d+) jobs", (ROOT / "docs" / "cluster.md").read_text())[1]
    assert int(planned) == int(count) + 1  # Snakemake counts `all` too
    (usd,) = [line.rpartition("at most ")[2] for line in page if line.startswith("judges.gpt-4: ")]
    of_table_1 = float(total(bill.lines(Path("config/paper.yaml"), ["table-1"], "H100"))[3])
    readme = " ".join((ROOT / "README.md").read_text().split())
    assert f"about {hours:,.0f} H100-hours, {of_table_1:,.0f} of them for Table 1" in readme
    assert f"{left:,.0f} GB left on disk" in readme
    assert f"at most {usd} for the judge" in readme
    assert not [line for line in page if re.match(r"\w+: a job takes ", line)], "more than its first attempt asks for"


def test_lengths_are_the_models_own_where_it_is_here(tiny_model, tmp_path):
    s = Plan(yaml.safe_load((ROOT / "config" / "config.yaml").read_text()), "config.yaml").settings
    texts = [("Why?", "So."), ("Why not?", None)]
    table = [human_row(asked(question), "Never.", positive=positive) for question, positive in texts]
    tokenizer = chat.load_tokenizer(tiny_model)
    prompts = [len(chat.encode_prompt(tokenizer, row["messages"])) for row in table]
    answers = [len(tokenizer(text, add_special_tokens=False).input_ids) + 1 for text in ("So.", "Never.", "Never.")]
    assert rows._lengths(table, tiny_model, s) == pytest.approx((sum(prompts) / 2, sum(answers) / 3))
    assert rows._lengths(table, tmp_path, s) != rows._lengths(table, tiny_model, s)
