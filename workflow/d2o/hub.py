"""The local folder of a model of the Hub or of this machine."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextvars import copy_context
from functools import cache, partial
from pathlib import Path
from threading import Thread
from typing import Any, Literal

from d2o import records, texts
from d2o.errors import D2OError
from d2o.settings import Source

# Seconds without a byte after which the Hub counts as not reached.
_PATIENCE = 10
# What a request that moves no file may take: so many times that long, and a reply of so many bytes. The Hub's longest
# list of the files of a repository, of 100,000, has about ten million.
_SPANS, _LARGEST = 10, 50_000_000
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
    """Bound each request of the Hub's client: for many, the client sets no time limit and waits for ever.

    No request waits for a byte longer than `patience`. The whole of one that moves no file, and of each error, is
    bounded in time and size; a file may take as long as its bytes arrive. The limits also hold for clients that
    replace this one, as after a failed connection. Of several calls in a process, the first decides.

    Args:
        patience: seconds without a byte; None: enough for small requests and downloads.
    """
    from huggingface_hub import get_session, set_client_factory

    def seconds_in_all() -> float:
        return _SPANS * (patience or _PATIENCE)

    def bound(request: Any) -> None:
        limits = request.extensions["timeout"]
        limits.update({phase: seconds or patience or _PATIENCE for phase, seconds in limits.items()})

    def bound_reply(response: Any) -> None:
        if response.request.extensions.get("small") or not response.is_success:
            response.iter_bytes = partial(_limited, response.iter_bytes, seconds_in_all())

    client = get_session()

    class Bounded(type(client)):
        def send(self, request: Any, *, stream: bool = False, **options: Any) -> Any:
            ask = partial(super().send, request, stream=stream, **options)
            if stream or _moves_a_file(request):
                return ask()
            request.extensions["small"] = True  # redirects keep it
            return _in_time(seconds_in_all(), ask)

    hooks = {"request": [*client.event_hooks["request"], bound], "response": [bound_reply]}
    set_client_factory(lambda: Bounded(event_hooks=hooks, follow_redirects=True, timeout=None))


def _moves_a_file(request: Any) -> bool:
    """Whether a request uploads a file, or downloads one or a range of it."""
    return request.method == "PUT" or (
        request.method == "GET" and re.search("/resolve(-cache)?/", request.url.path) is not None
    )


def _limited(read: Callable[..., Iterator[bytes]], seconds: float, *size: int) -> Iterator[bytes]:
    """The parts of a reply, up to a time and a number of bytes, counted unpacked: a packed megabyte may hold 1,000.

    Raises:
        OSError: where the reply is larger or slower.
    """
    length, end = 0, time.monotonic() + seconds
    for part in read(*size):
        if (length := length + len(part)) > _LARGEST:
            raise OSError(f"a reply of more than {_LARGEST:,} bytes")
        if time.monotonic() > end:
            raise TimeoutError(f"no whole reply within {seconds:g} s")
        yield part


def _in_time(seconds: float, ask: Callable[[], Any]) -> Any:
    """Call a client in a thread, which is left to itself after a time: headers that drip in have no other limit.

    Raises:
        httpx2.ReadTimeout: where it takes longer; the Hub's client then looks into its cache, as where it is offline.
    """
    import httpx2  # huggingface_hub's

    result: Future[Any] = Future()

    def work() -> None:
        try:
            result.set_result(ask())
        except BaseException as error:
            result.set_exception(error)

    Thread(target=copy_context().run, args=(work,), daemon=True).start()
    try:
        return result.result(seconds)
    except TimeoutError:
        raise httpx2.ReadTimeout(f"no whole reply within {seconds:g} s") from None


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
        return f"{name}: the Hub is not reached ({reason(error)}); check the network, or give a local `path`"
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
            f"{source.hub}@{source.revision}: not in the Hub's cache and not fetched ({reason(error)}); "
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


def reason(error: Exception) -> str:
    """Why the Hub gave nothing, in a line without the token; without queries of addresses, which may be signed."""
    from huggingface_hub import get_token

    return re.sub(r"\?\S+", "", texts.line(error, get_token() or ""))
