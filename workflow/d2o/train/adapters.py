"""Low-rank adapters through peft: attached before training, merged on export."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel

from d2o.forward import Policy, load
from d2o.settings import Lora


def attach(policy: Policy, lora: Lora) -> None:
    """Freeze the policy's weights and put adapters on all its linear layers but the head.

    The initial model is the policy without its adapters, so there is no second model for the reference either.
    """
    from peft import LoraConfig, get_peft_model  # a second of CPU, which no other training needs

    settings = LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules="all-linear", task_type="CAUSAL_LM")
    policy.lm = get_peft_model(policy.lm, settings)


def merged(model: Path, precision: str, lora: Lora, weights: dict[str, Tensor]) -> PreTrainedModel:
    """The initial model with trained adapters merged into its weights.

    Args:
        model: folder of the initial model.
        weights: the adapters', by their names in the policy's model.
    """
    policy = load(model, precision)
    attach(policy, lora)
    policy.lm.load_state_dict(weights, strict=False)
    return policy.lm.merge_and_unload()
