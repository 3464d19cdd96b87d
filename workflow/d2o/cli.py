"""The command `d2o`: one subcommand a stage, the same work with or without Snakemake.

Each imports its stage only when called, so that help and messages about wrong input come at once.
"""

from __future__ import annotations

import atexit
import gc
import locale
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from d2o import killed, settings, texts
from d2o.errors import D2OError
from d2o.settings import docs

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)

Json = Annotated[str, typer.Option("--settings", help="the stage's settings as JSON; keys below")]
Input = Annotated[Path, typer.Option(exists=True, dir_okay=False)]
Output = Annotated[Path, typer.Option(dir_okay=False)]
Model = Annotated[Path, typer.Option("--model", help="model folder, or the manifest in it")]
Execution = Annotated[str, typer.Option(help="JSON of the keys that change no result, over those of --settings")]


def main() -> None:
    """Run the command; wrong input ends in one line on stderr and exit status 1."""
    # The libraries of a stage are a million objects that stay: looking for garbage among them takes a second or two,
    # most of it at the exit.
    gc.set_threshold(50_000)
    atexit.register(gc.freeze)
    if locale.getpreferredencoding(False).lower() != "utf-8":  # all that is read and written is UTF-8
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])
    if not sys.stderr.isatty():  # a shell itself reports what was killed
        killed.watch()
    try:
        app()
    except D2OError as error:
        sys.exit("\n".join(f"error: {texts.visible(line)}" for line in str(error).splitlines()))


def _command(section: type[settings.Section] | None = None):
    """Register a function as subcommand, with the keys of its settings at the end of its help."""
    return app.command(epilog=docs.keys(section) if section else None)


def _folder(model: Path) -> Path:
    return model.parent if model.name == "manifest.json" else model


def _whole(model: Path) -> Path:
    """The folder of a model that is loaded, once it is known that it is whole and undamaged."""
    from d2o import records, weights

    folder = _folder(model)
    if lacking := weights.lacking(folder):
        raise D2OError(lacking)
    if (folder / "manifest.json").exists() and "RANK" not in os.environ:  # once per job, not once per rank
        records.check_content(folder)
    return folder


@app.callback()
def _devices(
    gpus: Annotated[
        int | None,
        typer.Option(min=0, help="lease so many GPUs of this machine first; wait where needed; see no other"),
    ] = None,
    share_gpus: Annotated[bool, typer.Option(envvar="D2O_SHARE_GPUS", help="lease none: jobs may share")] = False,
) -> None:
    """One subcommand a stage of the pipeline."""
    from d2o import devices

    if gpus is not None:
        devices.lease(gpus, share_gpus)


@_command(settings.Model)
def models(
    output: Output,
    settings_json: Json,
    run: Annotated[Path | None, typer.Option(help="model folder that a training made, or the manifest in it")] = None,
    execution: Execution = "{}",
) -> None:
    """Bring a model into one folder: safetensors, tokenizer, chat template. OUTPUT is its manifest.json."""
    from d2o import models

    models.fetch(
        settings.parse(settings.Model, settings_json, execution), _whole(run) if run else None, output.parent
    )


@_command(settings.Organism)
def organisms(
    output: Annotated[Path, typer.Option(help="train.jsonl; the other splits go beside it", dir_okay=False)],
    settings_json: Json,
) -> None:
    """Write a data set in which harm is known exactly."""
    from d2o import organisms

    organisms.write(settings.parse(settings.Organism, settings_json), output.parent)


Data = Annotated[str, typer.Argument(help="a file of rows, or a folder of them")]
Format = Annotated[str | None, typer.Option(help="read them as this one; else the one that fits best")]
Rejecting = Annotated[list[str], typer.Option("--negative", help="a label that rejects an answer; may be repeated")]


Labelled = Annotated[str | None, typer.Option(help="the column that says what people think of an answer")]


@app.command()
def look(data: Data, format: Format = None, negative: Rejecting = [], label: Labelled = None) -> None:  # noqa: B006
    """What a file would be read as, before any config: rows, prompts, negatives, pairs, lengths, examples."""
    os.environ["TQDM_DISABLE"] = "1"
    from d2o import look

    typer.echo("\n".join(look.lines(data, format, negative, label)))


