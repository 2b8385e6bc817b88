"""What a reader keeps in memory of a part, and a bounded cache of it.

Guarantees: an index is consistent with the manifest, with the part's arrays and with the tier's codec before it is
used; no more than `budget_bytes` of indexes are kept (one batch's worth always fits). Thread-safe.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from logitcache.codecs.codec import Axis, Codec
from logitcache.store import layout
from logitcache.store.fetch import Rows, fetch_objects, fetch_rows
from logitcache.store.manifest import Manifest
from logitcache.store.part import SAMPLES, Record, decode_record
from logitcache.store.place import Source
from logitcache.store.samples import Samples
from logitcache.store.stored_array import StoredArray


@dataclass(frozen=True, kw_only=True, eq=False)
class PartIndex:
    """Where everything of one part lies.

    Attributes:
        samples: the table of its sequences.
        token_ids: their tokens.
        targets: the codec's arrays by name; empty without a tier.
        entry_offsets: int64[B+1], the entries of sequence b; None where the codec has no entry axis.
    """

    samples: Samples
    token_ids: StoredArray
    targets: Mapping[str, StoredArray]
    entry_offsets: NDArray[np.int64] | None

    @property
    def memory_bytes(self) -> int:
        """About what this takes in memory."""
        arrays = (self.token_ids, *self.targets.values())
        entries = 0 if self.entry_offsets is None else self.entry_offsets.nbytes
        return self.samples.memory_bytes + entries + sum(array.memory_bytes for array in arrays)


@dataclass(frozen=True, kw_only=True, eq=False)
class PartLoader:
    """Reads part indexes, many at a time: two rounds of requests however many parts."""

    source: Source
    manifest: Manifest
    tier: str | None
    codec: Codec | None

    def load(self, parts: Sequence[int]) -> list[PartIndex]:
        """The indexes of these parts. Raises DamagedError."""
        sequences = self._records(parts, None)
        targets: list[Record | None] = [None] * len(parts)
        if self.tier is not None:
            targets = list(self._records(parts, self.tier))
        tables = fetch_objects(
            self.source, [(f"{item.group}/{SAMPLES}", _samples_object(self.source, item)) for item in sequences]
        )
        offsets = self._entry_offsets(targets)
        found = zip(parts, sequences, targets, tables, offsets, strict=True)
        return [self._checked(part, own, other, table, entries) for part, own, other, table, entries in found]

    def _records(self, parts: Sequence[int], tier: str | None) -> list[Record]:
        units = [self.manifest.units[part] for part in parts]
        groups = [layout.sequences_part(u) if tier is None else layout.targets_part(tier, u) for u in units]
        column = self.manifest.records if tier is None else self.manifest.tiers[tier].records
        names = [layout.record_of(group) for group in groups]
        data = fetch_objects(self.source, [(name, column[part]) for name, part in zip(names, parts, strict=True)])
        return [read_record(self.source, group, item) for group, item in zip(groups, data, strict=True)]

    def _entry_offsets(self, targets: Sequence[Record | None]) -> list[NDArray[np.int64] | None]:
        found = [None if record is None else record.arrays.get("entry_offsets") for record in targets]
        arrays = [array for array in found if array is not None]
        values = iter(fetch_rows(self.source, [Rows(array, 0, array.spec.shape[0]) for array in arrays]))
        return [None if array is None else next(values) for array in found]

    def _checked(
        self, part: int, sequences: Record, targets: Record | None, table: bytes, entries: NDArray[np.int64] | None
    ) -> PartIndex:
        try:
            samples = Samples.decode(table)
            tokens = _check_sequences(self.manifest, part, sequences, samples)
            if targets is None or self.codec is None:
                return PartIndex(samples=samples, token_ids=tokens, targets={}, entry_offsets=None)
            targets.require_tier(self.manifest.tiers[str(self.tier)].digest)
            arrays = _check_targets(targets, samples, self.codec, entries)
        except (KeyError, ValueError) as error:
            group = sequences.group if targets is None else targets.group
            raise layout.damaged(self.source.shown, layout.record_of(group), str(error)) from error
        return PartIndex(samples=samples, token_ids=tokens, targets=arrays, entry_offsets=entries)


def read_record(source: Source, group: str, data: bytes) -> Record:
    """A record from its bytes. Raises DamagedError."""
    try:
        return decode_record(group, data)
    except ValueError as error:
        raise layout.damaged(source.shown, layout.record_of(group), str(error)) from error


def _samples_object(source: Source, record: Record) -> Any:
    try:
        return record.objects[SAMPLES]
    except KeyError as error:
        raise layout.damaged(source.shown, layout.record_of(record.group), f"it names no {SAMPLES}") from error


def _check_sequences(manifest: Manifest, part: int, record: Record, samples: Samples) -> StoredArray:
    tokens = record.arrays["token_ids"]
    have = (len(samples), int(samples.offsets[-1]), int(samples.row_offsets[-1]))
    listed = (manifest.sequences[part], manifest.tokens[part], manifest.completion_tokens[part])
    if have != listed or tokens.spec.shape != (have[1],) or tokens.spec.dtype != "int32":
        raise ValueError(
            f"sequences, tokens and completion tokens are {have}, the manifest says {tuple(map(int, listed))}"
        )
    return tokens


def _check_targets(
    record: Record, samples: Samples, codec: Codec, entries: NDArray[np.int64] | None
) -> dict[str, StoredArray]:
    lengths = {Axis.ROW: int(samples.row_offsets[-1]), Axis.ENTRY: 0}
    if entries is not None:
        if len(entries) != len(samples) + 1 or entries[0] != 0 or (np.diff(entries) < 0).any():
            raise ValueError("its entry offsets are not those of its sequences")
        lengths[Axis.ENTRY] = int(entries[-1])
    arrays = {name: record.arrays[name] for name in codec.layouts}
    for name, item in codec.layouts.items():
        have = (arrays[name].spec.dtype, arrays[name].spec.shape)
        want = (item.dtype, (lengths[item.axis], *item.item_shape))
        if have != want:
            raise ValueError(f"{name} is {have[0]}{list(have[1])}, not {want[0]}{list(want[1])}")
    return arrays


class PartCache:
    """The most recently used indexes, bounded in bytes; a part that two threads want is read once."""

    def __init__(self, loader: PartLoader, budget_bytes: int) -> None:
        self._loader = loader
        self._budget_bytes = budget_bytes
        self._kept: OrderedDict[int, Future[PartIndex]] = OrderedDict()
        self._used_bytes = 0
        self._lock = threading.Lock()

    def get(self, parts: Sequence[int]) -> dict[int, PartIndex]:
        """The indexes of these parts, by part; those that nobody has or is reading are read together."""
        wanted = sorted(set(parts))
        with self._lock:
            mine = [part for part in wanted if part not in self._kept]
            for part in wanted:
                self._kept.setdefault(part, Future())
                self._kept.move_to_end(part)
            futures = {part: self._kept[part] for part in wanted}
        if mine:
            self._load(mine, futures)
        return {part: future.result() for part, future in futures.items()}

    def _load(self, parts: Sequence[int], futures: Mapping[int, Future[PartIndex]]) -> None:
        try:
            loaded = self._loader.load(parts)
        except BaseException as error:
            with self._lock:
                for part in parts:
                    del self._kept[part]
            for part in parts:
                futures[part].set_exception(error)
            raise
        for part, index in zip(parts, loaded, strict=True):
            futures[part].set_result(index)
        with self._lock:
            self._used_bytes += sum(index.memory_bytes for index in loaded)
            self._shrink(keep=set(futures))

    def _shrink(self, keep: set[int]) -> None:
        """Forget what was used longest ago; what is being read, and this batch, stay."""
        for part in list(self._kept):
            if self._used_bytes <= self._budget_bytes:
                return
            if part not in keep and self._kept[part].done():
                self._used_bytes -= self._kept.pop(part).result().memory_bytes
