"""A part: what one worker writes for one unit of work, and the record that commits it.

Guarantees: `encode_*` are pure: the same values give the same objects, byte for byte. A record names every object of
its part with length and SHA-256, and every chunk with length and CRC-32C, so nothing outside it needs to be trusted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from logitcache.codecs.codec import Axis, Codec
from logitcache.errors import UserError
from logitcache.records import TeacherTargets, TokenSequence
from logitcache.store import layout
from logitcache.store.envelope import canonical, seal, unseal
from logitcache.store.samples import encode_samples, offsets_of
from logitcache.store.shards import ArraySpec, encode_shards
from logitcache.store.stored_array import StoredArray, StoredObject

SAMPLES = "samples.parquet"
TOKEN_CHUNK = 1024
"""Tokens in a chunk of `token_ids`: what bounds the bytes read beyond a sequence's ends."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Record:
    """What was committed: one part, or a tier's shared arrays.

    Attributes:
        group: the Zarr group it describes.
        counts: what it holds: `sequences`, and `tokens` and `completion_tokens` or `rows`.
        arrays: the arrays by name.
        objects: every other object, by its name within the group.
        facts: what the writer measured; deterministic, free-form JSON.
        tier: of a targets part, the digest of the tier that it was encoded with; None in a part written before records
            said so, and of anything else.
    """

    group: str
    counts: Mapping[str, int]
    arrays: Mapping[str, StoredArray]
    objects: Mapping[str, StoredObject]
    facts: Mapping[str, Any] = field(default_factory=dict)
    tier: str | None = None

    @property
    def all_objects(self) -> dict[str, StoredObject]:
        """Every object the record answers for, by its name in the cache."""
        found = {f"{self.group}/{name}": item for name, item in self.objects.items()}
        for array in self.arrays.values():
            found |= dict(zip(array.names, array.objects, strict=True))
        return found

    def to_json(self) -> dict[str, Any]:
        """The body of the record's envelope."""
        return {
            "format_version": layout.FORMAT_VERSION,
            "group": self.group,
            "counts": dict(self.counts),
            "arrays": {name: array.to_json() for name, array in self.arrays.items()},
            "objects": {name: item.to_json() for name, item in self.objects.items()},
            "facts": dict(self.facts),
            **({} if self.tier is None else {"tier": self.tier}),
        }

    def require_tier(self, digest: str) -> None:
        """Raise ValueError if these targets were encoded with another tier than that of this digest."""
        if self.tier not in (None, digest):
            raise ValueError(f"it was encoded with tier {self.tier[:12]}, not with this one, {digest[:12]}")

    @classmethod
    def from_json(cls, group: str, body: Any) -> Record:
        """Raises ValueError unless it is the consistent record of that group."""
        try:
            _check_version(body)
            if body["group"] != group:
                raise ValueError(f"it is the record of {body['group']}")
            counts = {name: int(count) for name, count in body["counts"].items()}
            arrays = {name: StoredArray.from_json(f"{group}/{name}", item) for name, item in body["arrays"].items()}
            objects = {name: StoredObject.from_json(item) for name, item in body["objects"].items()}
            facts, tier = dict(body["facts"]), body.get("tier")
            if tier is not None and len(bytes.fromhex(tier)) != 32:
                raise ValueError(f"no digest of a tier: {tier}")
            return cls(group=group, counts=counts, arrays=arrays, objects=objects, facts=facts, tier=tier)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"a field is missing or of another type: {error}") from error


def _check_version(body: Any) -> None:
    version = body["format_version"]
    if version != layout.FORMAT_VERSION:
        raise ValueError(f"format version {version}; this logitcache reads {layout.FORMAT_VERSION}")


def decode_record(group: str, data: bytes) -> Record:
    """A record from its object. Raises ValueError if a byte is not as it was written."""
    return Record.from_json(group, unseal(data).body)


@dataclass(frozen=True, kw_only=True, eq=False)
class EncodedPart:
    """A part ready to be stored: its objects by name in the cache, and the record that commits them."""

    objects: Mapping[str, bytes]
    record: Record

    @property
    def record_data(self) -> bytes:
        """The record's object."""
        try:
            return seal(self.record.to_json())
        except ValueError as error:
            raise UserError(f"facts of {self.record.group}", str(error), "give plain, finite JSON") from error


def encode_sequences(unit: str, sequences: Sequence[TokenSequence], facts: Mapping[str, Any]) -> EncodedPart:
    """The part of a unit's sequences."""
    lengths = np.array([len(sequence) for sequence in sequences], np.int64)
    tokens = np.concatenate([np.empty(0, np.int32), *(sequence.token_ids for sequence in sequences)])
    completion = sum(sequence.completion_tokens for sequence in sequences)
    arrays = [
        ("token_ids", tokens, _vector("int32", len(tokens), "token", TOKEN_CHUNK)),
        _offsets("offsets", lengths),
    ]
    counts = {"sequences": len(sequences), "tokens": len(tokens), "completion_tokens": completion}
    group = layout.sequences_part(unit)
    return encode_group(group, arrays, counts, facts, {SAMPLES: encode_samples(sequences)})


