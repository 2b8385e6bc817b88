"""Problem sets of a cache: the identity's, and those appended to it later.

Guarantees: a problem that the cache has is not built again; a set begins only when all before it are whole, so what it
holds does not depend on who builds it or how often that is interrupted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from typing import Any

from logitcache.build import Unit, missing_units, unit_name
from logitcache.console import note
from logitcache.errors import IdentityError, UserError
from logitcache.problems import Problem, problems_digest
from logitcache.store import AppendedSet, Store, create, open_store


def open_first(out: str, identity: Mapping[str, Any]) -> Store:
    """The cache whose first problem set is the identity's, new or begun. Raises as `create`."""
    try:
        return create(out, identity)
    except IdentityError as error:
        there = open_store(out).identity
        if _but_for_problems(identity, there) != there:
            raise
        mend = "add --append to build what is new, or choose another place"
        raise IdentityError(error.asked, error.found, mend) from error


def open_to_append(out: str, identity: Mapping[str, Any]) -> Store:
    """An existing cache that agrees with `identity` in all but its problems. Raises as `create`."""
    return create(out, _but_for_problems(identity, open_store(out).identity))


def all_units(store: Store) -> list[Unit]:
    """The units of all sets, without their prompts."""
    return _units(0, _end(store, store.appended()))


def append_problems(store: Store, problems: Sequence[Problem], tiers: Sequence[str]) -> tuple[list[Problem], int]:
    """Append those of the problems that the cache lacks, or take up the set that this did before.

    Returns:
        The problems of the set, none if nothing was new, and the number of its first unit.

    Raises:
        UserError: the tiers are not the cache's, or an earlier set is not whole.
        IdentityError: another set was appended at this moment.
    """
    if set(tiers) != set(store.tiers()):
        asked, found = f"append with targets {', '.join(sorted(tiers))}", f"it has {', '.join(store.tiers()) or 'none'}"
        raise UserError(f"{asked} to {store.place.shown}", found, "name those; `logitcache score` adds another")
    sets = store.appended()
    first = _end(store, sets[:-1])
    have = _problems_of(store, 0, first, tiers)
    if sets:  # the same command may have begun the last one
        new, wanted = _set_of(store, problems, have, first)
        if wanted == sets[-1]:
            return new, first
        before, first = first, _end(store, sets)
        have |= _problems_of(store, before, first, tiers)
    new, wanted = _set_of(store, problems, have, first)
    note(f"{len(problems) - len(new)} of {len(problems)} problems are there already, {len(new)} are new")
    if new:
        _require_free(store, new, wanted)
        store.append(wanted)
    return new, first


def _problems_of(store: Store, first: int, stop: int, tiers: Sequence[str]) -> set[str]:
    """The ids of units first:stop, which must all be whole."""
    units = _units(first, stop)
    if missing := missing_units(store.committed(), units, tiers):
        found = f"{len(missing)} of {len(units)} units of earlier problems are missing"
        raise UserError(f"append to {store.place.shown}", found, "run the earlier build again to finish it first")
    return set(store.problem_ids([unit.name for unit in units]))


def _set_of(store: Store, problems: Sequence[Problem], have: Set[str], first: int) -> tuple[list[Problem], AppendedSet]:
    """Which problems are not among those there, and the set that they make from that unit on."""
    new = [problem for problem in problems if problem.id not in have]
    count = -(-len(new) // store.identity["problems"]["per_unit"])
    return new, AppendedSet(count=len(new), sha256=problems_digest(new), first_unit=first, units=count)


def _require_free(store: Store, new: Sequence[Problem], wanted: AppendedSet) -> None:
    """Raise UserError if units of another set, whose object was lost, are there."""
    there = [name for name in store.committed().sequences if name >= unit_name(wanted.first_unit)]
    per_unit, samples = store.identity["problems"]["per_unit"], store.identity["sampling"]["samples_per_problem"]
    ids = {
        unit_name(wanted.first_unit + n): [p.id for p in new[n * per_unit : (n + 1) * per_unit] for _ in range(samples)]
        for n in range(wanted.units)
    }
    if store.problem_ids(there) != [ident for name in there for ident in ids.get(name, [""])]:
        found = f"units from {there[0]} on are of problems that were appended before"
        raise UserError(f"append to {store.place.shown}", found, "run the command that appended those first")


def _end(store: Store, sets: Sequence[AppendedSet]) -> int:
    first = store.identity.get("problems")
    if first is None:
        found = "its identity names no problems: logitcache build did not make it"
        raise UserError(f"the units of {store.place.shown}", found, "add to it with logitcache.store.open_store")
    return sets[-1].first_unit + sets[-1].units if sets else -(-first["count"] // first["per_unit"])


def _units(first: int, stop: int) -> list[Unit]:
    return [Unit(name=unit_name(number), prompts=()) for number in range(first, stop)]


def _but_for_problems(identity: Mapping[str, Any], there: Mapping[str, Any]) -> dict[str, Any]:
    """`identity` with the problem set that is there, cut as is asked now."""
    return {**identity, "problems": {**there.get("problems", {}), "per_unit": identity["problems"]["per_unit"]}}
