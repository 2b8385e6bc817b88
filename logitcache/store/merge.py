"""Bring parts of caches of one identity into one place: what several machines built apart.

Guarantees: every byte is checked on the way; a part that is already there with the same bytes is left alone, one with
other bytes is refused; a merge that was interrupted is taken up where it stopped. Sources are only read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from logitcache.codecs import codec_from_config
from logitcache.errors import IdentityError, UserError
from logitcache.store import layout
from logitcache.store.appended import AppendedSet, all_appended, append_set
from logitcache.store.commits import list_committed, read_identity
from logitcache.store.envelope import digest_of
from logitcache.store.fetch import fetch_objects
from logitcache.store.opening import create
from logitcache.store.part import Record
from logitcache.store.part_index import read_record
from logitcache.store.place import Place, open_place
from logitcache.store.tiers import CodecFactory, EncodedTier, commit_tier, read_tier
from logitcache.store.writer import Store


def merge(
    sources: Sequence[str],
    into: str,
    *,
    storage_options: Mapping[str, Any] | None = None,
    codec_factory: CodecFactory = codec_from_config,
    progress: Callable[[int, int], None] | None = None,
) -> Store:
    """Copy every committed part of the sources; seal the store that comes back when nothing more is to come.

    Args:
        sources: URLs of caches, sealed or not.
        into: URL of the place that receives them: empty, or a cache of the same identity.
        storage_options: for fsspec, for all of them.
        codec_factory: of the store that comes back.
        progress: told parts done and parts in all.

    Raises:
        IdentityError: the sources are not of one identity, or a tier is not the same in two of them, or other problems
            were appended to them (then nothing is written).
        UserError: a unit is there twice with different bytes.
        DamagedError: a source is damaged.
    """
    places = [open_place(url, storage_options) for url in sources]
    if not places:
        raise UserError("merge caches", "no source was named", "name one or more")
    identities = [read_identity(place)[0] for place in places]
    for place, identity in zip(places, identities, strict=True):
        if digest_of(identity) != digest_of(identities[0]):
            asked = f"merge {places[0].shown} and {place.shown}"
            raise IdentityError(asked, "they were built with other settings", "merge caches of one build")
    digest = digest_of(identities[0])
    _agreed_sets(places, digest)
    store = create(into, identities[0], storage_options=storage_options, codec_factory=codec_factory)
    for number, item in enumerate(_agreed_sets([*places, store.place], digest), 1):
        append_set(store.place, digest, number, item)
    work = [(place, group) for place in places for group in _groups(store.place, place)]
    for done, (place, group) in enumerate(work, 1):
        _copy_part(place, store.place, group)
        if progress is not None:
            progress(done, len(work))
    return store


def _agreed_sets(places: Sequence[Place], identity: str) -> tuple[AppendedSet, ...]:
    """The longest list of appended problem sets; every place has a beginning of it, or IdentityError."""
    lists = [all_appended(place, identity) for place in places]
    longest = max(lists, key=len)
    for place, sets in zip(places, lists, strict=True):
        if sets != longest[: len(sets)]:
            asked = f"merge {place.shown} and {places[lists.index(longest)].shown}"
            mend = "merge caches that the same problems were appended to"
            raise IdentityError(asked, "other problems were appended to them", mend)
    return longest


def _groups(target: Place, source: Place) -> list[str]:
    """The parts of a source, its tiers copied already; sequences come first."""
    committed = list_committed(source)
    for tier in committed.targets:
        _copy_tier(source, target, tier)
    sequences = [layout.sequences_part(unit) for unit in committed.sequences]
    return sequences + [layout.targets_part(tier, u) for tier, units in committed.targets.items() for u in units]


def _copy_tier(source: Place, target: Place, name: str) -> None:
    theirs, ours = read_tier(source, name), read_tier(target, name)
    if theirs is None or (ours is not None and ours.digest == theirs.digest):
        return
    if ours is not None:
        asked = f"merge tier {name} of {source.shown} into {target.shown}"
        raise IdentityError(asked, "it has another configuration there", "merge caches whose tiers are the same")
    data = source.read(layout.tier_record(name))
    shared = _objects(source, theirs.shared)
    commit_tier(target, EncodedTier(name=name, objects=shared, data=data, digest=theirs.digest))


def _copy_part(source: Place, target: Place, group: str) -> None:
    name = layout.record_of(group)
    data = source.read(name)
    record = read_record(source, group, data)
    try:
        existing = target.read(name)
    except FileNotFoundError:
        target.write(_objects(source, record))
        target.write({name: data})
        return
    if existing != data:
        asked = f"merge {group} of {source.shown} into {target.shown}"
        raise UserError(asked, "it is there with other bytes", "merge caches that do not overlap")


def _objects(source: Place, record: Record) -> dict[str, bytes]:
    wanted = list(record.all_objects.items())
    return dict(zip((name for name, _ in wanted), fetch_objects(source, wanted), strict=True))
