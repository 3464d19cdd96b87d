"""The page of an annotator: one HTML file that needs nothing from outside, and the key to what it shows."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from d2o import records, runs, schemas
from d2o.errors import D2OError
from d2o.human_eval.design import design
from d2o.layout import Layout
from d2o.runs import Run
from d2o.settings import HumanEvalStage
from d2o.texts import policy_digest

CHECK = "This is no answer, but a check that both answers are read. Please choose “{choice}” for both questions."
# Labels of the keys on the page.
CHOICES = {"1": "Answer 1", "2": "Answer 2", "0": "No difference"}
_HERE = Path(__file__).parent


def write(stage: HumanEvalStage, results: Path, key: Path, output: Path) -> None:
    """Write one page per annotator, `output/annotator-<n>.html`, and the table that states what they show.

    A page contains texts and no names: only the table, `schemas.HUMAN_KEY`, states which model gave an answer. A
    page's version is a digest of the texts and the table, not of its design. Verdicts on another version are refused.

    Args:
        results: folder of all results.
        key: the table.
        output: the folder of the pages; nothing else lies in it but its manifest.
    Raises:
        D2OError: where an artifact is missing, or on some data set and model no test prompt is answered by all.
    """
    source = _Answers(stage, Layout(str(results)))
    pages = design(stage, {block: source.answered(*block) for block in product(stage.datasets, stage.models)})
    shown = [[source.item(row) for row in page] for page in pages]
    version = "v" + hashlib.sha256(json.dumps([pages, shown]).encode()).hexdigest()[:12]
    with records.artifact(key, stage, source.inputs) as draft:
        rows = ({"version": version} | row for page in pages for row in page)
        draft.facts["rows"] = records.write_table(draft.path, schemas.HUMAN_KEY, rows)
    with records.artifact(output, stage, source.inputs) as draft:
        draft.path.mkdir()
        draft.facts["version"] = version
        for number, items in enumerate(shown, 1):
            draft.path.joinpath(f"annotator-{number}.html").write_text(page(version, number, items))


class _Answers:
    """The prompts and answers that people compare, by their names in the results."""

    def __init__(self, stage: HumanEvalStage, layout: Layout):
        self._stage, self.inputs = stage, []
        self._turns, self._texts = {}, {}
        for dataset in stage.datasets:
            rows = self._read(layout.path("prompts", dataset=dataset), schemas.PROMPTS)
            self._turns[dataset] = {row["prompt_id"]: row["messages"] for row in rows if row["origin"] == "test"}
        for run in runs.compared(stage):
            rows = self._read(layout.path("responses", run.names), schemas.SAMPLES)
            self._texts[run] = {row["prompt_id"]: row["text"].strip() for row in rows if row["sample"] == 0}

    def _read(self, path: str, schema) -> list[dict[str, Any]]:
        self.inputs.append(path)
        return records.read_table(path, schema)

    def answered(self, dataset: str, model: str) -> list[str]:
        """The test prompts that all models have answered."""
        texts = [own for run, own in self._texts.items() if (run.dataset, run.model) == (dataset, model)]
        answered = [prompt for prompt in self._turns[dataset] if all(prompt in own for own in texts)]
        if not answered:
            raise D2OError(f"{dataset}, {model}: no test prompt is answered by all methods; run again")
        return answered

    def item(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """The content shown for a row of the table: the turns of the dialogue, and the two answers."""

        def text(method: str, seed: int) -> str:
            return self._texts[Run(row["dataset"], row["model"], method, seed)][row["prompt_id"]]

        initial = ("initial", self._stage.seeds["initial"][0])
        training = (row["method"], row["seed"]) if row["method"] else initial
        if row["check"]:
            texts = {"initial": text(*training), "method": CHECK.format(choice=CHOICES[row["check"]])}
        else:
            texts = {"initial": text(*initial), "method": text(*training)}
        turns = self._turns[row["dataset"]][row["prompt_id"]]
        return {
            "turns": [[turn["role"], turn["content"]] for turn in turns],
            "answers": [texts[model] for model in schemas.ORDERS[row["order"]]],
        }


def page(version: str, annotator: int, items: Sequence[Mapping[str, Any]]) -> str:
    """The HTML of an annotator's page. Its own script and style are allowed by their digests, and nothing else is."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE), undefined=jinja2.StrictUndefined, autoescape=True
    )
    script, style = (_HERE.joinpath(f"page.{kind}").read_text() for kind in ("js", "css"))
    # The data may contain no `<`: it could end the element.
    data = json.dumps({"version": version, "annotator": annotator, "items": items}).replace("<", "\\u003c")
    return environment.get_template("page.html.jinja").render(
        annotator=annotator,
        items=len(items),
        data=data,
        script=script,
        style=style,
        script_digest=policy_digest(script),
        style_digest=policy_digest(style),
    )
