"""Stages `reference_logprobs` and `heldout_logprobs`: the log-prob of every response under a model.

The first stage uses the initial model, once for all methods that need it; the second uses every model, for the
held-out human answers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from d2o import chat, devices, dtypes, groups, records, schemas
from d2o.settings import Forward
from d2o.sources import source_digest

if TYPE_CHECKING:
    from d2o import forward


def compute(settings: Forward, model: Path, negatives: Path, samples: Path | None, split: str, output: Path) -> None:
    """Write one row of `schemas.LOGPROBS` per distinct response of the split.

    Args:
        negatives: table of human answers; states which prompts are in the split.
        samples: pool whose answers are used instead of the human ones.
        split: `train` or `held-out`.
    """
    tokenizer = chat.load_tokenizer(model)
    pool = None if samples is None else chain.from_iterable(records.read_batches(samples, schemas.POOL))
    texts = groups.every_response(records.read_table(negatives, schemas.NEGATIVES), pool, split)
    tokeniser = groups.Tokeniser(tokenizer, settings)
    tokenised = [group for _, group in tokeniser.groups(texts)]
    inputs = [model / "manifest.json", negatives, *([samples] if samples else [])]
    policy = _loaded(settings, model, tokenised) if tokenised else None  # no held-out prompt, or no usable sample
    made = {"sources": source_digest(__name__), "precision": dtypes.precision(settings.precision)}
    made |= {"route": policy and policy.route}
    known = dict(_known(settings, model, negatives, made, output)) if samples else {}
    with records.artifact(output, settings, inputs) as draft:
        draft.facts |= tokeniser.counts | made
        here = [known[r.response_id] for group in tokenised for r in group.responses if r.response_id in known]
        for group in tokenised:
            group.positives = [response for response in group.positives if response.response_id not in known]
        new = [group for group in tokenised if group.positives]
        rows = chain(here, _logprobs(policy, new, settings.tokens, f"log-probs of {split} responses"))
        draft.facts["rows"] = records.write_table(draft.path, schemas.LOGPROBS, rows)


def _known(
    settings: Forward, model: Path, negatives: Path, made: Mapping[str, Any], output: Path
) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows, by response, of other pools' tables beside `output` that were computed as this table would be."""
    digests = {records.file_digest(path) for path in (model / "manifest.json", negatives)}
    for path in sorted(output.parent.glob(f"{output.stem.partition('-k')[0]}-k*.parquet")):
        manifest = records.read_manifest(path)
        same = manifest["versions"] == records.versions() and made.items() <= manifest.items()
        if same and manifest["settings"] == settings.model_dump() and digests <= set(manifest["inputs"].values()):
            yield from ((row["response_id"], row) for row in records.read_table(path, schemas.LOGPROBS))


def _loaded(settings: Forward, model: Path, tokenised: list[groups.Group]) -> forward.Policy:
    import torch

    from d2o import forward

    device = devices.device()
    policy = forward.load(model, settings.precision, device=device)
    policy.check(tokenised, torch.device(device))
    return policy


def _logprobs(policy: forward.Policy, tokenised: list[groups.Group], tokens: int, description: str):
    from tqdm import tqdm

    from d2o import forward

    # Rows of groups of similar size take similar time and memory; the largest first show early what they need.
    packs = groups.packs(sorted(tokenised, key=lambda group: group.tokens, reverse=True), tokens)
    with tqdm(total=sum(len(g.responses) for g in tokenised), desc=description, unit="resp", mininterval=2) as bar:
        for pack in packs:
            sums = policy.sums(forward.Row.of(pack).to(policy.lm.device)).tolist()
            responses = [(group, response) for group in pack for response in group.responses]
            for (group, response), logprob in zip(responses, sums, strict=True):
                yield {
                    "prompt_id": group.prompt_id,
                    "response_id": response.response_id,
                    "logprob": logprob,
                    "tokens": len(response.ids),
                }
            bar.update(len(responses))
