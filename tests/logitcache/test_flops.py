"""Formulas beyond a dense model's forward, against torch's own counter: experts, checkpointing, frozen weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from logitcache import flops
from logitcache.errors import UserError
from logitcache.flops import Attention, ModelShape

TOKENS = 33
DENSE = {
    "model_type": "qwen3", "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3,
    "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 500,
    "tie_word_embeddings": False,
}  # fmt: skip
EXPERTS = DENSE | {
    "model_type": "qwen3_moe", "num_hidden_layers": 4, "num_experts": 8, "num_experts_per_tok": 3,
    "moe_intermediate_size": 48, "mlp_only_layers": [1],
}  # fmt: skip


def model_of(config: dict[str, Any]) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), attn_implementation="sdpa")
    if config["model_type"] == "qwen3_moe":
        model.set_experts_implementation("eager")  # one product per expert, which the counter sees
    return model


def counted(run: Callable[[], Any]) -> tuple[Any, int]:
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        result = run()
    return result, counter.get_total_flops()


def logits_of(model: Any) -> Any:
    return model(input_ids=torch.arange(TOKENS)[None], use_cache=False).logits


def test_a_mixture_of_experts_agrees_with_torch_forward_and_backward() -> None:
    model, shape = model_of(EXPERTS), ModelShape.from_config(EXPERTS)
    logits, forward = counted(lambda: logits_of(model))
    _, backward = counted(lambda: logits.sum().backward())
    expected = flops.forward(shape, [TOKENS], head_rows=TOKENS, attention=Attention.FULL)
    assert forward == pytest.approx(expected, rel=1e-2)
    assert backward == pytest.approx(flops.backward(expected), rel=1e-2)
    matrices = sum(p.numel() for name, p in model.named_parameters() if p.dim() > 1 and "embed_tokens" not in name)
    assert shape.parameters == matrices


def test_checkpointing_runs_the_body_once_more() -> None:
    model, shape = model_of(DENSE).train(), ModelShape.from_config(DENSE)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    logits, _ = counted(lambda: logits_of(model))
    _, backward = counted(lambda: logits.sum().backward())
    forward = flops.forward(shape, [TOKENS], head_rows=TOKENS, attention=Attention.FULL)
    again = flops.recomputation(shape, [TOKENS], attention=Attention.FULL)
    assert backward == pytest.approx(flops.backward(forward) + again, rel=1e-2)


@pytest.mark.parametrize("matrices", [flops.ADAPTED, "qv", "k", "v", "o", ("gate", "down"), ("up",), ("down",)])
def test_lora_beside_frozen_weights_agrees_with_torch(matrices: Sequence[str]) -> None:
    rank, model, shape = 5, model_of(DENSE), ModelShape.from_config(DENSE)
    model.requires_grad_(False)
    for name, linear in list(model.model.layers.named_modules()):
        if isinstance(linear, torch.nn.Linear) and name.rpartition(".")[2].removesuffix("_proj") in matrices:
            thin = torch.nn.Sequential(
                torch.nn.Linear(linear.in_features, rank, bias=False),
                torch.nn.Linear(rank, linear.out_features, bias=False),
            )
            parent = model.model.layers.get_submodule(name.rpartition(".")[0])
            setattr(parent, name.rpartition(".")[2], Adapted(linear, thin))
    logits, forward = counted(lambda: logits_of(model))
    _, backward = counted(lambda: logits.sum().backward())
    expected = flops.forward(shape, [TOKENS], head_rows=TOKENS, attention=Attention.FULL)
    expected += flops.adapters(shape, TOKENS, rank=rank, matrices=matrices)
    frozen = flops.projections(shape, TOKENS) + flops.head(shape, TOKENS)
    frozen += flops.before_adapters(shape, [TOKENS], rank=rank, matrices=matrices, attention=Attention.FULL)
    assert forward == pytest.approx(expected, rel=1e-4)
    assert backward == pytest.approx(flops.backward(expected, frozen=frozen), rel=1e-4)


def test_adapters_on_experts_have_no_formula() -> None:
    with pytest.raises(UserError, match="experts"):
        flops.adapters(ModelShape.from_config(EXPERTS), 1, rank=1)


class Adapted(torch.nn.Module):
    """A frozen linear layer with LoRA's branch beside it."""

    def __init__(self, linear: torch.nn.Module, thin: torch.nn.Module) -> None:
        super().__init__()
        self.linear, self.thin = linear, thin

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return self.linear(states) + self.thin(states)
