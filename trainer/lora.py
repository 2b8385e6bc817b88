"""LoRA (arXiv 2106.09685) by peft: thin adapters beside the layers' matrices learn, and the weights stay as they are.

Guarantees: adapters begin as an exact zero, drawn from the settings' own seed; every other parameter is frozen, the
head included; merged weights have the names and shapes that the model had without adapters.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from logitcache.errors import UserError
from trainer.distributed import Ranks, collected
from trainer.settings import Lora


def adapt(model: Any, lora: Lora) -> None:
    """Put adapters into a Llama- or Qwen-style model in place, and freeze all else.

    Raises:
        UserError: no peft, or a model that has none of the matrices named.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise UserError("--lora-rank", "peft is not installed", "pip install 'logitcache[lora]'") from error
    matrices = [f"{name}_proj" for name in lora.matrices]
    config = LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=matrices)
    with torch.random.fork_rng():
        torch.manual_seed(lora.seed)
        try:
            inject_adapter_in_model(config, model)
        except ValueError as error:
            found = f"{type(model).__name__} has none of these"
            raise UserError(f"adapters of {', '.join(matrices)}", found, "name others with --lora-matrices") from error


def merged_weights(model: Any, ranks: Ranks) -> dict[str, Tensor]:
    """Every parameter once (tied ones are one), with its adapter added, named as without it; see `collected`."""
    weights = collected(((name, parameter.detach()) for name, parameter in model.named_parameters()), ranks)
    merged: dict[str, Tensor] = {}
    for name, weight in weights.items():
        if ".lora_" in name:
            continue
        place, _, rest = name.partition(".base_layer.")
        down = weights.get(f"{place}.lora_A.default.weight") if rest == "weight" else None
        if down is not None:
            up = weights[f"{place}.lora_B.default.weight"]
            weight = weight + model.get_submodule(place).scaling["default"] * (up @ down)
        merged[f"{place}.{rest}" if rest else name] = weight
    return merged
