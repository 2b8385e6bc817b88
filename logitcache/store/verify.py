"""Is every object what was committed? And where not, undo the commit, so that the build redoes exactly that.

Guarantees: a sound part is never touched; a repair restores bytes that are known or deletes records, with a tier's the
tier's shared arrays, and nothing that cannot be made again. A shallow check reads a listing and the records; a deep one
reads every byte.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from logitcache.errors import UserError
from logitcache.store import layout
from logitcache.store.check import Check, Damage, present
from logitcache.store.commits import list_committed
from logitcache.store.place import Place, open_place
from logitcache.store.tiers import tiers_among

Progress = Callable[[int, int], None]
"""Called with parts done and parts in all."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """What `verify` found.

    Attributes:
        sealed: whether there is a sound manifest.
        parts: how many were looked at.
        objects: how many were looked at.
        nbytes: bytes that were read and checked in full; 0 for a shallow check.
        damage: what is not sound; empty for a sound cache.
        repaired: whether the damage was undone: build again to make it whole.
    """

    sealed: bool
    parts: int
    objects: int
    nbytes: int
    damage: tuple[Damage, ...]
    repaired: bool

    @property
    def sound(self) -> bool:
        """Whether everything looked at is what was committed."""
        return not self.damage


def verify(
    url: str,
    *,
    deep: bool = False,
    repair: bool = False,
    storage_options: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> Report:
    """Check every object of a cache.

    Args:
        url: of the cache.
        deep: read and check every byte; otherwise presence and sizes, and the records' bytes.
        repair: undo what is damaged; the same build again then makes the same bytes.
        storage_options: for fsspec.
        progress: told after each part.

    Raises:
        UserError: there is no cache, or its place cannot list objects.
    """
    place = open_place(url, storage_options)
    if not any(present(place, name) for name in (layout.IDENTITY, layout.MANIFEST, layout.ROOT)):
        raise UserError(f"verify {place.shown}", "no cache there", "give the URL of a cache")
    check = Check(place=place, deep=deep, sizes=dict(place.sizes("")))
    manifest = check.manifest()
    check.identity(manifest)
    check.appended(manifest)
    groups = list(check.groups(manifest, list_committed(place)))
    for done, (group, expected) in enumerate(groups, 1):
        check.part(group, expected)
        if progress is not None:
            progress(done, len(groups))
    if repair:
        undo(place, check.damage)
    return Report(
        sealed=manifest is not None,
        parts=len(groups),
        objects=check.objects,
        nbytes=check.nbytes,
        damage=tuple(check.damage),
        repaired=repair and bool(check.damage),
    )


def undo(place: Place, damage: Sequence[Damage]) -> None:
    """Restore the bytes that are known and remove the commits of the rest."""
    for item in damage:
        if item.restore is not None:
            place.write({item.name: item.restore})
    undone = sorted({item.undo for item in damage if item.restore is None})
    for name in undone:
        place.delete(name)
    for tier in tiers_among(undone):  # arrays that are there are not replaced by those of the next calibration
        place.delete(layout.shared_group(tier))