@app.command()
def init(
    data: Data,
    output: Annotated[Path, typer.Option(help="the config; never replaced")] = Path("config.yaml"),
    format: Format = None,
    negative: Rejecting = [],  # noqa: B006
    label: Labelled = None,
) -> None:
    """Write a config to start from, for a file of rows."""
    os.environ["TQDM_DISABLE"] = "1"
    from d2o import look

    look.write_config(data, output, format, negative, label)
    typer.echo(f"{output} is written; next: snakemake -n --cores all --configfile {output}")


@_command(settings.Reading)
def datasets(output: Output, settings_json: Json, execution: Execution = "{}") -> None:
    """Read preference rows of any format into one table."""
    from d2o import datasets

    datasets.read(settings.parse(settings.Reading, settings_json, execution), output)


@_command(settings.Extraction)
def negatives(
    rows: Input,
    output: Annotated[Path, typer.Option(help="negatives.parquet; pairs, prompts and counts go beside it")],
    settings_json: Json,
    execution: Execution = "{}",
) -> None:
    """One row per (prompt, human negative), split by prompt; all human pairs; the prompts to answer."""
    from d2o import negatives

    negatives.extract(settings.parse(settings.Extraction, settings_json, execution), rows, output.parent)


@_command(settings.PairQuality)
def pair_quality(
    pairs: Input,
    output: Annotated[Path, typer.Option(help="prompts.parquet; chosen and rejected go beside it", dir_okay=False)],
    settings_json: Json,
) -> None:
    """Choose human pairs as answers, for `scores` and `judge`: Figure 1."""
    from d2o import pair_quality

    pair_quality.choose(settings.parse(settings.PairQuality, settings_json), pairs, output)


@_command(settings.PositivesStage)
def positives(
    model: Model,
    negatives: Input,
    output: Output,
    sampled: Annotated[
        Path, typer.Option(help="folder of all answers sampled so far; only what it lacks is sampled")
    ],
    settings_json: Json,
    shard: Annotated[str, typer.Option(help="which of the prompts: 1-of-3")] = "1-of-1",
    execution: Execution = "{}",
) -> None:
    """Sample K answers to each train prompt: one shard of a pool."""
    from d2o import positives

    stage = settings.parse(settings.PositivesStage, settings_json, execution)
    positives.sample(stage, _whole(model), negatives, shard, sampled, output)


@_command(settings.PositivesStage)
def pool(
    model: Model,
    negatives: Input,
    output: Annotated[Path, typer.Option(help="the pool; its data sheet goes beside it")],
    shards: Annotated[list[Path], typer.Option(help="shards of `d2o positives`, all of them")],
    settings_json: Json,
) -> None:
    """Merge the shards of a pool, once every sample is there."""
    from d2o import positives

    stage = settings.parse(settings.PositivesStage, settings_json)
    positives.merge(stage, _folder(model), negatives, shards, output)


@_command(settings.Forward)
def logprobs(
    model: Model,
    negatives: Input,
    output: Output,
    settings_json: Json,
    samples: Annotated[Path | None, typer.Option(help="pool whose answers get log-probs, not the human ones")] = None,
    split: Annotated[str, typer.Option(help="train or held-out")] = "train",
) -> None:
    """Log-prob sum and length of every response under a model."""
    from d2o import logprobs

    logprobs.compute(
        settings.parse(settings.Forward, settings_json), _whole(model), negatives, samples, split, output
    )


