"""One pass over a cache: objects against the records that name them, records against the manifest.

Guarantees: only bytes that were read, and are not what was committed, are called damage; a place that does not answer,
or a newer format, is an error that ends the pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from logitcache.errors import DamagedError
from logitcache.store import layout
from logitcache.store.appended import read_appended
from logitcache.store.commits import Committed, read_identity, read_manifest
from logitcache.store.envelope import digest_of
from logitcache.store.fetch import Rows, fetch_objects, fetch_ranges, fetch_rows
from logitcache.store.manifest import Manifest
from logitcache.store.opening import root_groups, root_identity
from logitcache.store.part import SAMPLES, Record, decode_record, group_metadata
from logitcache.store.place import ByteRange, Place
from logitcache.store.samples import Samples
from logitcache.store.stored_array import StoredArray, StoredObject
from logitcache.store.tiers import read_tier

BATCH_BYTES = 1 << 28
"""Bytes of objects that a deep check reads at once."""


@dataclass(frozen=True, kw_only=True)
class Damage:
    """One object that is not what was committed.

    Attributes:
        name: the object.
        found: what is wrong with it.
        undo: the object whose removal makes the build redo this part.
        restore: the bytes it must have, where they are known; then nothing is removed.
    """

    name: str
    found: str
    undo: str
    restore: bytes | None = None


@dataclass(kw_only=True)
class Check:
    """One pass over a cache, gathering damage."""

    place: Place
    deep: bool
    sizes: Mapping[str, int]
    damage: list[Damage] = field(default_factory=list)
    tiers: dict[str, str] = field(default_factory=dict)
    objects: int = 0
    nbytes: int = 0

    def manifest(self) -> Manifest | None:
        """The manifest, if it is there and sound."""
        try:
            found = read_manifest(self.place)
        except DamagedError as error:
            self._add(layout.MANIFEST, error.found, layout.MANIFEST)
            return None
        self.objects += found is not None
        return found

    def identity(self, manifest: Manifest | None) -> None:
        """The identity, and the groups that every cache has."""
        self.objects += 1
        stated = self._stated_identity()
        rooted = root_identity(self.place)
        known = stated or rooted if manifest is None else manifest.identity
        if stated is not None and stated != known:
            self._add(layout.IDENTITY, "it is not the identity of the manifest", layout.IDENTITY)
        elif manifest is None and stated is not None and rooted not in (None, stated):
            # One of the two was put here from another cache. Without `identity.json` only the build that the root
            # names is let in, so nothing false can come of removing it.
            self._add(layout.IDENTITY, f"{layout.ROOT} names another identity", layout.IDENTITY)
            return
        for name, data in ({} if known is None else root_groups(known)).items():
            self._constant(name, data)

    def appended(self, manifest: Manifest | None) -> None:
        """The appended problem sets: those of the manifest, whose bytes are known, and what follows them."""
        known = () if manifest is None else manifest.appended
        identity = root_identity(self.place) if manifest is None else manifest.identity
        for number, item in enumerate(known, 1):
            self._constant(layout.appended_set(number), item.data(str(identity)))
        there = sum(name.startswith(f"{layout.APPENDED}/") for name in self.sizes)
        for number in range(len(known) + 1, there + 1):
            self.objects += 1
            name = layout.appended_set(number)
            try:
                if read_appended(self.place, str(identity), number) is None:
                    self._add(name, "it is missing", name)
            except DamagedError as error:
                self._add(name, error.found, name)

    def _stated_identity(self) -> str | None:
        """The digest of a sound `identity.json`."""
        if not present(self.place, layout.IDENTITY):
            self._add(layout.IDENTITY, "it is missing", layout.IDENTITY)
            return None
        try:
            identity, stated = read_identity(self.place)
        except DamagedError as error:
            self._add(layout.IDENTITY, error.found, layout.IDENTITY)
            return None
        if digest_of(identity) != stated:
            self._add(layout.IDENTITY, "its digest is not that of the identity in it", layout.IDENTITY)
            return None
        return stated

    def groups(self, manifest: Manifest | None, committed: Committed) -> Iterator[tuple[str, StoredObject | None]]:
        """Every part that should be there, with its record's digest where a manifest has it."""
        listed = {} if manifest is None else dict(zip(manifest.units, range(len(manifest.units)), strict=True))
        for unit in sorted(listed.keys() | set(committed.sequences)):
            expected = manifest.records[listed[unit]] if manifest is not None and unit in listed else None
            yield layout.sequences_part(unit), expected
        sealed = {} if manifest is None else manifest.tiers
        for tier in sorted(sealed.keys() | committed.targets.keys()):
            self._tier(tier, sealed[tier].digest if tier in sealed else None)
            for unit in sorted((listed.keys() if tier in sealed else set()) | set(committed.targets.get(tier, ()))):
                known = tier in sealed and unit in listed
                yield layout.targets_part(tier, unit), sealed[tier].records[listed[unit]] if known else None

    def part(self, group: str, expected: StoredObject | None) -> None:
        """A part's record, and all that it names."""
        name = layout.record_of(group)
        try:
            record = decode_record(group, self._record(name, expected))
            if (digest := self.tiers.get(group.split("/")[1])) is not None:
                record.require_tier(digest)
        except FileNotFoundError:
            self._add(name, "it is missing", name)
        except ValueError as error:
            self._add(name, str(error), name)
        else:
            before = len(self.damage)
            self._record_objects(record, name)
            if self.deep and len(self.damage) == before:
                self._contents(record, name)

    def _record(self, name: str, expected: StoredObject | None) -> bytes:
        self.objects += 1
        data = self.place.read(name)
        if expected is not None and not expected.matches(data):
            raise ValueError("it is not the record that the manifest names")
        return data

    def _tier(self, name: str, digest: str | None) -> None:
        record = layout.tier_record(name)
        self.objects += 1
        if digest is not None:
            self.tiers[name] = digest
        try:
            tier = read_tier(self.place, name)
        except DamagedError as error:
            self._add(record, error.found, record)
            return
        if tier is None or digest not in (None, tier.digest):
            self._add(record, "it is missing, or not the one that the manifest names", record)
            return
        self.tiers[name] = tier.digest
        self._constant(f"{layout.tier_group(name)}/zarr.json", group_metadata())
        self._record_objects(tier.shared, record)

    def _constant(self, name: str, data: bytes) -> None:
        self.objects += 1
        try:
            found = self.place.read(name)
        except FileNotFoundError:
            found = None
        if found != data:
            self._add(name, "it is missing or changed", name, data)

    def _record_objects(self, record: Record, undo_name: str) -> None:
        shards = {name: (array, i) for array in record.arrays.values() for i, name in enumerate(array.names)}
        whole: list[tuple[str, StoredObject]] = []
        for name, expected in record.all_objects.items():
            self.objects += 1
            size = self.sizes.get(name)
            if size == expected.size:
                whole.append((name, expected))
                continue
            found = "it is missing" if size is None else f"it has {size} bytes, {expected.size} were committed"
            self._add(name, found, undo_name)
        for some in _batches(whole) if self.deep else ():
            data = fetch_ranges(self.place, [ByteRange(name, 0, expected.size) for name, expected in some])
            for (name, expected), content in zip(some, data, strict=True):
                self._bytes(name, expected, content, undo_name, shards.get(name))

    def _bytes(
        self, name: str, expected: StoredObject, data: bytes, undo_name: str, shard: tuple[StoredArray, int] | None
    ) -> None:
        self.nbytes += len(data)
        if not expected.matches(data):
            self._add(name, "its digest is not the recorded one", undo_name)
        elif shard is not None:
            try:
                shard[0].check_shard(shard[1], data)
            except ValueError as error:
                self._add(name, str(error), undo_name)

    def _contents(self, record: Record, undo_name: str) -> None:
        """What other readers see must be what ours computes: offsets against the table of samples and the axes."""
        try:
            if SAMPLES in record.objects:
                (table,) = fetch_objects(self.place, [(f"{record.group}/{SAMPLES}", record.objects[SAMPLES])])
                self._offsets(record, "offsets", record.counts["tokens"], Samples.decode(table).offsets)
            else:
                self._offsets(record, "row_offsets", record.counts["rows"], None)
                if "entry_offsets" in record.arrays:
                    self._offsets(record, "entry_offsets", record.counts["entries"], None)
        except (KeyError, ValueError) as error:
            self._add(undo_name, f"its parts do not agree: {error}", undo_name)

    def _offsets(self, record: Record, name: str, total: int, want: np.ndarray | None) -> None:
        array = record.arrays[name]
        (have,) = fetch_rows(self.place, [Rows(array, 0, array.spec.shape[0])])
        whole = len(have) == record.counts["sequences"] + 1 and have[0] == 0 and have[-1] == total
        if not whole or (np.diff(have) < 0).any() or (want is not None and not np.array_equal(have, want)):
            raise ValueError(f"{name} is not that of its {record.counts['sequences']} sequences")

    def _add(self, name: str, found: str, undo_name: str, restore: bytes | None = None) -> None:
        self.damage.append(Damage(name=name, found=found, undo=undo_name, restore=restore))


def _batches(objects: Sequence[tuple[str, StoredObject]]) -> Iterator[list[tuple[str, StoredObject]]]:
    """Objects to read at once: `BATCH_BYTES`, or one that is larger."""
    some: list[tuple[str, StoredObject]] = []
    for item in objects:
        if some and sum(expected.size for _, expected in some) + item[1].size > BATCH_BYTES:
            yield some
            some = []
        some.append(item)
    if some:
        yield some


def present(place: Place, name: str) -> bool:
    """Whether an object is there."""
    try:
        place.read(name)
    except FileNotFoundError:
        return False
    return True
