"""A cache on anything fsspec can open: an object store, memory, http to read.

Guarantees: the file system is opened in the process that uses it (a forked child cannot use its parent's); reads are
concurrent and retried while an error may pass; a short body is retried, then an error, never data; an object is put
whole: in one request, or where fsspec cuts a large one (s3fs from 100 MiB), in parts that appear together. Credentials
reach fsspec and nothing else.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from logitcache.errors import UserError
from logitcache.store.coalesce import read_coalesced
from logitcache.store.place import ByteRange, read_refused, redact, write_failed

ATTEMPTS = 5
"""Tries of one request; the waits between them double from `FIRST_WAIT_S`."""
FIRST_WAIT_S = 0.1
PUTS_AT_ONCE = 8
S3_DEFAULTS = {"config_kwargs": {"max_pool_connections": 64}}
"""botocore's own 10 connections would have most requests of a batch wait for one another."""
Refusal = Callable[[str, str, BaseException], UserError]
_ABSENT = (FileNotFoundError, NotADirectoryError, IsADirectoryError)
_PERMANENT = (*_ABSENT, TypeError, ImportError, NotImplementedError)
_UNIDENTIFIED = ("NoCredentialsError", "PartialCredentialsError", "DefaultCredentialsError")
"""Errors of botocore and google.auth, by name: neither need be installed."""


