"""Low-rank adapters through peft: attached before training, merged on export."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from d2o.forward import Policy, load
from d2o.settings import Lora
from d2o.weights import ADAPTER


def attach(policy: Policy, lora: Lora) -> None:
    """Freeze the policy's weights and put adapters on all its linear layers but the head.

    The initial model is the policy without its adapters, so there is no second model for the reference either.
    """
    from peft import LoraConfig, get_peft_model  # a second of CPU, which no other training needs

    settings = LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules="all-linear", task_type="CAUSAL_LM")
    policy.lm = get_peft_model(policy.lm, settings)


def export(model: Path, precision: str, lora: Lora, weights: dict[str, Tensor], folder: Path) -> None:
    """Write the initial model with trained adapters merged into its weights, and the adapters alone in `adapter/`.

    Args:
        model: folder of the initial model.
        weights: the adapters' weights, by their names in the policy's model.
        folder: of the merged model.
    """
    policy = load(model, precision)
    attach(policy, lora)
    policy.lm.load_state_dict(weights, strict=False)
    for config in policy.lm.peft_config.values():
        config.target_modules = sorted(config.target_modules)  # a set: the same training would write other bytes
    policy.lm.save_pretrained(folder / ADAPTER)
    policy.lm.merge_and_unload().save_pretrained(folder)
