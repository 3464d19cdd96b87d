"""Stage `tune`: choose the best trial of a method, by a metric of the validation prompts."""

from __future__ import annotations

from pathlib import Path

from d2o import metrics, records, statistics
from d2o.errors import D2OError
from d2o.settings import Experiment, TuneStage
from d2o.statistics import Sample


def choose(stage: TuneStage, results: Path, dataset: str, model: str, output: Path) -> None:
    """Write the values of the best trial (`chosen`), and what each trial reached (`trials`), as JSON.

    Means are over the validation prompts for which every trial has a value, of one training per trial; of equal
    trials the first is chosen.

    Raises:
        D2OError: as `metrics.single`, and where there is no such prompt.
    """
    archive, (kind, _, name) = metrics.Archive(results), stage.tuning.metric.partition("/")
    experiment = Experiment(
        datasets=[dataset],
        models=[model],
        methods=list(stage.trials),
        seeds=[stage.tuning.seed],
        rewards=[name] if kind == "reward" else [],
    )
    rewards = {name: stage.reward} if stage.reward else {}
    values = metrics.single(archive, experiment, rewards, stage.tuning.metric)
    validation = values[values["prompts"] == "validation"].dropna(subset="value")
    counts = validation.groupby("cluster")["method"].nunique()
    validation = validation[validation["cluster"].isin(counts[counts == len(stage.trials)].index)]
    if validation.empty:
        raise D2OError(
            f"{dataset}: no validation prompt has a value of {stage.tuning.metric} for every trial; choose another "
            f"metric, or name the trial that has none in the experiment's `failed`"
        )
    trials = []
    for trial, rows in validation.groupby("method", sort=False):
        estimate = statistics.mean(Sample(rows["value"].to_numpy(), rows["cluster"].to_numpy()))
        ends = {"mean": estimate.mean, "low": estimate.low, "high": estimate.high, "n": estimate.n}
        trials.append({"trial": trial, "values": stage.trials[trial]} | ends)
    sign = 1 if validation["better"].iloc[0] == "higher" else -1
    best = max(trials, key=lambda trial: sign * trial["mean"])
    chosen = {"chosen": best["values"], "trial": best["trial"], "metric": stage.tuning.metric, "trials": trials}
    with records.artifact(output, stage, archive.inputs) as draft:
        records.write_json(draft.path, chosen)
