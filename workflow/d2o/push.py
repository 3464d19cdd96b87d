"""Push a trained model to the Hub: weights, tokenizer, card and report in one commit, private by default."""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from d2o import hub, records, weights
from d2o.errors import D2OError
from d2o.layout import PLACES, Layout
from d2o.texts import line

# The file that marks a repository as made here: a repository without it is not written to.
MARK = "d2o.json"
# Seconds without a byte after which the Hub counts as not reached: it checks what was uploaded before it answers.
_PATIENCE = 120
# Files beside the page to which it links.
_TABLES = ("*.csv", "figures/*.csv")
_UPLOADED = {".safetensors", ".json", ".jinja", ".model", ".txt"}
# Keys of the model's manifest that readers elsewhere may need; its inputs are paths of this machine.
_KEPT = (
    "made",
    "seconds",
    "steps",
    "ranks",
    "groups",
    "precision",
    "peak_memory_gb",
    "settings",
    "versions",
)
_WAYS_OUT = {
    401: "check HF_TOKEN",
    403: "give the token the right to write there",
    409: "somebody else writes there: look at it, and push again",
    412: "somebody else has written there: look at it, and push again",
}


def push(run: Path, repository: str, public: bool) -> str:
    """Upload a training's model, card and report.

    Args:
        run: the training's folder, its model's, or the manifest in that.
        repository: id on the Hub, `owner/name`; created if it does not exist, private unless `public`.
    Returns:
        The address of the commit.
    Raises:
        D2OError: where weights, card or report are missing or not of one state, the model runs code of its own, there
            is no token, the repository holds files that were not pushed from here or has another visibility than
            asked for, or the Hub refuses the commit.
    """
    from huggingface_hub import get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    files = collect(run)
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise D2OError(f"{repository}: no id of the Hub ({line(error)}); name one such as you/rude-mended") from None
    if "/" not in repository:
        raise D2OError(f"{repository}: no owner; name one such as you/{repository}")
    token = get_token()
    if not token:
        raise D2OError("no token of the Hub: set HF_TOKEN to one that may write, or log in with `hf auth login`")
    try:
        return _commit(repository, files, public, token)
    except D2OError:
        raise
    except Exception as error:  # of the HTTP library that the Hub's client uses, or of an invalid reply
        cause = error.__cause__ or error
        status = getattr(getattr(cause, "response", None), "status_code", None)
        # The queries of addresses may contain signatures.
        message = re.sub(r"\?\S+", "", line(cause, token))
        reason = f"{status}: {message}" if status else message
        way_out = _WAYS_OUT.get(status, "check the network, and push again")
        raise D2OError(f"{repository}: nothing was committed ({reason}); {way_out}") from None


def collect(run: Path) -> dict[str, Path | bytes]:
    """The files of a training to upload, by their names in the repository; errors as `push`."""
    # Not resolved: `results` may be a link, and Snakemake knows it by that name.
    run = Path(os.path.normpath(run.absolute()))
    run = run.parent if run.name == "manifest.json" else run
    run = Path(os.path.relpath(run.parent if run.name == "model" else run))
    model, card = run / "model", run / Path(PLACES["card"]).name
    if not (model / "manifest.json").exists():
        raise D2OError(f"{run}: no training's folder: it has no model/manifest.json")
    if lacking := weights.lacking(model):
        raise D2OError(lacking)
    records.check_content(model)
    manifest = records.read_manifest(model)
    if manifest.get("trust_remote_code"):
        raise D2OError(f"{model}: runs code of its own (trust_remote_code), which is not pushed; share it yourself")
    content = {n: d for n, d in manifest["content"].items() if "/" not in n and Path(n).suffix in _UPLOADED}
    again = f"make it with: snakemake --cores all {card}"
    if not card.exists():
        raise D2OError(f"{card}: no card; {again}")
    card_manifest = records.read_manifest(card)
    page = Path(Layout(os.path.relpath(run / "../../../..")).path("page", experiment=card_manifest["experiment"]))
    _check(card, {card_manifest["content"]}, again)
    for path in (model / "manifest.json", page):
        _check(path, {*card_manifest["inputs"].values()}, f"the card is of another one; {again}")
    about = {key: manifest[key] for key in _KEPT if key in manifest} | {"content": content}
    return {
        **{name: _without_paths(model / name) for name in content},
        "README.md": card,
        page.name: page,
        **{str(path.relative_to(page.parent)): path for pattern in _TABLES for path in page.parent.glob(pattern)},
        MARK: (json.dumps(about, indent=2) + "\n").encode(),
    }


def _check(path: Path, digests: set[str], way_out: str) -> None:
    if not path.exists() or records.file_digest(path) not in digests:
        raise D2OError(f"{path}: {'not as it was written' if path.exists() else 'no such file'}; {way_out}")


def _without_paths(file: Path) -> Path | bytes:
    """A file unchanged; but a configuration without the path that the model was loaded from."""
    if not file.name.endswith("config.json"):
        return file
    config = json.loads(file.read_text())
    kept = {key: value for key, value in config.items() if key not in ("_name_or_path", "name_or_path")}
    return file if kept == config else (json.dumps(kept, indent=2, ensure_ascii=False) + "\n").encode()


def _commit(repository: str, files: Mapping[str, Path | bytes], public: bool, token: str) -> str:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    hub.bound_waiting(_PATIENCE)
    api = HfApi(token=token)
    try:
        info = api.model_info(repository)
    except RepositoryNotFoundError:
        api.create_repo(repository, private=not public)
        existing, before = set(), None
        print(f"push: {repository} was made, {'public' if public else 'private'}", file=sys.stderr)
    else:
        existing, before = {file.rfilename for file in info.siblings or []} - {".gitattributes"}, info.sha
        _check_ours(info, existing, public)
    operations: list[Any] = [
        CommitOperationAdd(name, str(file) if isinstance(file, Path) else file) for name, file in files.items()
    ]
    # A shard of earlier weights would be loaded. Other files that the owner put there stay.
    stale = _pushed_before(api, info) & existing - files.keys() if MARK in existing else ()
    operations += [CommitOperationDelete(name) for name in sorted(stale)]
    return api.create_commit(
        repository, operations, commit_message="Model, card and report by d2o push", parent_commit=before
    ).commit_url


def _check_ours(info: Any, existing: set[str], public: bool) -> None:
    if existing and MARK not in existing:
        raise D2OError(
            f"{info.id}: holds what was not pushed from here (no {MARK}), so it is left as it is; name another id"
        )
    if bool(info.private) == public:
        now, way_out = ("private", "leave --public out") if public else ("public", "say --public")
        raise D2OError(f"{info.id}: is {now}; {way_out}, or change it on its page")


def _pushed_before(api: Any, info: Any) -> set[str]:
    """The files of the model that the last push brought to a repository, as its `MARK` there lists them."""
    with tempfile.TemporaryDirectory() as folder:
        mark = Path(api.hf_hub_download(info.id, MARK, revision=info.sha, local_dir=folder))
        try:
            return {*json.loads(mark.read_text())["content"]}
        except (ValueError, TypeError, KeyError, RecursionError):
            raise D2OError(
                f"{info.id}: its {MARK} is damaged, so nobody knows what is stale there; name another id"
            ) from None
