"""`sampled`: token ids drawn from the teacher, with how often each was drawn.

Guarantees: ids and counts exactly; the realised token's log-prob and the entropy on the root grid
(`quantize.encode_root`). An average over the draws is unbiased for the forward KL; it is no distribution, so
nothing here gives a reverse KL or a tail.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from logitcache.codecs import entries as packed
from logitcache.codecs.codec import ArrayLayout, Axis, Encoded
from logitcache.codecs.quantize import decode_root, encode_root, require_finite
from logitcache.errors import UserError
from logitcache.records import SampledTargets, TeacherTargets
from logitcache.scoring import SampledRequest

ROWS, ENTRIES = "rows", "entries"
_DISTINCT, _TOKEN, _ENTROPY = range(3)


@dataclass(frozen=True, kw_only=True, eq=False)
class SampledCodec:
    """Draws with counts.

    Attributes:
        token_of_rank: uint32[V], token ids from the likeliest to the least: a permutation.
        request: how many draws, at most 255.
        entry_chunk: entries in an inner chunk.
    """

    token_of_rank: NDArray[np.uint32]
    request: SampledRequest
    entry_chunk: int = 16_384

    kind = "sampled"
    head = None

    @property
    def layouts(self) -> Mapping[str, ArrayLayout]:
        """`rows` int16[C, 3] (distinct ids, token log-prob, entropy) and `entries` uint32[E]."""
        bits, chunk = packed.planes(6, "bitshuffle"), (1024, 3)
        return {
            ROWS: ArrayLayout(axis=Axis.ROW, dtype="int16", chunk_shape=chunk, item_shape=(3,), compression=bits),
            ENTRIES: ArrayLayout(
                axis=Axis.ENTRY,
                dtype="uint32",
                chunk_shape=(self.entry_chunk,),
                compression=packed.planes(4, "shuffle"),
            ),
        }

    @property
    def config(self) -> dict[str, Any]:
        """JSON."""
        return {"kind": self.kind, "samples": self.request.samples, "entry_chunk": self.entry_chunk}

    @property
    def shared(self) -> Mapping[str, NDArray[Any]]:
        """`token_of_rank` uint32[V]."""
        return {"token_of_rank": self.token_of_rank}

    @classmethod
    def from_config(cls, config: Mapping[str, Any], shared: Mapping[str, NDArray[Any]]) -> SampledCodec:
        """Rebuild from `config` and `shared`."""
        return cls(
            token_of_rank=shared["token_of_rank"],
            request=SampledRequest(samples=config["samples"]),
            entry_chunk=config["entry_chunk"],
        )

    def encode(self, targets: Sequence[TeacherTargets]) -> Encoded:
        """Pack B sequences; see `Codec.encode`."""
        parts = packed.of_kind(targets, SampledTargets)
        splits = packed.joined_splits(parts)
        counts = packed.joined(parts, "counts", np.int32).astype(np.int64)
        token = packed.joined(parts, "token_log_prob", np.float32)
        entropy = packed.joined(parts, "entropy", np.float32)
        require_finite("token_log_prob", token)
        require_finite("entropy", entropy)
        if counts.size and (counts.min() < 1 or counts.max() > packed.MAX_VALUE):
            found = f"{counts.min()} to {counts.max()}"
            raise UserError(f"1 to {packed.MAX_VALUE} draws of a token", found, "draw fewer samples")
        rows = np.stack([np.diff(splits), encode_root(-token), encode_root(entropy)], axis=1).astype(np.int16)
        ids = packed.joined(parts, "ids", np.int32)
        sizes = np.array([len(part.ids) for part in parts], np.int64)
        entries = packed.pack(ids, counts, splits, self._ranks)
        return Encoded(arrays={ROWS: rows, ENTRIES: entries}, entries_per_sequence=sizes)

    def decode(self, arrays: Mapping[str, NDArray[Any]]) -> SampledTargets:
        """Unpack whole rows; see `Codec.decode`."""
        rows = arrays[ROWS]
        entries = arrays[ENTRIES]
        splits = packed.splits_of(rows[:, _DISTINCT], len(entries))
        ids, counts = packed.unpack(entries, splits, packed.row_of_entry(splits), self.token_of_rank)
        return SampledTargets(
            ids=ids,
            counts=counts.astype(np.int32),
            row_splits=splits,
            token_log_prob=-decode_root(rows[:, _TOKEN]),
            entropy=decode_root(rows[:, _ENTROPY]),
        )

    def entries_per_row(self, arrays: Mapping[str, NDArray[Any]]) -> NDArray[np.int64]:
        """int64[R]: see `CountsEntries`."""
        return arrays[ROWS][:, _DISTINCT].astype(np.int64)

    @cached_property
    def _ranks(self) -> NDArray[np.int64]:
        return packed.rank_of_token(self.token_of_rank)
