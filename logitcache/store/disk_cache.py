"""A bounded cache of remote reads on a local disk, for many epochs over one object store.

Guarantees: what is kept carries its own checksum, so a damaged copy is fetched again and never returned; the folder
stays within `max_bytes` (each process that fills it may exceed it by a twentieth); any number of processes share it.
Only byte ranges of committed, immutable objects are kept, under the digest of the content they belong to.
"""

from __future__ import annotations

import hashlib
import os
import threading
import uuid
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import google_crc32c

from logitcache.errors import UserError
from logitcache.store.chain import CRC_BYTES
from logitcache.store.place import ByteRange, Source

SLACK = 20
"""A process looks at the folder again after it wrote a twentieth of the bound."""


@dataclass(frozen=True, kw_only=True)
class DiskCache:
    """Where to keep what was read, and how much of it.

    Attributes:
        folder: on a local disk; made if it is not there.
        max_bytes: bound on what lies in it.
    """

    folder: str
    max_bytes: int

    def __post_init__(self) -> None:
        if self.max_bytes < 1 << 20:
            raise UserError("a disk cache", f"a bound of {self.max_bytes} bytes", "give a MiB or more")


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
    _written: list[int] = field(default_factory=lambda: [1 << 62], init=False, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False, repr=False)

    @property
    def shown(self) -> str:
        """The source's."""
        return self.source.shown

    def __reduce__(self) -> tuple[object, ...]:
        return _reopen, (self.source, self.cache, self.content)

    def read(self, name: str) -> bytes:
        """Not kept: what is read whole may change (a manifest)."""
        return self.source.read(name)

    def read_ranges(self, ranges: Sequence[ByteRange]) -> list[bytes]:
        """Kept copies, and the rest from the source in one call; see `Source`."""
        found = [self._kept(item) for item in ranges]
        missing = [i for i, data in enumerate(found) if data is None]
        if missing:
            fetched = self.source.read_ranges([ranges[i] for i in missing])
            for i, data in zip(missing, fetched, strict=True):
                self._keep(ranges[i], data)
                found[i] = data
        return [data for data in found if data is not None]

    def _file(self, item: ByteRange) -> Path:
        key = hashlib.sha256(f"{self.content}\n{item.name}\n{item.start}\n{item.stop}".encode()).hexdigest()
        return Path(self.cache.folder) / key[:2] / key[2:]

    def _kept(self, item: ByteRange) -> bytes | None:
        file = self._file(item)
        try:
            data = file.read_bytes()
            os.utime(file)
        except FileNotFoundError:
            return None
        payload = data[CRC_BYTES:]
        whole = len(payload) == item.stop - item.start
        if whole and google_crc32c.value(payload).to_bytes(CRC_BYTES, "little") == data[:CRC_BYTES]:
            return payload
        return None

    def _keep(self, item: ByteRange, data: bytes) -> None:
        file = self._file(item)
        temporary = Path(self.cache.folder) / f".{uuid.uuid4().hex}"
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(google_crc32c.value(data).to_bytes(CRC_BYTES, "little") + data)
            os.replace(temporary, file)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            asked = f"keep what was read in {self.cache.folder}"
            raise UserError(asked, str(error), "give a folder that can be written, or a smaller bound") from error
        with self._lock:
            self._written[0] += len(data)
            if self._written[0] > self.cache.max_bytes // SLACK:
                self._written[0] = 0
                self._shrink()

    def _shrink(self) -> None:
        """Remove what was not read for longest, until a twentieth of the bound is free."""
        entries = []
        for path in Path(self.cache.folder).rglob("*"):
            with suppress(FileNotFoundError):
                if path.is_file():
                    stat = path.stat()
                    entries.append((stat.st_mtime_ns, stat.st_size, path))
        excess = sum(size for _, size, _ in entries) - self.cache.max_bytes * (SLACK - 1) // SLACK
        for _, size, path in sorted(entries):
            if excess <= 0:
                return
            path.unlink(missing_ok=True)
            excess -= size


def _reopen(source: Source, cache: DiskCache, content: str) -> CachedSource:
    return CachedSource(source=source, cache=cache, content=content)
