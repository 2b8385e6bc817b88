"""How far what a codec returns is from what the teacher said, in nats, on states it was not fitted on.

Guarantees: exact full-vocabulary KL, both ways, through the codec's own `encode` and `decode`; a top-k tier is
judged with its tail spread by its prior, which is what a student that asks for a full distribution is given.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from logitcache.codecs.blas import one_blas_thread
from logitcache.codecs.codec import Codec
from logitcache.codecs.dense import DenseHead, row_blocks, select_topk
from logitcache.codecs.prior import spread_tail
from logitcache.codecs.topk import TopKCodec
from logitcache.errors import UserError
from logitcache.records import (
    FullVocabTargets,
    Head,
    HiddenStateTargets,
    SampledTargets,
    TeacherTargets,
    TopKTargets,
)
from logitcache.scoring import FullVocabRequest, HiddenStateRequest, TargetRequest, TopKRequest


@dataclass(frozen=True, kw_only=True, eq=False)
class Fidelity:
    """Per-row KL in nats, float64[n]: `forward` is KL(teacher, decoded), `reverse` KL(decoded, teacher)."""

    forward: NDArray[np.float64]
    reverse: NDArray[np.float64]

    @property
    def mean(self) -> float:
        """Mean forward KL, nats."""
        return float(self.forward.mean())

    @property
    def p99(self) -> float:
        """99th percentile of the forward KL, nats."""
        return float(np.quantile(self.forward, 0.99))


class Gauge:
    """Measures one codec against a teacher whose float32 head is shared; a transform-coded tier has its own besides."""

    def __init__(self, codec: Codec, teacher: DenseHead) -> None:
        self._codec = codec
        self._teacher = teacher
        self._decoder = None if codec.head is None else self._decoder_of(codec.head)

    def _decoder_of(self, head: Head) -> DenseHead:
        return self._teacher if head.fingerprint == self._teacher.head.fingerprint else DenseHead(head)

    @one_blas_thread()
    def measure(self, hidden: NDArray[np.float32]) -> Fidelity:
        """Encode and decode the rows of a sample, and compare; see `measured_kl`."""
        forward, reverse = np.empty(len(hidden)), np.empty(len(hidden))
        for block in row_blocks(len(hidden)):
            exact = self._teacher.log_probs(hidden[block])
            targets = targets_of(self._codec.request, exact, hidden[block], self._teacher.head.fingerprint)
            decoded = self._codec.decode(self._codec.encode([targets]).arrays)
            returned = distribution_of(self._codec, self._decoder, decoded)
            forward[block] = kl_nats(exact, returned)
            reverse[block] = kl_nats(returned, exact)
        return Fidelity(forward=forward, reverse=reverse)


def measured_kl(codec: Codec, head: Head, hidden: NDArray[np.float32]) -> Fidelity:
    """The KL of a codec on a sample, through its own `encode` and `decode`.

    Args:
        codec: fitted to this teacher.
        head: the teacher's own.
        hidden: float32[n, D], states after the final norm, as live scoring would have them.

    Raises:
        UserError: a kind that is no distribution (`sampled`); states or logits that are not finite.
    """
    return Gauge(codec, DenseHead(head)).measure(hidden)


def targets_of(
    request: TargetRequest,
    log_probs: NDArray[np.float32],
    hidden: NDArray[np.float32],
    fingerprint: str,
    token_ids: NDArray[np.int32] | None = None,
) -> TeacherTargets:
    """What a scorer gives for `request`, of rows whose log-probabilities float32[n, V] and states are known.

    The realised tokens are `token_ids` int32[n], or else the likeliest ones.
    """
    realised = log_probs.argmax(axis=1).astype(np.int32) if token_ids is None else token_ids
    match request:
        case TopKRequest():
            return select_topk(log_probs, realised, request)
        case HiddenStateRequest():
            return HiddenStateTargets(hidden=hidden, head_fingerprint=fingerprint)
        case FullVocabRequest():
            return FullVocabTargets(log_probs=log_probs)
        case _:
            raise UserError("the KL of a sampled tier", "draws are no distribution", "measure another tier")


def distribution_of(codec: Codec, decoder: DenseHead | None, targets: TeacherTargets) -> NDArray[np.float32]:
    """float32[n, V]: the full distribution that decoded targets stand for."""
    match targets:
        case TopKTargets() if isinstance(codec, TopKCodec):
            return spread_tail(targets, codec.prior)
        case HiddenStateTargets(hidden=hidden) if decoder is not None:
            return decoder.log_probs(hidden)
        case FullVocabTargets(log_probs=log_probs):
            return log_probs
        case SampledTargets() | _:
            raise UserError("a full distribution", f"{type(targets).__name__}", "measure another tier")


def kl_nats(left: NDArray[np.float32], right: NDArray[np.float32]) -> NDArray[np.float64]:
    """float64[n]: sum of p log(p / q) over the vocabulary, never below 0.

    Summed as p log(p / q) - p + q, whose terms are all nonnegative, so that the float32 rounding of the logs does not
    drown small values; where the two are close, by expm1, which keeps the digits that the difference would lose.
    """
    ratio = right - left
    left_probs = np.exp(left)
    near = left_probs * (np.expm1(np.clip(ratio, -1, 1)) - ratio)
    far = np.exp(right) - left_probs - left_probs * ratio
    return np.where(np.abs(ratio) < 1, near, far).sum(axis=1, dtype=np.float64)
