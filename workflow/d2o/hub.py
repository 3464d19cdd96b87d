"""The local folder of a model of the Hub or of this machine."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

from d2o import records
from d2o.errors import D2OError
from d2o.settings import Source

# Seconds without a byte after which the Hub counts as not reached.
_PATIENCE = 10
# Maximum attempts for a repository while the Hub limits the rate of requests, and maximum seconds between them.
_TRIES, _LONGEST_WAIT = 5, 300
_WANTED = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"]


def locate(source: Source) -> Path:
    """The local folder of a model: its `path`, or its revision in the Hub's cache, downloaded if needed.

    Raises:
        D2OError: if the folder does not exist, the Hub cannot be reached, or the folder has no safetensors file.
    """
    if source.path:
        folder = Path(source.path).resolve()
        if not folder.is_dir():
            raise D2OError(f"{source.path}: no such folder")
    else:
        folder = _download(source)
    if not any(folder.glob("*.safetensors")):
        raise D2OError(f"{source.path or source.hub}: no .safetensors file; other formats can run code: convert it")
    return folder


@cache
def bound_waiting(patience: float | None = None) -> None:
    """Give each request of the Hub's client a time limit: for many, the client sets none and waits for ever.

    The limit also holds for clients that replace this one, as after a failed connection. Of several calls in a
    process, the first decides.

    Args:
        patience: seconds without a byte; None: enough for small requests and downloads.
    """
    from huggingface_hub import get_session, set_client_factory

    def bound(request: Any) -> None:
        limits = request.extensions["timeout"]
        limits.update({phase: seconds or patience or _PATIENCE for phase, seconds in limits.items()})

    client = get_session()
    hooks = {"request": [*client.event_hooks["request"], bound]}
    set_client_factory(lambda: type(client)(event_hooks=hooks, follow_redirects=True, timeout=None))


@cache
def lacking(repository: str, revision: str, kind: Literal["model", "dataset"]) -> str | None:
    """The reason, in a line, why a repository cannot be fetched now, or None; a cached model needs no request."""
    from huggingface_hub import HfApi, constants, errors

    if _in_cache(repository, revision) if kind == "model" else constants.HF_HUB_OFFLINE:
        return None  # offline, a data set's job reports whether it is in the cache
    name = f"{repository}@{revision}"
    bound_waiting()
    try:
        files = HfApi().repo_info(repository, revision=revision, repo_type=kind, timeout=_PATIENCE).siblings or []
        HfApi().auth_check(repository, repo_type=kind)
    except errors.GatedRepoError:
        return f"{name}: gated; accept its licence on its page of the Hub, and set HF_TOKEN"
    except errors.RevisionNotFoundError:
        return f"{name}: no such revision; check it"
    except errors.RepositoryNotFoundError:
        return f"{name}: no such {kind}, or a private one; check the id and HF_TOKEN"
    except Exception as error:  # of the HTTP library that the Hub's client uses, or of an invalid reply
        if _seconds_to_wait(error) is not None:
            return None  # a limit on requests does not mean that the repository is missing
        return f"{name}: the Hub is not reached ({_reason(error)}); check the network, or give a local `path`"
    if kind == "model" and not any(file.rfilename.endswith(".safetensors") for file in files):
        return (
            f"{name}: no .safetensors file; other formats can run code: convert it, or name a revision that has one"
        )
    return None


@cache
def licence(repository: str, revision: str, kind: Literal["model", "dataset"]) -> str | None:
    """The licence that a repository states; empty where it states none to us; None where the Hub is not reached."""
    from huggingface_hub import HfApi, constants, errors

    if constants.HF_HUB_OFFLINE:
        return None
    try:
        card = HfApi().repo_info(repository, revision=revision, repo_type=kind, timeout=_PATIENCE).card_data
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError):
        return ""
    except Exception:  # as above
        return None
    return (card and stated(card)) or ""


def stated(card: Mapping[str, Any]) -> str | None:
    """The licence that the metadata of a card state: one or several names."""
    licence = card.get("license_name") or card.get("license") or []
    return ", ".join(map(str, licence if isinstance(licence, list) else [licence])) or None


def _in_cache(repository: str, revision: str) -> bool:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        snapshot_download(repository, revision=revision, allow_patterns=_WANTED, local_files_only=True)
    except (LocalEntryNotFoundError, OSError):
        return False
    return True


def _download(source: Source) -> Path:
    from huggingface_hub import snapshot_download

    patterns = [*_WANTED, "*.py"] if source.trust_remote_code else _WANTED
    bound_waiting()
    try:
        download = partial(snapshot_download, source.hub, revision=source.revision, allow_patterns=patterns)
        folder = Path(patiently(source.hub, download))
    except Exception as error:  # as above
        raise D2OError(
            f"{source.hub}@{source.revision}: not in the Hub's cache and not fetched ({_reason(error)}); "
            f"check the id, the network and HF_TOKEN, or give a local `path`"
        ) from None
    for file in folder.glob("*.safetensors"):
        # In the Hub's cache a large file is named by its SHA-256, which nothing else checks.
        blob = file.resolve()
        if re.fullmatch(r"[0-9a-f]{64}", blob.name) and records.file_digest(blob) != blob.name:
            raise D2OError(
                f"{source.hub}@{source.revision}: {file.name} is not the file of the Hub; delete {blob} and run again"
            )
    return folder


def patiently(repository: str, ask: Callable[[], Any]) -> Any:
    """Call a client of the Hub and return its result; retry while the Hub limits the rate of requests (429)."""
    tries = 0
    while True:
        try:
            return ask()
        except Exception as error:
            tries += 1
            seconds = _seconds_to_wait(error)
            if seconds is None or tries == _TRIES:
                raise
        print(f"{repository}: the Hub wants fewer requests; waiting {seconds} s", file=sys.stderr)
        time.sleep(seconds)


def _seconds_to_wait(error: BaseException | None) -> int | None:
    """The seconds until the Hub answers again, where the error, or a cause of it, is a 429; else None."""
    from huggingface_hub.utils import parse_ratelimit_headers

    while error is not None:
        response = getattr(error, "response", None)
        if response is not None and response.status_code == 429:
            limit, delay = parse_ratelimit_headers(response.headers), response.headers.get("Retry-After", "")
            seconds = limit.reset_in_seconds if limit else int(delay) if delay.isdecimal() else _PATIENCE
            return min(seconds + 1, _LONGEST_WAIT)
        error = error.__cause__ or error.__context__
    return None


def _reason(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
