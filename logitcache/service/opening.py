"""From the URL of a served cache to its reader.

Guarantees: a manifest and an identity that do not belong together, or carry another digest than their own, are refused.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from logitcache.codecs import codec_from_config
from logitcache.errors import DamagedError, UserError
from logitcache.service.client import FlightReader, run_action
from logitcache.service.connection import Connection
from logitcache.store.envelope import unseal
from logitcache.store.manifest import Manifest
from logitcache.store.opening import SERVED, require_tokenizer, tier_named
from logitcache.store.tiers import CodecFactory

TOKEN_VARIABLE = "LOGITCACHE_TOKEN"
_OPTIONS = ("token", "tls_roots", "timeout_s", "patience_s")
_HOSTS = re.compile(r"[^/?#@,\s]+(,[^/?#@,\s]+)*")


def open_served(
    url: str,
    *,
    targets: str | None,
    tokenizer: str | None = None,
    storage_options: Mapping[str, Any] | None = None,
    codec_factory: CodecFactory = codec_from_config,
) -> FlightReader:
    """Open a served cache; `logitcache.open_cache` comes here for its URLs.

    Args:
        url: `grpc://HOST:PORT/NAME` or `grpc+tls://HOST:PORT/NAME`; of several servers with the same caches, the
            others after commas: `grpc://HOST:PORT,HOST:PORT/NAME`.
        targets: as for `open_cache`.
        tokenizer: as for `open_cache`.
        storage_options: `decoded=True` to have the server decode; `token` (by default the environment's
            LOGITCACHE_TOKEN); `tls_roots`, a path of PEM certificates to trust; `timeout_s` and `patience_s` of the
            `Connection`; `disk_cache`, a `DiskCache` to keep rows in.
        codec_factory: rebuilds the tier's codec.

    Raises:
        IdentityError: the tokenizer is another.
        UserError: not such a URL or option, no answer, a refusal, no such tier.
    """
    options = dict(storage_options or {})
    decoded = bool(options.pop("decoded", False))
    disk_cache = options.pop("disk_cache", None)
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
    unknown = options.keys() - set(_OPTIONS)
    if unknown:
        found = f"got {', '.join(sorted(unknown))}"
        raise UserError("options of a server", found, f"give {', '.join(_OPTIONS)}, decoded or disk_cache")
    token = options["token"] = options.get("token") or os.environ.get(TOKEN_VARIABLE)
    if token is not None and not (token.isascii() and token.isprintable()):
        raise UserError("a token", "it has other characters than printable ASCII", f"check {TOKEN_VARIABLE}")
    if (roots := options.pop("tls_roots", None)) is not None:
        try:
            options["tls_roots"] = Path(roots).read_bytes()
        except OSError as error:
            raise UserError(f"certificates in {roots}", type(error).__name__, "give a PEM file") from error
    return Connection(locations=tuple(f"{scheme}://{host}" for host in hosts.split(",")), **options), name


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
