"""The manifest: every part of a sealed cache, in columns, so that 100,000 parts open in seconds.

Guarantees: a manifest is consistent once parsed (equal columns, sums that fit, no name twice), and what it says of a
part is checked again against the part's record when that is read. Its digest names the cache's whole content.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from logitcache.errors import UserError
from logitcache.store import layout
from logitcache.store.appended import AppendedSet
from logitcache.store.envelope import Sealed, seal
from logitcache.store.samples import offsets_of
from logitcache.store.stored_array import StoredObject, pack, unpack

_MAX_TOTAL = 1 << 62


@dataclass(frozen=True, kw_only=True, eq=False)
class RecordColumn:
    """Length and SHA-256 of each part's record.

    Attributes:
        size: uint32[P], bytes.
        sha256: uint8[P, 32].
    """

    size: NDArray[np.uint32]
    sha256: NDArray[np.uint8]

    @classmethod
    def of(cls, objects: Sequence[StoredObject]) -> RecordColumn:
        """The column of these records."""
        digests = b"".join(bytes.fromhex(item.sha256) for item in objects)
        sizes = np.array([item.size for item in objects], np.uint32)
        return cls(size=sizes, sha256=np.frombuffer(digests, np.uint8).reshape(-1, 32))

    def __getitem__(self, part: int) -> StoredObject:
        return StoredObject(size=int(self.size[part]), sha256=self.sha256[part].tobytes().hex())

    def to_json(self) -> dict[str, str]:
        """As it stands in a manifest."""
        return {"record_size": pack(self.size), "record_sha256": pack(self.sha256)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any], parts: int) -> RecordColumn:
        """Raises ValueError unless it has one entry a part."""
        sizes, digests = unpack(value["record_size"], "<u4"), unpack(value["record_sha256"], "u1")
        if len(sizes) != parts or len(digests) != 32 * parts:
            raise ValueError(f"{len(sizes)} records of {parts} parts")
        return cls(size=sizes, sha256=digests.reshape(-1, 32))


@dataclass(frozen=True, kw_only=True, eq=False)
class TierSummary:
    """What a manifest says of a tier.

    Attributes:
        kind: of its targets.
        digest: SHA-256 of `tier.json`'s body.
        nbytes: bytes of all its parts' objects, records included.
        shared_nbytes: bytes kept once for the whole tier.
        rows: target rows.
        kl_nats: mean and p99 of KL(teacher, decoded) over the sample the build measured, and the sample's size; None
            if nothing was measured.
        engine_kl_nats: the same of KL(reference engine, scoring engine), `forward`, and its `reverse`; None if it was
            not measured.
        records: of its parts, in the order of the units.
    """

    kind: str
    digest: str
    nbytes: int
    shared_nbytes: int
    rows: int
    kl_nats: Mapping[str, float] | None
    records: RecordColumn
    engine_kl_nats: Mapping[str, Mapping[str, float] | None] | None = None

    @property
    def bytes_per_token(self) -> float | None:
        """Bytes a target row costs; None without rows."""
        return self.nbytes / self.rows if self.rows else None

    def to_json(self) -> dict[str, Any]:
        """As it stands in a manifest."""
        return {
            "kind": self.kind,
            "digest": self.digest,
            "bytes": self.nbytes,
            "shared_bytes": self.shared_nbytes,
            "rows": self.rows,
            "kl_nats": None if self.kl_nats is None else dict(self.kl_nats),
            **({} if self.engine_kl_nats is None else {"engine_kl_nats": dict(self.engine_kl_nats)}),
            **self.records.to_json(),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any], parts: int) -> TierSummary:
        """Raises ValueError unless it has one record a part."""
        return cls(
            kind=str(value["kind"]),
            digest=str(value["digest"]),
            nbytes=int(value["bytes"]),
            shared_nbytes=int(value["shared_bytes"]),
            rows=int(value["rows"]),
            kl_nats=value["kl_nats"],
            engine_kl_nats=value.get("engine_kl_nats"),
            records=RecordColumn.from_json(value, parts),
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Manifest:
    """A consistent set of parts.

    Attributes:
        identity: digest of the build's identity.
        units: names, ascending; their order is the order of the sequences.
        sequences, tokens, completion_tokens: int64[P], what each part holds.
        records: of the sequence parts.
        tiers: by name.
        flops: floating-point operations spent, by phase.
        appended: problem sets that were appended to the identity's.
        digest: SHA-256 of the manifest's body; None for the parts of a cache that is not sealed.
    """

    identity: str
    units: tuple[str, ...]
    sequences: NDArray[np.int64]
    tokens: NDArray[np.int64]
    completion_tokens: NDArray[np.int64]
    records: RecordColumn
    tiers: Mapping[str, TierSummary]
    flops: Mapping[str, int]
    appended: tuple[AppendedSet, ...] = ()
    digest: str | None = None

    @cached_property
    def starts(self) -> NDArray[np.int64]:
        """int64[P+1]: the index of each part's first sequence."""
        return offsets_of(self.sequences)

    def to_json(self) -> dict[str, Any]:
        """The body of the manifest's envelope."""
        return {
            "format_version": layout.FORMAT_VERSION,
            "identity": self.identity,
            "flops": dict(self.flops),
            "totals": self.totals,
            **({"appended": [asdict(item) for item in self.appended]} if self.appended else {}),
            "parts": {
                "units": list(self.units),
                "sequences": pack(self.sequences),
                "tokens": pack(self.tokens),
                "completion_tokens": pack(self.completion_tokens),
                **self.records.to_json(),
            },
            "tiers": {name: tier.to_json() for name, tier in self.tiers.items()},
        }

    @property
    def totals(self) -> dict[str, int]:
        """Sequences, tokens and completion tokens of the whole cache."""
        names = ("sequences", "tokens", "completion_tokens")
        return {name: int(getattr(self, name).sum()) for name in names}

    def data(self) -> bytes:
        """The manifest's object."""
        return seal(self.to_json())

    @classmethod
    def from_sealed(cls, sealed: Sealed) -> Manifest:
        """Raises ValueError unless its numbers agree with each other."""
        try:
            return cls._parse(sealed)
        except UserError as error:
            raise ValueError(str(error)) from error
        except (KeyError, TypeError, AttributeError, OverflowError) as error:
            raise ValueError(f"a field is missing or of another type: {error}") from error

    @classmethod
    def _parse(cls, sealed: Sealed) -> Manifest:
        body = sealed.body
        parts = body["parts"]
        units = tuple(layout.check_name("a unit", name) for name in parts["units"])
        columns = {name: unpack(parts[name], "<i8") for name in ("sequences", "tokens", "completion_tokens")}
        manifest = cls(
            identity=str(body["identity"]),
            units=units,
            records=RecordColumn.from_json(parts, len(units)),
            tiers={
                layout.check_name("a tier", name): TierSummary.from_json(tier, len(units))
                for name, tier in body["tiers"].items()
            },
            flops={str(phase): int(spent) for phase, spent in body["flops"].items()},
            appended=tuple(AppendedSet.from_json(item) for item in body.get("appended", ())),
            digest=sealed.digest,
            **columns,
        )
        manifest._check(body["totals"])
        return manifest

    def _check(self, totals: Mapping[str, int]) -> None:
        if any(low >= high for low, high in zip(self.units, self.units[1:], strict=False)):
            raise ValueError("its units are not in order, or one is there twice")
        for column in (self.sequences, self.tokens, self.completion_tokens):
            if len(column) != len(self.units) or (column < 0).any() or column.astype(np.float64).sum() >= _MAX_TOTAL:
                raise ValueError("its counts are negative, absurd, or not one for each part")
        if (self.completion_tokens > self.tokens).any() or (self.sequences > self.tokens).any():
            raise ValueError("a part has more sequences or completion tokens than tokens")
        if self.totals != totals:
            raise ValueError(f"its totals are {self.totals}, it says {totals}")
