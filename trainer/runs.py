"""A run's directory: its configuration, written first, and its metrics, one JSON object a line.

Guarantees: a run never writes into a place that holds something else; the configuration is there before step 0; every
line of metrics that is there is whole up to the last; a run goes on only under the configuration it began with.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Any

from logitcache.errors import UserError
from logitcache.store.envelope import first_difference
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
    known = {Path(path).resolve() for path in may_hold}
    try:
        out.mkdir(parents=True, exist_ok=True)
        others = sorted(path.name for path in out.iterdir() if path.resolve() not in known)
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
        UserError: something else is there, or a run of another configuration, naming the first difference.
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
    different = first_difference(there, _deciding(json.loads(json.dumps(config))))
    if different is not None:
        raise UserError(f"go on with the run in {out}", f"it has another {different}", "choose another --out")
    return True


def _deciding(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration without where it was run."""
    return {name: value for name, value in config.items() if name not in PROVENANCE}


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Put a JSON object into a file, whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(value, indent=2) + "\n")
    flush(partial)
    partial.replace(path)


class MetricsLog(AbstractContextManager["MetricsLog"]):
    """`metrics.jsonl`, a line per step. Its state is its length: restored, it forgets the lines after a checkpoint."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("ab", buffering=0)

    def write(self, values: Mapping[str, Any]) -> None:
        """Append a line; NaN and infinity, which are no JSON, are errors."""
        self._file.write((json.dumps(values, allow_nan=False) + "\n").encode())

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
