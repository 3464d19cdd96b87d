"""A training's weights, most of what a run leaves: released once all is made from them, restored by training again.

Their manifest stays, and all that was made from them: nothing is made again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from d2o import model_folders, records
from d2o.errors import D2OError

# The adapter of a training with LoRA, in its model folder.
ADAPTER = "adapter"


def release(keep: str, run: Path, waiting: Sequence[Path], output: Path) -> None:
    """Delete the weights of a run, of its snapshots and of the policies of its rounds.

    Args:
        keep: what of a model stays: `adapter`, or `nothing`.
        run: the run's folder.
        waiting: what other experiments still make from the weights: where one is not there, all weights stay.
        output: JSON with the files that are gone, and with what was waited for.
    """
    missing = [str(path) for path in waiting if not path.exists()]
    released = []
    for folder in [] if missing else _folders(run):
        for name in filter(_there(folder), model_folders.weights(folder)):
            (folder / name).unlink()
            released.append(str((folder / name).relative_to(run)))
        if keep == "nothing":
            records.remove_folder(folder / ADAPTER)
    if released:
        _restored(run).unlink(missing_ok=True)
    with records.artifact(output, {"keep": keep}) as draft:
        records.write_json(draft.path, {"released": released, "waiting_for": missing})


def restore(run: Path, again: Path) -> None:
    """Bring back the weights that were released, from a second training with the same settings.

    `restored.json` in the run's folder names them.

    Args:
        run: the folder of the first training.
        again: that of the second, which is removed.
    Raises:
        D2OError: where the second training gave other weights.
    """
    pairs = [(folder, again / folder.relative_to(run)) for folder in _folders(run) if folder.name != "policy"]
    for first, second in pairs:
        if model_folders.weights(first) != model_folders.weights(second):
            raise D2OError(
                f"{first}: trained again it has other weights (another device, or one that computes other bits each "
                f"time); to take them, delete {first / 'manifest.json'}: all that was made from the old ones will be "
                f"made again"
            )
    restored = []
    for first, second in pairs:
        for name in filter(_there(second), [*model_folders.weights(first), ADAPTER]):
            if not (first / name).exists():
                (second / name).rename(first / name)
                restored.append(str((first / name).relative_to(run)))
    with records.artifact(_restored(run)) as draft:
        records.write_json(draft.path, {"restored": restored})
    records.remove_folder(again)


def lacking(folder: Path) -> str | None:
    """What to do where a model's weights are not there; None where they are, or the model was never made."""
    manifest = folder / "manifest.json"
    if not manifest.exists() or all(map(_there(folder), model_folders.weights(folder))):
        return None
    run = released_run(folder)
    if run is None:
        return f"{folder}: its weights are gone; delete {manifest} and run again"
    if folder.name == "policy":
        return f"{folder}: its weights were released; delete {manifest}, and the round is trained again"
    return f"{folder}: its weights were released; train it again: snakemake --cores all {_restored(run)}"


def released_run(folder: Path) -> Path | None:
    """The run that a model is of, where its weights were released."""
    return next((run for run in folder.parents[:3] if (run / "released").is_dir()), None)


def _folders(run: Path) -> list[Path]:
    """The models of a run: at its end, after steps, and before rounds."""
    models = ("model", "step*/model", "rounds/*/policy")
    return sorted(manifest.parent for at in models for manifest in run.glob(f"{at}/manifest.json"))


def _there(folder: Path) -> Callable[[str], bool]:
    return lambda name: (folder / name).exists()


def _restored(run: Path) -> Path:
    return run / "restored.json"
