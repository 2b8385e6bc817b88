"""A bounded folder of what was costly to get, on a local disk: remote reads, a server's rows, a teacher's scores.

Guarantees: what is kept carries its own checksum, so a damaged or torn copy is got again and never returned; the folder
stays within `max_bytes` (each process that fills it may exceed it by a twentieth); any number of processes share it.
Only what never changes is kept, under a digest that says what it is.
"""

from __future__ import annotations

import hashlib
import logging
import os
import threading
import uuid
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import google_crc32c

from logitcache.errors import UserError
from logitcache.pickling import as_arguments
from logitcache.store.chain import CRC_BYTES
from logitcache.store.place import ByteRange, Source

LOG = logging.getLogger("logitcache.store")
FOLDER_VARIABLE = "LOGITCACHE_DISK_CACHE"
SIZE_VARIABLE = "LOGITCACHE_DISK_CACHE_GB"
SLACK = 20
"""A process looks at the folder again after it wrote a twentieth of the bound."""


@dataclass(frozen=True, kw_only=True)
class DiskCache:
    """Where to keep what was got, and how much of it. Thread-safe; pickles as its arguments.

    Attributes:
        folder: on a local disk; made if it is not there.
        max_bytes: bound on what lies in it.
    """

    folder: str
    max_bytes: int
    _written: list[int] = field(default_factory=lambda: [1 << 62], init=False, repr=False, compare=False)
    _told: list[UserError] = field(default_factory=list, init=False, repr=False, compare=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False, repr=False, compare=False)

    @classmethod
    def from_environment(cls) -> DiskCache | None:
        """The folder that LOGITCACHE_DISK_CACHE names, of LOGITCACHE_DISK_CACHE_GB (20); None where it names none.

        Raises UserError for a size that is none.
        """
        folder, size = os.environ.get(FOLDER_VARIABLE), os.environ.get(SIZE_VARIABLE, "20")
        if not folder:
            return None
        try:
            max_bytes = int(float(size) * 1e9)
        except (ValueError, OverflowError) as error:
            raise UserError(f"{SIZE_VARIABLE}={size}", "it is not a number", "give GB, such as 20") from error
        return cls(folder=folder, max_bytes=max_bytes)

    def __post_init__(self) -> None:
        if self.max_bytes < 1 << 20:
            raise UserError("a disk cache", f"a bound of {self.max_bytes} bytes", "give a MiB or more")

    def __reduce__(self) -> tuple[Any, ...]:
        return as_arguments(self)

    def get(self, key: str) -> bytes | None:
        """What is kept under a key (hex digits of a digest); None if nothing is, or nothing whole."""
        file = self._file(key)
        try:
            data = file.read_bytes()
            os.utime(file)
        except OSError:
            return None
        payload = data[CRC_BYTES:]
        if payload and google_crc32c.value(payload).to_bytes(CRC_BYTES, "little") == data[:CRC_BYTES]:
            return payload
        return None

    def put(self, key: str, data: bytes) -> None:
        """Keep it; what was not asked for longest makes room. Raises UserError if the folder cannot be written."""
        file = self._file(key)
        temporary = Path(self.folder) / f".{uuid.uuid4().hex}"
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(google_crc32c.value(data).to_bytes(CRC_BYTES, "little") + data)
            os.replace(temporary, file)
        except OSError as error:
            with suppress(OSError):
                temporary.unlink()
            asked = f"keep what was read in {self.folder}"
            raise UserError(asked, str(error), "give a folder that can be written, or a smaller bound") from error
        with self._lock:
            self._written[0] += len(data)
            if self._written[0] > self.max_bytes // SLACK:
                self._written[0] = 0
                self._shrink()

    def put_or_tell(self, key: str, data: bytes) -> None:
        """`put` for whoever can go on without: why it cannot be kept is said, the first time, on the log."""
        try:
            self.put(key, data)
        except UserError as error:
            if not self._told:
                LOG.warning("nothing is kept on disk: %s", error)
                self._told.append(error)

    def drop(self, key: str) -> None:
        """Keep nothing under this key any more."""
        with suppress(OSError):
            self._file(key).unlink()

    def _file(self, key: str) -> Path:
        return Path(self.folder) / key[:2] / key[2:]

    def _shrink(self) -> None:
        """Remove what was not read for longest, until a twentieth of the bound is free."""
        entries = []
        for path in Path(self.folder).rglob("*"):
            with suppress(FileNotFoundError):
                if path.is_file():
                    stat = path.stat()
                    entries.append((stat.st_mtime_ns, stat.st_size, path))
        excess = sum(size for _, size, _ in entries) - self.max_bytes * (SLACK - 1) // SLACK
        for _, size, path in sorted(entries):
            if excess <= 0:
                return
            path.unlink(missing_ok=True)
            excess -= size


@dataclass(frozen=True, kw_only=True, eq=False)
class CachedSource:
    """A source whose ranged reads are kept.

    Attributes:
        source: what is read on a miss.
        cache: where it is kept.
        content: digest of the content that `source` serves; another content never meets this one's copies.
    """

    source: Source
    cache: DiskCache
    content: str

    @property
    def shown(self) -> str:
        """The source's."""
        return self.source.shown

    def read(self, name: str) -> bytes:
        """Not kept: what is read whole may change (a manifest)."""
        return self.source.read(name)

    def read_ranges(self, ranges: Sequence[ByteRange]) -> list[bytes]:
        """Kept copies, and the rest from the source in one call; see `Source`."""
        keys = [key_of(self.content, *item) for item in ranges]
        found = [self.cache.get(key) for key in keys]
        missing = [i for i, data in enumerate(found) if data is None]
        if missing:
            fetched = self.source.read_ranges([ranges[i] for i in missing])
            for i, data in zip(missing, fetched, strict=True):
                self.cache.put_or_tell(keys[i], data)
                found[i] = data
        return [data for data in found if data is not None]

    def forget(self, ranges: Sequence[ByteRange]) -> None:
        """See `Forgets`: a copy is kept before anyone has checked it against a record."""
        for item in ranges:
            self.cache.drop(key_of(self.content, *item))


def key_of(*parts: object) -> str:
    """The key of what these parts, none of which holds a line break, name together: 64 hex digits."""
    return hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()
