"""The jobs of a config, as Snakemake itself plans them: nothing is counted twice, and nothing by hand."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from d2o import layout
from d2o.errors import D2OError


@dataclass(frozen=True)
class CountedRule:
    """How a rule's jobs are counted.

    Attributes:
        kind: line of the bill.
        place: where its first output lies (`layout.PLACES`).
        benchmark: the file in which Snakemake writes how long a job took: `<place>` and names as in `layout.PLACES`,
            without the suffix.
    """

    kind: str
    place: str
    benchmark: str


# Tables, choices and reports: seconds on one core each; they are only counted.
OTHERS = "tables, reports"

RULES = {
    "fetch_model": CountedRule("models", "model", "<results>/models/logs/{model}"),
    "fetch_reward": CountedRule("models", "fetched_reward", "<results>/rewards/logs/{reward}"),
    "train_reward": CountedRule("rewards", "trained_reward", "<data>/rewards/logs/{reward}"),
    "sample_positives": CountedRule("positives", "pool_shard", "<base>/logs/positives-{pool}-{shard}"),
    "sample_round": CountedRule("positives", "round_shard", "<run>/logs/round{round}-sample"),
    "compute_reference_logprobs": CountedRule(
        "reference_logprobs", "reference_logprobs", "<base>/logs/reference_logprobs-{table}"
    ),
    "compute_round_logprobs": CountedRule("reference_logprobs", "round_logprobs", "<run>/logs/round{round}-logprobs"),
    "train_method": CountedRule("train", "trained", "<run>/logs/train"),
    "train_to_round": CountedRule("train", "round_policy", "<run>/logs/round{round}-train"),
    "train_again": CountedRule("train", "trained_again", "<run>/logs/train-again"),
    "answer_prompts": CountedRule("responses", "responses", "<point>/logs/responses"),
    "compute_heldout_logprobs": CountedRule("heldout_logprobs", "heldout_logprobs", "<point>/logs/heldout_logprobs"),
    "score_responses": CountedRule("scores", "scores", "<point>/logs/scores-{reward}"),
    "score_positives": CountedRule("scores", "pool_scores", "<base>/logs/scores-{pool}-{reward}"),
    "score_pairs": CountedRule("scores", "pair_scores", "<data>/pair_quality/logs/scores-{reward}-{preference}"),
    "answer_questions": CountedRule("tasks", "task_values", "<point>/logs/tasks-{task}"),
    "judge_responses": CountedRule("judge", "verdicts", "<run>/logs/judge-{judge}"),
    "judge_pairs": CountedRule("judge", "pair_verdicts", "<data>/pair_quality/logs/judge-{judge}"),
    "write_organism": CountedRule(OTHERS, "organism", "<results>/organisms/logs/{organism}"),
    "read_dataset": CountedRule(OTHERS, "rows", "<data>/logs/rows"),
    "extract_negatives": CountedRule(OTHERS, "negatives", "<data>/logs/negatives"),
    "merge_positives": CountedRule(OTHERS, "pool", "<base>/logs/positives-{pool}"),
    "merge_round": CountedRule(OTHERS, "round_pool", "<run>/logs/round{round}-pool"),
    "choose_pairs": CountedRule(OTHERS, "pair_prompts", "<data>/pair_quality/logs/pairs"),
    "choose_trial": CountedRule(OTHERS, "tuned", "<base>/{method}/logs/tune"),
    "fetch_questions": CountedRule(OTHERS, "questions", "<results>/tasks/logs/{task}"),
    "find_leaks": CountedRule(OTHERS, "leaks", "<data>/logs/leaks-{task}"),
    "plot_pair_quality": CountedRule(OTHERS, "pair_quality_figure", "<reports>/logs/{experiment}-pair-quality"),
    "write_human_pages": CountedRule(OTHERS, "human_key", "<human_eval>/logs/pages"),
    "read_human_verdicts": CountedRule(OTHERS, "human_verdicts", "<human_eval>/logs/verdicts"),
    "release_weights": CountedRule(OTHERS, "released", "<run>/logs/released"),
    "restore_weights": CountedRule(OTHERS, "restored", "<run>/logs/restored"),
    "write_report": CountedRule(OTHERS, "page", "<reports>/logs/{experiment}"),
    "write_card": CountedRule(OTHERS, "card", "<run>/logs/card"),
}


@dataclass(frozen=True)
class Job:
    """One job: its rule, and the names that its output's path is made of."""

    rule: str
    wildcards: tuple[tuple[str, str], ...]

    @classmethod
    def of(cls, kind: str, wildcards: Any) -> Job:
        """The job of a kind with these wildcards; where several rules have them, of the first rule."""
        names = dict(wildcards.items())
        rule = next(
            r for r, about in RULES.items() if about.kind == kind and layout.wildcards(about.place) == {*names}
        )
        return cls(rule, tuple(names.items()))

    @property
    def names(self) -> dict[str, str]:
        """The value of each wildcard."""
        return dict(self.wildcards)

    @property
    def kind(self) -> str:
        """The line of the bill."""
        return RULES[self.rule].kind

    def benchmark(self, results: str) -> Path:
        """The file in which Snakemake writes how long the job took."""
        return Path(results, f"{layout.expanded(RULES[self.rule].benchmark)}.benchmark.tsv".format_map(self.names))


def planned(config: Path, results: str, targets: Sequence[str]) -> list[Job]:
    """The jobs that make the targets, finished ones included. Takes some seconds; no job is run.

    Args:
        results: the folder of results of the config.
    Raises:
        D2OError: where Snakemake has no plan, with its message.
    """
    snakefile = Path(__file__).parents[3] / "Snakefile"
    command = [sys.executable, "-m", "snakemake", "--snakefile", str(snakefile), "--configfile", str(config)]
    done = subprocess.run([*command, "--summary", "--", *targets], capture_output=True, text=True)
    if done.returncode:
        raise D2OError(f"{config}: Snakemake has no plan: {done.stderr.strip() or done.stdout.strip()}")
    return parsed(done.stdout, results)


def parsed(summary: str, results: str) -> list[Job]:
    """The jobs of a `snakemake --summary`, each once, whatever the number of its outputs."""
    columns, *lines = (line.split("\t") for line in summary.splitlines())
    jobs: dict[Job, None] = {}
    for line in lines:
        output = dict(zip(columns, line, strict=True))
        if rule := RULES.get(output["rule"]):
            names = layout.names_in(rule.place, output["output_file"].removeprefix(f"{results}/"))
            if names and names.get("split", "train") == "train":  # an organism is one job for all its splits
                jobs[Job(output["rule"], tuple(names.items()))] = None
    return list(jobs)
