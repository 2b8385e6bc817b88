"""Object stores on loopback: a real S3 server (moto) and a plain http one, with latency and faults on request.

Both log every request, so that a benchmark counts what a reader asks for and a test sees what it retries.
"""

from __future__ import annotations

import logging
import multiprocessing
import re
import threading
import time
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

Start = Callable[..., Any]
Application = Callable[[dict[str, Any], Start], Iterable[bytes]]


@dataclass(frozen=True, kw_only=True)
class Answer:
    """Answer with this status and nothing more."""

    status: str


@dataclass(frozen=True, kw_only=True)
class HalfBody:
    """Send half of the body that was promised, then hang up."""


Fault = Answer | HalfBody


@dataclass(kw_only=True)
class Gate:
    """WSGI middleware: waits, counts, and spoils requests.

    Attributes:
        application: what answers.
        latency_s: added to every request.
        log: method and path of each request.
        faults: taken one after another by the next GET requests whose path matches `faulty`.
        faulty: which paths.
    """

    application: Application
    latency_s: float = 0.0
    log: list[str] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    faulty: str = ""
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __call__(self, environ: dict[str, Any], start: Start) -> Iterable[bytes]:
        with self.lock:
            self.log.append(f"{environ['REQUEST_METHOD']} {environ['PATH_INFO']}")
            spoil = environ["REQUEST_METHOD"] == "GET" and re.search(self.faulty, environ["PATH_INFO"])
            fault = self.faults.pop(0) if self.faults and spoil else None
        time.sleep(self.latency_s)
        match fault:
            case Answer(status=status):
                start(status, [("Content-Length", "0")])
                return [b""]
            case HalfBody():
                body = b"".join(self.application(environ, start))
                return [body[: len(body) // 2]]
            case None:
                return self.application(environ, start)


@contextmanager
def serve(application: Application, *, latency_s: float = 0.0) -> Iterator[tuple[Gate, str]]:
    """Serve an application on loopback from a thread: the gate before it and its URL."""
    from werkzeug.serving import make_server

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    gate = Gate(application=application, latency_s=latency_s)
    server = make_server("127.0.0.1", 0, gate, threaded=True)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield gate, f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextmanager
def s3(*, latency_s: float = 0.0) -> Iterator[tuple[Gate, dict[str, Any]]]:
    """An S3 server with a bucket named `caches`: the gate and the storage options to reach it."""
    import s3fs
    from moto.server import DomainDispatcherApplication, create_backend_app

    with serve(DomainDispatcherApplication(create_backend_app)) as (gate, endpoint):
        options = {
            "key": "test",
            "secret": "test",
            "client_kwargs": {"endpoint_url": endpoint},
        }
        urllib.request.urlopen(f"{endpoint}/moto-api/reset", data=b"")  # its buckets belong to the process
        s3fs.S3FileSystem(**options).mkdir("caches")
        gate.latency_s = latency_s
        yield gate, options


@dataclass(frozen=True, kw_only=True)
class Away:
    """A gate in another process.

    Attributes:
        options: storage options to reach the server.
        connection: to the process.
    """

    options: dict[str, Any]
    connection: Connection

    def requests(self, latency_s: float) -> int:
        """Requests since the last call; from now on each waits that long."""
        self.connection.send(latency_s)
        return int(self.connection.recv())


@contextmanager
def s3_elsewhere() -> Iterator[Away]:
    """An S3 server in a process of its own, so that its work is not the reader's."""
    ours, theirs = multiprocessing.Pipe()
    server = multiprocessing.get_context("spawn").Process(target=_serve_s3, args=(theirs,), daemon=True)
    server.start()
    try:
        yield Away(options=ours.recv(), connection=ours)
    finally:
        ours.send(None)
        server.join(10)
        server.kill()


def _serve_s3(connection: Connection) -> None:
    with s3() as (gate, options):
        connection.send(options)
        while (latency_s := connection.recv()) is not None:
            gate.latency_s = latency_s
            connection.send(len(gate.log))
            gate.log.clear()


def files(root: Path) -> Application:
    """An application that serves a folder's files, byte ranges included."""

    def answer(environ: dict[str, Any], start: Start) -> Iterable[bytes]:
        path = root / environ["PATH_INFO"].lstrip("/")
        if not path.is_file():
            start("404 Not Found", [("Content-Length", "0")])
            return [b""]
        size = path.stat().st_size
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", environ.get("HTTP_RANGE", ""))
        first = int(wanted[1]) if wanted else 0
        last = min(size - 1, int(wanted[2])) if wanted and wanted[2] else size - 1
        if first > last:
            start("416 Range Not Satisfiable", [("Content-Length", "0"), ("Content-Range", f"bytes */{size}")])
            return [b""]
        with path.open("rb") as file:
            file.seek(first)
            data = file.read(last - first + 1)
        headers = [("Content-Length", str(len(data))), ("Accept-Ranges", "bytes")]
        start("206 Partial Content" if wanted else "200 OK", headers)
        return [b"" if environ["REQUEST_METHOD"] == "HEAD" else data]

    return answer
