"""`full`: every log-probability of every row, on a grid uniform in nats.

For small vocabularies and short windows: 2 V bytes a row before compression. Guarantees: log-probabilities within
`step` of the teacher's (half a step of rounding, at most as much again from the renormalisation that makes every
decoded row proper), down to 65,535 steps below 0, where they stop.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from logitcache.codecs.codec import ArrayLayout, Axis, Encoded
from logitcache.codecs.dense import log_softmax
from logitcache.codecs.entries import planes
from logitcache.codecs.quantize import require_finite
from logitcache.errors import UserError
from logitcache.records import FullVocabTargets, TeacherTargets
from logitcache.scoring import FullVocabRequest

LOG_PROBS = "log_probs"
_CHUNK_VALUES = 1 << 18


@dataclass(frozen=True, kw_only=True)
class FullVocabCodec:
    """Every log-probability, in steps of `step` nats below 0."""

    vocab_size: int
    step: float

    kind = "full"
    request = FullVocabRequest()
    head = None

    @property
    def layouts(self) -> Mapping[str, ArrayLayout]:
        """`log_probs` uint16[C, V]."""
        v = self.vocab_size
        chunk = (max(1, _CHUNK_VALUES // v), v)
        compression = planes(2, "shuffle")
        return {
            LOG_PROBS: ArrayLayout(
                axis=Axis.ROW, dtype="uint16", chunk_shape=chunk, item_shape=(v,), compression=compression
            )
        }

    @property
    def config(self) -> dict[str, Any]:
        """JSON."""
        return {"kind": self.kind, "vocab_size": self.vocab_size, "step": self.step}

    @property
    def shared(self) -> Mapping[str, NDArray[Any]]:
        """Nothing."""
        return {}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> FullVocabCodec:
        """Rebuild from `config`."""
        return cls(vocab_size=config["vocab_size"], step=config["step"])

    def encode(self, targets: Sequence[TeacherTargets]) -> Encoded:
        """Pack B sequences; see `Codec.encode`."""
        codes = [np.empty((0, self.vocab_size), np.uint16)]
        for part in targets:
            if not isinstance(part, FullVocabTargets):
                raise UserError("full-vocabulary targets", "another kind", "ask the scorer for codec.request")
            if part.log_probs.shape[1] != self.vocab_size:
                found = f"{part.log_probs.shape[1]} tokens"
                raise UserError(f"a vocabulary of {self.vocab_size}", found, "check the scorer's vocabulary")
            require_finite("log_probs", part.log_probs)
            codes.append(np.clip(np.rint(part.log_probs / -self.step), 0, 65_535).astype(np.uint16))
        return Encoded(arrays={LOG_PROBS: np.concatenate(codes)}, entries_per_sequence=np.zeros(len(targets), np.int64))

    def decode(self, arrays: Mapping[str, NDArray[Any]]) -> FullVocabTargets:
        """Unpack whole rows; see `Codec.decode`."""
        return FullVocabTargets(log_probs=log_softmax(arrays[LOG_PROBS].astype(np.float32) * np.float32(-self.step)))