@_command(settings.TrainStage)
def train(
    model: Model,
    negatives: Input,
    output: Output,
    checkpoints: Annotated[Path, typer.Option(help="folder to resume from; kept when the job is killed")],
    settings_json: Json,
    samples: Annotated[list[Path], typer.Option(help="pool of self-generated answers")] = [],  # noqa: B006
    scores: Annotated[list[Path], typer.Option(help="scores of the pool, which the method filters by")] = [],  # noqa: B006
    reference_logprobs: Annotated[list[Path], typer.Option(help="log-probs under the reference")] = [],  # noqa: B006
    fresh: Annotated[list[Path], typer.Option(help="pool of an online round, in order")] = [],  # noqa: B006
    fresh_logprobs: Annotated[list[Path], typer.Option(help="reference log-probs of such a pool")] = [],  # noqa: B006
    tuned: Annotated[Path | None, typer.Option(help="the best trial of the method, whose values are taken")] = None,
    execution: Execution = "{}",
) -> None:
    """Align a model with one method. OUTPUT is the manifest.json of the aligned model's folder."""
    from d2o import train

    train.run(
        settings.parse(settings.TrainStage, settings_json, execution),
        train.Inputs(_whole(model), negatives, samples, scores, reference_logprobs, fresh, fresh_logprobs, tuned),
        checkpoints,
        output.parent,
    )
    if "TORCHELASTIC_RUN_ID" in os.environ:
        # All is written, and one in some hundred ranks is aborted by a thread of torch's when the interpreter ends:
        # torchrun would call the whole run failed.
        sys.stdout.flush()
        sys.stderr.flush()
        killed.ends()
        os._exit(0)


@_command(settings.TuneStage)
def tune(
    dataset: Annotated[str, typer.Option(help="its name in the results")],
    model: Annotated[str, typer.Option(help="its name in the results")],
    output: Output,
    settings_json: Json,
    results: Annotated[Path, typer.Option(help="folder that holds everything made")] = Path("results"),
) -> None:
    """Choose the best trial of a method by a metric of the validation prompts."""
    from d2o import tune

    tune.choose(settings.parse(settings.TuneStage, settings_json), results, dataset, model, output)


@_command(settings.ResponsesStage)
def responses(model: Model, prompts: Input, output: Output, settings_json: Json, execution: Execution = "{}") -> None:
    """Answer the test and evaluation prompts."""
    from d2o import responses

    stage = settings.parse(settings.ResponsesStage, settings_json, execution)
    responses.answer(stage, _whole(model), prompts, output)


@_command(settings.Reward)
def rewards(
    output: Output,
    settings_json: Json,
    backbone: Annotated[Path | None, typer.Option(help="model to train a head on")] = None,
    rows: Annotated[Path | None, typer.Option(help="table with the human labels")] = None,
    negatives: Annotated[Path | None, typer.Option(help="table that says which prompts are train and test")] = None,
    execution: Execution = "{}",
) -> None:
    """Fetch a reward model, or train one from the human labels. OUTPUT is its manifest.json."""
    from d2o import rewards

    rewards.make(
        settings.parse(settings.Reward, settings_json, execution),
        _whole(backbone) if backbone else None,
        rows,
        negatives,
        output.parent,
    )


@_command(settings.Reward)
def scores(
    prompts: Input,
    responses: Input,
    output: Output,
    settings_json: Json,
    reward: Annotated[Path | None, typer.Option(help="folder of the reward model; a rule has none")] = None,
    execution: Execution = "{}",
) -> None:
    """One reward model's score for each answer, or an exact scorer's."""
    from d2o import scores

    folder = _whole(reward) if reward else None
    scores.score(settings.parse(settings.Reward, settings_json, execution), folder, prompts, responses, output)


@_command(settings.Judge)
def judge(
    prompts: Input,
    initial: Input,
    responses: Input,
    output: Output,
    settings_json: Json,
    execution: Execution = "{}",
) -> None:
    """Pairwise verdicts against the initial model's answers, in both orders."""
    from d2o import judge

    judge.compare(settings.parse(settings.Judge, settings_json, execution), prompts, initial, responses, output)


@_command(settings.HumanEvalStage)
def human_eval(
    key: Annotated[Path, typer.Option(help="the table that says what stands on the pages", dir_okay=False)],
    output: Annotated[Path, typer.Option(help="manifest.json of the folder with the pages", dir_okay=False)],
    settings_json: Json,
    results: Annotated[Path, typer.Option(help="folder that holds everything made")] = Path("results"),
) -> None:
    """Write a page for each annotator, who compares answers with the initial model's, blind."""
    from d2o import human_eval

    human_eval.write(settings.parse(settings.HumanEvalStage, settings_json), results, key, output.parent)


