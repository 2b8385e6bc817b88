"""Problem sets that were appended to a cache, each an object of its own (docs/format.md, section 8).

Guarantees: a set is created whole by one writer and never changes; its number and its units follow those before it. The
first set is the identity's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from logitcache.errors import IdentityError
from logitcache.store import layout
from logitcache.store.envelope import seal
from logitcache.store.fetch import fetch_envelope
from logitcache.store.place import Place, Source


@dataclass(frozen=True, kw_only=True)
class AppendedSet:
    """Problems that were appended together.

    Attributes:
        count: of problems.
        sha256: over their ids and texts in order, hex.
        first_unit: number of the set's first unit.
        units: how many there are.
    """

    count: int
    sha256: str
    first_unit: int
    units: int

    def data(self, identity: str) -> bytes:
        """The set's object in the cache of that identity."""
        return seal({"format_version": layout.FORMAT_VERSION, "identity": identity, "problems": asdict(self)})

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> AppendedSet:
        """Raises ValueError for absurd numbers, KeyError or TypeError for missing ones."""
        found = cls(
            count=int(value["count"]),
            sha256=str(value["sha256"]),
            first_unit=int(value["first_unit"]),
            units=int(value["units"]),
        )
        if not 0 < found.units <= found.count or found.first_unit < 1:
            raise ValueError(f"{found.count} problems in {found.units} units from {found.first_unit}")
        return found


def read_appended(source: Source, identity: str, number: int) -> AppendedSet | None:
    """The set of that number, 1 or more; None if there is none. Raises DamagedError."""
    name = layout.appended_set(number)
    sealed = fetch_envelope(source, name)
    if sealed is None:
        return None
    try:
        if sealed.body["identity"] != identity:
            raise ValueError(f"it is of identity {sealed.body['identity']}")
        return AppendedSet.from_json(sealed.body["problems"])
    except (KeyError, TypeError, ValueError) as error:
        raise layout.damaged(source.shown, name, str(error)) from error


def all_appended(source: Source, identity: str) -> tuple[AppendedSet, ...]:
    """Every set, in order. Raises DamagedError."""
    found: list[AppendedSet] = []
    while (item := read_appended(source, identity, len(found) + 1)) is not None:
        if found and item.first_unit != found[-1].first_unit + found[-1].units:
            raise layout.damaged(source.shown, layout.appended_set(len(found) + 1), "it does not follow the one before")
        found.append(item)
    return tuple(found)


def append_set(place: Place, identity: str, number: int, wanted: AppendedSet) -> None:
    """Create a set, or find the very same one created. Raises IdentityError for another one."""
    name = layout.appended_set(number)
    if not place.create(name, wanted.data(identity)) and read_appended(place, identity, number) != wanted:
        asked = f"append {wanted.count} problems to {place.shown}"
        raise IdentityError(asked, "another set was appended meanwhile", "finish that one, then run this again")
