"""A cache behind a server, read as one on disk is.

Guarantees: the same sequences and the same numbers as `logitcache.store.Reader`, whichever side decodes; each index
asked for comes once, in order, though the server stops and starts meanwhile; a server that has another content by then
is refused. Manifest and tiers carry their digests; rows are checked for form and order, and for their numbers the
server is believed, which reads them against their checksums.

Deliberately not here: reading ahead (`logitcache.loader.Prefetch` does).
"""

from __future__ import annotations

import dataclasses
import json
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.flight as flight
from numpy.typing import NDArray

from logitcache.codecs import codec_from_config
from logitcache.codecs.codec import Codec
from logitcache.errors import DamagedError, UserError
from logitcache.pickling import as_arguments
from logitcache.records import Head, ScoredSequence, TokenSequence
from logitcache.service import wire
from logitcache.service.connection import LOST, Connection
from logitcache.service.requests import MAX_SEQUENCES, Request, RowsRequest, SamplesRequest, SharedRequest, to_bytes
from logitcache.store.disk_cache import DiskCache, key_of
from logitcache.store.envelope import unseal
from logitcache.store.manifest import Manifest
from logitcache.store.reader import checked_indices
from logitcache.store.tiers import CodecFactory
from logitcache.store.windows import Window

NOT_WHAT_WAS_ASKED = (ValueError, LookupError, TypeError, UserError, pa.ArrowException)


