"""The three ways into a cache: `create` it, `open_store` to add to it, `open_cache` to read it.

Guarantees: a place that holds something else is never written to; a cache of another identity is refused, and so is a
tokenizer that is not the cache's. Identity is written first, so whatever is there later belongs to it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, cast

from logitcache.codecs import codec_from_config
from logitcache.errors import DamagedError, IdentityError, UserError
from logitcache.store import layout
from logitcache.store.commits import consolidate, consolidate_tier, list_committed, read_identity, read_manifest
from logitcache.store.disk_cache import CachedSource, DiskCache
from logitcache.store.envelope import canonical, differences, digest_of, seal
from logitcache.store.local import LocalPlace
from logitcache.store.manifest import Manifest
from logitcache.store.part import group_metadata
from logitcache.store.place import Place, Source, open_place
from logitcache.store.reader import INDEX_MEMORY_BYTES, Reader
from logitcache.store.tiers import CodecFactory
from logitcache.store.writer import Store

SERVED = ("grpc://", "grpc+tls://")
"""URLs of caches behind a server (docs/service.md)."""


def create(
    url: str,
    identity: Mapping[str, Any],
    *,
    storage_options: Mapping[str, Any] | None = None,
    codec_factory: CodecFactory = codec_from_config,
) -> Store:
    """Start a cache, or take up one that the same build began.

    Args:
        url: a path or any URL that fsspec can write.
        identity: JSON that says what decides the cache's bytes (teacher, tokenizer, problems, sampling).
        storage_options: for fsspec (credentials, an endpoint); never stored.
        codec_factory: rebuilds codecs of tiers.

    Raises:
        IdentityError: a cache of another identity is there.
        UserError: something else is there, or the place cannot be written.
    """
    place = open_place(url, storage_options)
    digest = digest_of(identity)
    data = seal({"format_version": layout.FORMAT_VERSION, "digest": digest, "identity": dict(identity)})
    existing = _surviving_identity(place, digest)
    if existing is None:
        _require_ours(place, digest)
        if not place.create(layout.IDENTITY, data):
            existing, _ = read_identity(place)
    if existing is not None and digest_of(existing) != digest:
        asked = json.loads(canonical(dict(identity)))
        found = ", ".join(differences(existing, asked, options=["sampling"]))
        raise IdentityError(f"build into {place.shown}", f"it has another {found}", "choose another place")
    groups = root_groups(digest)
    if any(_read_or_none(place, name) != group for name, group in groups.items()):
        place.write(groups)
    return Store(place=place, identity=dict(identity), codec_factory=codec_factory)


def open_store(
    url: str,
    *,
    storage_options: Mapping[str, Any] | None = None,
    codec_factory: CodecFactory = codec_from_config,
) -> Store:
    """An existing cache, to add to or to seal. Raises UserError where there is none."""
    place = open_place(url, storage_options)
    identity, _ = read_identity(place)
    return Store(place=place, identity=identity, codec_factory=codec_factory)


def open_cache(
    url: str,
    *,
    targets: str | None,
    tokenizer: str | None = None,
    committed: bool = False,
    storage_options: Mapping[str, Any] | None = None,
    codec_factory: CodecFactory = codec_from_config,
    index_memory_bytes: int = INDEX_MEMORY_BYTES,
    disk_cache: DiskCache | None = None,
) -> Reader:
    """Open a cache to read.

    Args:
        url: a path or any URL that fsspec can read; or `grpc://HOST:PORT/NAME`, `grpc+tls://...` for a served cache,
            whose `FlightReader` takes a reader's place.
        targets: a tier by name, or by kind where one tier alone is of that kind; None for tokens alone.
        tokenizer: fingerprint that the cache's tokenizer must have; None to leave it unchecked.
        committed: read what is committed now, sealed or not: only whole units, with targets where a tier is asked for.
        storage_options: for fsspec, or of `logitcache.service.opening.open_served`.
        codec_factory: rebuilds the tier's codec.
        index_memory_bytes: bound on the part indexes kept in memory.
        disk_cache: where to keep what is read from a remote place or a server; None for the one that the environment
            names in LOGITCACHE_DISK_CACHE, if it does.

    Raises:
        IdentityError: the tokenizer is another.
        DamagedError: the manifest or the identity is damaged.
        UserError: no cache there, not sealed, no such tier, a newer format version.
    """
    if url.startswith(SERVED):
        try:
            from logitcache.service.opening import open_served
        except ImportError as error:
            raise UserError(f"open {url}", str(error), "pip install 'logitcache[service]'") from error
        if committed:
            raise UserError(f"open {url}", "got committed", "open what the server has, which is sealed")
        served = open_served(
            url,
            targets=targets,
            tokenizer=tokenizer,
            storage_options=storage_options,
            codec_factory=codec_factory,
            disk_cache=disk_cache or DiskCache.from_environment(),
        )
        return cast(Reader, served)  # its twin, method for method
    place = open_place(url, storage_options)
    identity, digest = read_identity(place)
    require_tokenizer(place.shown, identity, tokenizer)
    manifest = _committed_manifest(place, targets) if committed else read_manifest(place)
    if manifest is None:
        units = len(list_committed(place).sequences)
        found = f"it is not sealed; {units} units are committed"
        do = "finish the build, or settle for those: `logitcache seal`, or committed=True in Python"
        raise UserError(f"open {place.shown}", found, do)
    if manifest.identity != digest:
        raise layout.damaged(place.shown, layout.MANIFEST, f"it is the manifest of identity {manifest.identity}")
    source: Source = place
    if disk_cache is None and not isinstance(place, LocalPlace):
        disk_cache = DiskCache.from_environment()
    if disk_cache is not None:
        source = CachedSource(source=place, cache=disk_cache, content=manifest.digest or digest)
    return Reader(
        source=source,
        manifest=manifest,
        identity=identity,
        tier=None if targets is None else tier_named(place.shown, manifest, targets),
        codec_factory=codec_factory,
        index_memory_bytes=index_memory_bytes,
    )


def root_groups(identity: str) -> dict[str, bytes]:
    """The groups that every cache has; the root names format version and identity."""
    attributes = {"logitcache": {"format_version": layout.FORMAT_VERSION, "identity": identity}}
    return {
        layout.ROOT: group_metadata(attributes),
        f"{layout.SEQUENCES}/zarr.json": group_metadata(),
        f"{layout.TARGETS}/zarr.json": group_metadata(),
    }


def root_identity(place: Place) -> str | None:
    """The digest that the root group names; None if it is not the root of a cache, to the byte."""
    data = _read_or_none(place, layout.ROOT)
    try:
        digest = json.loads(data or b"")["attributes"]["logitcache"]["identity"]
    except (ValueError, KeyError, TypeError):
        return None
    return digest if data == root_groups(digest)[layout.ROOT] else None


def _surviving_identity(place: Place, digest: str) -> dict[str, Any] | None:
    """The identity that is there; None if none is, or if it is damaged and the root says that it was this one."""
    try:
        return read_identity(place)[0]
    except DamagedError:
        if root_identity(place) != digest:
            raise
        place.delete(layout.IDENTITY)
        return None
    except UserError:
        if _read_or_none(place, layout.IDENTITY) is not None:
            raise
        return None


def _require_ours(place: Place, digest: str) -> None:
    """Raise UserError unless the place is empty, or a cache of this identity that lost its `identity.json`."""
    others = (name for name, _ in place.sizes("") if not name.startswith(f"{layout.PARTIAL}/"))
    first = next(others, None)
    if first is not None and root_identity(place) != digest:
        found = "it is a file" if first == "" else "it is not empty and not a cache"
        raise UserError(f"build into {place.shown}", found, "choose another place")


def _read_or_none(place: Place, name: str) -> bytes | None:
    try:
        return place.read(name)
    except FileNotFoundError:
        return None


def require_tokenizer(shown: str, identity: Mapping[str, Any], fingerprint: str | None) -> None:
    """Raise IdentityError unless the cache's tokenizer has that fingerprint; None leaves it unchecked."""
    have = (identity.get("tokenizer") or {}).get("fingerprint")
    if fingerprint is not None and fingerprint != have:
        asked = f"read {shown} with tokenizer {fingerprint}"
        raise IdentityError(asked, f"the cache's is {have}", "use a student with the teacher's tokenizer")


def _committed_manifest(place: Place, targets: str | None) -> Manifest:
    committed = list_committed(place)
    if targets is not None:
        everything = consolidate(place, committed, (), sorted(committed.targets))
        targets = tier_named(place.shown, everything, targets)
    return consolidate_tier(place, committed, targets)


def tier_named(shown: str, manifest: Manifest, targets: str) -> str:
    """The tier of that name, or the only one of that kind. Raises UserError."""
    of_kind = [name for name, tier in manifest.tiers.items() if tier.kind == targets]
    if targets in manifest.tiers:
        return targets
    if len(of_kind) == 1:
        return of_kind[0]
    have = ", ".join(f"{name} ({tier.kind})" for name, tier in manifest.tiers.items()) or "no targets"
    raise UserError(f"targets {targets} of {shown}", f"it has {have}", "name one of its tiers")
