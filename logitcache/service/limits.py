"""What requests may take together: how many at once, for how long; and the end of taking any."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
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
        answer_bytes: of the targets that one call to a teacher may ask for.
        drain_s: how long streams may go on once the server is told to stop.
    """

    streams: int = 16
    queue: int = 256
    queue_s: float = 30.0
    stream_s: float = 600.0
    drain_s: float = 30.0
    answer_bytes: int = 1 << 30

    def __post_init__(self) -> None:
        require(self.streams >= 1, "--streams of 1 or more", self.streams)
        require(self.queue >= 1, "a queue of 1 or more", self.queue)
        for name in ("queue_s", "stream_s", "drain_s"):
            seconds = getattr(self, name)
            require(0 < seconds <= threading.TIMEOUT_MAX, f"--{name.replace('_', '-')}, above 0 and finite", seconds)


class Turns:
    """Turns to send, in the order they were asked for: at most `limits.streams` at once, none once it is closed."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._idle = threading.Condition()
        self._queue: deque[Future[bool]] = deque()
        self._taken, self._closed = 0, False

    @contextmanager
    def turn(self) -> Iterator[float]:
        """Wait for a turn; yields the `time.monotonic` at which it is over. Raises Refusal without one in time."""
        if not self._wait():
            found = "it is shutting down" if self._closed else "it is busy"
            error = UserError("read from this server", found, "try again, or serve with more --streams")
            raise Refusal(error, flight.FlightUnavailableError)
        try:
            yield time.monotonic() + self._limits.stream_s
        finally:
            with self._idle:
                if self._queue:
                    self._queue.popleft().set_result(True)  # the turn is the next one's
                else:
                    self._taken -= 1
                    self._idle.notify_all()

    def close(self) -> None:
        """Give no more turns."""
        with self._idle:
            self._closed = True
            while self._queue:
                self._queue.popleft().set_result(False)

    def drain(self, until: float) -> bool:
        """Give no more turns, and wait for those that are taken; whether all ended by that `time.monotonic`."""
        self.close()
        with self._idle:
            return self._idle.wait_for(lambda: not self._taken, until - time.monotonic())

    def _wait(self) -> bool:
        """Whether it was given a turn."""
        with self._idle:
            if self._closed or len(self._queue) >= self._limits.queue:
                return False
            if self._taken < self._limits.streams:
                self._taken += 1
                return True
            given: Future[bool] = Future()
            self._queue.append(given)
        try:
            return given.result(self._limits.queue_s)
        except TimeoutError:
            with self._idle:
                if given.done():  # in the meantime
                    return given.result()
                self._queue.remove(given)
                return False

    @property
    def taken(self) -> int:
        """Turns that are taken."""
        return self._taken

    @property
    def waiting(self) -> int:
        """Requests that wait for one."""
        return len(self._queue)

    @property
    def closed(self) -> bool:
        """Whether there are no more turns."""
        return self._closed
