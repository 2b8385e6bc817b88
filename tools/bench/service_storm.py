"""Requests that a server must refuse, in random order, and what became of each: see `tools.bench.service_faults`."""

from __future__ import annotations

import json
import random
import socket
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.flight as flight

from logitcache.scoring import FullVocabRequest, HiddenStateRequest
from logitcache.service import wire
from logitcache.service.client import FlightReader
from logitcache.service.refusals import from_flight
from logitcache.service.requests import MAX_REQUEST_BYTES, RowsRequest, ScoreRequest, score_to_bytes, to_bytes
from logitcache.service.scorer import ServedScorer
from logitcache.store.envelope import digest_of

SPOILT: tuple[Any, ...] = (["x"], {}, 1.5, "../../etc/passwd", "\ud800")
"""What no field of a request may be."""
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
STARTS = (b"", PREFACE, PREFACE + b"\x00\x00\x00\x04\x00\x00\x00\x00\x00", b"GET / HTTP/1.1\r\n\r\n")
"""How what is sent to the bare socket begins: nothing known, HTTP/2 without and with its settings, HTTP/1."""
_PATIENCE_S = 30.0


@dataclass(kw_only=True)
class Storm:
    """One after another, each of a kind and with bytes that `rng` chooses.

    Attributes:
        reader: of the cache; with the right to be there.
        scorer: of the teacher.
        secret: text that no answer may hold.
        rng: the source of it all.
        sent: requests by kind.
        answered: of those, the ones that ended as they should.
        missed: what the others ended in.
        leaks: answers that told of the server's insides.
    """

    reader: FlightReader
    scorer: ServedScorer
    secret: str
    rng: random.Random
    sent: Counter[str] = field(default_factory=Counter)
    answered: Counter[str] = field(default_factory=Counter)
    missed: list[str] = field(default_factory=list)
    leaks: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        location, token = self.reader.connection.location, self.reader.connection.token
        self._client = flight.FlightClient(location)
        host, _, port = location.removeprefix("grpc://").rpartition(":")
        self._address = host, int(port)
        self._allowed = _with(token)
        rows = RowsRequest(cache=self.reader.cache, manifest=str(self.reader.manifest.digest), tier=None, indices=(0,))
        self._good = {
            "do_get": to_bytes(rows),
            "do_action": json.dumps({"cache": self.reader.cache}).encode(),
            "do_exchange": self._score(HiddenStateRequest()),
        }
        self._texts = self.reader.read_tokens(range(min(128, len(self.reader))))

    def request(self) -> None:
        """One more."""
        kinds: dict[str, Callable[[], bool]] = {
            "malformed": lambda: self._refused(self._malformed, self._allowed),
            "truncated": lambda: self._refused(self._truncated, self._allowed),
            "oversized": lambda: self._refused(self._oversized, self._allowed),
            "unauthenticated": lambda: self._refused(
                self._good.__getitem__, self.rng.choice((_with(None), _with("x")))
            ),
            "upload": self._upload,
            "socket": self._socket,
        }
        kind = self.rng.choice(list(kinds))
        self.sent[kind] += 1
        self.answered[kind] += kinds[kind]()

    def _malformed(self, call: str) -> bytes:
        fields = json.loads(self._good[call])
        fields[self.rng.choice(list(fields))] = self.rng.choice(SPOILT)
        junk = (
            self.rng.randbytes(self.rng.randrange(300)),
            b"[" * self.rng.randrange(5000),
            json.dumps(fields).encode(),
            json.dumps(fields | {"path": "/etc/passwd"}).encode(),
        )
        return self.rng.choice(junk)

    def _truncated(self, call: str) -> bytes:
        return self._good[call][: self.rng.randrange(len(self._good[call]))]

    def _oversized(self, call: str) -> bytes:
        return b" " * self.rng.choice((MAX_REQUEST_BYTES + 1, MAX_REQUEST_BYTES + 1, 8 * MAX_REQUEST_BYTES))

    def _refused(self, body: Callable[[str], bytes], options: flight.FlightCallOptions) -> bool:
        call = self.rng.choice(list(self._good))
        data = body(call)
        match call:
            case "do_get":
                return self._ends(lambda: self._client.do_get(flight.Ticket(data), options).read_all())
            case "do_action":
                return self._ends(lambda: list(self._client.do_action(flight.Action("cache", data), options)))
            case _:
                return self._ends(lambda: self._exchange(data, iter(()), options))

    def _upload(self) -> bool:
        """A call to a teacher that may be made, with what cannot be scored."""
        hidden = self._good["do_exchange"]
        schema = wire.rows_schema(None)
        (good,) = wire.encode_rows(schema, [0], self._texts[:1])
        many = list(wire.in_messages(schema, range(len(self._texts)), self._texts)) * 64
        command, batches = self.rng.choice(
            (
                (hidden, []),
                (hidden, [pa.record_batch({"a": [1]})]),
                (hidden, [good.drop_columns(["token_ids"])]),
                (hidden, [good.set_column(0, "index", pa.array([None], pa.int64()))]),
                (self._score(FullVocabRequest()), many),
            )
        )
        return self._ends(lambda: self._exchange(command, iter(batches), self._allowed))

    def _exchange(self, command: bytes, batches: Iterator[pa.RecordBatch], options: flight.FlightCallOptions) -> None:
        writer, reader = self._client.do_exchange(flight.FlightDescriptor.for_command(command), options)
        try:
            with suppress(pa.ArrowException):  # it was refused, and what is read next says why
                for number, batch in enumerate(batches):
                    if number == 0:
                        writer.begin(batch.schema)
                    writer.write_batch(batch)
                writer.done_writing()
            reader.read_all()
        finally:
            with suppress(pa.ArrowException):
                writer.close()

    def _ends(self, call: Callable[[], Any]) -> bool:
        """Whether a call ends in an error that the server wrote."""
        found = "no error"
        try:
            call()
        except (flight.FlightError, pa.ArrowException) as error:
            found = f"{error} {getattr(error, 'extra_info', b'')!r}"
            self._look(found)
            if from_flight(error) is not None:
                return True
        self.missed.append(found[:500])
        return False

    def _socket(self) -> bool:
        """Whether the server hangs up on bytes that are no request."""
        answer = b""
        try:
            with socket.create_connection(self._address, timeout=_PATIENCE_S) as raw:
                raw.sendall(self.rng.choice(STARTS) + self.rng.randbytes(self.rng.randrange(300)))
                raw.shutdown(socket.SHUT_WR)
                while some := raw.recv(1 << 16):
                    answer += some
        except TimeoutError:
            self.missed.append("a socket that stays open")
            return False
        except OSError:
            pass  # it hung up in the middle
        self._look(answer.decode(errors="replace"))
        return True

    def _look(self, told: str) -> None:
        if any(inside in told for inside in (self.secret, "Traceback", ".py")):
            self.leaks.append(told[:500])

    def _score(self, want: FullVocabRequest | HiddenStateRequest) -> bytes:
        return score_to_bytes(ScoreRequest(teacher=self.scorer.teacher, digest=digest_of(self.scorer.facts), want=want))


def _with(token: str | None) -> flight.FlightCallOptions:
    headers = [] if token is None else [(b"authorization", f"Bearer {token}".encode())]
    return flight.FlightCallOptions(timeout=_PATIENCE_S, headers=headers)
