"""Attention over sequences that lie one after another in a single row, without padding and without masks.

Guarantees: a token attends to itself and what precedes it in its own sequence, and nothing is computed for pairs of
tokens of different sequences. Each sequence goes through torch's causal kernel by itself, which on CPUs is also the
fastest way (tools/bench/flops.py measures it against a padded batch).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

ATTENTION = "packed_sequences"
"""The name under which transformers finds `packed_attention`."""


def packed_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    sequence_lengths: Sequence[int],
    scaling: float,
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each sequence; an attention function as transformers' AttentionInterface asks for.

    Args:
        module: the attention layer, of which nothing is needed.
        query: [1, heads, T, head_dim].
        key: [1, kv_heads, T, head_dim].
        value: [1, kv_heads, T, head_dim].
        attention_mask: None; the lengths say everything.
        sequence_lengths: tokens of each packed sequence; they add up to T.
        scaling: multiplies the dot products.

    Returns:
        [1, T, heads, head_dim].
    """
    assert attention_mask is None
    assert sum(sequence_lengths) == query.shape[2]
    parts = zip(*(tensor.split(list(sequence_lengths), dim=2) for tensor in (query, key, value)), strict=True)
    outputs = [
        scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=q.shape[1] != k.shape[1])
        for q, k, v in parts
    ]
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous(), None


@contextmanager
def packed_sequences(model: Any) -> Iterator[None]:
    """Within it, `model` runs with packed attention; afterwards it generates and trains as it did before."""
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION, packed_attention)
    before = model.config._attn_implementation
    model.set_attn_implementation(ATTENTION)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
