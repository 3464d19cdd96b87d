"""Stage `models`: any source becomes one folder of safetensors, tokenizer and chat template."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

from d2o import hub, model_folders, records, texts
from d2o.chat import templates
from d2o.errors import D2OError
from d2o.settings import Model

# Tokens of context where the config names none.
_CONTEXT = 2048


def fetch(model: Model, run: Path | None, folder: Path) -> None:
    """Make the model folder.

    A model of the Hub, of a local folder or of a run is linked, not copied: a 7B checkpoint exists once. A GGUF file
    is dequantised to bf16, which keeps the rounding of its quantisation.

    Args:
        run: the folder that a training made, for `model.run` only.
    Raises:
        D2OError: where the source is missing, has another hash than the config states, or lacks safetensors,
            tokenizer or chat template.
    """
    template = templates.read(model.chat_template) if model.chat_template else None
    if (run is None) != (model.run is None):
        raise D2OError("models: --run goes with a model that has `run`")
    with records.artifact(folder, model, [run / "manifest.json"] if run else []) as draft:
        draft.path.mkdir()
        if model.package:
            draft.facts["source"] = _convert_gguf(_packaged(model), draft.path)
        else:
            source = run or hub.locate(model)
            model_folders.check_source(source)
            model_folders.link(source, draft.path)
            draft.facts["source"] = str(source)
        draft.facts["trust_remote_code"] = model_folders.trusts_code(run) if run else model.trust_remote_code
        _settle_tokenizer(draft.path, template, model.context or (None if run else _CONTEXT))
        model_folders.check(draft.path)


def _packaged(model: Model) -> Path:
    spec = importlib.util.find_spec(model.package)
    if spec is None:
        raise D2OError(f"models: the package {model.package} is not installed; run `make env`")
    path = Path(spec.submodule_search_locations[0]) / model.file
    if not path.exists():
        raise D2OError(f"models: the package {model.package} has no file {model.file}")
    if model.sha256 and records.file_digest(path) != model.sha256:
        raise D2OError(f"{path}: SHA-256 is not the config's {model.sha256}; install the version that the lock names")
    return path


def _convert_gguf(path: Path, folder: Path) -> str:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    print(f"models: converting {path.name} to bf16 safetensors", file=sys.stderr, flush=True)
    try:
        weights = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    except Exception as error:  # a damaged file may cause any error in the library
        raise D2OError(
            f"{path}: not a GGUF file that transformers can read ({texts.line(error)}); fetch it again"
        ) from None
    # The weights are plain now; a leftover quantisation record would make every loader dequantise again.
    weights.hf_quantizer, weights.is_quantized = None, False
    del weights.config.quantization_config
    weights.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return path.name


def _settle_tokenizer(folder: Path, template: str | None, context: int | None) -> None:
    """Write the context length, and a named template if there is one, into the folder's own tokenizer."""
    path = folder / "tokenizer_config.json"
    config = model_folders.read_object(path) if path.exists() else {}
    if context:
        config["model_max_length"] = context
    if template:
        config.pop("chat_template", None)
        _replace(folder / "chat_template.jinja", template)
    _replace(path, json.dumps(config, indent=2, ensure_ascii=False))


def _replace(path: Path, text: str) -> None:
    path.unlink(missing_ok=True)  # a link to the source must not be written through
    path.write_text(text)
