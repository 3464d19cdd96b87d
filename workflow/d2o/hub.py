"""The local folder of a model of the Hub or of this machine."""

from __future__ import annotations

from pathlib import Path

from d2o.errors import D2OError
from d2o.settings import Source

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


def _download(source: Source) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    patterns = [*_WANTED, "*.py"] if source.trust_remote_code else _WANTED
    try:
        return Path(snapshot_download(source.hub, revision=source.revision, allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise D2OError(
            f"{source.hub}@{source.revision}: not in the Hub's cache and not fetched ({reason}); "
            f"check the id, the network and HF_TOKEN, or give a local `path`"
        ) from None
