"""Runs a server until it is told to stop.

Guarantees: on an address that others can reach it does not run without tokens; SIGTERM and Ctrl-C end it once the
streams under way are sent, or `limits.drain_s` is over; its log is one JSON object a line on standard error.
"""

from __future__ import annotations

import ipaddress
import json
import logging
import signal
import threading
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa

from logitcache.codecs import codec_from_config
from logitcache.errors import UserError, require
from logitcache.service.access import Tokens
from logitcache.service.catalogue import open_catalogue
from logitcache.service.limits import Limits
from logitcache.service.refusals import LOG
from logitcache.service.server import CacheServer
from logitcache.store.tiers import CodecFactory

_FIELDS = ("request", "peer", "error", "bytes", "seconds", "location", "caches", "drained")


def run_server(
    caches: Sequence[str],
    *,
    host: str = "127.0.0.1",
    port: int = 8815,
    tokens: Path | None = None,
    tls: tuple[Path, Path] | None = None,
    limits: Limits = Limits(),  # noqa: B008 (frozen)
    codec_factory: CodecFactory = codec_from_config,
    ready: Callable[[str], None] = lambda location: None,
) -> bool:
    """Serve caches until SIGTERM or SIGINT; call it in the main thread.

    Args:
        caches: URLs of sealed caches, each alone or as `NAME=URL`.
        host: address to listen on.
        port: to listen on; 0 takes a free one.
        tokens: file of bearer tokens and their rights; None lets everyone read everything.
        tls: files of the certificate chain and its private key, PEM.
        limits: on what requests take.
        codec_factory: rebuilds the codecs of the caches' tiers.
        ready: told the address once requests are taken.

    Returns:
        Whether every stream was sent to its end.

    Raises:
        UserError: an address that others can reach without tokens, one that is taken, a file that is not as it should
            be, a place without a sealed cache.
    """
    require(0 <= port < 1 << 16, "a port", port)
    if tokens is None and not _loopback(host):
        found = "others can reach that address, and there are no tokens"
        raise UserError(f"serve on {host}", found, "give --tokens FILE, or listen on 127.0.0.1")
    known = None if tokens is None else Tokens.read(tokens)
    certificate = None if tls is None else (_pem(tls[0]), _pem(tls[1]))
    catalogue = open_catalogue(caches, codec_factory=codec_factory)
    stop = threading.Event()
    before = {number: signal.signal(number, lambda *_: stop.set()) for number in (signal.SIGTERM, signal.SIGINT)}
    log = logging.StreamHandler()
    log.setFormatter(_JsonLines())
    LOG.addHandler(log)
    LOG.setLevel(logging.INFO)
    try:
        location = f"{'grpc' if tls is None else 'grpc+tls'}://{f'[{host}]' if ':' in host else host}"
        server = _listen(
            f"{location}:{port}",
            lambda where: CacheServer(where, catalogue, tokens=known, tls=certificate, limits=limits),
        )
        address = f"{location}:{server.port}"
        LOG.info("serving", extra={"location": address, "caches": list(catalogue)})
        if tls is None and not _loopback(host):
            LOG.warning("tokens and data travel unencrypted without TLS")
        ready(address)
        stop.wait()
        drained = server.drain()
        LOG.info("stopping", extra={"drained": drained})
        closing = threading.Thread(target=server.shutdown, daemon=True)  # it waits for streams, however stuck
        closing.start()
        closing.join(limits.drain_s if drained else 0)
        return drained and not closing.is_alive()
    finally:
        LOG.removeHandler(log)
        for number, handler in before.items():
            signal.signal(number, handler)


def _listen(location: str, make: Callable[[str], CacheServer]) -> CacheServer:
    try:
        return make(location)
    except (pa.ArrowException, OSError, ValueError) as error:
        found = str(error).splitlines()[0]
        raise UserError(
            f"listen on {location}", found, "choose another --port, or check host and certificate"
        ) from error


def _loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _pem(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"TLS with {path}", type(error).__name__, "give a PEM file that can be read") from error


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
