"""A run's numbers to where people watch them: TensorBoard or Weights & Biases, beside the JSONL that is always written.

Guarantees: a sink gets the numbers of a metrics line under the line's own names and at its own step; what is null in
the line stays away; a sink that is not installed is refused before any work starts. A sink only ever receives: it
changes nothing of the run, and the JSONL stays the record.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Any, Protocol

from logitcache.errors import UserError


class Watch(StrEnum):
    """Where to watch; also the extra that installs it."""

    TENSORBOARD = "tensorboard"
    WANDB = "wandb"


class Sink(Protocol):
    """Takes metrics lines."""

    def write(self, line: Mapping[str, Any]) -> None:
        """The numbers of one line; `line["step"]` says when. Steps never fall."""
        ...

    def close(self) -> None:
        """Flush, and end it."""
        ...


def require_watch(kinds: Sequence[Watch]) -> None:
    """Raise UserError unless every one of these is installed."""
    for kind in kinds:
        if importlib.util.find_spec(kind) is None:
            raise UserError(f"--watch {kind}", f"{kind} is not installed", f"pip install 'logitcache[{kind}]'")


@contextmanager
def watching(
    kinds: Sequence[Watch], directory: Path, config: Mapping[str, Any], *, first_step: int = 0
) -> Iterator[list[Sink]]:
    """Open the sinks of a run, and close them however it ends.

    Args:
        kinds: see `Watch`; none opens nothing.
        directory: the run's: TensorBoard's event files and W&B's own folder go into it. W&B's project is `logitcache`
            and its name the directory's, unless its own environment variables say otherwise.
        config: shown beside the curves (W&B only).
        first_step: of a run that is resumed: TensorBoard forgets what it was told from there on; W&B starts a new run.
    """
    require_watch(kinds)
    with ExitStack() as stack:
        sinks: list[Sink] = []
        for kind in dict.fromkeys(kinds):
            sinks.append(_open(kind, directory, config, first_step))
            stack.callback(sinks[-1].close)
        yield sinks


def _open(kind: Watch, directory: Path, config: Mapping[str, Any], first_step: int) -> Sink:
    match kind:
        case Watch.TENSORBOARD:
            return _TensorBoard(directory, first_step)
        case Watch.WANDB:
            return _WeightsAndBiases(directory, config)


def _numbers(line: Mapping[str, Any]) -> dict[str, float]:
    """What can be drawn: numbers, but no truth values, and not the step itself."""
    numeric = {name: value for name, value in line.items() if isinstance(value, int | float) and name != "step"}
    return {name: value for name, value in numeric.items() if not isinstance(value, bool)}


class _TensorBoard:
    def __init__(self, directory: Path, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(directory / "tensorboard"), purge_step=first_step or None)

    def write(self, line: Mapping[str, Any]) -> None:
        for name, value in _numbers(line).items():
            self._writer.add_scalar(name, value, line["step"])

    def close(self) -> None:
        self._writer.close()


class _WeightsAndBiases:
    def __init__(self, directory: Path, config: Mapping[str, Any]) -> None:
        import wandb

        self._run: Any = wandb.init(
            project=_unless_set("WANDB_PROJECT", "logitcache"),
            name=_unless_set("WANDB_NAME", directory.name),
            dir=str(directory),
            config=dict(config),
            settings=wandb.Settings(console="off", silent=True),
        )

    def write(self, line: Mapping[str, Any]) -> None:
        self._run.log(_numbers(line), step=line["step"])

    def close(self) -> None:
        self._run.finish()


def _unless_set(variable: str, value: str) -> str | None:
    """None where the environment decides."""
    return None if variable in os.environ else value
