"""A run's directory: its configuration, written first, and its metrics, one JSON object a line.

Guarantees: a run never writes into a place that holds something else; the configuration is there before step 0; every
line of metrics that is there is whole up to the last.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Any

from logitcache.errors import UserError


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


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Put a JSON object into a file, whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(value, indent=2) + "\n")
    partial.replace(path)


class MetricsLog(AbstractContextManager["MetricsLog"]):
    """`metrics.jsonl`, a line per step."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("a", buffering=1)

    def write(self, values: Mapping[str, Any]) -> None:
        """Append a line; NaN and infinity, which are no JSON, are errors."""
        self._file.write(json.dumps(values, allow_nan=False) + "\n")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
