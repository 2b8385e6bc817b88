"""`hidden`: the state after the final norm as bfloat16 bits, with the head that reads it.

Guarantees: bits in, the same bits out; float32 states are rounded to the nearest bfloat16, ties to even
(2^-9 relative). The head is kept as it is, once a tier, so decoded states give full-vocabulary logits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from logitcache.codecs.codec import ArrayLayout, Axis, Encoded
from logitcache.codecs.quantize import bf16_bits
from logitcache.errors import IdentityError, UserError
from logitcache.records import Head, HiddenStateTargets, TeacherTargets
from logitcache.scoring import HiddenStateRequest

STATES = "states"


@dataclass(frozen=True, kw_only=True, eq=False)
class HiddenStateCodec:
    """Bfloat16 states of the teacher whose output head is `head`."""

    head: Head

    kind = "hidden"
    request = HiddenStateRequest()

    @property
    def layouts(self) -> Mapping[str, ArrayLayout]:
        """`states` uint16[C, D]."""
        d = self.head.weight.shape[1]
        return {
            STATES: ArrayLayout(
                axis=Axis.ROW, dtype="uint16", chunk_shape=(256, d), item_shape=(d,), compression=_BITPLANES
            )
        }

    @property
    def config(self) -> dict[str, Any]:
        """JSON."""
        return {"kind": self.kind, "form": "bfloat16", "head": head_config(self.head)}

    @property
    def shared(self) -> Mapping[str, NDArray[Any]]:
        """`head_weight` [V, D] and, where there is one, `head_bias` float32[V]."""
        return head_arrays(self.head)

    @classmethod
    def from_config(cls, config: Mapping[str, Any], shared: Mapping[str, NDArray[Any]]) -> HiddenStateCodec:
        """Rebuild from `config` and `shared`."""
        return cls(head=head_from(config["head"], shared))

    def encode(self, targets: Sequence[TeacherTargets]) -> Encoded:
        """Pack B sequences; see `Codec.encode`. Raises IdentityError for states of another head."""
        states = [_bits(part) for part in own_states(targets, self.head.fingerprint)]
        d = self.head.weight.shape[1]
        return Encoded(
            arrays={STATES: np.concatenate([np.empty((0, d), np.uint16), *states])},
            entries_per_sequence=np.zeros(len(targets), np.int64),
        )

    def decode(self, arrays: Mapping[str, NDArray[Any]]) -> HiddenStateTargets:
        """Unpack whole rows; see `Codec.decode`."""
        return HiddenStateTargets(hidden=arrays[STATES], head_fingerprint=self.head.fingerprint)


_BITPLANES = (
    {
        "name": "blosc",
        "configuration": {"typesize": 2, "cname": "zstd", "clevel": 5, "shuffle": "bitshuffle", "blocksize": 0},
    },
)


def _bits(targets: HiddenStateTargets) -> NDArray[np.uint16]:
    if targets.hidden.dtype == np.float32:
        return bf16_bits(targets.hidden.astype(np.float32, copy=False))
    bits = targets.hidden.astype(np.uint16, copy=False)
    if ((bits & 0x7FFF) >= 0x7F80).any():
        raise UserError("finite states from the teacher", "NaN or infinity", "score the unit again")
    return bits


def own_states(targets: Sequence[TeacherTargets], fingerprint: str) -> list[HiddenStateTargets]:
    """The targets, once all are hidden states of the head with that fingerprint; IdentityError otherwise."""
    states = [part for part in targets if isinstance(part, HiddenStateTargets)]
    if len(states) != len(targets):
        raise UserError("hidden-state targets", "another kind", "ask the scorer for codec.request")
    for part in states:
        if part.head_fingerprint != fingerprint:
            raise IdentityError(
                f"states of head {fingerprint}", part.head_fingerprint, "score with this tier's teacher"
            )
    return states


def head_config(head: Head) -> dict[str, Any]:
    """The JSON half of a head."""
    return {"soft_cap": head.soft_cap, "scale": head.scale, "fingerprint": head.fingerprint}


def head_arrays(head: Head) -> dict[str, NDArray[Any]]:
    """The array half of a head."""
    arrays: dict[str, NDArray[Any]] = {"head_weight": head.weight}
    return arrays if head.bias is None else arrays | {"head_bias": head.bias}


def head_from(config: Mapping[str, Any], shared: Mapping[str, NDArray[Any]]) -> Head:
    """A head from its two halves. Raises IdentityError when the arrays are not those that were written."""
    head = Head(
        weight=shared["head_weight"],
        bias=shared.get("head_bias"),
        soft_cap=config["soft_cap"],
        scale=config["scale"],
    )
    if head.fingerprint != config["fingerprint"]:
        raise IdentityError(f"head {config['fingerprint']}", head.fingerprint, "run logitcache verify")
    return head
