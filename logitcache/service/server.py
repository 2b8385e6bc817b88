"""The Flight server: a catalogue, streams of what is in it, and teachers that score.

Guarantees: it writes to no cache; every request is checked before anything is read or scored; every answer is rows, or
one line of refusal (`logitcache.service.refusals`). Memory is bounded by the calls that run at once, of which a stream
holds one message and a call to a teacher its answer.

    list_flights          every tier of every cache that the caller may read, its tokens alone, and every teacher
    get_flight_info       of one of them, by path (cache), (cache, tier) or (teacher): schema, counts, identity, digest
    do_get                rows, samples, shared arrays or a teacher's head: see `logitcache.service.requests`
    do_exchange           sequences in, the targets that a teacher scores them with out
    do_action             `health`; `cache`: its identity and manifest as stored; `tier`: its configuration; `teacher`
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.flight as flight

from logitcache.errors import IdentityError, UserError
from logitcache.records import TokenSequence
from logitcache.service import exchange, streams
from logitcache.service.access import RIGHTS, Gate, Rights, Tokens
from logitcache.service.catalogue import Catalogue, Served, other_content, unknown_cache
from logitcache.service.limits import Limits, Turns
from logitcache.service.metrics import Metrics
from logitcache.service.refusals import LOG, Refusal, refusing
from logitcache.service.requests import (
    HeadRequest,
    ScoreRequest,
    is_name,
    malformed,
    parse_object,
    parse_request,
    parse_score,
)
from logitcache.service.teachers import Scoring

_Message = TypeVar("_Message")
_ACTIONS = {
    "health": "whether the server takes requests",
    "cache": 'the identity and the manifest of {"cache": NAME}, as stored',
    "tier": 'the configuration of {"cache": NAME, "tier": NAME}, as stored',
    "teacher": 'what {"teacher": NAME} is, as a JSON object',
}


class CacheServer(flight.FlightServerBase):
    """Serves caches and teachers; it runs once it is made.

    Args:
        location: to listen on, `grpc://HOST:PORT` or `grpc+tls://HOST:PORT`; port 0 takes a free one.
        caches: to read.
        teachers: to score with; none has a cache's name.
        tokens: who may read what; None lets everyone read everything.
        tls: certificate chain and private key, PEM.
        limits: on what requests take.
    """

    def __init__(
        self,
        location: str,
        caches: Catalogue,
        *,
        teachers: Sequence[Scoring] = (),
        tokens: Tokens | None = None,
        tls: tuple[bytes, bytes] | None = None,
        limits: Limits = Limits(),  # noqa: B008 (frozen)
        metrics: Metrics | None = None,
    ) -> None:
        self._caches, self._limits = caches, limits
        self._teachers = {scoring.teacher.name: scoring for scoring in teachers}
        self._turns = {call: Turns(limits) for call in ("do_get", "do_exchange")}
        self._metrics = metrics or Metrics()
        for call, turns in self._turns.items():
            self._metrics.watch(call, turns)
        super().__init__(
            location,
            middleware={RIGHTS: Gate(tokens, self._metrics.refused)},
            tls_certificates=None if tls is None else [tls],
        )

    def drain(self) -> bool:
        """Refuse new calls and wait for those under way; whether all ended in time."""
        for turns in self._turns.values():
            turns.close()
        until = time.monotonic() + self._limits.drain_s
        return min([turns.drain(until) for turns in self._turns.values()])  # each waits, whatever the one before says

    @property
    def draining(self) -> bool:
        """Whether new calls are refused."""
        return self._turns["do_get"].closed

    def list_flights(self, context: Any, criteria: bytes) -> Iterator[flight.FlightInfo]:
        """See `flight.FlightServerBase`."""
        with self._answering("list_flights", context):
            rights = _rights(context)
            mine = [served for served in self._caches if rights.may_use(served.name)]
            teachers = [scoring for name, scoring in self._teachers.items() if rights.may_use(name)]
            tiers = [streams.info(served, tier) for served in mine for tier in (None, *served.tokens.manifest.tiers)]
            return iter([*tiers, *map(streams.teacher_info, teachers)])

    def get_flight_info(self, context: Any, descriptor: flight.FlightDescriptor) -> flight.FlightInfo:
        """See `flight.FlightServerBase`."""
        with self._answering("get_flight_info", context):
            path = [part.decode(errors="replace") for part in descriptor.path or ()]
            if not 1 <= len(path) <= 2:
                raise Refusal(malformed("a path is (cache), (cache, tier) or (teacher)"))
            if path[0] in self._teachers:
                return streams.teacher_info(self._teacher(context, path[0]))
            served = self._served(context, path[0])
            tier = path[1] if len(path) == 2 else None
            streams.require_tier(served, tier)
            return streams.info(served, tier)

    def get_schema(self, context: Any, descriptor: flight.FlightDescriptor) -> flight.SchemaResult:
        """See `flight.FlightServerBase`."""
        return flight.SchemaResult(self.get_flight_info(context, descriptor).schema)

    def do_get(self, context: Any, ticket: flight.Ticket) -> flight.GeneratorStream:
        """See `flight.FlightServerBase`."""
        with self._answering("do_get", context):
            try:
                request = parse_request(ticket.ticket)
            except UserError as error:
                raise Refusal(error) from error
            match request:
                case HeadRequest(teacher=name):
                    teacher = self._teacher(context, name, request.digest).teacher
                    schema, batches = streams.head(teacher, request)
                case _:
                    name = request.cache
                    schema, batches = streams.of_cache(self._served(context, name, request.manifest), request)
            return flight.GeneratorStream(schema, self._send(context, f"{type(request).__name__} of {name}", batches))

    def list_actions(self, context: Any) -> list[tuple[str, str]]:
        """See `flight.FlightServerBase`."""
        return list(_ACTIONS.items())

    def do_action(self, context: Any, action: flight.Action) -> Iterator[bytes]:
        """See `flight.FlightServerBase`."""
        with self._answering("do_action", context):
            if action.type not in _ACTIONS:
                raise Refusal(malformed("there is no such action"))
            body = action.body.to_pybytes()
            match action.type:
                case "health":
                    return iter([json.dumps({"status": "draining" if self.draining else "serving"}).encode()])
                case "teacher":
                    scoring = self._teacher(context, _strings(body, ("teacher",))["teacher"])
                    return iter([json.dumps(scoring.teacher.facts).encode()])
                case "cache":
                    return iter(self._served(context, _strings(body, ("cache",))["cache"]).envelopes)
                case _:
                    fields = _strings(body, ("cache", "tier"))
                    served = self._served(context, fields["cache"])
                    streams.require_tier(served, fields["tier"])
                    return iter([served.tier_record(fields["tier"])])

    def do_put(self, context: Any, descriptor: Any, reader: Any, writer: Any) -> None:
        """Refused."""
        with self._answering("do_put", context):
            raise Refusal(UserError("write to this server", "it serves caches to read", "use do_get"))

    def do_exchange(self, context: Any, descriptor: flight.FlightDescriptor, reader: Any, writer: Any) -> None:
        """See `flight.FlightServerBase`."""
        with self._answering("do_exchange", context):
            try:
                request = parse_score(descriptor.command or b"")
            except UserError as error:
                raise Refusal(error) from error
            scoring = self._teacher(context, request.teacher, request.digest)
            started, what = time.monotonic(), f"scores by {request.teacher}"
            with self._turns["do_exchange"].turn() as over:
                sequences = self._sequences(_in_time(reader, over, what), scoring, request)
                answers = _awaited(scoring.submit(sequences, request.want), context, over, what)
                sent = exchange.send_answers(writer, sequences, answers)
            self._sent(context, what, sent, started)

    def _sequences(self, chunks: Iterable[Any], scoring: Scoring, request: ScoreRequest) -> list[TokenSequence]:
        head = scoring.teacher.scorer.head
        try:
            return exchange.read_sequences(chunks, head, request.want, self._limits.answer_bytes)
        except UserError as error:
            raise Refusal(error) from error

    @contextmanager
    def _answering(self, call: str, context: Any) -> Iterator[None]:
        """Whatever is raised becomes an error for the client, and the call is counted."""
        with self._metrics.counting(call), refusing(call, context.peer()):
            yield

    def _served(self, context: Any, name: str, digest: str | None = None) -> Served:
        if not _rights(context).may_use(name) or self._caches.get(name) is None:
            raise Refusal(unknown_cache(name), flight.FlightUnauthorizedError)
        served = self._caches.get(name, digest)
        if served is None:
            raise Refusal(other_content(name))
        return served

    def _teacher(self, context: Any, name: str, digest: str | None = None) -> Scoring:
        scoring = self._teachers.get(name)
        if scoring is None or not _rights(context).may_use(name):
            found = "this server has none of that name for you"
            error = UserError(f"teacher {name[:80]}", found, "list_flights says which")
            raise Refusal(error, flight.FlightUnauthorizedError)
        if digest not in (None, scoring.teacher.digest):
            raise Refusal(IdentityError(f"teacher {name}", "the server has another by now", "open it again"))
        return scoring

    def _send(self, context: Any, what: str, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        """The batches, in turn and in time, and a line in the log when they are sent."""
        started, sent = time.monotonic(), 0
        with self._metrics.counting("stream"), refusing(what, context.peer()), self._turns["do_get"].turn() as over:
            for batch in _in_time(batches, over, what):
                sent += batch.nbytes
                yield batch
            self._sent(context, what, sent, started)

    def _sent(self, context: Any, what: str, sent: int, started: float) -> None:
        self._metrics.sent_bytes.inc(sent)
        seconds = round(time.monotonic() - started, 6)
        LOG.info("sent", extra={"request": what, "peer": context.peer(), "bytes": sent, "seconds": seconds})


def _awaited(future: Future[Any], context: Any, over: float, what: str) -> Any:
    """A teacher's answers, unless the time is over or nobody waits for them any more."""
    while True:
        try:
            return future.result(timeout=min(1.0, max(0.0, over - time.monotonic())))
        except UserError as error:
            raise Refusal(error) from error
        except TimeoutError:
            if time.monotonic() > over:
                future.cancel()
                raise _late(what) from None
            if context.is_cancelled():
                future.cancel()
                raise Refusal(UserError(what, "the client is gone", "ask again"), flight.FlightCancelledError) from None


def _in_time(messages: Iterable[_Message], over: float, what: str) -> Iterator[_Message]:
    """The messages of a stream, either way, until the time is over."""
    for message in messages:
        if time.monotonic() > over:
            raise _late(what)
        yield message


def _late(what: str) -> Refusal:
    found = "it took longer than the server allows"
    return Refusal(UserError(what, found, "ask for less at once"), flight.FlightTimedOutError)


def _rights(context: Any) -> Rights:
    return context.get_middleware(RIGHTS).rights


def _strings(data: bytes, names: tuple[str, ...]) -> dict[str, str]:
    try:
        fields = parse_object(data)
    except UserError as error:
        raise Refusal(error) from error
    if fields.keys() != set(names) or not all(map(is_name, fields.values())):
        raise Refusal(malformed(f"it takes exactly {', '.join(names)}"))
    return fields
