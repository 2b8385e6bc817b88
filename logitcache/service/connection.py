"""A client's line to a server, or to the next of several: dialled when needed, and again when it breaks.

Guarantees: what the server refuses is raised as it was meant, at once; what another attempt may cure (a server that
restarts, is busy, or hangs up) is asked again after growing random pauses, for `patience_s`.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.flight as flight
from tenacity import (
    RetryCallState,
    RetryError,
    Retrying,
    retry_if_exception_type,
    stop_after_delay,
    wait_random_exponential,
)

from logitcache.errors import UserError
from logitcache.pickling import as_arguments
from logitcache.service.refusals import LOG, from_flight

LOST = (
    flight.FlightUnavailableError,
    flight.FlightCancelledError,
    flight.FlightTimedOutError,
    flight.FlightInternalError,
)
"""Failures that another attempt may cure."""
_LONGEST_PAUSE_S = 2.0
_CHANNEL = [  # a channel of its own, so that dialling again is not held up by gRPC's minutes of back-off
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 1000),
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.http2.lookahead_bytes", 8 << 20),  # the server sends on while a message is decoded
]
_DIALLED: list[int] = []
"""The process that dialled first. gRPC's threads are not in a fork of it, where every call would hang."""
_Found = TypeVar("_Found")
Attempt = Callable[[flight.FlightClient, flight.FlightCallOptions], _Found]


class _Passing(Exception):
    """An attempt that another one may better; should none, what was found and what to do."""

    def __init__(self, found: str, do: str) -> None:
        super().__init__(found)
        self.do = do


@dataclass(frozen=True, kw_only=True, eq=False)
class Connection:
    """Thread-safe; pickles as its arguments.

    Attributes:
        locations: `grpc://HOST:PORT` or `grpc+tls://HOST:PORT`, of servers that offer the same.
        token: sent as a bearer token.
        tls_roots: certificates to trust, PEM; None for the system's.
        timeout_s: the longest that one request may take.
        patience_s: how long to go on asking while nothing comes.
    """

    locations: tuple[str, ...]
    token: str | None = field(default=None, repr=False)
    tls_roots: bytes | None = field(default=None, repr=False)
    timeout_s: float = 600.0
    patience_s: float = 60.0
    _clients: list[flight.FlightClient] = field(default_factory=list, init=False, repr=False)
    _failed: list[int] = field(default_factory=lambda: [0], init=False, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False, repr=False)

    @property
    def location(self) -> str:
        """The server that is asked now."""
        return self.locations[self._failed[0] % len(self.locations)]

    def __reduce__(self) -> tuple[Any, ...]:
        return as_arguments(self)

    def ask(self, attempt: Attempt[_Found]) -> _Found:
        """What an attempt returns, made again while it ends in `LOST`.

        Raises:
            UserError, DamagedError, IdentityError: what the server refuses with; UserError if there is no answer.
        """
        retrying = Retrying(
            retry=retry_if_exception_type(_Passing),
            stop=stop_after_delay(self.patience_s),
            wait=wait_random_exponential(multiplier=0.1, max=_LONGEST_PAUSE_S),
            before_sleep=self._tell,
        )
        try:
            return retrying(self._attempt, attempt)
        except RetryError as error:
            last = error.last_attempt.exception()
            assert isinstance(last, _Passing)
            asked = f"read from {' or '.join(self.locations)}"
            raise UserError(asked, f"no answer for {self.patience_s:g} s ({last})", last.do) from error

    def _attempt(self, attempt: Attempt[_Found]) -> _Found:
        client = self._dial()
        headers = [] if self.token is None else [(b"authorization", f"Bearer {self.token}".encode())]
        try:
            return attempt(client, flight.FlightCallOptions(timeout=self.timeout_s, headers=headers))
        except LOST as error:
            refusal = from_flight(error)
            if refusal is None or len(self.locations) > 1:  # a busy server, and another one that may not be
                self._hang_up(client)
            raise _passing(error, refusal) from error
        except (flight.FlightError, pa.ArrowException, OSError) as error:
            refusal = from_flight(error)
            if refusal is not None:
                raise refusal from None
            asked = f"read from {self.location}"
            raise UserError(asked, _first_words(error), "check that a server of this version runs there") from error

    def _dial(self) -> flight.FlightClient:
        if _DIALLED and _DIALLED[0] != os.getpid():
            found = "this process is a fork of one that has read from a server, which gRPC does not survive"
            raise UserError(f"read from {self.location}", found, "start it with multiprocessing_context='spawn'")
        with self._lock:
            if not self._clients:
                _DIALLED[:] = [os.getpid()]
                roots = {} if self.tls_roots is None else {"tls_root_certs": self.tls_roots}
                try:
                    self._clients.append(flight.FlightClient(self.location, generic_options=_CHANNEL, **roots))
                except (pa.ArrowException, ValueError) as error:
                    do = "write grpc://HOST:PORT/NAME"
                    raise UserError(f"a server at {self.location}", _first_words(error), do) from error
            return self._clients[0]

    def _hang_up(self, client: flight.FlightClient) -> None:
        """Forget a client, for the next server's; what other threads still read from it fails or ends by itself."""
        with self._lock:
            if self._clients == [client]:
                self._clients.clear()
                self._failed[0] += 1

    def _tell(self, state: RetryCallState) -> None:
        if state.attempt_number == 1 and state.outcome is not None:
            LOG.warning("no answer (%s): asking %s", state.outcome.exception(), self.location)


def _passing(error: Exception, refusal: UserError | None) -> _Passing:
    if refusal is not None:
        return _Passing(refusal.found, refusal.do)
    found = _first_words(error)
    if "handshake" in found or "certificate" in found:
        return _Passing(found, "check its certificate, and LOGITCACHE_TLS_ROOTS, those to trust")
    return _Passing(found, "start the server")


def _first_words(error: BaseException) -> str:
    line = (str(error).splitlines() or [""])[0].partition(". Detail:")[0]
    return line.rpartition("last error: ")[2][:200] or type(error).__name__