def encode_targets(
    group: str, digest: str, codec: Codec, targets: Sequence[TeacherTargets], facts: Mapping[str, Any]
) -> EncodedPart:
    """The part of a unit's targets in the tier of that digest, whose codec it is."""
    encoded = codec.encode(targets)
    rows = np.array([len(item) for item in targets], np.int64)
    axes = {Axis.ROW: int(rows.sum()), Axis.ENTRY: int(encoded.entries_per_sequence.sum())}
    arrays = [_offsets("row_offsets", rows)]
    if any(item.axis is Axis.ENTRY for item in codec.layouts.values()):
        arrays.append(_offsets("entry_offsets", encoded.entries_per_sequence))
    for name, item in codec.layouts.items():
        names = (str(item.axis), *(None for _ in item.item_shape))
        spec = ArraySpec(
            dtype=item.dtype,
            shape=(axes[item.axis], *item.item_shape),
            chunk_shape=item.chunk_shape,
            dimension_names=names,
            compression=tuple(dict(step) for step in item.compression),
        )
        arrays.append((_free(name), encoded.arrays[name], spec))
    counts = {"sequences": len(targets), "rows": axes[Axis.ROW], "entries": axes[Axis.ENTRY]}
    part = encode_group(group, arrays, counts, facts, {})
    return replace(part, record=replace(part.record, tier=digest))


def encode_group(
    group: str,
    arrays: Sequence[tuple[str, NDArray[Any], ArraySpec]],
    counts: Mapping[str, int],
    facts: Mapping[str, Any],
    others: Mapping[str, bytes],
) -> EncodedPart:
    """A Zarr group of arrays and a few other objects, with the record of them all."""
    objects = {f"{group}/zarr.json": group_metadata(), **{f"{group}/{name}": data for name, data in others.items()}}
    stored: dict[str, StoredArray] = {}
    for name, values, spec in arrays:
        _check_values(f"{group}/{name}", values, spec)
        path = f"{group}/{name}"
        shards = list(encode_shards(spec, values))
        objects[f"{path}/zarr.json"] = spec.metadata()
        objects |= {f"{path}/{shard.name}": shard.data for shard in shards}
        stored[name] = StoredArray.of(path, spec, shards)
    in_arrays = {name for array in stored.values() for name in array.names}
    plain = {name[len(group) + 1 :]: StoredObject.of(data) for name, data in objects.items() if name not in in_arrays}
    record = Record(group=group, counts=dict(counts), arrays=stored, objects=plain, facts=dict(facts))
    return EncodedPart(objects=objects, record=record)


def group_metadata(attributes: Mapping[str, Any] | None = None) -> bytes:
    """The `zarr.json` of a group."""
    return canonical({"zarr_format": 3, "node_type": "group", "attributes": dict(attributes or {})})


def blosc_zstd(dtype: str) -> tuple[Mapping[str, Any], ...]:
    """Byte shuffle and Zstandard at level 5: the store's own arrays."""
    size = np.dtype(dtype).itemsize
    configuration = {"cname": "zstd", "clevel": 5, "shuffle": "shuffle", "typesize": size, "blocksize": 0}
    return ({"name": "blosc", "configuration": configuration},)


def shared_spec(values: NDArray[Any]) -> ArraySpec:
    """How an array that a tier keeps once is stored: chunks of about a MiB along its first axis."""
    dtype = values.dtype.name
    if not values.ndim:
        raise UserError("a shared array with at least one axis", "got a scalar", "keep it in the codec's config")
    row_bytes = max(1, values[:1].nbytes)
    return ArraySpec(
        dtype=dtype,
        shape=values.shape,
        chunk_shape=(max(1, min(len(values), (1 << 20) // row_bytes)), *values.shape[1:]),
        dimension_names=(None,) * values.ndim,
        compression=blosc_zstd(dtype),
    )


def _vector(dtype: str, size: int, dimension: str, chunk: int) -> ArraySpec:
    return ArraySpec(
        dtype=dtype, shape=(size,), chunk_shape=(chunk,), dimension_names=(dimension,), compression=blosc_zstd(dtype)
    )


def _offsets(name: str, lengths: NDArray[np.int64]) -> tuple[str, NDArray[Any], ArraySpec]:
    values = offsets_of(lengths)
    return name, values, _vector("int64", len(values), "sequence", 4096)


def _free(name: str) -> str:
    if name in layout.RESERVED_ARRAYS:
        raise UserError("an array name of a codec", f"{name} is the store's own", "rename it in the codec's layouts")
    return layout.check_name("an array", name)


def _check_values(path: str, values: NDArray[Any], spec: ArraySpec) -> None:
    if values.shape != spec.shape or values.dtype.name != spec.dtype:
        asked = f"{path}: {spec.dtype}{list(spec.shape)} as its layout says"
        raise UserError(asked, f"the codec made {values.dtype.name}{list(values.shape)}", "mend the codec")
