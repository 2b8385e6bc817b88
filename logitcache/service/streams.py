"""What a server's streams and flights hold: rows, samples, shared arrays and heads, each with its schema.

Guarantees: what is asked for is checked against what is there before anything is read, and read as it is sent.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

import pyarrow as pa
import pyarrow.flight as flight

from logitcache.errors import UserError
from logitcache.service import wire
from logitcache.service.catalogue import Served
from logitcache.service.refusals import Refusal
from logitcache.service.requests import (
    AllRequest,
    HeadRequest,
    RowsRequest,
    SamplesRequest,
    SharedRequest,
    malformed,
    to_bytes,
)
from logitcache.service.teachers import Scoring, Teacher
from logitcache.store.samples import SCHEMA as SAMPLES

_AHEAD_BYTES = 4 << 20
Stream = tuple[pa.Schema, Iterator[pa.RecordBatch]]


def of_cache(served: Served, request: RowsRequest | AllRequest | SamplesRequest | SharedRequest) -> Stream:
    """What a request asks of a cache. Raises Refusal for what is not there."""
    match request:
        case RowsRequest():
            if max(request.indices, default=0) >= max(1, len(served.tokens)):
                found = f"{max(request.indices)} is asked for"
                raise Refusal(UserError(f"indices of {len(served.tokens)} sequences", found, "give 0 to len - 1"))
            return _rows(served, request)
        case AllRequest():
            return _rows(served, RowsRequest(**vars(request), indices=range(len(served.tokens))))
        case SamplesRequest():
            return SAMPLES, _samples(served)
        case SharedRequest():
            return _shared(served, request)


def head(teacher: Teacher, request: HeadRequest) -> Stream:
    """An array of a teacher's head. Raises Refusal where there is none."""
    found = teacher.scorer.head
    array = {"weight": found.weight, "bias": found.bias}.get(request.array)
    if array is None:
        raise Refusal(malformed("the head has no such array"))
    schema = wire.shared_schema(request.array, array)
    return schema, wire.encode_shared(schema, array)


def info(served: Served, tier: str | None) -> flight.FlightInfo:
    """The flight of a tier, or of tokens alone."""
    manifest = served.tokens.manifest
    facts = {
        "cache": served.name,
        "tier": tier,
        "kind": None if tier is None else manifest.tiers[tier].kind,
        "manifest": manifest.digest,
        "identity": manifest.identity,
        **manifest.totals,
    }
    descriptor = flight.FlightDescriptor.for_path(served.name, *(() if tier is None else (tier,)))
    ticket = flight.Ticket(to_bytes(AllRequest(cache=served.name, manifest=served.digest, tier=tier)))
    return flight.FlightInfo(
        wire.rows_schema(served.reader(tier).codec),
        descriptor,
        [flight.FlightEndpoint(ticket, [])],  # at this same server
        len(served.tokens),
        -1 if tier is None else manifest.tiers[tier].nbytes,
        True,
        json.dumps(facts).encode(),
    )


def teacher_info(scoring: Scoring) -> flight.FlightInfo:
    """The flight of a teacher: its schema is that of what it takes."""
    teacher = scoring.teacher
    facts = {"teacher": teacher.name, "digest": teacher.digest, **teacher.facts}
    descriptor = flight.FlightDescriptor.for_path(teacher.name)
    return flight.FlightInfo(wire.rows_schema(None), descriptor, [], -1, -1, True, json.dumps(facts).encode())


def require_tier(served: Served, tier: str | None) -> None:
    """Raise Refusal unless a cache has that tier; None is its tokens."""
    tiers = served.tokens.manifest.tiers
    if tier is not None and tier not in tiers:
        have = ", ".join(tiers) or "no targets"
        raise Refusal(UserError(f"targets {tier[:80]} of {served.name}", f"it has {have}", "name one of its tiers"))


def _rows(served: Served, request: RowsRequest) -> Stream:
    require_tier(served, request.tier)
    reader = served.reader(request.tier, encoded=request.encoded)
    read = reader.read_tokens if request.tier is None else reader.read
    schema = wire.rows_schema(reader.codec)

    tiers = reader.manifest.tiers
    stored = 0 if request.tier is None else tiers[request.tier].nbytes // max(1, len(reader))

    def batches() -> Iterator[pa.RecordBatch]:
        start, at_once = 0, _at_once(stored)
        while indices := request.indices[start : start + at_once]:
            found = read(indices, first_completion_token=request.first, max_completion_tokens=request.limit)
            nbytes = 0
            for batch in wire.encode_rows(schema, indices, found):
                nbytes += batch.nbytes
                yield batch
            start += len(indices)
            at_once = _at_once(nbytes // len(indices))

    return schema, batches()


def _at_once(sequence_bytes: int) -> int:
    """How many sequences to read together: while some are read, those before them travel and are decoded."""
    return min(max(1, _AHEAD_BYTES // max(1, sequence_bytes)), wire.SEQUENCES_AT_ONCE)


def _samples(served: Served) -> Iterator[pa.RecordBatch]:
    yield from served.tokens.samples().to_batches(1 << 16)


def _shared(served: Served, request: SharedRequest) -> Stream:
    require_tier(served, request.tier)
    codec = served.reader(request.tier).codec
    array = None if codec is None else codec.shared.get(request.array)
    if array is None:
        raise Refusal(malformed("the tier has no such array"))
    schema = wire.shared_schema(request.array, array)
    return schema, wire.encode_shared(schema, array)
