"""Sets of token ids, row after row, as one uint32 an entry: popularity gaps above, eight bits of value below.

Guarantees: `unpack` inverts `pack`; ids come back ascending within a row. Within a row entries are in order of
popularity rank and keep the distance to the one before, so that common tokens near each other cost few bits and
the two upper bytes are nearly always zero, which byte planes under zstd turn into nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from logitcache.codecs.specs import MAX_KEPT
from logitcache.errors import DamagedError, UserError
from logitcache.records import SampledTargets, TeacherTargets, TopKTargets

VALUE_BITS = 8
MAX_VALUE = (1 << VALUE_BITS) - 1
MAX_VOCAB = 1 << 24
_SORTED_TOGETHER = 2048
"""About as many keys as are sorted fastest: fewer cost a call each, more leave the first cache."""

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
    keys = ((ranks[ids] << VALUE_BITS) | values).astype(np.uint32)
    _sort_rows(keys, row_splits, row_of_entry(row_splits), len(ranks))
    rank = (keys >> VALUE_BITS).astype(np.int64)
    gap = np.diff(rank, prepend=-1) - 1
    first = row_splits[:-1]
    gap[first] = rank[first]
    if (gap < 0).any():
        raise UserError("distinct ids within a row", "a repeated id", "check the scorer")
    return ((gap << VALUE_BITS) | (keys & MAX_VALUE)).astype(np.uint32)


def unpack(
    entries: NDArray[np.uint32], splits: NDArray[np.int64], row: NDArray[np.int64], token_of_rank: NDArray[np.uint32]
) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """Ids int32[E] ascending within a row, values int64[E].

    Args:
        entries: uint32[E] of `pack`.
        splits: int64[C+1] of `splits_of`.
        row: int64[E] of `row_of_entry`.
        token_of_rank: uint32[V].

    Raises:
        DamagedError: a rank beyond the vocabulary.
    """
    # One running sum over all rows, less what it was before each. It wraps round, but no row does unnoticed: a step is
    # at most 2^24, as V is, so the first rank that leaves the vocabulary is still a number beyond it.
    steps = (entries >> VALUE_BITS) + np.uint32(1)
    ranks = np.add.accumulate(steps)
    starts = splits[:-1]
    ranks -= (ranks[starts] - steps[starts] + np.uint32(1)).take(row)
    if (highest := ranks.max(initial=0)) >= len(token_of_rank):
        raise DamagedError(f"ranks below {len(token_of_rank)}", f"{highest}", "run logitcache verify")
    keys = token_of_rank.take(ranks) << np.uint32(VALUE_BITS)
    keys |= entries & MAX_VALUE
    _sort_rows(keys, splits, row, len(token_of_rank))
    return (keys >> VALUE_BITS).view(np.int32), (keys & MAX_VALUE).astype(np.int64)


def splits_of(counts: NDArray[np.int16], entries: int) -> NDArray[np.int64]:
    """int64[C+1] of the stored counts of so many entries. Raises DamagedError unless they add up, each 1 or more."""
    splits = np.zeros(len(counts) + 1, np.int64)
    np.cumsum(counts, out=splits[1:])
    if splits[-1] != entries or (counts < 1).any():
        raise DamagedError(f"{splits[-1]} entries of {len(counts)} rows", f"{entries}", "run logitcache verify")
    return splits


def row_of_entry(splits: NDArray[np.int64]) -> NDArray[np.int64]:
    """int64[E]: the row of each entry. A running sum takes two thirds of the time of `np.repeat`."""
    count = int(splits[-1])
    return np.cumsum(np.bincount(splits[1:-1], minlength=count)[:count])


def _sort_rows(keys: NDArray[np.uint32], splits: NDArray[np.int64], row: NDArray[np.int64], vocab: int) -> None:
    """Sort keys, each a number below `vocab` over a value, within their rows: as many rows at once as the bits above
    the key tell apart.
    """
    bits = VALUE_BITS + (vocab - 1).bit_length()
    mean = 1 + len(keys) // len(splits)
    together = min(1 << (32 - bits), 1 << (_SORTED_TOGETHER // mean).bit_length())
    keys |= ((row & (together - 1)) << bits).astype(np.uint32)
    for start, stop in pairwise([*splits[:-1:together].tolist(), len(keys)]):
        keys[start:stop].sort()
    keys &= np.uint32((1 << bits) - 1)


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
