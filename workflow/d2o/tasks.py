"""Stage `tasks`: lm-evaluation-harness asks a model the questions of a task.

A task is one that the harness knows by name, or its own `mmlu` with local files instead of the Hub: MMLU's prompt
(Hendrycks et al. 2021, arXiv 2009.03300) without chat template, the first dev questions as examples, and the letter
with the highest log-prob as the answer. The mean over all questions is that of the harness's group `mmlu`.
"""

from __future__ import annotations

import tempfile
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from d2o import devices, dtypes, harness, model_folders, records, schemas
from d2o.errors import D2OError
from d2o.settings import Task

if TYPE_CHECKING:
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.models.huggingface import HFLM


def answer(task: Task, model: Path, folder: Path, output: Path) -> None:
    """Write one row of `schemas.TASK_VALUES` per question; the manifest has the metric, its direction and its means.

    A question's number is its place among the subject's questions, as in `schemas.QUESTIONS`. A prompt that is longer
    than the model's context loses its beginning, as everywhere in the harness; the manifest counts such prompts.

    Args:
        model: folder of a causal language model.
        folder: the one made by the stage `questions`.

    Raises:
        D2OError: where the model or the questions are missing, the questions damaged, a subject has fewer examples
            than `shots`, or a task has no such metric, or none that is a mean over the questions; and as
            `harness.load`.
    """
    model_folders.check(model)
    records.check_content(folder)
    splits = {subject: list(counts) for subject, counts in records.read_manifest(folder)["subjects"].items()}
    inputs = [path / "manifest.json" for path in (model, folder) if (path / "manifest.json").exists()]
    with records.artifact(output, task, inputs) as draft, tempfile.TemporaryDirectory() as cache:

        def read(subject: ConfigurableTask, _: dict[str, Any]):
            files = {
                split: harness.data_file(folder, subject.task_name, split) for split in splits[subject.task_name]
            }
            return harness.load_files("parquet", files, cache)

        specs = [task.task] if task.task else [multiple_choice(subject) for subject in splits]
        subjects = harness.load(specs, read, task.include)
        for subject in subjects.values():
            _give_examples(subject, task.shots, folder)
        metric = harness.choose_metric(subjects, task.metric)
        rows, draft.facts = _evaluate(task, model, subjects, metric)
        draft.facts |= {"metric": metric.name, "filter": metric.filter, "better": metric.better} | _means(rows)
        draft.facts["rows"] = records.write_table(draft.path, schemas.TASK_VALUES, rows)


def multiple_choice(subject: str) -> dict[str, Any]:
    """The harness's task for one subject in MMLU's form: its `mmlu/default` template."""
    return {
        "task": subject,
        "test_split": "test",
        "fewshot_split": "dev",
        "fewshot_config": {"sampler": "first_n"},
        "num_fewshot": 5,
        "output_type": "multiple_choice",
        "description": _literal(
            f"The following are multiple choice questions (with answers) about {subject.replace('_', ' ')}.\n\n"
        ),
        "doc_to_text": "{{question.strip()}}\nA. {{choices[0]}}\nB. {{choices[1]}}\nC. {{choices[2]}}\n"
        "D. {{choices[3]}}\nAnswer:",
        "doc_to_choice": ["A", "B", "C", "D"],
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }


def _literal(text: str) -> str:
    """A Jinja template that renders to exactly `text`: the harness treats our strings as templates."""
    return f"{{{{ {text!a} }}}}"


def _give_examples(subject: ConfigurableTask, shots: int | None, folder: Path) -> None:
    """Set the number of examples before each question; None leaves the task's own."""
    own = subject.config.num_fewshot
    wanted = (own or 0) if shots is None else shots
    if wanted and own == 0:
        raise D2OError(f"{folder}: {subject.task_name} is asked without examples by its making; leave out `shots`")
    if wanted > (available := len(subject.fewshot_docs())):
        raise D2OError(f"{folder}: {subject.task_name} has {available} examples; set `shots` to at most that")
    subject.set_config("num_fewshot", wanted)


def _evaluate(
    task: Task, model: Path, subjects: dict[str, ConfigurableTask], metric: harness.TaskMetric
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Rows of `schemas.TASK_VALUES`, and facts about their computation for the manifest."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    device = devices.device()
    # An absolute path: the harness looks a relative one up on the Hub.
    lm = HFLM(
        str(model.resolve()),
        device=device,
        dtype=dtypes.checkpoint_dtype(),
        batch_size=task.batch_size,
        trust_remote_code=model_folders.trusts_code(model),
    )
    logged = simple_evaluate(
        lm,
        tasks=list(subjects.values()),
        task_manager=TaskManager(include_defaults=False),
        limit=task.limit,
        log_samples=True,
        bootstrap_iters=0,
    )["samples"]
    rows = [
        {"subject": subject, "question": sample["doc_id"], "value": float(sample[metric.name])}
        for subject in subjects
        for sample in logged[subject]
        if sample["filter"] == metric.filter
    ]
    asked = (sample for samples in logged.values() for sample in samples if sample["filter"] == metric.filter)
    requests = [sample["arguments"][0] for sample in asked]
    return rows, {
        "device": device,
        "dtype": str(lm.model.dtype).removeprefix("torch."),
        "shots": next(iter(subjects.values())).config.num_fewshot,
        # Whether the tokenizer adds it, which the harness does not change. Llama's scores depend on it.
        "bos": lm.tok_encode("A")[:1] == [lm.tokenizer.bos_token_id],
        "cut_prompts": sum(len(lm.tok_encode(request[0])) > _room(lm, *request[1:]) for request in requests),
    }


def _room(lm: HFLM, continuation: str | dict[str, Any] = "") -> int:
    """The number of tokens that a prompt may have before a continuation: a text, or settings of its generation."""
    if isinstance(continuation, dict):
        return lm.max_length - continuation.get("max_gen_toks", lm.max_gen_toks)
    return lm.max_length


def _means(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean over all questions, as in the harness's group `mmlu`, and per subject."""
    values = defaultdict(list)
    for row in rows:
        values[row["subject"]].append(row["value"])
    return {
        "mean": sum(map(sum, values.values())) / len(rows),
        "subjects": {subject: sum(own) / len(own) for subject, own in values.items()},
    }
