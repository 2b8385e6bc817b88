"""How a server is reached, what it keeps, and what it is loaded with to see what it bears: options, checked.

Guarantees: an address that others can reach is refused without tokens. Light to import: a command's options are these.
"""

from __future__ import annotations

import ipaddress
import threading
from dataclasses import dataclass
from pathlib import Path

from logitcache.errors import UserError, require


@dataclass(frozen=True, kw_only=True)
class Service:
    """How a server is reached and what it keeps: options of `logitcache serve`.

    Attributes:
        host: address to listen on; others than this machine's own need `--tokens`.
        port: to listen on; 0 takes a free one.
        tokens: file with a line `TOKEN NAME...` for each bearer token and the caches and teachers it opens, or
            `TOKEN *`; without it everyone may read everything.
        tls_certificate: certificate chain, PEM; students then open `grpc+tls://HOST:PORT/NAME`.
        tls_key: its private key, PEM.
        metrics: `HOST:PORT` of Prometheus' `/metrics` and of `/healthz`, over plain http; nothing by default.
        reload_s: seconds between looks for what was sealed since; 0 never looks.
        gather_s: seconds that a call to a teacher waits for others to share a pass with; 0 gives each its own.
        scores: folder where what a teacher said is kept, and read when it is asked again; nothing is kept by default.
        scores_gb: bound on that folder.
    """

    host: str = "127.0.0.1"
    port: int = 8815
    tokens: Path | None = None
    tls_certificate: Path | None = None
    tls_key: Path | None = None
    metrics: str | None = None
    reload_s: float = 10.0
    gather_s: float = 0.005
    scores: Path | None = None
    scores_gb: float = 10.0

    def __post_init__(self) -> None:
        require(0 <= self.port < 1 << 16, "a port", self.port)
        require(0 <= self.reload_s <= threading.TIMEOUT_MAX, "--reload-s, 0 or more and finite", self.reload_s)
        require(0 <= self.gather_s <= threading.TIMEOUT_MAX, "--gather-s, 0 or more and finite", self.gather_s)
        require(0.01 <= self.scores_gb <= 1e9, "--scores-gb, 0.01 or more and finite", self.scores_gb)
        if self.tokens is None and not loopback(self.host):
            found = "others can reach that address, and there are no tokens"
            raise UserError(f"serve on {self.host}", found, "give --tokens FILE, or listen on 127.0.0.1")
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise UserError("serve with TLS", "one of certificate and key is missing", "give both")

    @property
    def tls(self) -> tuple[bytes, bytes] | None:
        """Certificate chain and private key. Raises UserError if they cannot be read."""
        if self.tls_certificate is None or self.tls_key is None:
            return None
        return _pem(self.tls_certificate), _pem(self.tls_key)


@dataclass(frozen=True, kw_only=True)
class Load:
    """What to load a server with: options of `logitcache bench-serve`.

    Attributes:
        clients: students that read at once.
        seconds: how long.
        sequences: in one read.
        pause_s: that a student takes between two reads, as for a step of training; 0 reads on.
        decoded: the server decodes, not the students.
        seed: of what they read.
    """

    clients: int = 8
    seconds: float = 10.0
    sequences: int = 8
    pause_s: float = 0.0
    decoded: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        require(self.clients >= 1, "--clients of 1 or more", self.clients)
        require(self.sequences >= 1, "--sequences of 1 or more", self.sequences)
        require(0 < self.seconds <= threading.TIMEOUT_MAX, "--seconds, above 0 and finite", self.seconds)
        require(0 <= self.pause_s <= threading.TIMEOUT_MAX, "--pause-s, 0 or more and finite", self.pause_s)


def loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _pem(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"TLS with {path}", type(error).__name__, "give a PEM file that can be read") from error
