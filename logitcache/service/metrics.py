"""What a server counts, as Prometheus text over HTTP, with its health beside it.

Guarantees: a label is one of a fixed few words or a name that the server itself gave, never anything a client sent; no
token, path or peer is in it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, make_wsgi_app

from logitcache.errors import UserError
from logitcache.service.limits import Turns

_SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)
_CALLS = (1, 2, 4, 8, 16, 32, 64)


class Metrics:
    """Of one server."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        made: dict[str, Any] = {"namespace": "logitcache", "registry": self.registry}
        self.requests = Counter("requests", "Calls, by kind and by how they ended.", ["call", "outcome"], **made)
        self.seconds = Histogram("stream_seconds", "Time of a call that sends.", ["call"], buckets=_SECONDS, **made)
        self.sent_bytes = Counter("sent_bytes", "Arrow bytes sent.", **made)
        self.turns = Gauge("turns", "Calls that send now, and calls that wait to.", ["call", "state"], **made)
        self.reloads = Counter("reloads", "Contents of caches that were taken up after the start.", **made)
        self.sequences = Counter("scored_sequences", "Sequences asked of a teacher.", ["teacher", "answer"], **made)
        self.rows = Counter("scored_rows", "Rows that a teacher was run over.", ["teacher"], **made)
        self.calls = Histogram("calls_per_pass", "Calls answered together.", ["teacher"], buckets=_CALLS, **made)

    @contextmanager
    def counting(self, call: str) -> Iterator[None]:
        """Count a call, and how it ends: `ok`, `refused` or, where the client goes, `gone`."""
        outcome = "gone"
        with self.seconds.labels(call).time():
            try:
                yield
                outcome = "ok"
            except Exception:
                outcome = "refused"
                raise
            finally:
                self.requests.labels(call, outcome).inc()

    def refused(self, call: str) -> None:
        """Count a call that was refused before it began."""
        self.requests.labels(call, "refused").inc()

    def watch(self, call: str, turns: Turns) -> None:
        """Show how many turns of a kind of call are taken, and how many calls wait for one."""
        self.turns.labels(call, "taken").set_function(lambda: turns.taken)
        self.turns.labels(call, "waiting").set_function(lambda: turns.waiting)

    def scored(self, teacher: str) -> Callable[..., None]:
        """What a teacher's thread tells: see `logitcache.service.teachers.Scoring`."""

        def told(*, calls: int, scored: int, rows: int, others: int) -> None:
            self.calls.labels(teacher).observe(calls)
            self.rows.labels(teacher).inc(rows)
            self.sequences.labels(teacher, "scored").inc(scored)
            self.sequences.labels(teacher, "kept or shared").inc(others)

        return told


@contextmanager
def metrics_at(address: str | None, metrics: Metrics, draining: Callable[[], bool]) -> Iterator[str | None]:
    """Serve `/metrics` and `/healthz` (200, or 503 once the server drains) at `HOST:PORT` meanwhile; None serves none.

    Yields the address; port 0 takes a free one. Raises UserError for an address that is none or is taken.
    """
    if address is None:
        yield None
        return
    host, _, port = address.rpartition(":")
    try:
        server = make_server(host.strip("[]"), int(port), _app(metrics, draining), WSGIServer, _Quiet)
    except (OSError, ValueError, OverflowError) as error:
        raise UserError(f"metrics at {address}", str(error), "give a free HOST:PORT, such as 127.0.0.1:9815") from error
    thread = threading.Thread(target=server.serve_forever, name="metrics", daemon=True)
    thread.start()
    try:
        yield f"{host}:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _app(metrics: Metrics, draining: Callable[[], bool]) -> Any:
    text = make_wsgi_app(metrics.registry)

    def answer(environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        path = environ.get("PATH_INFO")
        if path == "/metrics":
            found: Iterable[bytes] = text(environ, start)
            return found
        known = path == "/healthz"
        status = "404 Not Found" if not known else "503 Service Unavailable" if draining() else "200 OK"
        start(status, [("Content-Type", "text/plain")])
        return [b"draining\n" if known and draining() else b"serving\n" if known else b"/metrics or /healthz\n"]

    return answer


class _Quiet(WSGIRequestHandler):
    timeout = 10  # one thread answers: who connects and says nothing must not keep it

    def log_message(self, format: str, *args: Any) -> None:
        """Said nowhere: a scrape every few seconds is no event."""
