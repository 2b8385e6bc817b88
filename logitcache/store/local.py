"""A cache on a local disk.

Guarantees: an object is written to a temporary file, flushed to the disk and renamed, and its directory is
flushed too, so that after a power cut it is there whole or not at all. Temporary files lie under `.partial/` in the
root, where no reader looks. Whoever writes there holds a shared lock on that folder, which the kernel takes from a
killed process; a writer that finds itself alone removes what killed ones left. Where a file system has no such locks
(some network ones) that stays until someone removes it.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from logitcache.store.layout import PARTIAL
from logitcache.store.place import ByteRange, read_refused, write_failed

FLUSHES_AT_ONCE = 8
"""Threads that flush the files of one write."""


@dataclass(frozen=True, kw_only=True)
class LocalPlace:
    """Objects as files beneath `root`."""

    root: str

    @property
    def shown(self) -> str:
        """The path as it was given."""
        return self.root

    def read(self, name: str) -> bytes:
        """A whole file; see `Source`."""
        try:
            return (Path(self.root) / name).read_bytes()
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
            raise FileNotFoundError(name) from error
        except PermissionError as error:
            raise read_refused(self.shown, name, error) from error

    def read_ranges(self, ranges: Sequence[ByteRange]) -> list[bytes]:
        """One pread a range; see `Source`."""
        return [self._read_range(item) for item in ranges]

    def _read_range(self, item: ByteRange) -> bytes:
        try:
            descriptor = os.open(f"{self.root}/{item.name}", os.O_RDONLY)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise FileNotFoundError(item.name) from error
        except PermissionError as error:
            raise read_refused(self.shown, item.name, error) from error
        try:
            if os.fstat(descriptor).st_size < item.stop:  # before a buffer of an absurd size is allocated
                raise EOFError(f"{item.name} ends before byte {item.stop}")
            data = os.pread(descriptor, item.stop - item.start, item.start)
        finally:
            os.close(descriptor)
        if len(data) != item.stop - item.start:
            raise EOFError(f"{item.name} ends before byte {item.stop}")
        return data

    def write(self, objects: Mapping[str, bytes]) -> None:
        """Durable, atomic files; flushed many at a time, since disks flush a group as fast as one; see `Place`."""
        names = list(objects)
        temporaries: list[Path] = []
        try:
            with self._writing(), ThreadPoolExecutor(FLUSHES_AT_ONCE) as pool:
                try:
                    for name in names:
                        temporaries.append(self._temporary(objects[name]))
                    list(pool.map(flush, temporaries))
                    targets = [Path(self.root) / name for name in names]
                    for temporary, target in zip(temporaries, targets, strict=True):
                        _make_folder(target.parent)
                        os.replace(temporary, target)
                    list(pool.map(flush, {target.parent for target in targets}))
                finally:
                    for temporary in temporaries:
                        temporary.unlink(missing_ok=True)
        except OSError as error:
            raise write_failed(self.shown, names[0], error) from error

    def create(self, name: str, data: bytes) -> bool:
        """A hard link refuses to replace, unlike a rename; see `Place`."""
        target = Path(self.root) / name
        try:
            with self._writing():
                temporary = self._temporary(data)
                try:
                    flush(temporary)
                    _make_folder(target.parent)
                    os.link(temporary, target)
                except FileExistsError:
                    return False
                finally:
                    temporary.unlink(missing_ok=True)
                flush(target.parent)
        except OSError as error:
            raise write_failed(self.shown, name, error) from error
        return True

    def delete(self, name: str) -> None:
        """A file or a tree; see `Place`."""
        path = Path(self.root) / name
        try:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
            if path.parent.is_dir():
                flush(path.parent)
        except FileNotFoundError:
            return  # another process cleared it first
        except OSError as error:
            raise write_failed(self.shown, name, error) from error

    def sizes(self, under: str) -> Iterator[tuple[str, int]]:
        """Walk the tree; see `Place`."""
        top = Path(self.root) / under
        if top.is_file():
            yield under, top.stat().st_size
        for folder, _, files in os.walk(top):
            for file in files:
                path = Path(folder) / file
                try:
                    yield path.relative_to(self.root).as_posix(), path.stat().st_size
                except FileNotFoundError:
                    continue  # a temporary file renamed meanwhile

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """While temporary files are made and renamed: keeps others from removing them."""
        folder = Path(self.root) / PARTIAL
        _make_folder(folder)
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            shared = _lock(descriptor, fcntl.LOCK_SH)
            yield
            if shared and _lock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB):
                for left in folder.iterdir():
                    with suppress(OSError):
                        left.unlink()
        finally:
            os.close(descriptor)

    def _temporary(self, data: bytes) -> Path:
        path = Path(self.root) / PARTIAL / uuid.uuid4().hex
        try:
            path.write_bytes(data)
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        return path


def _lock(descriptor: int, kind: int) -> bool:
    """Whether the lock was had: not if another holds it, or the file system has none."""
    try:
        fcntl.flock(descriptor, kind)
    except OSError:
        return False
    return True


def _make_folder(path: Path) -> None:
    if path.is_dir():
        return
    _make_folder(path.parent)
    path.mkdir(exist_ok=True)
    flush(path.parent)


def flush(path: Path) -> None:
    """Put a file, or a folder's entries, on the disk itself."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
