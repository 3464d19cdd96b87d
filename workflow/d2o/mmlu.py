"""Stage `mmlu`: lm-evaluation-harness answers a benchmark's questions.

The tasks are the harness's own `mmlu` with local files in place of the Hub: MMLU's prompt (Hendrycks et al. 2021,
arXiv 2009.03300) without chat template, the first dev questions as examples, and the letter with the highest
log-prob as the answer. The accuracy over all questions is that of the harness's group `mmlu`.
"""

from __future__ import annotations

import glob
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

from d2o import chat, devices, records
from d2o.errors import D2OError
from d2o.settings import Benchmark


def answer(benchmark: Benchmark, model: Path, questions: Path, output: Path) -> None:
    """Write one row of `records.QUESTIONS` per question; the accuracies are in the manifest.

    A question's number is its place in the subject's test file. A prompt longer than the model's context loses
    its beginning, as everywhere in the harness; the manifest counts them.

    Args:
        model: folder of a causal language model.
        questions: folder made by the stage `questions`.

    Raises:
        D2OError: where the model or the questions are missing, or a subject has fewer examples than `shots`.
    """
    chat.check_folder(model)
    counts = records.read_manifest(questions)["subjects"]
    for subject, count in counts.items():
        if count["dev"] < benchmark.shots:
            raise D2OError(f"{questions}: {subject} has {count['dev']} dev questions; set `shots` to at most that")
    inputs = [path / "manifest.json" for path in (model, questions) if (path / "manifest.json").exists()]
    with records.artifact(output, benchmark, inputs) as draft:
        rows, draft.facts = _evaluate(benchmark, model, questions, list(counts))
        draft.facts |= _accuracies(rows)
        draft.facts["rows"] = records.write_table(draft.path, records.QUESTIONS, rows)


def task(subject: str, questions: Path, shots: int, cache: str) -> dict[str, Any]:
    """The harness's task for one subject: its `mmlu/default` template, with local files.

    Args:
        cache: folder in which `datasets` may keep its conversion of the files.
    """
    # `datasets` takes paths for patterns.
    files = {split: glob.escape(str(questions.resolve() / f"{subject}-{split}.parquet")) for split in ("dev", "test")}
    return {
        "task": f"mmlu_{subject}",
        "dataset_path": "parquet",
        "dataset_kwargs": {"data_files": files, "cache_dir": cache},
        "test_split": "test",
        "fewshot_split": "dev",
        "fewshot_config": {"sampler": "first_n"},
        "num_fewshot": shots,
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
    """A Jinja template that gives `text` as it is: the harness takes what we hand it for templates."""
    return f"{{{{ {text!a} }}}}"


def _evaluate(
    benchmark: Benchmark, model: Path, questions: Path, subjects: list[str]
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Rows of `records.QUESTIONS`, and what they were computed with."""
    import datasets
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    device = devices.device()
    datasets.disable_progress_bars()  # four for each subject, of a few milliseconds
    # An absolute path: the harness looks a relative one up on the Hub.
    lm = HFLM(
        str(model.resolve()),
        device=device,
        dtype="auto",
        batch_size=benchmark.batch_size,
        trust_remote_code=records.trusts_code(model),
    )
    with tempfile.TemporaryDirectory() as cache:
        found = simple_evaluate(
            lm,
            tasks=[task(subject, questions, benchmark.shots, cache) for subject in subjects],
            task_manager=TaskManager(include_defaults=False),
            log_samples=True,
            bootstrap_iters=0,
        )
    rows = [
        {"subject": subject, "question": sample["doc_id"], "correct": bool(sample["acc"])}
        for subject in subjects
        for sample in found["samples"][f"mmlu_{subject}"]
    ]
    prompts = [sample["arguments"][0][0] for samples in found["samples"].values() for sample in samples]
    return rows, {
        "device": device,
        "dtype": str(lm.model.dtype).removeprefix("torch."),
        "cut_prompts": sum(len(lm.tok_encode(prompt)) > lm.max_length for prompt in prompts),
    }


def _accuracies(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Share of right answers over all questions, as in the harness's group, and per subject."""
    correct = defaultdict(list)
    for row in rows:
        correct[row["subject"]].append(row["correct"])
    return {
        "accuracy": sum(map(sum, correct.values())) / len(rows),
        "subjects": {subject: sum(found) / len(found) for subject, found in correct.items()},
    }
