"""What is committed in a place, sealed or not: the manifest, or the records that would make one.

Guarantees: a manifest made here is a pure function of the committed records, so sealing again gives the same bytes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from logitcache.errors import IdentityError, UserError
from logitcache.store import layout
from logitcache.store.appended import all_appended
from logitcache.store.fetch import fetch_envelope, fetch_ranges
from logitcache.store.manifest import Manifest, RecordColumn, TierSummary
from logitcache.store.part import Record
from logitcache.store.part_index import read_record
from logitcache.store.place import ByteRange, Place, Source
from logitcache.store.stored_array import StoredObject
from logitcache.store.tiers import EncodedTier, read_tier, tiers_among

RECORDS_AT_ONCE = 256


@dataclass(frozen=True, kw_only=True)
class Committed:
    """Units whose parts are committed, names ascending.

    Attributes:
        sequences: units with sequences.
        targets: by tier, units with targets; a committed tier without parts is there, empty.
        record_sizes: bytes of each record object, by name.
    """

    sequences: tuple[str, ...]
    targets: Mapping[str, tuple[str, ...]]
    record_sizes: Mapping[str, int]


def read_identity(source: Source) -> tuple[dict[str, Any], str]:
    """A cache's identity and its digest. Raises UserError where there is no cache."""
    sealed = fetch_envelope(source, layout.IDENTITY)
    if sealed is None:
        asked = f"open {source.shown}"
        raise UserError(asked, f"no {layout.IDENTITY} there", "give the URL of a cache, or build one there")
    return dict(sealed.body["identity"]), sealed.body["digest"]


def read_manifest(source: Source) -> Manifest | None:
    """The manifest of a sealed cache; None if it is not sealed. Raises DamagedError."""
    sealed = fetch_envelope(source, layout.MANIFEST)
    if sealed is None:
        return None
    try:
        return Manifest.from_sealed(sealed)
    except ValueError as error:
        raise layout.damaged(source.shown, layout.MANIFEST, str(error)) from error


def list_committed(place: Place) -> Committed:
    """What a listing of the place shows."""
    names = [*place.sizes(layout.SEQUENCES), *place.sizes(layout.TARGETS)]
    sizes = {name: size for name, size in names if name.endswith("/record.json")}
    paths = [name.split("/") for name in sizes]
    sequences = sorted(path[1] for path in paths if len(path) == 3 and path[0] == layout.SEQUENCES)
    targets: dict[str, list[str]] = {tier: [] for tier in tiers_among(name for name, _ in names)}
    for path in paths:
        if len(path) == 4 and path[0] == layout.TARGETS and path[1] in targets:
            targets[path[1]].append(path[2])
    return Committed(
        sequences=tuple(sequences),
        targets={tier: tuple(sorted(units)) for tier, units in targets.items()},
        record_sizes=sizes,
    )


def consolidate(place: Place, committed: Committed, units: Sequence[str], tiers: Sequence[str]) -> Manifest:
    """The manifest of these units with these tiers, from their records. Raises DamagedError."""
    flops: list[Mapping[str, int]] = []
    sequence_records, counts = _sequence_column(place, committed, units, flops)
    summaries = {tier: _summary(place, committed, tier, units, flops) for tier in tiers}
    _, identity = read_identity(place)
    for tier, summary in summaries.items():
        if summary.rows != int(counts["completion_tokens"].sum()):
            found = f"{summary.rows} rows for {counts['completion_tokens'].sum()} completion tokens"
            raise IdentityError(f"tier {tier} of {place.shown}", found, "it is of other sequences: build it again")
    phases = sorted({phase for spent in flops for phase in spent})
    return Manifest(
        identity=identity,
        appended=all_appended(place, identity),
        units=tuple(units),
        records=sequence_records,
        tiers=summaries,
        flops={phase: sum(int(spent.get(phase, 0)) for spent in flops) for phase in phases},
        **counts,
    )


