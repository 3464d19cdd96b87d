"""Tasks of lm-evaluation-harness: looked up by name, and loaded with data from the source that a stage names."""

from __future__ import annotations

import difflib
import glob
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import quote

from d2o.errors import D2OError

if TYPE_CHECKING:
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks import TaskManager

# Metrics of the Hub are programs. The harness imports `evaluate` only for a task that names one.
os.environ["HF_EVALUATE_OFFLINE"] = "1"

# The splits of a task's data, given the task and its `dataset_kwargs`.
Read = Callable[["ConfigurableTask", dict[str, Any]], Mapping[str, "Dataset"]]
SPLITS = ("training_split", "validation_split", "test_split", "fewshot_split")


@cache
def problem(name: str, include: str | None) -> str | None:
    """The reason why a name stands for no task; None where it does, or where the harness is not installed.

    The harness takes ten seconds to read its 14,000 files, so a name that one of them contains literally counts as
    known at once.
    """
    spec = find_spec("lm_eval")  # imports nothing
    if spec is None:
        return None
    own = [Path(include)] if include else []
    theirs = Path(spec.origin).parent / "tasks"
    folders = sorted(theirs.iterdir(), key=lambda folder: folder.name not in name)  # the likely ones first
    key = re.compile(rf"^(?:task|group|tag):(?:\s*\n(?:\s*- .*\n)*?\s*-)? *[\"']?{re.escape(name)}[\"']?\s*$", re.M)
    files = (file for folder in [*own, *folders] for file in folder.rglob("*yaml*") if file.is_file())
    if any(key.search(file.read_text(errors="replace")) for file in files):
        return None
    known = _manager(include).all_tasks
    if name in known:
        return None
    close = difflib.get_close_matches(name, known, n=3)
    wanted = f"did you mean {' or '.join(close)}?" if close else "`lm-eval ls tasks` lists what it knows"
    return f"lm-evaluation-harness knows no {name!r}; {wanted}"


def load(specs: list[str | dict[str, Any]], read: Read, include: str | None = None) -> dict[str, ConfigurableTask]:
    """Load the tasks of names or configurations, by task name; a group has several tasks.

    Args:
        read: returns the data of a task. A split that it does not return is removed from the task. Columns of images,
            sounds and other files are left out.
        include: folder with YAML files of further tasks.

    Raises:
        D2OError: where a name is unknown, a task cannot be made of its data, or it runs code that a model wrote,
            asks about images or sounds, or fetches its data by code of its own.
    """
    from lm_eval.api.task import ConfigurableTask

    try:
        with _downloading(read):
            tasks = _manager(include, all(isinstance(spec, str) for spec in specs)).load(specs)["tasks"]
    except (D2OError, MemoryError):
        raise
    except Exception as error:  # the code of a task may raise anything about data that are not its own
        reason = " ".join(str(error).split())
        shown = ", ".join(spec if isinstance(spec, str) else spec["task"] for spec in specs)
        raise D2OError(
            f"{shown}: not a task that can be made of its data ({type(error).__name__}: {reason}); its name must be "
            f"the harness's, and the columns those that its YAML file names"
        ) from error
    for name, task in tasks.items():
        if not isinstance(task, ConfigurableTask) or type(task).download is not ConfigurableTask.download:
            raise D2OError(f"{name}: its data are made by code of its own, which is not supported; take another task")
        if getattr(task, "UNSAFE_CODE", False):
            raise D2OError(f"{name}: it runs code that the model writes, which is not supported; take another task")
        if getattr(task, "MULTIMODAL", False):
            raise D2OError(f"{name}: it asks about images or sounds, which is not supported; take another task")
    return tasks


@dataclass(frozen=True)
class TaskMetric:
    """A value that the harness computes for each question.

    Attributes:
        filter: extracts the answer from the text; `none` where the whole text is the answer.
        better: which values are better; None where the task does not state it.
    """

    name: str
    filter: str
    better: Literal["higher", "lower"] | None