@_command(settings.HumanVerdicts)
def human_verdicts(
    key: Input,
    answers: Annotated[Path, typer.Option(help="folder with the CSV files that came back", file_okay=False)],
    output: Output,
    settings_json: Json,
) -> None:
    """Read the verdicts of annotators."""
    from d2o import human_eval

    human_eval.read(settings.parse(settings.HumanVerdicts, settings_json), key, answers, output)


@_command(settings.Questions)
def questions(
    output: Output,
    settings_json: Json,
    metric: Annotated[str | None, typer.Option(help="check that the task has this metric")] = None,
) -> None:
    """Bring a task's questions into local Parquet files. OUTPUT is their folder's manifest.json."""
    from d2o import questions

    questions.fetch(settings.parse(settings.Questions, settings_json), output.parent, metric)


@_command(settings.Extraction)
def leaks(
    tables: Annotated[list[Path], typer.Option(help="table of negatives, or of pairs, that is trained on")],
    questions: Input,
    output: Output,
    settings_json: Json,
) -> None:
    """Find the questions of a task that train prompts say; the report leaves them out."""
    from d2o.negatives import task_leaks

    extraction = settings.parse(settings.Extraction, settings_json)
    task_leaks.find(extraction, tables, questions.parent, output)


@_command(settings.Task)
def tasks(model: Model, questions: Input, output: Output, settings_json: Json) -> None:
    """Answer the questions of a task with lm-evaluation-harness."""
    from d2o import tasks

    tasks.answer(settings.parse(settings.Task, settings_json), _whole(model), questions.parent, output)


@app.command()
def release(
    run: Annotated[Path, typer.Option(help="folder of a training", exists=True, file_okay=False)],
    keep: Annotated[str, typer.Option(help="what of its weights stays: adapter, or nothing")],
) -> None:
    """Delete the weights of a training, of its snapshots and of its rounds; all that was made from them stays."""
    from d2o import weights

    weights.release(keep, run)


@app.command()
def restore(run: Annotated[Path, typer.Option(help="folder of a training", exists=True, file_okay=False)]) -> None:
    """Bring back weights that were released, where a second training, in `again/`, has given the same ones."""
    from d2o import weights

    weights.restore(run)


@_command(settings.Settings)
def report(
    output: Output,
    settings_json: Json,
    results: Annotated[Path, typer.Option(help="folder that holds everything made")] = Path("results"),
) -> None:
    """Tables with intervals, figures and examples of one experiment."""
    from d2o import report

    report.write(settings.parse(settings.Settings, settings_json), results, output)


@_command(settings.CardStage)
def card(
    output: Output,
    settings_json: Json,
    results: Annotated[Path, typer.Option(help="folder that holds everything made")] = Path("results"),
) -> None:
    """The model card of one training, from the report of an experiment."""
    from d2o.report import card

    card.write(settings.parse(settings.CardStage, settings_json), results, output)


@_command(settings.Settings)
def pair_quality_figure(
    output: Annotated[
        Path, typer.Option(help="figures/pair_quality.svg; pair_quality.csv goes above it", dir_okay=False)
    ],
    settings_json: Json,
    results: Annotated[Path, typer.Option(help="folder that holds everything made")] = Path("results"),
) -> None:
    """Plot how good the human pairs of an experiment's data sets are."""
    from d2o import report

    report.write_pair_quality(settings.parse(settings.Settings, settings_json), results, output)


@app.command()
def watch(results: Annotated[Path, typer.Argument(help="folder of results")] = Path("results")) -> None:
    """Show the trainings under way: curves, rate, time left, alarms."""
    from d2o import progress

    progress.watch(results)


@app.command()
def chat(
    runs: Annotated[list[Path], typer.Argument(help="folders of runs, such as results/demo/smollm2/d2o/seed0")],
    temperature: Annotated[float, typer.Option(min=0, help="of sampling; 0: greedy, the same answer each time")] = 0,
    max_tokens: Annotated[int, typer.Option(min=1, help="an answer is cut here")] = 256,
    backend: Annotated[settings.Backend, typer.Option(help="vllm starts more slowly")] = "transformers",
) -> None:
    """Ask models what you type: their answers beside each other, and beside those of the initial model."""
    from d2o import talk

    folders = {name: _whole(folder) for name, folder in talk.model_folders(runs).items()}
    engine = settings.Engine(backend=backend, max_num_seqs=1, eager=True, kv_cache_gib=1)
    sampling = settings.Sampling(temperature=temperature, max_tokens=max_tokens)
    talk.converse(talk.Talk(folders, engine, sampling))


