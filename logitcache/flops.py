"""FLOPs of decoder-only transformers, from their configuration alone.

Guarantees: integers, exact for the matrix products named in docs/flops.md (multiply-add counts 2);
an architecture whose cost is not known is an error, never a guess. Agrees with torch's
FlopCounterMode where that counter sees (tests/trainer/test_flops.py).

Deliberately not counted: what is no matrix product (norms, rotary embedding, softmax, activations,
the embedding look-up, the optimizer), and work an engine wastes (padding, sequences that ended).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from logitcache.errors import UserError

KNOWN_MODEL_TYPES = ("llama", "qwen2", "qwen3", "qwen3_moe")
"""`model_type`s that are exactly: grouped-query attention over everything before, gated MLPs, a linear head."""
ADAPTED = ("q", "k", "v", "o", "gate", "up", "down")
"""The matrices of a layer that LoRA adapts unless told otherwise."""


class Attention(StrEnum):
    """Which query-key pairs are counted."""

    CAUSAL = "causal"
    """Each token with itself and those before it, S(S+1)/2 pairs: what a causal kernel needs."""
    FULL = "full"
    """All S*S pairs: what a kernel that computes and then masks does, and what FlopCounterMode counts."""


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """The widths that decide the cost of a Llama- or Qwen3-style model.

    Attributes:
        layers: decoder layers.
        hidden: D, the residual width.
        heads: query heads; kv_heads: key and value heads (grouped-query attention).
        head_dim: width of one head; heads * head_dim need not be D (Qwen3).
        mlp: the gated MLP's inner width, in layers without experts.
        vocab: rows of the head, tied or not.
        experts: in each layer that has any; 0 in a dense model.
        active_experts: that each token goes through.
        expert_mlp: inner width of one expert's gated MLP.
        sparse_layers: layers that have experts in place of the MLP.
    """

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    vocab: int
    experts: int = 0
    active_experts: int = 0
    expert_mlp: int = 0
    sparse_layers: int = 0

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> ModelShape:
        """Read a `config.json` (or `PreTrainedConfig.to_dict()`).

        Raises:
            UserError: the architecture's cost is not known here, or a width that decides it is missing or none.
        """
        model_type = config.get("model_type")
        if model_type not in KNOWN_MODEL_TYPES:
            do = f"use one of {', '.join(KNOWN_MODEL_TYPES)}, or add its terms to logitcache/flops.py"
            raise UserError("count FLOPs", f"model_type {model_type!r} has no formula", do)
        if config.get("use_sliding_window"):
            raise UserError("count FLOPs", "sliding-window attention has no formula", "use a model without it")
        hidden, heads = _count(config, "hidden_size"), _count(config, "num_attention_heads")
        return cls(
            layers=_count(config, "num_hidden_layers"),
            hidden=hidden,
            heads=heads,
            kv_heads=_count(config, "num_key_value_heads", default=heads),
            head_dim=_count(config, "head_dim", default=hidden // heads),
            mlp=_count(config, "intermediate_size"),
            vocab=_count(config, "vocab_size"),
            **(_experts_of(config) if model_type == "qwen3_moe" else {}),
        )

    @classmethod
    def of(cls, model_dir: Path) -> ModelShape:
        """Of a model's directory; errors as `from_config`."""
        return cls.from_config(json.loads((model_dir / "config.json").read_text()))

    @property
    def parameters(self) -> int:
        """Weights in the matrices counted here, all experts and the head once."""
        return _layer_weights(self, experts=self.experts) + self.hidden * self.vocab


def _experts_of(config: Mapping[str, Any]) -> dict[str, int]:
    """Which layers are sparse is decided as transformers' Qwen3MoeDecoderLayer does."""
    dense, step = config.get("mlp_only_layers") or (), _count(config, "decoder_sparse_step", default=1)
    name = "num_experts" if "num_experts" in config else "num_local_experts"
    if config.get(name) == 0:
        return {}
    layers = range(1, 1 + _count(config, "num_hidden_layers"))
    return {
        "experts": _count(config, name),
        "active_experts": _count(config, "num_experts_per_tok"),
        "expert_mlp": _count(config, "moe_intermediate_size"),
        "sparse_layers": sum(layer - 1 not in dense and layer % step == 0 for layer in layers),
    }


def _count(config: Mapping[str, Any], name: str, *, default: int | None = None) -> int:
    """A whole number from 1 on; `default` for one that is missing or null."""
    value = config.get(name)
    value = default if value is None else value
    if type(value) is not int or value < 1:
        raise UserError("count FLOPs", f"a configuration whose {name} is {value!r}", "use a model's own config.json")
    return value


def _layer_weights(shape: ModelShape, *, experts: int) -> int:
    """Weights of all layers, with so many experts in each sparse one, their router included."""
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    attention = shape.hidden * (queries + 2 * keys) + queries * shape.hidden
    sparse = shape.experts * shape.hidden + experts * 3 * shape.hidden * shape.expert_mlp
    dense = 3 * shape.hidden * shape.mlp
    return shape.layers * attention + shape.sparse_layers * sparse + (shape.layers - shape.sparse_layers) * dense


def projections(shape: ModelShape, tokens: int) -> int:
    """The products with the layers' weights alone, without attention and head: what LoRA leaves without a gradient."""
    return 2 * tokens * _layer_weights(shape, experts=shape.active_experts)


