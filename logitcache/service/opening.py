"""From the URL of a served cache to its reader.

Guarantees: a manifest and an identity that do not belong together, or carry another digest than their own, are refused.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from logitcache.codecs import codec_from_config
from logitcache.errors import DamagedError, UserError, require
from logitcache.service.client import FlightReader, run_action
from logitcache.service.connection import Connection
from logitcache.store.disk_cache import DiskCache
from logitcache.store.envelope import unseal
from logitcache.store.manifest import Manifest
from logitcache.store.opening import SERVED, require_tokenizer, tier_named
from logitcache.store.tiers import CodecFactory

TOKEN_VARIABLE = "LOGITCACHE_TOKEN"
ROOTS_VARIABLE = "LOGITCACHE_TLS_ROOTS"
_OPTIONS: dict[str, Any] = {
    "token": str | None,
    "tls_roots": str | os.PathLike | None,
    "timeout_s": int | float,
    "patience_s": int | float,
}
_HOSTS = re.compile(r"[^/?#@,\s]+(,[^/?#@,\s]+)*")


def open_served(
    url: str,
    *,
    targets: str | None,
    tokenizer: str | None = None,
    storage_options: Mapping[str, Any] | None = None,
    codec_factory: CodecFactory = codec_from_config,
    disk_cache: DiskCache | None = None,
) -> FlightReader:
    """Open a served cache; `logitcache.open_cache` comes here for its URLs.

    Args:
        url: `grpc://HOST:PORT/NAME` or `grpc+tls://HOST:PORT/NAME`; of several servers with the same caches, the
            others after commas: `grpc://HOST:PORT,HOST:PORT/NAME`.
        targets: as for `open_cache`.
        tokenizer: as for `open_cache`.
        storage_options: `decoded=True` to have the server decode; `token` (by default the environment's
            LOGITCACHE_TOKEN); `tls_roots`, a path of PEM certificates to trust (by default the environment's
            LOGITCACHE_TLS_ROOTS); `timeout_s` and `patience_s` of the `Connection`.
        codec_factory: rebuilds the tier's codec.
        disk_cache: where to keep rows; None to keep none.

    Raises:
        IdentityError: the tokenizer is another.
        UserError: not such a URL or option, no answer, a refusal, no such tier.
    """
    options = dict(storage_options or {})
    decoded = options.pop("decoded", False)
    require(isinstance(decoded, bool), "the option decoded, True or False", repr(decoded))
    connection, cache = connect(url, "/", options)
    manifest, identity = _facts(connection, cache)
    require_tokenizer(url, identity, tokenizer)
    return FlightReader(
        connection=connection,
        cache=cache,
        manifest=manifest,
        identity=identity,
        tier=None if targets is None else tier_named(url, manifest, targets),
        encoded=not decoded,
        disk_cache=disk_cache,
        codec_factory=codec_factory,
    )


def connect(url: str, separator: str, options: dict[str, Any]) -> tuple[Connection, str]:
    """The connection that a URL and options name, and the name after the URL's `/` or `#`."""
    scheme, _, rest = url.partition("://")
    hosts, _, name = rest.rstrip("/").partition(separator)
    if f"{scheme}://" not in SERVED or not _HOSTS.fullmatch(hosts) or not name or re.search(r"[/?#@]", name):
        asked = "the URL of a served cache" if separator == "/" else "the URL of a served teacher"
        raise UserError(asked, "it is not one", f"write grpc://HOST:PORT{separator}NAME")
    _check_options(options)
    token = options["token"] = options.get("token") or os.environ.get(TOKEN_VARIABLE)
    if token is not None and not (token.isascii() and token.isprintable()):
        raise UserError("a token", "it has other characters than printable ASCII", f"check {TOKEN_VARIABLE}")
    roots = options.pop("tls_roots", None)
    if scheme == "grpc+tls" and (roots := roots or os.environ.get(ROOTS_VARIABLE)):
        try:
            options["tls_roots"] = Path(roots).read_bytes()
        except (OSError, ValueError) as error:
            raise UserError(f"certificates in {roots}", type(error).__name__, "give a PEM file") from error
        require(b"BEGIN CERTIFICATE" in options["tls_roots"], "certificates to trust", roots, "give a PEM file")
    return Connection(locations=tuple(f"{scheme}://{host}" for host in hosts.split(",")), **options), name


def _check_options(options: Mapping[str, Any]) -> None:
    if unknown := options.keys() - _OPTIONS.keys():
        found = f"got {', '.join(sorted(map(str, unknown)))}"
        raise UserError("options of a server", found, f"give {', '.join(_OPTIONS)} or decoded")
    for name, value in options.items():
        fits = isinstance(value, _OPTIONS[name])
        if fits and name.endswith("_s"):
            fits = 0 < value <= threading.TIMEOUT_MAX
        found = type(value).__name__ if name == "token" else repr(value)
        require(fits, f"the option {name}", found, "give text, or seconds above 0")


def _facts(connection: Connection, cache: str) -> tuple[Manifest, dict[str, Any]]:
    """A served cache's manifest and identity. Raises DamagedError unless they belong together."""
    envelopes = run_action(connection, "cache", cache=cache)
    try:
        identity, manifest = (unseal(data) for data in envelopes)
        found = Manifest.from_sealed(manifest)
        if found.identity != identity.body["digest"]:
            raise ValueError("its manifest is of another identity")
        return found, dict(identity.body["identity"])
    except (ValueError, KeyError, TypeError) as error:
        asked = f"open {cache} at {connection.location}"
        raise DamagedError(asked, str(error), "tell who runs the server") from error
