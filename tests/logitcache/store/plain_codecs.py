"""Two small codecs that keep every number as it is: one without an entry axis, one with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from logitcache.codecs.codec import ArrayLayout, Axis, Codec, Encoded
from logitcache.records import Head, HiddenStateTargets, TopKTargets
from logitcache.scoring import HiddenStateRequest, TopKRequest


def shuffled(dtype: str) -> tuple[dict[str, Any], ...]:
    """Blosc zstd with byte shuffle."""
    size = np.dtype(dtype).itemsize
    options = {"typesize": size, "cname": "zstd", "clevel": 5, "shuffle": "shuffle", "blocksize": 0}
    return ({"name": "blosc", "configuration": options},)


@dataclass(frozen=True, kw_only=True, eq=False)
class PlainHidden:
    """Hidden states, bit for bit."""

    head: Head
    kind = "hidden"
    request = HiddenStateRequest()

    @property
    def layouts(self) -> dict[str, ArrayLayout]:
        d = self.head.weight.shape[1]
        return {
            "states": ArrayLayout(
                axis=Axis.ROW, dtype="uint16", chunk_shape=(256, d), item_shape=(d,), compression=shuffled("uint16")
            )
        }

    @property
    def config(self) -> dict[str, Any]:
        return {"kind": "hidden", "head": self.head.fingerprint}

    @property
    def shared(self) -> dict[str, NDArray[Any]]:
        return {"head_weight": self.head.weight}

    def encode(self, targets: Sequence[Any]) -> Encoded:
        d = self.head.weight.shape[1]
        states = np.concatenate([np.empty((0, d), np.uint16), *(item.hidden for item in targets)])
        return Encoded(arrays={"states": states}, entries_per_sequence=np.zeros(len(targets), np.int64))

    def decode(self, arrays: Mapping[str, NDArray[Any]]) -> HiddenStateTargets:
        return HiddenStateTargets(hidden=arrays["states"], head_fingerprint=self.head.fingerprint)


@dataclass(frozen=True, kw_only=True, eq=False)
class PlainTopK:
    """Top-k, number for number."""

    vocab_size: int
    kind = "topk"
    request = TopKRequest()
    head = None

    @property
    def layouts(self) -> dict[str, ArrayLayout]:
        row, entry = Axis.ROW, Axis.ENTRY
        float32, int32 = shuffled("float32"), shuffled("int32")
        return {
            "counts": ArrayLayout(axis=row, dtype="uint16", chunk_shape=(256,), compression=shuffled("uint16")),
            "rows": ArrayLayout(axis=row, dtype="float32", chunk_shape=(256, 1), item_shape=(3,), compression=float32),
            "ids": ArrayLayout(axis=entry, dtype="int32", chunk_shape=(700,), compression=int32),
            "log_probs": ArrayLayout(axis=entry, dtype="float32", chunk_shape=(700,)),
        }

    @property
    def config(self) -> dict[str, Any]:
        return {"kind": "topk", "vocab_size": self.vocab_size}

    shared: Mapping[str, NDArray[Any]] = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        object.__setattr__(self, "shared", {"prior": np.arange(self.vocab_size, dtype=np.float32)})

    def encode(self, targets: Sequence[Any]) -> Encoded:
        rows = [np.stack([t.tail_log_mass, t.token_log_prob, t.entropy], 1) for t in targets]
        arrays = {
            "counts": np.concatenate([np.empty(0), *(np.diff(t.row_splits) for t in targets)]).astype(np.uint16),
            "rows": np.concatenate([np.empty((0, 3)), *rows]).astype(np.float32),
            "ids": np.concatenate([np.empty(0), *(t.ids for t in targets)]).astype(np.int32),
            "log_probs": np.concatenate([np.empty(0), *(t.log_probs for t in targets)]).astype(np.float32),
        }
        return Encoded(arrays=arrays, entries_per_sequence=np.array([len(t.ids) for t in targets], np.int64))

    def decode(self, arrays: Mapping[str, NDArray[Any]]) -> TopKTargets:
        rows = np.ascontiguousarray(arrays["rows"].T)
        return TopKTargets(
            ids=arrays["ids"],
            log_probs=arrays["log_probs"],
            row_splits=np.concatenate([[0], np.cumsum(arrays["counts"], dtype=np.int64)]),
            tail_log_mass=rows[0],
            token_log_prob=rows[1],
            entropy=rows[2],
        )


class CountingTopK(PlainTopK):
    """The same, able to say how many entries each row has."""

    def entries_per_row(self, arrays: Mapping[str, NDArray[Any]]) -> NDArray[np.int64]:
        return arrays["counts"].astype(np.int64)


def plain_codec(config: Mapping[str, Any], shared: Mapping[str, NDArray[Any]]) -> Codec:
    """The factory for both."""
    if config["kind"] == "hidden":
        return PlainHidden(head=Head(weight=shared["head_weight"]))
    assert len(shared["prior"]) == config["vocab_size"]
    return PlainTopK(vocab_size=config["vocab_size"])


def counting_codec(config: Mapping[str, Any], shared: Mapping[str, NDArray[Any]]) -> Codec:
    """The factory that prefers the counting one."""
    return CountingTopK(vocab_size=config["vocab_size"]) if config["kind"] == "topk" else plain_codec(config, shared)