def _pair_flops(shape: ModelShape) -> int:
    """One query-key pair in all heads and layers: a dot product and a weighted sum, each head_dim multiply-adds."""
    return shape.layers * 4 * shape.heads * shape.head_dim


def head(shape: ModelShape, rows: int) -> int:
    """Logits of `rows` tokens."""
    return 2 * rows * shape.hidden * shape.vocab


def body(shape: ModelShape, lengths: Iterable[int], *, attention: Attention = Attention.CAUSAL) -> int:
    """One forward over sequences of these lengths up to the state after the final norm, without the head."""
    total = 0
    for length in lengths:
        total += projections(shape, length) + _pairs(length, attention) * _pair_flops(shape)
    return total


def _pairs(length: int, attention: Attention) -> int:
    return length * length if attention is Attention.FULL else length * (length + 1) // 2


def forward(
    shape: ModelShape, lengths: Iterable[int], *, head_rows: int, attention: Attention = Attention.CAUSAL
) -> int:
    """One forward (a prefill, a scoring, a training forward) with logits for `head_rows` rows in all."""
    return body(shape, lengths, attention=attention) + head(shape, head_rows)


def backward(forward_flops: int, *, frozen: int = 0) -> int:
    """The gradient of every product A @ B costs two products of the same size: towards A and towards B.

    Args:
        forward_flops: all of them.
        frozen: those of them that are products with weights without a gradient, which cost one product, not two.
    """
    return 2 * forward_flops - frozen


def recomputation(shape: ModelShape, lengths: Iterable[int], *, attention: Attention = Attention.CAUSAL) -> int:
    """Gradient checkpointing by layers: the body once more during the backward, and no head.

    The down-projection that ends a dense layer is not done again: its output is no operand of any gradient, and
    torch.utils.checkpoint stops before it.
    """
    lengths = list(lengths)
    last = 2 * sum(lengths) * (shape.layers - shape.sparse_layers) * shape.hidden * shape.mlp
    return body(shape, lengths, attention=attention) - last


def adapters(shape: ModelShape, tokens: int, *, rank: int, matrices: Sequence[str] = ADAPTED) -> int:
    """LoRA's two thin products beside each adapted matrix of every layer (arXiv 2106.09685), forward.

    A training step with all weights frozen costs `forward + adapters`, and
    `backward(forward + adapters, frozen=projections + head + before_adapters)`.

    Args:
        shape: of the model.
        tokens: rows that go through the body.
        rank: r; an `in x out` matrix gets `in x r` and `r x out`.
        matrices: of "q", "k", "v", "o", "gate", "up" and "down".

    Raises:
        UserError: a model with experts, whose adapters have no formula here.
    """
    if shape.sparse_layers:
        raise UserError("count LoRA's FLOPs", "a model with experts", "adapt a dense model")
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    widths = {"q": queries, "k": keys, "v": keys, "o": queries, "gate": shape.mlp, "up": shape.mlp, "down": shape.mlp}
    return 2 * tokens * shape.layers * rank * sum(shape.hidden + widths[name] for name in matrices)


def before_adapters(
    shape: ModelShape,
    lengths: Iterable[int],
    *,
    rank: int,
    matrices: Sequence[str] = ADAPTED,
    attention: Attention = Attention.CAUSAL,
) -> int:
    """The backward's products towards what comes before the first layer's first adapters: with LoRA, left out.

    Embeddings are frozen, so the first layer's input has no gradient, and neither has anything up to an adapter.

    Args:
        shape: of a dense model.
        lengths: of the sequences.
        rank: r.
        matrices: as for `adapters`.
        attention: which pairs are counted.
    """
    lengths, adapted = list(lengths), set(matrices)
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    stages = [
        (shape.hidden, {"q": queries, "k": keys, "v": keys}),
        (queries, {"o": shape.hidden}),
        (shape.hidden, {"gate": shape.mlp, "up": shape.mlp}),
        (shape.mlp, {"down": shape.hidden}),
    ]
    # Attention's backward is a product towards each of queries, keys, values, and the weights between the first two.
    needed = len(adapted & {"q", "k", "v"}) + bool(adapted & {"q", "k"})
    total = 2 * (4 - needed) * queries * sum(_pairs(length, attention) for length in lengths)
    for width, widths in stages:
        thin = rank * len(adapted & widths.keys())
        total += 2 * sum(lengths) * width * (sum(widths.values()) + thin)
        if thin:
            break
    return total


def generate(
    shape: ModelShape,
    prompt_tokens: Iterable[int],
    new_tokens: Iterable[int],
    *,
    attention: Attention = Attention.CAUSAL,
) -> tuple[int, int]:
    """Prefill and decode FLOPs of sampling `new_tokens[i]` tokens after `prompt_tokens[i]`, with a KV cache.

    The prompt is run once with logits for its last row; each new token but the last is run once against all keys
    before it, so decoding n tokens is n - 1 steps with one row of logits each. With causal counting the sum is a
    forward over prompt_tokens + new_tokens - 1 tokens.

    Returns:
        (prefill, decode).
    """
    prefill = decode = 0
    for prompt, new in zip(prompt_tokens, new_tokens, strict=True):
        if new == 0:
            continue
        prefill += body(shape, [prompt], attention=attention) + head(shape, 1)
        steps = new - 1
        contexts = steps * prompt + steps * (steps + 1) // 2
        decode += projections(shape, steps) + contexts * _pair_flops(shape) + head(shape, steps)
    return prefill, decode