def choose_metric(tasks: Mapping[str, ConfigurableTask], wanted: str | None) -> TaskMetric:
    """The metric of tasks: `wanted` as `name` or `name,filter`; None: the first metric of the first task.

    Raises:
        D2OError: where a task has no such metric, or it is no mean over the questions.
    """
    first = next(iter(tasks.values()))
    name, _, chosen = (wanted or next(iter(first.aggregation()))).partition(",")
    chosen = chosen or _filters(first)[0]
    for task in tasks.values():
        offered = [f"{one},{two}" for one in _means(task) for two in _filters(task)]
        if f"{name},{chosen}" not in offered:
            shown = ", ".join(one.removesuffix(",none") for one in offered) or "none"
            raise D2OError(
                f"{task.task_name}: {wanted or name} is no mean over its questions; set `metric` to one: {shown}"
            )
    higher = first.higher_is_better().get(name)
    return TaskMetric(name, chosen, None if higher is None else "higher" if higher else "lower")


def _means(task: ConfigurableTask) -> list[str]:
    """The metrics of a task that are means over its questions, and not programs of the Hub."""
    from lm_eval.api.metrics import mean

    known = task._metric_fn_list if task.config.process_results is None else task.aggregation()
    return [name for name, how in task.aggregation().items() if how is mean and known.get(name) is not None]


def _filters(task: ConfigurableTask) -> list[str]:
    return [one["name"] for one in task.config.filter_list or [{"name": "none"}]]


def prompts(task: ConfigurableTask, limit: int | None) -> Iterator[tuple[int, str]]:
    """The questions of a task with their numbers: the text in the column `question` of its data, or else the prompt.
    Blank texts, and prompts that are not text, are left out."""
    for number, row in task.doc_iterator(limit=limit):
        text = row.get("question")
        text = text if isinstance(text, str) else task.doc_to_text(row)
        if isinstance(text, str) and text.strip():
            yield number, text


@cache
def _manager(include: str | None, defaults: bool = True) -> TaskManager:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=include, include_defaults=defaults)


@contextmanager
def _downloading(read: Read) -> Iterator[None]:
    """Replace the harness's own download by `read`; its documentation lets tasks override the download."""
    from lm_eval.api.task import ConfigurableTask

    def download(self: ConfigurableTask, dataset_kwargs: dict[str, Any] | None = None, **_: Any) -> None:
        self.dataset = {split: without_media(rows) for split, rows in read(self, dataset_kwargs or {}).items()}
        for key in SPLITS:
            if getattr(self.config, key) not in self.dataset:
                setattr(self.config, key, None)
        if self.fewshot_cfg.split not in self.dataset:
            self.fewshot_cfg.split = None
        if not (self.has_test_docs() or self.has_validation_docs()):
            raise D2OError(
                f"{self.config.task}: no split to be asked about among {', '.join(self.dataset)}; name a file of "
                f"`data` by the task's own word for it"
            )

    original = ConfigurableTask.download
    ConfigurableTask.download = download
    try:
        yield
    finally:
        ConfigurableTask.download = original


# Data --------------------------------------------------------------------------------------------


def data_file(folder: Path, subject: str, split: str) -> Path:
    """The path of the rows of a subject's split in a folder of questions."""
    return folder / "data" / f"{quote(subject, safe='')}-{split}.parquet"


def load_files(form: str, files: Mapping[str, Path], cache: str) -> Mapping[str, Dataset]:
    """Local files per split, as `datasets` reads them; `cache` is a folder for its conversion."""
    import datasets

    datasets.disable_progress_bars()  # several for each subject, of a few milliseconds
    # `datasets` reads paths as patterns.
    paths = {split: glob.escape(str(path.resolve())) for split, path in files.items()}
    return datasets.load_dataset(form, data_files=paths, cache_dir=cache)


def without_media(rows: Dataset) -> Dataset:
    """Rows without columns of images or sounds, which would be fetched from any address that a row contains."""
    return rows.remove_columns([name for name, feature in rows.features.items() if _names_files(feature)])


def _names_files(feature: Any) -> bool:
    """Whether values of a type, or of one within it, may be files elsewhere that `datasets` opens."""
    within = feature.values() if isinstance(feature, dict) else [getattr(feature, "feature", None)]
    return hasattr(feature, "embed_storage") or any(_names_files(one) for one in within if one is not None)
