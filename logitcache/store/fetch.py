"""Verified reads: what comes back is what was committed, or a `DamagedError` that names the object.

Every request of a batch goes to the source in one call, so that an object store serves them at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from numpy.typing import NDArray

from logitcache.errors import UserError
from logitcache.store.envelope import Sealed, unseal
from logitcache.store.layout import FORMAT_VERSION, damaged
from logitcache.store.place import ByteRange, Source
from logitcache.store.stored_array import DamagedChunkError, StoredArray, StoredObject


class Rows(NamedTuple):
    """Rows first:stop of one array."""

    array: StoredArray
    first: int
    stop: int


def fetch_rows(source: Source, wanted: Sequence[Rows]) -> list[NDArray[Any]]:
    """The rows, in the order asked for, each chunk checked against its record."""
    plans = [item.array.ranges(item.first, item.stop) for item in wanted]
    data = iter(fetch_ranges(source, [part for plan in plans for part in plan]))
    found = []
    for item, plan in zip(wanted, plans, strict=True):
        try:
            found.append(item.array.assemble(item.first, item.stop, [next(data) for _ in plan]))
        except DamagedChunkError as error:
            name, why = error.args
            raise damaged(source.shown, name, why) from error
    return found


def fetch_ranges(source: Source, ranges: Sequence[ByteRange]) -> list[bytes]:
    """Byte ranges of committed objects: missing or short ones are damage."""
    with _committed(source):
        return source.read_ranges(ranges)


def fetch_objects(source: Source, wanted: Sequence[tuple[str, StoredObject]]) -> list[bytes]:
    """Whole committed objects, checked against their digests."""
    found = fetch_ranges(source, [ByteRange(name, 0, item.size) for name, item in wanted])
    for (name, item), data in zip(wanted, found, strict=True):
        if not item.matches(data):
            raise damaged(source.shown, name, "its digest is not the recorded one")
    return found


def fetch_envelope(source: Source, name: str) -> Sealed | None:
    """A JSON object that carries its digest and a format version; None if there is none."""
    try:
        data = source.read(name)
    except FileNotFoundError:
        return None
    try:
        sealed = unseal(data)
    except ValueError as error:
        raise damaged(source.shown, name, str(error)) from error
    version = sealed.body.get("format_version") if isinstance(sealed.body, dict) else None
    if version != FORMAT_VERSION:
        asked = f"open {source.shown}"
        raise UserError(asked, f"{name} has format version {version}, not {FORMAT_VERSION}", "upgrade logitcache")
    return sealed


@contextmanager
def _committed(source: Source) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise damaged(source.shown, str(error), "it is missing") from error
    except EOFError as error:
        raise damaged(source.shown, str(error).split(" ", 1)[0], "it is shorter than recorded") from error
