"""Where a cache lives: one URL, a handful of operations on whole objects and byte ranges.

Guarantees: a write is all or nothing and durable when it returns; a ranged read returns exactly the bytes
asked for or raises. Names are relative to the URL, separated by `/`. Credentials in a URL are never shown.

Deliberately not here: what the bytes mean. Nothing above this line knows a file from an object.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

from logitcache.errors import UserError


class ByteRange(NamedTuple):
    """Bytes `start:stop` of one object."""

    name: str
    start: int
    stop: int


class Source(Protocol):
    """Reads objects. Raises FileNotFoundError for one that is not there, `UserError` for a store that fails."""

    @property
    def shown(self) -> str:
        """The URL without credentials, for people."""
        ...

    def read(self, name: str) -> bytes:
        """A whole object of unknown size."""
        ...

    def read_ranges(self, ranges: Sequence[ByteRange]) -> list[bytes]:
        """Byte ranges, concurrently where that pays.

        Obligations: exactly `stop - start` bytes each, in the order given; EOFError if an object ends before `stop`.
        """
        ...


@runtime_checkable
class Forgets(Protocol):
    """A source that keeps copies of what it read, and cannot tell whether they are what was committed."""

    def forget(self, ranges: Sequence[ByteRange]) -> None:
        """Drop the copies of these ranges: the next read gets them from where they came."""
        ...


class Place(Source, Protocol):
    """Reads, writes and lists objects."""

    def write(self, objects: Mapping[str, bytes]) -> None:
        """Put each object, replacing what was there. Obligation: each one appears whole and durable, or not at all."""
        ...

    def create(self, name: str, data: bytes) -> bool:
        """Put one object where none is; False if there is one, which never changes it.

        The one that is there can be this one: a store that loses its reply is asked again.
        """
        ...

    def delete(self, name: str) -> None:
        """Remove an object, or everything beneath it; nothing there is fine."""
        ...

    def sizes(self, under: str) -> Iterator[tuple[str, int]]:
        """Every object at or beneath `under`: name and size in bytes, in any order."""
        ...


def open_place(url: str, storage_options: Mapping[str, Any] | None = None) -> Place:
    """The place that a URL names. Raises UserError for a protocol that fsspec does not know."""
    from logitcache.store.local import LocalPlace
    from logitcache.store.remote import RemotePlace

    protocol, separator, path = url.partition("://")
    if not separator:
        return LocalPlace(root=url)
    if protocol in ("file", "local"):
        return LocalPlace(root=path)
    if protocol in ("grpc", "grpc+tls"):
        found = "a server's caches can be read, not listed, checked or written"
        raise UserError(f"use {redact(url)}", found, "give the URL where the cache itself lies")
    return RemotePlace(url=url, storage_options=dict(storage_options or {}))


def redact(text: str) -> str:
    """Text without what a URL may hold of credentials: `user:password@` and everything after `?`."""
    return re.sub(r"\?[^\s'\")]+", "?...", re.sub(r"://[^/\s@]+@", "://...@", text))


def write_failed(shown: str, name: str, error: BaseException) -> UserError:
    """The error for an object that could not be written."""
    found = redact(str(error)) or type(error).__name__
    return UserError(f"write {name} in {shown}", found, "make it writable or free some space, then run it again")


def read_refused(shown: str, name: str, error: BaseException) -> UserError:
    """The error for an object that may not be read."""
    return UserError(f"read {name} in {shown}", redact(str(error)), "grant read access or set your credentials")
