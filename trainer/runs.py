"""A run's directory: its configuration, written first, and its metrics, one JSON object a line.

Guarantees: a run never writes into a place that holds something else, nor beside another process that trains there; the
configuration is there before step 0; every line of metrics that is there is whole up to the last; a run goes on only
under the configuration it began with; a disk that is full is one line.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from safetensors import SafetensorError

from logitcache.errors import UserError
from logitcache.store.envelope import differences
from logitcache.store.local import flush

CONFIG = "config.json"
PROVENANCE = ("versions", "device", "commit")
"""Entries of a configuration that say where it was run, and decide nothing."""


def new_run_dir(out: Path, *, may_hold: Sequence[str] = ()) -> Path:
    """Make a directory for a run, or take an empty one.

    Args:
        out: where.
        may_hold: paths that may lie in it already (a cache, the student to start from).

    Raises:
        UserError: something else is there already, or it cannot be made.
    """
    known = {Path(path).resolve() for path in (*may_hold, str(_partial(out / CONFIG)))}
    try:
        out.mkdir(parents=True, exist_ok=True)
        others = sorted(path.name for path in out.iterdir() if path.resolve() not in known)
    except FileExistsError as error:
        raise UserError(f"a run in {out}", "it is a file", "give a directory, new or of this run") from error
    except OSError as error:
        raise UserError(f"a run in {out}", f"cannot be written ({error.strerror})", "choose another --out") from error
    if others:
        found = f"it holds {', '.join(others[:3])} already"
        raise UserError(f"a run in {out}", found, "choose another --out or remove what is there")
    return out


def open_run(out: Path, config: Mapping[str, Any]) -> bool:
    """Start a run in a new directory, or go on with the one that is there if it is this run.

    Two configurations are the same run if they differ in nothing but where they were run (versions, device, commit).

    Returns:
        Whether it was there.

    Raises:
        UserError: something else is there, or a run of another configuration, naming every difference.
    """
    file = out / CONFIG
    if not file.exists():
        new_run_dir(out)
        write_json(file, config)
        return False
    try:
        there = _deciding(json.loads(file.read_text()))
    except (ValueError, AttributeError) as error:
        raise UserError(f"a run in {out}", f"its {CONFIG} is damaged ({error})", "choose another --out") from error
    asked = _deciding(json.loads(json.dumps(config)))
    if different := differences(there, asked, options=["training", "surrogate", "study"]):
        found = f"it has another {', '.join(different)}"
        raise UserError(f"go on with the run in {out}", found, "choose another --out")
    return True


def _deciding(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration without where it was run."""
    return {name: value for name, value in config.items() if name not in PROVENANCE}


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Within it, a file system that cannot take what is written is a UserError about `path`."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise UserError(str(path), f"it cannot be written ({error})", "make room, and run it again") from error


@contextmanager
def new_directory(directory: Path) -> Iterator[Path]:
    """A place to fill, which becomes `directory` at the end: whole and on the disk, or not at all.

    Raises:
        UserError: it cannot be written (a full disk).
    """
    partial = directory.with_name(f".{directory.name}.partial-{os.getpid()}")
    try:
        with writing(directory):
            partial.mkdir(parents=True)
            yield partial
            for path in (*partial.iterdir(), partial):
                flush(path)
            partial.rename(directory)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Put a JSON object into a file, whole or not at all.

    Raises:
        UserError: it cannot be written (a full disk); what was there before still is.
    """
    partial = _partial(path)
    with writing(path):
        partial.write_text(json.dumps(value, indent=2) + "\n")
        flush(partial)
        partial.replace(path)


def _partial(path: Path) -> Path:
    """Where a file is written before it is whole."""
    return path.with_name(f".{path.name}.partial")


def lock_alone(file: IO[bytes], asked: str, do: str) -> None:
    """Keep others from locking this file until it is closed; where a file system knows no locks, do nothing.

    Raises:
        UserError: another process has it: `asked`, and what to `do`.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UserError(asked, "another process does so now", do) from error
    except OSError:
        pass


class MetricsLog(AbstractContextManager["MetricsLog"]):
    """`metrics.jsonl`, a line per step. Its state is its length: restored, it forgets the lines after a checkpoint.

    While it is open, no other process can open it.

    Raises:
        UserError: another process has it open, or it cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        with writing(path):
            self._file = path.open("ab", buffering=0)
        try:
            lock_alone(self._file, f"train in {path.parent}", "wait for it, or choose another --out")
        except UserError:
            self._file.close()
            raise

    def write(self, values: Mapping[str, Any]) -> None:
        """Append a line; NaN and infinity, which are no JSON, are errors."""
        left = memoryview((json.dumps(values, allow_nan=False) + "\n").encode())
        with writing(self._path):
            while left:
                left = left[self._file.write(left) :]

    def state(self) -> dict[str, Any]:
        """Its length, after everything before is on the disk."""
        os.fsync(self._file.fileno())
        return {"bytes": self._file.seek(0, os.SEEK_END)}

    def restore(self, state: dict[str, Any]) -> None:
        """Cut it to a length it had. Raises ValueError if it is shorter."""
        if self._file.seek(0, os.SEEK_END) < state["bytes"]:
            raise ValueError("the metrics are shorter than they were")
        self._file.truncate(state["bytes"])

    def clear(self) -> None:
        """Forget all lines."""
        self._file.truncate(0)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


class Unlogged(AbstractContextManager["Unlogged"]):
    """In place of a `MetricsLog`, keeps nothing: for ranks that are not the first."""

    def write(self, values: Mapping[str, Any]) -> None:
        """Forget it."""

    def state(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Nothing to cut."""

    def clear(self) -> None:
        """Nothing to forget."""

    def __exit__(self, *_: object) -> None:
        """Nothing to close."""
