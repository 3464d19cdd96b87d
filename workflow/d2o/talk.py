"""`d2o chat`: one prompt, the answers of several models side by side."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from d2o import chat, generation, layout, texts
from d2o.errors import D2OError
from d2o.generation import Request
from d2o.settings import Engine, Sampling


def model_folders(named: list[Path]) -> dict[str, Path]:
    """The folders of the models that are to answer, by the names that are displayed.

    Args:
        named: folders of runs (`…/d2o/seed0`), of their snapshots, or of models, or the manifests in them. The model
            that the first run was trained from comes first, as `initial`.
    Raises:
        D2OError: where there is no model.
    """
    initial, places = None, {}
    for path in named:
        folder = Path(os.path.normpath(path.absolute()))
        folder = folder.parent if folder.name == "manifest.json" else folder
        run = folder.parent if folder.name == "model" else folder
        if (run / "model" / "config.json").exists():
            folder = run / "model"
            initial = initial or _initial(run)
        if not (folder / "config.json").exists():
            raise D2OError(
                f"{path}: no model and no run with one; name a folder such as results/demo/smollm2/d2o/seed0"
            )
        depth = 1 if folder == run else 3 if run.name.startswith("step") else 2
        places[folder] = run.parts, depth
    folders = ({"initial": initial} if initial else {}) | dict(zip(_names([*places.values()]), places, strict=True))
    # As they can be typed: Snakemake knows its files by these names.
    return {name: Path(os.path.relpath(folder)) for name, folder in folders.items()}


def _names(places: Sequence[tuple[tuple[str, ...], int]]) -> list[str]:
    """Names for paths: the last parts of each, as many as its number, or more for all until the names differ."""
    names = ["/".join(parts[-depth:]) for parts, depth in places]
    different = len({"initial", *names}) > len(names)
    return names if different else _names([(parts, depth + 1) for parts, depth in places])


def _initial(run: Path) -> Path | None:
    """The model that a run was trained from, if it is at its place in the layout."""
    run = run.parent if run.name.startswith("step") else run
    if len(run.parents) < 4:
        return None
    folder = Path(layout.Layout(str(run.parents[3])).path("model", model=run.parents[1].name)).parent
    return folder if (folder / "config.json").exists() else None


class Talk:
    """One dialogue per model; all models get the same prompts."""

    def __init__(self, folders: Mapping[str, Path], engine: Engine, sampling: Sampling):
        """
        Args:
            engine: its share of a GPU's memory is divided among the models.
            sampling: temperature 0 gives the same answer each time; above it each turn has a seed of its own.
        Raises:
            D2OError: as `generation.start` and `chat.load_tokenizer`.
        """
        share = engine.model_copy(update={"gpu_memory_utilization": engine.gpu_memory_utilization / len(folders)})
        self._tokenizers = {name: chat.load_tokenizer(folder) for name, folder in folders.items()}
        self._models = {name: generation.start(folder, share) for name, folder in folders.items()}
        self._sampling, self._turn = sampling, 0
        self.forget()

    def forget(self) -> None:
        """Begin a new dialogue."""
        self._dialogues: dict[str, list[dict[str, str]]] = {name: [] for name in self._models}

    def ask(self, prompt: str) -> dict[str, str]:
        """Each model's answer, which is added to its dialogue. A dialogue too long for the context starts again."""
        self._turn += 1
        answers = {}
        for name, model in self._models.items():
            tokenizer, question = self._tokenizers[name], {"role": "user", "content": prompt}
            ids = chat.encode_prompt(tokenizer, [*self._dialogues[name], question])
            if len(ids) >= tokenizer.model_max_length:
                self._dialogues[name] = []
                ids = chat.encode_prompt(tokenizer, [question])
            if len(ids) >= tokenizer.model_max_length:
                answers[name] = "(longer than the model's context)"
                continue
            ((_, answer),) = model.generate([Request(ids, self._turn)], self._sampling)
            self._dialogues[name] += [question, {"role": "assistant", "content": answer.text}]
            answers[name] = answer.text + " […]" * (answer.finish == "length")
        return answers


def converse(talk: Talk) -> None:
    """Read prompts from the terminal, or lines of a pipe, until they end; write the answers."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    console.print("A prompt, /new for a new dialogue, Ctrl-D to end.", style="dim")
    while True:
        try:
            prompt = console.input("[bold]> [/bold]").strip()
        except (EOFError, KeyboardInterrupt):
            return
        if prompt == "/new":
            talk.forget()
        elif prompt:
            answers = talk.ask(prompt)
            table = Table(expand=True)
            for name in answers:
                table.add_column(Text(name), ratio=1)
            table.add_row(*(Text("\n".join(map(texts.visible, answer.splitlines()))) for answer in answers.values()))
            console.print(table)