@dataclass(frozen=True, kw_only=True)
class RemotePlace:
    """Objects beneath an fsspec URL."""

    url: str
    storage_options: Mapping[str, Any] = field(default_factory=dict, repr=False)
    _opened: dict[int, tuple[Any, str]] = field(default_factory=dict, init=False, repr=False, compare=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False, repr=False, compare=False)

    @property
    def shown(self) -> str:
        """The URL without credentials."""
        return redact(self.url)

    def __reduce__(self) -> tuple[Callable[..., RemotePlace], tuple[str, Mapping[str, Any]]]:
        return _reopen, (self.url, self.storage_options)

    def read(self, name: str) -> bytes:
        """A whole object, in one request; see `Source`."""
        fs, root = self._open()
        path = f"{root}/{name}"
        return self._retry(name, lambda: bytes(fs.cat_file(path, start=0, end=None)))

    def read_ranges(self, ranges: Sequence[ByteRange]) -> list[bytes]:
        """One request for what touches, all requests at once; see `Source`."""
        return read_coalesced(ranges, self._read_runs)

    def _read_runs(self, ranges: Sequence[ByteRange]) -> list[bytes]:
        results: list[bytes | None] = [None] * len(ranges)
        errors: dict[int, Exception] = {}
        for attempt in range(ATTEMPTS):
            missing = [i for i, result in enumerate(results) if result is None]
            if not missing:
                break
            _wait(attempt)
            for i, got in zip(missing, self._fetch([ranges[i] for i in missing]), strict=True):
                if isinstance(got, _ABSENT):
                    raise FileNotFoundError(ranges[i].name) from got
                if isinstance(got, _PERMANENT):
                    raise got
                if isinstance(got, PermissionError):
                    raise read_refused(self.shown, ranges[i].name, got)
                if type(got).__name__ in _UNIDENTIFIED:
                    raise self._unidentified(got)
                if isinstance(got, Exception):
                    errors[i] = got
                else:
                    results[i] = got
        done = [result for result in results if result is not None]
        if len(done) < len(ranges):
            i = results.index(None)
            raise self._why(ranges[i], errors[i])
        return done

    def _fetch(self, ranges: Sequence[ByteRange]) -> list[bytes | Exception]:
        fs, root = self._open()
        paths = [f"{root}/{item.name}" for item in ranges]
        try:
            got = fs.cat_ranges(paths, [r.start for r in ranges], [r.stop for r in ranges], on_error="return")
        except _PERMANENT:
            raise
        except Exception as error:
            return [error] * len(ranges)
        return [_exact(item, data) for item, data in zip(ranges, got, strict=True)]

    def _why(self, item: ByteRange, error: Exception) -> Exception:
        """Stores answer a range past the end in many ways (a short body, 416, 400): ask for the size instead."""
        fs, root = self._open()
        try:
            short = int(fs.size(f"{root}/{item.name}")) < item.stop
        except Exception:
            short = isinstance(error, EOFError)
        if short:
            return EOFError(f"{item.name} ends before byte {item.stop}")
        return self._failed("read", item.name, error)

    def write(self, objects: Mapping[str, bytes]) -> None:
        """One put an object, a few at once; see `Place`."""
        self._require("be written")
        fs, root = self._open()

        def put(name: str) -> None:
            self._put(name, partial(fs.pipe_file, f"{root}/{name}", objects[name]))

        with ThreadPoolExecutor(PUTS_AT_ONCE) as pool:
            list(pool.map(put, objects))

    def create(self, name: str, data: bytes) -> bool:
        """Conditional put where the store has one (S3's If-None-Match); see `Place`."""
        self._require("be written")
        fs, root = self._open()
        path = f"{root}/{name}"

        def create() -> bool:
            try:
                fs.pipe_file(path, data, mode="create")
            except FileExistsError:
                return False
            except Exception:  # each store refuses in its own way, and a reply can get lost: ask what is there
                fs.invalidate_cache()
                if fs.exists(path):
                    return False
                raise
            return True

        return bool(self._put(name, create))

    def delete(self, name: str) -> None:
        """An object or everything beneath it; see `Place`."""
        self._require("be written")
        fs, root = self._open()
        with suppress(FileNotFoundError):
            self._retry(name, partial(fs.rm, f"{root}/{name}", recursive=True), refused=write_failed)

    def sizes(self, under: str) -> Iterator[tuple[str, int]]:
        """A listing; see `Place`."""
        self._require("be listed")
        fs, root = self._open()
        fs.invalidate_cache()
        try:
            found = self._retry(under, partial(fs.find, f"{root}/{under}".rstrip("/"), detail=True))
        except FileNotFoundError:
            return
        for path, entry in found.items():
            yield path[len(root) + 1 :], int(entry["size"])

    def _require(self, ability: str) -> None:
        """Http serves objects and nothing else."""
        if self.url.startswith(("http://", "https://")):
            raise UserError(f"use {self.shown}", f"over http it cannot {ability}", "give the store's own URL")

    def _open(self) -> tuple[Any, str]:
        with self._lock:
            if os.getpid() not in self._opened:
                import fsspec

                defaults = S3_DEFAULTS if self.url.startswith(("s3://", "s3a://")) else {}
                try:
                    fs, root = fsspec.core.url_to_fs(self.url, **{**defaults, **self.storage_options})
                except (ValueError, ImportError) as error:
                    raise UserError(f"open {self.shown}", redact(str(error)), "check the URL, install it") from error
                self._opened[os.getpid()] = fs, root.rstrip("/")
            return self._opened[os.getpid()]

    def _put(self, name: str, request: Callable[[], Any]) -> Any:
        try:
            return self._retry(name, request, refused=write_failed)
        except _PERMANENT as error:
            raise write_failed(self.shown, name, error.__cause__ or error) from error

    def _retry(self, name: str, request: Callable[[], Any], refused: Refusal = read_refused) -> Any:
        last: Exception | None = None
        for attempt in range(ATTEMPTS):
            _wait(attempt)
            try:
                return request()
            except _ABSENT as error:
                raise FileNotFoundError(name) from error
            except _PERMANENT:
                raise
            except PermissionError as error:
                raise refused(self.shown, name, error) from error
            except Exception as error:
                if type(error).__name__ in _UNIDENTIFIED:
                    raise self._unidentified(error) from error
                last = error
        assert last is not None
        raise self._failed("reach", name, last) from last

    def _unidentified(self, error: object) -> UserError:
        return UserError(f"reach {self.shown}", redact(str(error)), "set your credentials for it")

    def _failed(self, verb: str, name: str, error: Exception) -> UserError:
        found = f"{type(error).__name__} {redact(str(error))} after {ATTEMPTS} attempts"
        return UserError(f"{verb} {name} in {self.shown}", found, "check the network and the store, then run it again")


def _reopen(url: str, storage_options: Mapping[str, Any]) -> RemotePlace:
    return RemotePlace(url=url, storage_options=storage_options)


def _wait(attempt: int) -> None:
    if attempt:
        time.sleep(FIRST_WAIT_S * 2 ** (attempt - 1))


def _exact(item: ByteRange, data: bytes | Exception) -> bytes | Exception:
    if isinstance(data, Exception):
        return data
    want = item.stop - item.start
    if len(data) == want:
        return bytes(data)
    if len(data) > want:
        return OSError(f"asked {want} bytes, got {len(data)}: the server does not honour byte ranges")
    return EOFError(f"{item.name}: asked {want} bytes, got {len(data)}")
