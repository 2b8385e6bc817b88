"""Learning the transform of `transform.TransformCodec` from a sample of the teacher's states.

Guarantees: deterministic in its arguments on one machine (the result is stored, never recomputed); one pass over the
vocabulary. The basis is fitted once and serves every step.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from logitcache.codecs.dense import DenseHead, log_softmax, row_blocks
from logitcache.codecs.quantize import as_float32, bf16_bits
from logitcache.codecs.transform import TransformCodec
from logitcache.records import Head

_LEAST_EIGENVALUE = 1e-7
"""Of the Fisher information, relative to its greatest: directions that hardly touch a logit are kept, coarsely."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Basis:
    """The transform at step 1: z = (h - mean) @ analysis, h = mean + z @ synthesis; float64[D], [D, D], [D, D]."""

    mean: NDArray[np.float64]
    analysis: NDArray[np.float64]
    synthesis: NDArray[np.float64]


def fisher_information(head: DenseHead, hidden: NDArray[np.float32]) -> NDArray[np.float64]:
    """float64[D, D], nats per squared unit of state: mean over rows of J' (diag p - p p') J, J the logits' Jacobian.

    J = diag(c) W with c = scale * (1 - (logit / soft_cap)^2), the derivative of the cap.
    """
    record = head.head
    diagonal = np.zeros(record.vocab_size)
    means = np.empty(hidden.shape)
    for block in row_blocks(len(hidden)):
        logits = head.logits(hidden[block])
        probs = np.exp(log_softmax(logits))
        slope = np.full(1, record.scale, np.float32)
        if record.soft_cap is not None:
            slope = (record.scale * (1 - np.square(logits / record.soft_cap))).astype(np.float32)
        diagonal += (probs * np.square(slope)).sum(axis=0, dtype=np.float64)
        means[block] = (probs * slope) @ head.weight_VD
    weighted = head.weight_VD * (diagonal / len(hidden)).astype(np.float32)[:, None]
    return (head.weight_VD.T @ weighted).astype(np.float64) - means.T @ means / len(hidden)


def fit_basis(head: DenseHead, hidden: NDArray[np.float32]) -> Basis:
    """The basis for a sample of states, float32[n, D], of the teacher whose head is `head`."""
    values, vectors = np.linalg.eigh(fisher_information(head, hidden))
    root = np.sqrt(np.maximum(values, max(_LEAST_EIGENVALUE * values[-1], 1e-30)))
    mean = hidden.mean(axis=0, dtype=np.float64)
    whitened = (hidden - mean) @ (vectors * root)
    _, axes = np.linalg.eigh(whitened.T @ whitened)
    axes = axes[:, ::-1]
    return Basis(mean=mean, analysis=(vectors * root) @ axes, synthesis=axes.T @ (vectors / root).T)


def with_step(basis: Basis, step: float, head: Head) -> TransformCodec:
    """The codec of a basis at a step (root nats), the inverse folded into `head`.

    The folded weight has the precision of the teacher's own: in bfloat16 that costs about 3e-5 nats (measured at a step
    that costs 2e-3), and halves both the head and the work of a student that multiplies by it.
    """
    weight = as_float32(head.weight)
    bias = weight @ basis.mean.astype(np.float32)
    inverse = weight @ (basis.synthesis.T * step).astype(np.float32)
    folded = Head(
        weight=bf16_bits(inverse) if head.weight.dtype == np.uint16 else inverse,
        bias=bias if head.bias is None else bias + head.bias,
        soft_cap=head.soft_cap,
        scale=head.scale,
    )
    return TransformCodec(
        head=folded,
        source=head.fingerprint,
        mean=basis.mean.astype(np.float32),
        analysis=(basis.analysis / step).astype(np.float32),
        step=step,
    )
