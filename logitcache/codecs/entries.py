"""Sets of token ids, row after row, as one uint32 an entry: popularity gaps above, eight bits of value below.

Guarantees: `unpack` inverts `pack`; ids come back ascending within a row. Within a row entries are in order of
popularity rank and keep the distance to the one before, so that common tokens near each other cost few bits and
the two upper bytes are nearly always zero, which byte planes under zstd turn into nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from logitcache.codecs.specs import MAX_KEPT
from logitcache.errors import DamagedError, UserError
from logitcache.records import SampledTargets, TeacherTargets, TopKTargets

VALUE_BITS = 8
MAX_VALUE = (1 << VALUE_BITS) - 1
MAX_VOCAB = 1 << 24
_ROW_SHIFT = 32
"""Entries are sorted within rows by one sort of 64 bits each, the row above the key: numpy does that with SIMD."""

SparseTargets = TypeVar("SparseTargets", TopKTargets, SampledTargets)


def planes(typesize: int, shuffle: str) -> tuple[Mapping[str, Any], ...]:
    """Blosc zstd over the byte (or bit) planes of every `typesize` bytes."""
    options = {"typesize": typesize, "cname": "zstd", "clevel": 7, "shuffle": shuffle, "blocksize": 0}
    return ({"name": "blosc", "configuration": options},)


def pack(
    ids: NDArray[np.int32],
    values: NDArray[np.int64],
    row_splits: NDArray[np.int64],
    ranks: NDArray[np.int64],
) -> NDArray[np.uint32]:
    """uint32[E]: gap << 8 | value, where gap = rank - the rank before it in the row - 1 (at first: rank).

    Args:
        ids: int32[E], distinct within a row, below V.
        values: int64[E], 0..255.
        row_splits: int64[C+1].
        ranks: int64[V], of each token.

    Raises:
        UserError: an id beyond the vocabulary, or twice in a row; a row that keeps nothing or more than 32,767.
    """
    counts = np.diff(row_splits)
    if counts.size and (counts.min() < 1 or counts.max() > MAX_KEPT):
        found = f"{counts.min()} to {counts.max()}"
        raise UserError(f"1 to {MAX_KEPT} kept tokens in every row", found, "lower k, or raise p")
    if ids.size and (ids.min() < 0 or ids.max() >= len(ranks)):
        found = f"{ids.min()} to {ids.max()}"
        raise UserError(f"token ids below {len(ranks)}", found, "check the scorer's vocabulary")
    keys = (ranks[ids] << VALUE_BITS) | values | (np.repeat(np.arange(len(counts)), counts) << _ROW_SHIFT)
    keys.sort()
    order = keys.astype(np.uint32)
    rank = (order >> VALUE_BITS).astype(np.int64)
    gap = np.diff(rank, prepend=-1) - 1
    first = row_splits[:-1]
    gap[first] = rank[first]
    if (gap < 0).any():
        raise UserError("distinct ids within a row", "a repeated id", "check the scorer")
    return ((gap << VALUE_BITS) | (order & MAX_VALUE)).astype(np.uint32)


def unpack(
    entries: NDArray[np.uint32], counts: NDArray[np.int16], token_of_rank: NDArray[np.uint32]
) -> tuple[NDArray[np.int64], NDArray[np.int32], NDArray[np.int64]]:
    """Row splits int64[C+1], ids int32[E] ascending within a row, values int64[E].

    Raises:
        DamagedError: counts that do not add up to the entries, or a rank beyond the vocabulary.
    """
    splits = np.zeros(len(counts) + 1, np.int64)
    np.cumsum(counts, out=splits[1:])
    if splits[-1] != len(entries) or (counts < 1).any():
        raise DamagedError(f"{splits[-1]} entries of {len(counts)} rows", f"{len(entries)}", "run logitcache verify")
    steps = (entries >> VALUE_BITS).astype(np.int64) + 1
    ends = np.zeros(len(entries) + 1, np.int64)
    np.cumsum(steps, out=ends[1:])
    spans = np.diff(ends[splits])
    if (spans > len(token_of_rank)).any():
        raise DamagedError(f"ranks below {len(token_of_rank)}", f"{spans.max() - 1}", "run logitcache verify")
    # One running sum gives row and rank: where a row starts, it takes back what the row before added to the rank.
    steps[splits[1:-1]] += (1 << _ROW_SHIFT) - spans[:-1]
    steps[:1] -= 1
    places = np.cumsum(steps, out=steps)
    ranks = places & ((1 << _ROW_SHIFT) - 1)
    keys = places ^ ranks
    keys |= token_of_rank.take(ranks) << np.uint32(VALUE_BITS)
    keys |= entries & np.uint32(MAX_VALUE)
    keys.sort()
    ordered = keys.astype(np.uint32)
    return splits, (ordered >> VALUE_BITS).view(np.int32), (ordered & MAX_VALUE).astype(np.int64)


def rank_of_token(token_of_rank: NDArray[np.uint32]) -> NDArray[np.int64]:
    """int64[V]: the inverse of a permutation."""
    ranks = np.empty(len(token_of_rank), np.int64)
    ranks[token_of_rank] = np.arange(len(ranks))
    return ranks


def of_kind(targets: Sequence[TeacherTargets], kind: type[SparseTargets]) -> list[SparseTargets]:
    """The targets, once all are of `kind`; UserError otherwise."""
    parts = [part for part in targets if isinstance(part, kind)]
    if len(parts) != len(targets):
        raise UserError(f"{kind.__name__} from the scorer", "another kind", "ask the scorer for codec.request")
    return parts


def joined_splits(parts: Sequence[SparseTargets]) -> NDArray[np.int64]:
    """int64[C+1]: the row splits of parts laid one after another."""
    counts: list[NDArray[np.int64]] = [np.zeros(1, np.int64), *(np.diff(part.row_splits) for part in parts)]
    return np.cumsum(np.concatenate(counts))


def joined(parts: Sequence[SparseTargets], name: str, dtype: type) -> NDArray[Any]:
    """One array of every part's, also when there are no parts."""
    return np.concatenate([np.empty(0, dtype), *(getattr(part, name) for part in parts)])
