"""Full-vocabulary rows from states and a head, in numpy, a block of rows at a time.

For calibration, fidelity and tests; training has its own kernels. Peak memory is a few blocks of
[BLOCK_ROWS, V] float32, whatever the number of rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from logitcache.codecs.quantize import as_float32, require_finite
from logitcache.records import Head, TopKTargets
from logitcache.scoring import TopKRequest

BLOCK_ROWS = 256


def row_blocks(rows: int, block: int = BLOCK_ROWS) -> Iterator[slice]:
    """Slices that cover `rows` rows, at most `block` each."""
    return (slice(start, min(start + block, rows)) for start in range(0, rows, block))


def spread(rows: NDArray[Any], count: int) -> NDArray[Any]:
    """At most `count` of the rows, evenly from the first to the last."""
    return rows[np.linspace(0, len(rows) - 1, min(count, len(rows))).astype(int)]


class DenseHead:
    """A head whose float32 weight is laid out once, on first use, to be applied to many blocks."""

    def __init__(self, head: Head) -> None:
        self.head = head

    @cached_property
    def weight_VD(self) -> NDArray[np.float32]:
        """float32[V, D]: twice a bfloat16 head, so one teacher needs one of these."""
        return as_float32(self.head.weight)

    def logits(self, hidden: NDArray[np.uint16] | NDArray[np.float32]) -> NDArray[np.float32]:
        """float32[n, V] logits of [n, D] states: cap(scale * (hidden @ weight.T + bias))."""
        logits = as_float32(hidden) @ self.weight_VD.T
        if self.head.bias is not None:
            logits += self.head.bias
        if self.head.scale != 1.0:
            logits *= np.float32(self.head.scale)
        if self.head.soft_cap is not None:
            cap = np.float32(self.head.soft_cap)
            np.multiply(np.tanh(logits / cap), cap, out=logits)
        return logits

    def log_probs(self, hidden: NDArray[np.uint16] | NDArray[np.float32]) -> NDArray[np.float32]:
        """float32[n, V] log-probabilities in nats. Raises UserError on NaN or infinite logits."""
        return log_softmax(self.logits(hidden))


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """Log-probabilities float32[n, V] of logits; sums in float64."""
    require_finite("logits", logits)
    shifted = logits - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, dtype=np.float64, keepdims=True)).astype(np.float32)


def select_topk(log_probs: NDArray[np.float32], token_ids: NDArray[np.int32], request: TopKRequest) -> TopKTargets:
    """The targets that `request` asks for, from every log-probability of every row.

    Args:
        log_probs: float32[n, V], nats, finite.
        token_ids: int32[n], the realised token of each row.
        request: which to keep. Of equal probabilities, those with lower ids are kept.
    """
    probs = np.exp(log_probs)
    kept = _likeliest(log_probs, request)
    rows, ids = np.nonzero(kept)
    if request.mass < 1:
        inside = _nucleus(probs[rows, ids], rows, request.mass)
        kept[rows[~inside], ids[~inside]] = False
        rows, ids = rows[inside], ids[inside]
    entropy = -np.einsum("nv,nv->n", probs, log_probs, dtype=np.float64)
    probs[rows, ids] = 0
    with np.errstate(divide="ignore"):
        log_tail = np.log(probs.sum(axis=1, dtype=np.float64))
    return TopKTargets(
        ids=ids.astype(np.int32),
        log_probs=log_probs[rows, ids],
        row_splits=np.searchsorted(rows, np.arange(len(log_probs) + 1)).astype(np.int64),
        tail_log_mass=log_tail.astype(np.float32),
        token_log_prob=log_probs[np.arange(len(log_probs)), token_ids],
        entropy=np.maximum(entropy, 0).astype(np.float32),
    )


def _likeliest(log_probs: NDArray[np.float32], request: TopKRequest) -> NDArray[np.bool_]:
    """bool[n, V]: at most `max_k` tokens a row that reach `min_probability`, and always the likeliest."""
    n, v = log_probs.shape
    k = min(request.max_k, v)
    with np.errstate(divide="ignore"):
        kept = log_probs >= np.float32(np.log(request.min_probability))
    kept[np.arange(n), log_probs.argmax(axis=1)] = True
    crowded = np.flatnonzero(kept.sum(axis=1) > k)
    values = log_probs[crowded]
    least = np.partition(values, v - k, axis=1)[:, v - k, None] if len(crowded) else values[:, :1]
    above, ties = values > least, values == least
    kept[crowded] = above | (ties & (ties.cumsum(axis=1) <= k - above.sum(axis=1, keepdims=True)))
    return kept


def _nucleus(probs: NDArray[np.float32], rows: NDArray[np.int64], mass: float) -> NDArray[np.bool_]:
    """bool[E]: the fewest entries of each row, from the likeliest down, whose probabilities reach `mass`."""
    order = np.lexsort((-probs, rows))
    ends = np.cumsum(probs[order], dtype=np.float64)
    first = np.searchsorted(rows, rows, side="left")
    before = ends - probs[order] - np.concatenate([[0.0], ends])[first]
    inside = np.empty(len(rows), bool)
    inside[order] = before < mass
    return inside
