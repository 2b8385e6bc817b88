"""What requests may take together: how many at once, for how long; and the end of taking any."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pyarrow.flight as flight

from logitcache.errors import UserError, require
from logitcache.service.refusals import Refusal


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Of one server.

    Attributes:
        streams: that are sent at once; with the size of a message this bounds the memory.
        queue: requests that wait for their turn; more are sent away, to come again.
        queue_s: how long a request waits for its turn before it is sent away, to come again.
        stream_s: how long a stream may take; a client goes on with another.
        drain_s: how long streams may go on once the server is told to stop.
    """

    streams: int = 16
    queue: int = 256
    queue_s: float = 30.0
    stream_s: float = 600.0
    drain_s: float = 30.0

    def __post_init__(self) -> None:
        require(self.streams >= 1 and self.queue >= 1, "at least one stream at once, and a queue", self)
        require(min(self.queue_s, self.stream_s, self.drain_s) > 0, "times above 0 seconds", self)


class Turns:
    """Turns to send: at most `limits.streams` at once, none once it is closed."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._changed = threading.Condition()
        self._taken = self._waiting = 0
        self._closed = False

    @contextmanager
    def turn(self) -> Iterator[float]:
        """Wait for a turn; yields the `time.monotonic` at which it is over. Raises Refusal without one in time."""
        with self._changed:
            free = self._waiting < self._limits.queue and self._wait()
            if self._closed or not free:
                found = "it is shutting down" if self._closed else "it is busy"
                raise Refusal(UserError("read from this server", found, "try again"), flight.FlightUnavailableError)
            self._taken += 1
        try:
            yield time.monotonic() + self._limits.stream_s
        finally:
            with self._changed:
                self._taken -= 1
                self._changed.notify_all()

    def drain(self) -> bool:
        """Give no more turns, and wait for those that are taken; whether all ended in time."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            return self._changed.wait_for(lambda: not self._taken, self._limits.drain_s)

    def _wait(self) -> bool:
        self._waiting += 1
        try:
            return self._changed.wait_for(
                lambda: self._closed or self._taken < self._limits.streams, self._limits.queue_s
            )
        finally:
            self._waiting -= 1

    @property
    def closed(self) -> bool:
        """Whether there are no more turns."""
        return self._closed
