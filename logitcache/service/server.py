"""The Flight server: a catalogue, and streams of what is in it.

Guarantees: read-only; every request is checked before anything is read; every answer is rows, or one line of refusal
(`logitcache.service.refusals`). Memory is bounded by the streams that run at once, each of which holds one message.

    list_flights          every tier of every cache that the caller may read, and its tokens alone
    get_flight_info       of one of them, by path (cache) or (cache, tier): schema, counts, identity, manifest digest
    do_get                rows, samples or shared arrays: see `logitcache.service.requests`
    do_action             `health`; `cache`: its identity and manifest as stored; `tier`: its configuration
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.flight as flight

from logitcache.errors import UserError
from logitcache.service import wire
from logitcache.service.access import RIGHTS, Gate, Rights, Tokens
from logitcache.service.catalogue import Served, other_content, unknown_cache
from logitcache.service.limits import Limits, Turns
from logitcache.service.refusals import LOG, Refusal, refusing
from logitcache.service.requests import (
    RowsRequest,
    SamplesRequest,
    SharedRequest,
    malformed,
    parse_object,
    parse_request,
)
from logitcache.store.samples import SCHEMA as SAMPLES

SEQUENCES_AT_ONCE = 8
"""Sequences that a stream reads at a time, and sends as a message unless they are large."""
_ACTIONS = {
    "health": "whether the server takes requests",
    "cache": 'the identity and the manifest of {"cache": NAME}, as stored',
    "tier": 'the configuration of {"cache": NAME, "tier": NAME}, as stored',
}
Stream = tuple[pa.Schema, Iterator[pa.RecordBatch]]


class CacheServer(flight.FlightServerBase):
    """Serves caches; it runs once it is made.

    Args:
        location: to listen on, `grpc://HOST:PORT` or `grpc+tls://HOST:PORT`; port 0 takes a free one.
        caches: what to serve, by name.
        tokens: who may read what; None lets everyone read everything.
        tls: certificate chain and private key, PEM.
        limits: on what requests take.
    """

    def __init__(
        self,
        location: str,
        caches: Mapping[str, Served],
        *,
        tokens: Tokens | None = None,
        tls: tuple[bytes, bytes] | None = None,
        limits: Limits = Limits(),  # noqa: B008 (frozen)
    ) -> None:
        self._caches = caches
        self._turns = Turns(limits)
        super().__init__(location, middleware={RIGHTS: Gate(tokens)}, tls_certificates=None if tls is None else [tls])

    def drain(self) -> bool:
        """Refuse new streams and wait for those under way; whether all ended in time."""
        return self._turns.drain()

    def list_flights(self, context: Any, criteria: bytes) -> Iterator[flight.FlightInfo]:
        """See `flight.FlightServerBase`."""
        with refusing("list_flights", context.peer()):
            mine = [served for served in self._caches.values() if _rights(context).may_read(served.name)]
            return iter([_info(served, tier) for served in mine for tier in (None, *served.tokens.manifest.tiers)])

    def get_flight_info(self, context: Any, descriptor: flight.FlightDescriptor) -> flight.FlightInfo:
        """See `flight.FlightServerBase`."""
        with refusing("get_flight_info", context.peer()):
            path = [part.decode(errors="replace") for part in descriptor.path or ()]
            if not 1 <= len(path) <= 2:
                raise Refusal(malformed("a path is (cache) or (cache, tier)"))
            served = self._served(context, path[0])
            tier = path[1] if len(path) == 2 else None
            _require_tier(served, tier)
            return _info(served, tier)

    def get_schema(self, context: Any, descriptor: flight.FlightDescriptor) -> flight.SchemaResult:
        """See `flight.FlightServerBase`."""
        return flight.SchemaResult(self.get_flight_info(context, descriptor).schema)

    def do_get(self, context: Any, ticket: flight.Ticket) -> flight.GeneratorStream:
        """See `flight.FlightServerBase`."""
        with refusing("do_get", context.peer()):
            try:
                request = parse_request(ticket.ticket)
            except UserError as error:
                raise Refusal(error) from error
            served = self._served(context, request.cache)
            if request.manifest != served.tokens.manifest.digest:
                raise Refusal(other_content(served.name))
            match request:
                case RowsRequest():
                    schema, batches = _rows(served, request)
                case SamplesRequest():
                    schema, batches = SAMPLES, _samples(served)
                case SharedRequest():
                    schema, batches = _shared(served, request)
            return flight.GeneratorStream(
                schema, self._send(context.peer(), f"{type(request).__name__} of {served.name}", batches)
            )

    def list_actions(self, context: Any) -> list[tuple[str, str]]:
        """See `flight.FlightServerBase`."""
        return list(_ACTIONS.items())

    def do_action(self, context: Any, action: flight.Action) -> Iterator[bytes]:
        """See `flight.FlightServerBase`."""
        with refusing("do_action", context.peer()):
            if action.type == "health":
                return iter([json.dumps({"status": "draining" if self._turns.closed else "serving"}).encode()])
            if action.type not in _ACTIONS:
                raise Refusal(malformed("there is no such action"))
            fields = _strings(action.body.to_pybytes(), ("cache",) if action.type == "cache" else ("cache", "tier"))
            served = self._served(context, fields["cache"])
            if action.type == "cache":
                return iter(served.envelopes)
            _require_tier(served, fields["tier"])
            return iter([served.tier_record(fields["tier"])])

    def do_put(self, context: Any, descriptor: Any, reader: Any, writer: Any) -> None:
        """Refused."""
        with refusing("do_put", context.peer()):
            raise Refusal(_read_only())

    def do_exchange(self, context: Any, descriptor: Any, reader: Any, writer: Any) -> None:
        """Refused."""
        with refusing("do_exchange", context.peer()):
            raise Refusal(_read_only())

    def _served(self, context: Any, name: str) -> Served:
        served = self._caches.get(name)
        if served is None or not _rights(context).may_read(name):
            raise Refusal(unknown_cache(name), flight.FlightUnauthorizedError)
        return served

    def _send(self, peer: str, what: str, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        """The batches, in turn and in time, and a line in the log when they are sent."""
        started, sent = time.monotonic(), 0
        with refusing(what, peer), self._turns.turn() as over:
            for batch in batches:
                if time.monotonic() > over:
                    late = UserError(what, "it took longer than the server allows", "ask for the rest")
                    raise Refusal(late, flight.FlightTimedOutError)
                sent += batch.nbytes
                yield batch
            seconds = round(time.monotonic() - started, 6)
            LOG.info("sent", extra={"request": what, "peer": peer, "bytes": sent, "seconds": seconds})


def _rows(served: Served, request: RowsRequest) -> Stream:
    _require_tier(served, request.tier)
    reader = served.reader(request.tier, encoded=request.encoded)
    if max(request.indices, default=0) >= max(1, len(reader)):
        found = f"{max(request.indices)} is asked for"
        raise Refusal(UserError(f"indices of {len(reader)} sequences", found, "give 0 to len - 1"))
    read = reader.read_tokens if request.tier is None else reader.read
    schema = wire.rows_schema(reader.codec)

    def batches() -> Iterator[pa.RecordBatch]:
        for start in range(0, len(request.indices), SEQUENCES_AT_ONCE):
            indices = request.indices[start : start + SEQUENCES_AT_ONCE]
            found = read(indices, first_completion_token=request.first, max_completion_tokens=request.limit)
            yield from wire.encode_rows(schema, indices, found)

    return schema, batches()


def _samples(served: Served) -> Iterator[pa.RecordBatch]:
    yield from served.tokens.samples().to_batches(1 << 16)


def _shared(served: Served, request: SharedRequest) -> Stream:
    _require_tier(served, request.tier)
    codec = served.reader(request.tier).codec
    array = None if codec is None else codec.shared.get(request.array)
    if array is None:
        raise Refusal(malformed("the tier has no such array"))
    schema = wire.shared_schema(request.array, array)
    return schema, wire.encode_shared(schema, array)


def _info(served: Served, tier: str | None) -> flight.FlightInfo:
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
    return flight.FlightInfo(
        wire.rows_schema(served.reader(tier).codec),
        descriptor,
        [],
        len(served.tokens),
        -1 if tier is None else manifest.tiers[tier].nbytes,
        True,
        json.dumps(facts).encode(),
    )


def _require_tier(served: Served, tier: str | None) -> None:
    tiers = served.tokens.manifest.tiers
    if tier is not None and tier not in tiers:
        have = ", ".join(tiers) or "no targets"
        raise Refusal(UserError(f"targets {tier[:80]} of {served.name}", f"it has {have}", "name one of its tiers"))


def _rights(context: Any) -> Rights:
    return context.get_middleware(RIGHTS).rights


def _read_only() -> UserError:
    return UserError("write to this server", "it serves caches to read", "use do_get")


def _strings(data: bytes, names: tuple[str, ...]) -> dict[str, str]:
    try:
        fields = parse_object(data)
    except UserError as error:
        raise Refusal(error) from error
    if fields.keys() != set(names) or not all(isinstance(value, str) for value in fields.values()):
        raise Refusal(malformed(f"it takes exactly {', '.join(names)}"))
    return fields
