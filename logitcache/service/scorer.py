"""A teacher behind a server, as a `Scorer`: what students write is scored there, and the teacher is in no student.

Guarantees: see `logitcache.scoring.Scorer`; the same numbers as the server's engine gives in its own process; a server
that has another teacher by then is refused. A call that a restart cut off is made again as a whole.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.flight as flight

from logitcache.errors import DamagedError, IdentityError
from logitcache.pickling import as_arguments
from logitcache.records import Head, ScoredSequence, TeacherTargets, TokenSequence
from logitcache.scoring import Scores, TargetRequest
from logitcache.service import wire
from logitcache.service.client import NOT_WHAT_WAS_ASKED, fetch_table, run_action
from logitcache.service.connection import Connection
from logitcache.service.requests import HeadRequest, ScoreRequest, kind_of, score_to_bytes
from logitcache.store.envelope import digest_of


@dataclass(frozen=True, kw_only=True, eq=False)
class ServedScorer:
    """See `open_scorer`. Thread-safe; pickles as its arguments.

    Attributes:
        connection: to the server.
        teacher: its name there.
        facts: what the server says of it: see docs/service.md.
    """

    connection: Connection
    teacher: str
    facts: Mapping[str, Any]
    _head: list[Head] = field(default_factory=list, init=False, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False, repr=False)

    def __reduce__(self) -> tuple[Any, ...]:
        return as_arguments(self)

    @property
    def head(self) -> Head:
        """See `Scorer.head`. Fetched once."""
        with self._lock:
            if not self._head:
                self._head.append(self._fetch_head())
            return self._head[0]

    @property
    def stop_ids(self) -> frozenset[int]:
        """Token ids that end a completion of the teacher's."""
        return frozenset(self.facts["stop_ids"])

    def score(
        self, sequences: Sequence[TokenSequence], want: Sequence[TargetRequest]
    ) -> list[tuple[TeacherTargets, ...]]:
        """See `Scorer.score`. Each request is a pass of the teacher. Also raises UserError without an answer."""
        return self.score_counted(sequences, want).targets

    def score_counted(self, sequences: Sequence[TokenSequence], want: Sequence[TargetRequest]) -> Scores:
        """See `CountsPasses.score_counted`: 0 where an answer was kept, or came of another student's call."""
        columns = [self._exchange(sequences, request) for request in want] if sequences else []
        targets = [tuple(column[i][0] for column in columns) for i in range(len(sequences))]
        return Scores(targets, [sum(column[i][1] for column in columns) for i in range(len(sequences))])

    def _exchange(self, sequences: Sequence[TokenSequence], want: TargetRequest) -> list[tuple[TeacherTargets, bool]]:
        request = ScoreRequest(teacher=self.teacher, digest=digest_of(self.facts), want=want)
        descriptor = flight.FlightDescriptor.for_command(score_to_bytes(request))
        hidden = kind_of(want) == "hidden"
        rebuild = wire.rebuild_decoded(kind_of(want), self.head.fingerprint if hidden else None)

        def attempt(
            client: flight.FlightClient, options: flight.FlightCallOptions
        ) -> list[tuple[TeacherTargets, bool]]:
            writer, reader = client.do_exchange(descriptor, options)
            received: list[tuple[TeacherTargets, bool]] = []
            try:
                with suppress(pa.ArrowException):  # it was refused, and what is read next says why
                    writer.begin(wire.rows_schema(None))
                    for batch in wire.in_messages(wire.rows_schema(None), range(len(sequences)), sequences):
                        writer.write_batch(batch)
                    writer.done_writing()
                for chunk in reader:
                    received += self._decoded(chunk, sequences, len(received), rebuild)
            finally:
                with suppress(pa.ArrowException):
                    writer.close()
            if len(received) != len(sequences):
                raise self._damaged("it answers fewer sequences than were asked for")
            return received

        return self.connection.ask(attempt)

    def _decoded(
        self, chunk: Any, sequences: Sequence[TokenSequence], start: int, rebuild: wire.Rebuild
    ) -> list[tuple[TeacherTargets, bool]]:
        """The answers in a message, which must be those to the sequences from `start` on."""
        try:
            scored = json.loads(chunk.app_metadata.to_pybytes())["scored"]
            rows = wire.decode_rows(chunk.data, rebuild)
            if [index for index, _ in rows] != list(range(start, start + len(rows))):
                raise ValueError("it answers other sequences than were asked for")
            if len(scored) != len(rows) or not all(isinstance(flag, bool) for flag in scored):
                raise ValueError("it does not say which sequences were scored")
            asked = sequences[start : start + len(rows)]
            targets = [item.targets for _, item in rows if isinstance(item, ScoredSequence)]
            mine = [ScoredSequence(sequence=s, targets=t) for s, t in zip(asked, targets, strict=True)]
        except (*NOT_WHAT_WAS_ASKED, AttributeError) as error:
            raise self._damaged(str(error)) from error
        return [(item.targets, flag) for item, flag in zip(mine, scored, strict=True)]

    def _fetch_head(self) -> Head:
        facts = self.facts["head"]
        arrays: dict[str, Any] = {}
        for name in facts["arrays"]:
            request = HeadRequest(teacher=self.teacher, digest=digest_of(self.facts), array=name)
            try:
                arrays[name] = wire.decode_shared(fetch_table(self.connection, request))
            except (ValueError, LookupError, pa.ArrowException) as error:
                raise self._damaged(str(error)) from error
        head = Head(**arrays, soft_cap=facts["soft_cap"], scale=facts["scale"])
        if head.fingerprint != facts["fingerprint"]:
            raise self._damaged("its head is another than it says")
        return head

    def _damaged(self, found: str) -> DamagedError:
        asked = f"score with {self.teacher} at {self.connection.location}"
        return DamagedError(asked, found, "tell who runs the server")


def open_scorer(
    url: str, *, built_by: Mapping[str, Any] | None = None, storage_options: Mapping[str, Any] | None = None
) -> ServedScorer:
    """A served teacher.

    Args:
        url: `grpc://HOST:PORT#NAME` or `grpc+tls://HOST:PORT#NAME`.
        built_by: the teacher of a cache's identity; another model, or another precision, is refused.
        storage_options: as of `logitcache.service.opening.open_served`, without `decoded`.

    Raises:
        IdentityError: it is another teacher than `built_by`.
        UserError: not such a URL or option, no answer, a refusal.
    """
    from logitcache.service.opening import connect

    connection, name = connect(url, "#", dict(storage_options or {}))
    (data,) = run_action(connection, "teacher", teacher=name)
    try:
        facts = json.loads(data)
        scorer = ServedScorer(connection=connection, teacher=name, facts=facts)
        found = {key: facts[key] for key in ("fingerprint", "dtype")}
    except (ValueError, LookupError, TypeError) as error:
        raise DamagedError(f"open teacher {name} at {connection.location}", str(error), "check the server") from error
    if built_by is not None and (other := {key: built_by[key] for key in found}) != found:
        told = ", ".join(
            f"{key} {found[key]} where the cache has {other[key]}" for key in found if found[key] != other[key]
        )
        raise IdentityError(f"score with {url}", told, "serve the teacher that built the cache, in its precision")
    return scorer
