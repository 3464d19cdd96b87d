"""A training's weights, the bulk of a run: released once all is made from them, restored by training again.

Their manifest and all that was made from them stay: nothing is made again.
"""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path

from d2o import model_folders, records
from d2o.errors import D2OError
from d2o.layout import PLACES, made_again

# The adapter of a training with LoRA, in its model folder.
ADAPTER = "adapter"
# In a run's folder: the list of released files, the list of restored files, and the folder of the second training.
RELEASED, RESTORED, _AGAIN, _LOG = (
    Path(PLACES[place]).name for place in ("released", "restored", "again", "again_log")
)


def release(keep: str, run: Path) -> None:
    """Delete the weights of a run, of its snapshots and of the policies of its rounds; `RELEASED` lists them.

    Args:
        keep: what of a model stays: `adapter`, or `nothing`.
        run: the run's folder.
    """
    records.discard(run / RESTORED)  # first: Snakemake makes a missing file again
    released = [file for folder in _models(run) for file in _bulk(folder, keep == "nothing")]
    for file in released:
        file.unlink(missing_ok=True)
    with records.artifact(run / RELEASED, {"keep": keep}) as draft:
        records.write_json(draft.path, {"released": [str(file.relative_to(run)) for file in released]})


def restore(run: Path) -> None:
    """Bring back the weights that were released, from a second training with the same settings.

    Args:
        run: the folder of the first training; its subfolder `again/` holds the second. What the second has written
            is removed. `RESTORED` lists the restored files.
    Raises:
        D2OError: where the second training gave other weights.
    """
    again = run / _AGAIN
    pairs = [(folder, again / folder.relative_to(run)) for folder in _models(run)]
    pairs = [(first, second) for first, second in pairs if second.is_dir()]  # policies do not come back
    for first, second in pairs:
        if _digests(first) != _digests(second):
            raise D2OError(
                f"{first}: trained again it has other weights (another device, or one that computes other bits each "
                f"time); to take them, delete {again} and {first / 'manifest.json'}: all that was made from the old "
                f"ones will be made again"
            )
    restored = []
    for first, second in pairs:
        for file in _bulk(first, adapter=True):
            source = second / file.relative_to(first)
            if source.exists() and not file.exists():
                file.parent.mkdir(exist_ok=True)
                source.rename(file)
                records.sync_names(file.parent)
                restored.append(str(file.relative_to(run)))
    with records.artifact(run / RESTORED) as draft:
        records.write_json(draft.path, {"restored": restored})
    _remove_training(again)


def _remove_training(run: Path) -> None:
    """Remove what a training has left in its folder; other files stay, and then the folder."""
    records.discard(run / _LOG)
    made = ("model", "step*/model", "tensorboard", "checkpoints")
    for folder in [folder for at in made for folder in run.glob(at)]:
        if records.is_ours(folder) and not folder.is_symlink():
            records.remove_folder(folder)
    for folder in (*run.glob("step*"), run):
        with suppress(OSError):  # it is not empty
            folder.rmdir()


def lacking(model: Path) -> str | None:
    """What to do about a model's missing weights; None where they exist, or the model was never made."""
    manifest = model / "manifest.json"
    try:
        if not manifest.exists() or all((model / name).exists() for name in model_folders.weights(model)):
            return None
    except D2OError as error:
        return str(error)
    run = _run_of(model)
    if run is None:
        return f"{model}: its weights are gone; delete {made_again(manifest)} and run again"
    if model.name == "policy":
        return f"{model}: its weights were released; delete {manifest}, and the round is trained again"
    return f"{model}: its weights were released; train it again: snakemake --cores all {run / RESTORED}"


def released(file: Path) -> bool:
    """Whether a missing file of a model was released."""
    run = _run_of(file.parent)
    try:
        return run is not None and str(file.relative_to(run)) in json.loads((run / RELEASED).read_text())["released"]
    except (ValueError, KeyError, TypeError, RecursionError):  # a damaged list releases nothing
        return False


def _run_of(folder: Path) -> Path | None:
    """The run that contains a folder, if weights of the run were released; else None."""
    return next((run for run in folder.parents[:4] if (run / RELEASED).exists()), None)


def _models(run: Path) -> list[Path]:
    """The models of a run: at its end, after steps, and before rounds."""
    models = ("model", "step*/model", "rounds/*/policy")
    return sorted(manifest.parent for at in models for manifest in run.glob(f"{at}/manifest.json"))


def _digests(model: Path) -> dict[str, str]:
    """The SHA-256 of each file of a model's weights and of its adapter, as it was when it was made."""
    content = records.read_manifest(model).get("content", {})
    adapter = {name: digest for name, digest in content.items() if Path(name).parent == Path(ADAPTER)}
    return model_folders.weights(model) | adapter


def _bulk(model: Path, adapter: bool) -> list[Path]:
    """The files of a model's weights, whether they exist or not; with its adapter if asked for."""
    return [model / name for name in (_digests(model) if adapter else model_folders.weights(model))]
