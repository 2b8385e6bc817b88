"""Verified reads: what comes back is what was committed, or a `DamagedError` that names the object.

Every request of a batch goes to the source in one call, so that an object store serves them at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

from numpy.typing import NDArray

from logitcache.errors import UserError
from logitcache.store.envelope import Sealed, unseal
from logitcache.store.layout import FORMAT_VERSION, damaged
from logitcache.store.place import ByteRange, Forgets, Source
from logitcache.store.stored_array import DamagedChunkError, StoredArray, StoredObject

_Checked = TypeVar("_Checked")


class Rows(NamedTuple):
    """Rows first:stop of one array."""

    array: StoredArray
    first: int
    stop: int


def fetch_rows(source: Source, wanted: Sequence[Rows]) -> list[NDArray[Any]]:
    """The rows, in the order asked for, each chunk checked against its record."""
    plans = [item.array.ranges(item.first, item.stop) for item in wanted]

    def assembled(blobs: Sequence[bytes]) -> list[NDArray[Any]]:
        data = iter(blobs)
        return [
            item.array.assemble(item.first, item.stop, [next(data) for _ in plan])
            for item, plan in zip(wanted, plans, strict=True)
        ]

    return _fetch_checked(source, [part for plan in plans for part in plan], assembled)


def fetch_ranges(source: Source, ranges: Sequence[ByteRange]) -> list[bytes]:
    """Byte ranges of committed objects: missing or short ones are damage."""
    with _committed(source):
        return source.read_ranges(ranges)


def fetch_objects(source: Source, wanted: Sequence[tuple[str, StoredObject]]) -> list[bytes]:
    """Whole committed objects, checked against their digests."""

    def matched(blobs: list[bytes]) -> list[bytes]:
        for (name, item), data in zip(wanted, blobs, strict=True):
            if not item.matches(data):
                raise DamagedChunkError(name, "its digest is not the recorded one")
        return blobs

    return _fetch_checked(source, [ByteRange(name, 0, item.size) for name, item in wanted], matched)


def _fetch_checked(source: Source, ranges: Sequence[ByteRange], check: Callable[[list[bytes]], _Checked]) -> _Checked:
    """What `check` makes of the bytes. Copies that it refuses are got once more from where they came."""
    try:
        try:
            return check(fetch_ranges(source, ranges))
        except DamagedChunkError:
            if not isinstance(source, Forgets):
                raise
            source.forget(ranges)
            return check(fetch_ranges(source, ranges))
    except DamagedChunkError as error:
        name, why = error.args
        raise damaged(source.shown, name, why) from error


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