@app.command()
def check(
    model: Annotated[Path | None, typer.Option("--model", help="model folder, for the forward pass and vLLM")] = None,
) -> None:
    """Check that this machine computes what it should: two minutes, the first thing to run on a new one."""
    from d2o import check

    if not check.run(_folder(model) if model else None):
        sys.exit(1)


@app.command()
def plan(
    config: Annotated[Path, typer.Argument(help="a config", exists=True, dir_okay=False)],
    experiments: Annotated[list[str] | None, typer.Argument(help="of it; all where none is named")] = None,
    device: Annotated[
        str | None,
        typer.Option(
            help="what the jobs run on: H100, H200, A100, L40S, or a core of a cpu; by itself that of the config, or "
            "where it names none an H100, without `compute.gpus` a cpu"
        ),
    ] = None,
    check: Annotated[bool, typer.Option("--check", help="compare with what the finished jobs have taken")] = False,
) -> None:
    """What a config will take: jobs, tokens, hours, memory, disk, a judge's requests; nothing is run."""
    from d2o import bill

    say = bill.check if check else bill.lines
    typer.echo("\n".join(say(config, experiments or [], device)))


@app.command()
def study(
    configs: Annotated[list[Path], typer.Argument(help="configs of its parts", exists=True, dir_okay=False)],
    page: Annotated[Path, typer.Option(help="its page; the numbers go into the folder of that name")] = Path(
        "docs/study.md"
    ),
) -> None:
    """Keep what the finished parts of the study have measured, and write the findings into its page."""
    import yaml

    from d2o import study

    parts = [settings.load(yaml.safe_load(path.read_text()), str(path)) for path in configs]
    for one in parts:
        study.keep(one, page.with_suffix(""))
    study.write_page(parts, page.with_suffix(""), page)


@app.command()
def show(path: Annotated[Path, typer.Argument(help="an artifact, or its manifest")]) -> None:
    """What made an artifact: settings, inputs, versions, time."""
    import json

    from d2o import records

    lines = json.dumps(records.read_manifest(path), indent=2, ensure_ascii=False).splitlines()
    typer.echo("\n".join(map(texts.visible, lines)))


@app.command()
def push(
    run: Annotated[Path, typer.Argument(help="folder of a training, or its model's manifest", exists=True)],
    repository: Annotated[str, typer.Argument(help="id on the Hub, such as you/rude-mended", metavar="HUB-ID")],
    public: Annotated[
        bool, typer.Option("--public", help="for all to see; else a new repository is private")
    ] = False,
) -> None:
    """Upload a trained model to the Hub, with its card and report, in one commit."""
    from d2o import push

    typer.echo(push.push(run, repository, public))


@app.command()
def bundle(
    experiment: Annotated[str, typer.Argument(help="of the config; its report and cards are there")],
    output: Annotated[Path, typer.Option(help="the bundle, a .zip", dir_okay=False)],
    config: Annotated[Path, typer.Option(help="a config", exists=True, dir_okay=False)] = Path("config/config.yaml"),
) -> None:
    """Pack what an experiment's numbers rest on, but weights and texts, for a paper's appendix."""
    from d2o import bundle

    bundle.write(config, experiment, output)


@app.command()
def verify(path: Annotated[Path, typer.Argument(help="folder of results, or a bundle", exists=True)]) -> None:
    """Compare every artifact, or every file of a bundle, with the SHA-256 that it was written with."""
    from d2o import bundle, verify

    problems, counted = verify.verify(path) if path.is_dir() else bundle.verify(path)
    typer.echo("\n".join([*problems, counted]))
    if problems:
        sys.exit(1)


@app.command()
def schema(folder: Annotated[Path, typer.Argument(help="where to write")] = Path("config")) -> None:
    """Write schema.json and README.md, generated from the settings."""
    folder.joinpath("schema.json").write_text(docs.schema())
    folder.joinpath("README.md").write_text(docs.settings_page())


if __name__ == "__main__":
    main()
