"""`hidden:step=`: states through a learned linear transform, on one uniform grid, ready for an entropy coder.

Guarantees: decoding is a cast to float32, because the inverse transform lives in `head`: `codec.head` applied to
what `decode` returns gives the teacher's logits at the quantised state. In transform space each coordinate is
within half a step of the teacher's. What that costs in nats is measured, not bounded (`fidelity.measured_kl`).

The transform. With p the teacher's distribution and W its head, a small change e of the state costs
KL = e' F_t e / 2 nats, F_t = W' (diag p - p p') W. F is its mean over a calibration sample. In the coordinates
x F^(1/2) every direction costs the same, so one step suits all; a rotation U to the principal axes of the
sample there decorrelates them, so that each can be entropy coded by itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from logitcache.codecs.codec import ArrayLayout, Axis, Encoded
from logitcache.codecs.hidden_state import head_arrays, head_config, head_from, own_states
from logitcache.codecs.quantize import as_float32, require_finite
from logitcache.errors import UserError
from logitcache.records import Head, HiddenStateTargets, TeacherTargets
from logitcache.scoring import HiddenStateRequest

CODES = "codes"
CHUNK_ROWS, CHUNK_DIMS = 1024, 32
"""A PCodec chunk has one set of bins: dimensions of like variance share it, neighbours after the sort."""


@dataclass(frozen=True, kw_only=True, eq=False)
class TransformCodec:
    """Transform-coded states.

    Attributes:
        head: reads decoded states: the teacher's head with the inverse transform and the step folded in.
        source: fingerprint of the teacher's own head, which states to encode must carry.
        mean: float32[D], subtracted before the transform.
        analysis: float32[D, D]; (state - mean) @ analysis is rounded to integers, the step divided out already.
        step: root nats, for the record.
    """

    head: Head
    source: str
    mean: NDArray[np.float32]
    analysis: NDArray[np.float32]
    step: float

    kind = "hidden"
    request = HiddenStateRequest()

    @property
    def layouts(self) -> Mapping[str, ArrayLayout]:
        """`codes` int16[C, D], dimensions from the most to the least variance."""
        d = len(self.mean)
        chunk = (CHUNK_ROWS, min(CHUNK_DIMS, d))
        return {
            CODES: ArrayLayout(axis=Axis.ROW, dtype="int16", chunk_shape=chunk, item_shape=(d,), compression=_PCODEC)
        }

    @property
    def config(self) -> dict[str, Any]:
        """JSON."""
        head = head_config(self.head)
        return {"kind": self.kind, "form": "transform", "step": self.step, "source": self.source, "head": head}

    @property
    def shared(self) -> Mapping[str, NDArray[Any]]:
        """The folded head (`head_weight` [V, D], `head_bias` float32[V]), `mean` and `analysis`."""
        return head_arrays(self.head) | {"mean": self.mean, "analysis": self.analysis}

    @classmethod
    def from_config(cls, config: Mapping[str, Any], shared: Mapping[str, NDArray[Any]]) -> TransformCodec:
        """Rebuild from `config` and `shared`."""
        return cls(
            head=head_from(config["head"], shared),
            source=config["source"],
            mean=shared["mean"],
            analysis=shared["analysis"],
            step=config["step"],
        )

    def encode(self, targets: Sequence[TeacherTargets]) -> Encoded:
        """Pack B sequences; see `Codec.encode`. Raises IdentityError for states of another head."""
        codes = [self._codes(as_float32(part.hidden)) for part in own_states(targets, self.source)]
        empty = np.empty((0, len(self.mean)), np.int16)
        return Encoded(
            arrays={CODES: np.concatenate([empty, *codes])},
            entries_per_sequence=np.zeros(len(targets), np.int64),
        )

    def decode(self, arrays: Mapping[str, NDArray[Any]]) -> HiddenStateTargets:
        """Unpack whole rows; see `Codec.decode`."""
        return HiddenStateTargets(hidden=arrays[CODES].astype(np.float32), head_fingerprint=self.head.fingerprint)

    def _codes(self, states: NDArray[np.float32]) -> NDArray[np.int16]:
        require_finite("states", states)
        codes = np.rint((states - self.mean) @ self.analysis)
        largest = float(np.abs(codes).max(initial=0))
        if largest > np.iinfo(np.int16).max:
            raise UserError(f"states within 32,767 steps of {self.step}", f"{largest:.0f} steps", "use a larger step")
        return codes.astype(np.int16)


# Deltas are switched off by their order: the word for "none" differs between releases of pcodec.
_PCODEC = (
    {
        "name": "numcodecs.pcodec",
        "configuration": {
            "level": 8,
            "mode_spec": "classic",
            "delta_spec": "try_consecutive",
            "delta_encoding_order": 0,
        },
    },
)