@dataclass(frozen=True, kw_only=True, eq=False)
class FlightReader:
    """One tier of a served cache, or its tokens alone; see `open_served`. Thread-safe; pickles as its arguments.

    Attributes:
        connection: to the server.
        cache: its name there.
        manifest: what it holds; `manifest.digest` names that content.
        identity: of the build.
        tier: the tier that is read; None for tokens alone.
        encoded: whether targets travel as the codec packed them, and are decoded here.
        disk_cache: where rows are kept as they came; None to keep nothing.
    """

    connection: Connection
    cache: str
    manifest: Manifest
    identity: Mapping[str, Any]
    tier: str | None
    encoded: bool = True
    codec_factory: CodecFactory = codec_from_config
    disk_cache: DiskCache | None = None
    _codec: list[Codec] = field(default_factory=list, init=False, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False, repr=False)

    def __len__(self) -> int:
        return int(self.manifest.starts[-1])

    def __reduce__(self) -> tuple[Any, ...]:
        return as_arguments(self)

    @property
    def codec(self) -> Codec | None:
        """See `Reader.codec`."""
        if self.tier is None:
            return None
        with self._lock:
            if not self._codec:
                self._codec.append(self._fetch_codec(self.tier))
            return self._codec[0]

    @property
    def head(self) -> Head | None:
        """See `Reader.head`."""
        return None if self.codec is None else self.codec.head

    def read(
        self, indices: Sequence[int], *, first_completion_token: int = 0, max_completion_tokens: int | None = None
    ) -> list[ScoredSequence]:
        """See `Reader.read`. Also raises UserError when the server gives no answer, or refuses to."""
        if self.tier is None:
            raise UserError("targets", "this reader was opened with targets=None", "use read_tokens, or name a tier")
        rebuild = self._rebuild(self.tier)
        request = self._request(indices, self.tier, first_completion_token, max_completion_tokens)
        return self._rows(request, rebuild)

    def read_tokens(
        self, indices: Sequence[int], *, first_completion_token: int = 0, max_completion_tokens: int | None = None
    ) -> list[TokenSequence]:
        """See `Reader.read_tokens`."""
        return self._rows(self._request(indices, None, first_completion_token, max_completion_tokens), None)

    def samples(self, columns: Sequence[str] | None = None) -> Any:
        """See `Reader.samples`."""
        table = self._table(SamplesRequest(cache=self.cache, manifest=str(self.manifest.digest)))
        if table.schema != wire.SAMPLES or table.num_rows != len(self):
            raise self._damaged("its table of samples is not that of its manifest")
        return table if columns is None else table.select(list(columns))

    def _request(self, indices: Sequence[int], tier: str | None, first: int, limit: int | None) -> RowsRequest:
        window = Window(first=first, limit=limit)
        return RowsRequest(
            cache=self.cache,
            manifest=str(self.manifest.digest),
            tier=tier,
            indices=tuple(checked_indices(indices, len(self)).tolist()),
            first=window.first,
            limit=window.limit,
            encoded=self.encoded and tier is not None,
        )

    def _rows(self, request: RowsRequest, rebuild: wire.Rebuild | None) -> list[Any]:
        """Every row of a request: what is kept, and the rest from the server."""
        if self.disk_cache is None:
            return self._fetched(request, rebuild)
        found = [self._kept(request, index, rebuild) for index in request.indices]
        missing = [place for place, item in enumerate(found) if item is None]
        indices = tuple(request.indices[place] for place in missing)
        for place, item in zip(
            missing, self._fetched(dataclasses.replace(request, indices=indices), rebuild), strict=True
        ):
            found[place] = item
        return found

    def _kept(self, request: RowsRequest, index: int, rebuild: wire.Rebuild | None) -> Any:
        data = None if self.disk_cache is None else self.disk_cache.get(_row_key(request, index))
        return None if data is None else self._decoded(wire.from_ipc(data), (index,), 0, rebuild)[0]

    def _fetched(self, request: RowsRequest, rebuild: wire.Rebuild | None) -> list[Any]:
        """The rows from the server. Each round asks for what is missing, and ends with some of it or an error."""
        received: list[Any] = []

        def attempt(client: flight.FlightClient, options: flight.FlightCallOptions) -> None:
            before = len(received)
            missing = request.indices[before : before + MAX_SEQUENCES]
            wanted = ticket(dataclasses.replace(request, indices=missing))
            try:
                for chunk in client.do_get(wanted, options):
                    start = len(received)
                    received.extend(self._decoded(chunk.data, request.indices, start, rebuild))
                    if self.disk_cache is not None:
                        for row, index in enumerate(request.indices[start : len(received)]):
                            key = _row_key(request, index)
                            self.disk_cache.put_or_tell(key, wire.to_ipc(chunk.data.slice(row, 1)))
            except LOST:
                if len(received) == before:
                    raise
            if len(received) == before:
                raise self._damaged("it sends none of what was asked for")

        while len(received) < len(request.indices):
            self.connection.ask(attempt)
        return received

    def _decoded(
        self, batch: pa.RecordBatch, indices: Sequence[int], start: int, rebuild: wire.Rebuild | None
    ) -> list[Any]:
        """The rows of a message, which must be those of `indices` from `start` on."""
        try:
            rows = wire.decode_rows(batch, rebuild)
        except NOT_WHAT_WAS_ASKED as error:
            raise self._damaged(str(error)) from error
        if [index for index, _ in rows] != list(indices[start : start + len(rows)]):
            raise self._damaged("it sends other sequences than were asked for")
        return [item for _, item in rows]

    def _rebuild(self, tier: str) -> wire.Rebuild:
        if self.encoded:
            codec = self.codec
            assert codec is not None
            return wire.rebuild_encoded(codec)
        head = self.head if self.manifest.tiers[tier].kind == "hidden" else None
        return wire.rebuild_decoded(self.manifest.tiers[tier].kind, None if head is None else head.fingerprint)

    def _fetch_codec(self, tier: str) -> Codec:
        try:
            (data,) = run_action(self.connection, "tier", cache=self.cache, tier=tier)
            sealed = unseal(data)
            if sealed.digest != self.manifest.tiers[tier].digest:
                raise ValueError("its digest is not the manifest's")
            shared = {str(name): self._shared(tier, str(name)) for name in sealed.body["shared"]["arrays"]}
            return self.codec_factory(dict(sealed.body["config"]), shared)
        except (ValueError, LookupError, TypeError) as error:
            raise self._damaged(f"tier {tier}: {error}") from error

    def _shared(self, tier: str, name: str) -> NDArray[Any]:
        request = SharedRequest(cache=self.cache, manifest=str(self.manifest.digest), tier=tier, array=name)
        return wire.decode_shared(self._table(request))

    def _table(self, request: Request) -> pa.Table:
        try:
            return fetch_table(self.connection, request)
        except pa.ArrowException as error:
            raise self._damaged(str(error)) from error

    def _damaged(self, found: str) -> DamagedError:
        return DamagedError(f"read {self.cache} from {self.connection.location}", found, "tell who runs the server")


def run_action(connection: Connection, kind: str, **fields: str) -> list[bytes]:
    """The results of one of the server's actions."""
    action = flight.Action(kind, json.dumps(fields).encode())
    return connection.ask(
        lambda client, options: [item.body.to_pybytes() for item in client.do_action(action, options)]
    )


def fetch_table(connection: Connection, request: Request) -> pa.Table:
    """All that a request brings, as one table. Raises ArrowException for one that is not valid."""
    table = connection.ask(lambda client, options: client.do_get(ticket(request), options).read_all())
    table.validate(full=True)
    return table


def _row_key(request: RowsRequest, index: int) -> str:
    asked = (request.manifest, request.tier, request.encoded, request.first, request.limit)
    return key_of("served row", *asked, index)


def ticket(request: Request) -> flight.Ticket:
    """A request as Flight carries it."""
    return flight.Ticket(to_bytes(request))
