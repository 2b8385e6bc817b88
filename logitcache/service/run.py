"""Runs a server until it is told to stop.

Guarantees: on an address that others can reach it does not run without tokens; SIGTERM and Ctrl-C end it once the
streams under way are sent, or `limits.drain_s` is over; its log is one JSON object a line on standard error.
"""

from __future__ import annotations

import json
import logging
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime

import pyarrow as pa

from logitcache.codecs import codec_from_config
from logitcache.errors import UserError
from logitcache.service.access import Tokens
from logitcache.service.catalogue import Catalogue
from logitcache.service.limits import Limits
from logitcache.service.metrics import Metrics, metrics_at
from logitcache.service.refusals import LOG
from logitcache.service.server import CacheServer
from logitcache.service.settings import Service, loopback
from logitcache.service.teachers import Scoring, Teacher
from logitcache.store.disk_cache import DiskCache, key_of
from logitcache.store.tiers import CodecFactory

_FIELDS = ("request", "peer", "error", "bytes", "seconds", "location", "metrics", "caches", "teachers", "drained")


def run_server(
    caches: Sequence[str],
    service: Service = Service(),  # noqa: B008 (frozen)
    *,
    teachers: Callable[[], Sequence[Teacher]] = lambda: (),
    limits: Limits = Limits(),  # noqa: B008 (frozen)
    codec_factory: CodecFactory = codec_from_config,
    ready: Callable[[str], None] = lambda location: None,
) -> bool:
    """Serve until SIGTERM or SIGINT; call it in the main thread.

    Args:
        caches: URLs of sealed caches, each alone or as `NAME=URL`; `FOLDER/*` for those in a folder.
        service: how it is reached and what it keeps.
        teachers: makes those to score with, once all else is found to be in order: it may take minutes.
        limits: on what requests take.
        codec_factory: rebuilds the codecs of the caches' tiers.
        ready: told the address once requests are taken.

    Returns:
        Whether every stream was sent to its end.

    Raises:
        UserError: an address that is taken, a file that is not as it should be, a place without a sealed cache, a name
            that comes twice, nothing to serve.
    """
    tokens = None if service.tokens is None else Tokens.read(service.tokens)
    tls, metrics, stop = service.tls, Metrics(), threading.Event()
    catalogue = Catalogue(caches, codec_factory=codec_factory)
    kept = _kept(service)
    offered = teachers()
    names = [teacher.name for teacher in offered]
    catalogue.reserve(names)
    if not caches and not names:
        raise UserError("serve", "no cache and no teacher is named", "give the URL of a cache, or --teacher MODEL")
    with _signals(stop), _logging():
        scoring = [
            Scoring(teacher, gather_s=service.gather_s, cache=kept, told=metrics.scored(teacher.name))
            for teacher in offered
        ]
        location = f"{'grpc' if tls is None else 'grpc+tls'}://{_bracketed(service.host)}"
        server = _listen(
            f"{location}:{service.port}",
            lambda where: CacheServer(
                where, catalogue, teachers=scoring, tokens=tokens, tls=tls, limits=limits, metrics=metrics
            ),
        )
        with metrics_at(service.metrics, metrics, lambda: server.draining) as metrics_address:
            address = f"{location}:{server.port}"
            told = {"caches": [cache.name for cache in catalogue], "teachers": names}
            LOG.info("serving", extra={"location": address, "metrics": metrics_address, **told})
            if tls is None and not loopback(service.host):
                LOG.warning("tokens and data travel unencrypted without TLS")
            ready(address)
            while not stop.wait(service.reload_s or None):
                if anew := catalogue.refresh():
                    metrics.reloads.inc(len(anew))
                    LOG.info("taken up", extra={"caches": anew})
            drained = server.drain()
        LOG.info("stopping", extra={"drained": drained})
        closing = threading.Thread(target=server.shutdown, daemon=True)  # it waits for streams, however stuck
        closing.start()
        closing.join(limits.drain_s if drained else 0)
        return drained and not closing.is_alive()


def _kept(service: Service) -> DiskCache | None:
    """Where answers are kept. Raises UserError if the folder cannot be written, before anyone waits for it."""
    if service.scores is None:
        return None
    kept = DiskCache(folder=str(service.scores), max_bytes=int(service.scores_gb * 1e9))
    kept.put(key_of("written at the start"), b"of a server")
    return kept


@contextmanager
def _signals(stop: threading.Event) -> Iterator[None]:
    """SIGTERM and SIGINT set the event meanwhile."""
    before = {number: signal.signal(number, lambda *_: stop.set()) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _logging() -> Iterator[None]:
    log = logging.StreamHandler()
    log.setFormatter(_JsonLines())
    LOG.addHandler(log)
    LOG.setLevel(logging.INFO)
    try:
        yield
    finally:
        LOG.removeHandler(log)


def _listen(location: str, make: Callable[[str], CacheServer]) -> CacheServer:
    try:
        return make(location)
    except (pa.ArrowException, OSError, ValueError) as error:
        found = str(error).splitlines()[0]
        raise UserError(
            f"listen on {location}", found, "choose another --port, or check host and certificate"
        ) from error


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


class _JsonLines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        """One JSON object."""
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            **{name: getattr(record, name) for name in _FIELDS if hasattr(record, name)},
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line)