def consolidate_tier(place: Place, committed: Committed, tier: str | None) -> Manifest:
    """The manifest of the units that have this tier, with it alone; None for all units without targets."""
    if tier is None:
        return consolidate(place, committed, committed.sequences, [])
    units = sorted(set(committed.sequences) & set(committed.targets[tier]))
    return consolidate(place, committed, units, [tier])


def _sequence_column(
    place: Place, committed: Committed, units: Sequence[str], flops: list[Mapping[str, int]]
) -> tuple[RecordColumn, dict[str, Any]]:
    objects = []
    names = ("sequences", "tokens", "completion_tokens")
    counts = np.zeros((3, len(units)), np.int64)
    groups = [layout.sequences_part(unit) for unit in units]
    for i, (record, item) in enumerate(_records(place, committed, groups)):
        objects.append(item)
        counts[:, i] = [record.counts[name] for name in names]
        flops.append(record.facts.get("flops", {}))
    return RecordColumn.of(objects), dict(zip(names, counts, strict=True))


def _summary(
    place: Place, committed: Committed, tier: str, units: Sequence[str], flops: list[Mapping[str, int]]
) -> TierSummary:
    found = read_tier(place, tier)
    if found is None:
        raise layout.damaged(place.shown, layout.tier_record(tier), "it is missing")
    objects, samples, rows, nbytes = [], [], 0, 0
    engine: dict[str, list[float]] = {}
    groups = [layout.targets_part(tier, unit) for unit in units]
    for record, item in _records(place, committed, groups):
        try:
            record.require_tier(found.digest)
        except ValueError as error:
            raise layout.damaged(place.shown, layout.record_of(record.group), str(error)) from error
        objects.append(item)
        samples.extend(record.facts.get("kl_nats", ()))
        for direction, values in record.facts.get("engine_kl_nats", {}).items():
            engine.setdefault(direction, []).extend(values)
        flops.append(record.facts.get("flops", {}))
        rows += record.counts["rows"]
        nbytes += item.size + sum(part.size for part in record.all_objects.values())
    return TierSummary(
        kind=found.kind,
        digest=found.digest,
        nbytes=nbytes,
        shared_nbytes=sum(part.size for part in found.shared.all_objects.values()),
        rows=rows,
        kl_nats=pooled(samples),
        engine_kl_nats={direction: pooled(values) for direction, values in engine.items()} or None,
        records=RecordColumn.of(objects),
    )


def require_parts_of(place: Place, tier: EncodedTier) -> None:
    """Raise IdentityError if parts of a tier that lost its `tier.json` were encoded with another calibration.

    Under this one they would decode to other numbers.
    """
    committed, under = list_committed(place), layout.tier_group(tier.name)
    groups = [name.rpartition("/")[0] for name in committed.record_sizes if name.startswith(f"{under}/")]
    named = {record.tier for record, _ in _records(place, committed, groups)}
    if groups and (manifest := read_manifest(place)) is not None and tier.name in manifest.tiers:
        named.add(manifest.tiers[tier.name].digest)
    if not named <= {None, tier.digest}:
        found = f"its {len(groups)} parts were encoded with another calibration"
        mend = f"build it on the machine and with the targets of before, or delete {under} to score it again"
        raise IdentityError(f"create tier {tier.name} in {place.shown}", found, mend)


def _records(place: Place, committed: Committed, groups: Sequence[str]) -> Iterator[tuple[Record, StoredObject]]:
    for start in range(0, len(groups), RECORDS_AT_ONCE):
        some = groups[start : start + RECORDS_AT_ONCE]
        names = [layout.record_of(group) for group in some]
        data = fetch_ranges(place, [ByteRange(name, 0, committed.record_sizes[name]) for name in names])
        for group, item in zip(some, data, strict=True):
            yield read_record(place, group, item), StoredObject.of(item)


def pooled(samples: Sequence[float]) -> dict[str, float] | None:
    """Mean and 99th percentile (linear between ranks) of all measured values together; None without any."""
    if not samples:
        return None
    values = np.sort(np.asarray(samples, np.float64))
    mean = math.fsum(values) / len(values)
    return {"mean": mean, "p99": float(np.percentile(values, 99)), "samples": len(values)}
