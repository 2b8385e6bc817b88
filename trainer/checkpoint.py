"""Checkpoints of a run: everything that decides its next step, so that a run that was killed goes on bit for bit.

Guarantees: a checkpoint is there whole or not at all (written beside, synced, renamed), and one that cannot be written
leaves the last good one; nothing is pickled: tensors are safetensors, the rest is JSON; only the newest `keep` stay.
A run's configuration is compared before (`trainer.runs.open_run`); a checkpoint also names what it was trained from,
and is refused where that is another.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from logitcache.errors import IdentityError, UserError, require
from logitcache.store.envelope import differences
from logitcache.store.local import flush
from trainer.distributed import ALONE, Ranks, collected, like

MODEL, OPTIMIZER, STATE = "model.safetensors", "optimizer.safetensors", "state.json"


class Stateful(Protocol):
    """A part of a run that has a state: a source, a ledger, a curriculum."""

    def state(self) -> dict[str, Any]:
        """What it needs to go on, as JSON values."""
        ...

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        ...


@dataclass(frozen=True, kw_only=True)
class Checkpoints:
    """A run's checkpoints, `step-N` for N steps done.

    Attributes:
        directory: holds them and nothing else; made when the first is written.
        every: steps between two.
        keep: how many stay.
        ranks: that train together. The first one writes, whole tensors that it gathers; all of them read.
        identity: JSON values: what a run is trained from. Kept in each, and compared when one is restored.
    """

    directory: Path
    every: int
    keep: int = 2
    ranks: Ranks = ALONE
    identity: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        require(self.every >= 1, "--checkpoint-every, at least 1", self.every)
        require(self.keep >= 1, "--keep, at least 1", self.keep)

    def latest(self) -> int | None:
        """Steps done at the newest checkpoint; None without one."""
        return max(self._steps(), default=None)

    def due(self, steps_done: int, *, of: int) -> bool:
        """Whether one is to be written after so many steps `of` all: also after the last, before what follows it."""
        return steps_done % self.every == 0 or steps_done == of

    def save(
        self, steps_done: int, model: nn.Module, optimizer: torch.optim.Optimizer, parts: Mapping[str, Stateful]
    ) -> None:
        """Write one and drop the oldest. All ranks call it.

        Raises:
            UserError: it cannot be written (a full disk); those written before are still there.
        """
        target, partial = self._of(steps_done), self.directory / ".partial"
        weights = collected(((name, weight.detach()) for name, weight in _trained(model).items()), self.ranks)
        moments = collected(_moments(model, optimizer), self.ranks)
        if not self.ranks.first:
            return
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            save_file(weights, partial / MODEL)
            save_file(moments, partial / OPTIMIZER)
            state = {"identity": self.identity, "parts": {name: part.state() for name, part in parts.items()}}
            (partial / STATE).write_text(json.dumps(state))
            for path in (*partial.iterdir(), partial):
                flush(path)
            partial.rename(target)
            flush(self.directory)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(partial, ignore_errors=True)
            last = self.latest()
            good = "there is none before it" if last is None else f"the one of step {last} is good"
            raise UserError(
                f"a checkpoint in {self.directory}",
                f"it cannot be written ({error}); {good}",
                "make room, run it again",
            ) from error
        for steps in sorted(self._steps())[: -self.keep]:
            shutil.rmtree(self._of(steps))

    def restore(self, model: nn.Module, optimizer: torch.optim.Optimizer, parts: Mapping[str, Stateful]) -> int:
        """Put everything back as it was at the newest checkpoint; the steps done then, 0 without one.

        Raises:
            IdentityError: a checkpoint of another identity.
            UserError: one that is damaged or has other parts than this run.
        """
        steps_done = self.latest()
        if steps_done is None:
            return 0
        source = self._of(steps_done)
        try:
            kept = json.loads((source / STATE).read_text())
            if different := differences(kept["identity"], self.identity):
                found = f"it is of another {', '.join(different)}"
                raise IdentityError(f"resume from {source}", found, "remove it, or choose another --out")
            state = kept["parts"]
            if state.keys() != parts.keys():
                raise ValueError(f"its parts are {', '.join(state)}, this run's {', '.join(parts)}")
            weights, moments = load_file(source / MODEL), load_file(source / OPTIMIZER)
            _load_weights(model, weights)
            _load_moments(model, optimizer, moments)
            for name, part in parts.items():
                part.restore(state[name])
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"resume from {source}", f"it is damaged ({error})", "remove it to go on from the one before"
            ) from error
        return steps_done

    def _of(self, steps: int) -> Path:
        return self.directory / f"step-{steps:08d}"

    def _steps(self) -> list[int]:
        return [int(path.name.removeprefix("step-")) for path in self.directory.glob("step-" + 8 * "[0-9]")]


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """What is trained, each parameter once: tied ones are one."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _moments(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in _trained(model).items():
        for field, value in optimizer.state.get(parameter, {}).items():
            yield f"{field}:{name}", value


def _load_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    parameters = _trained(model)
    if parameters.keys() != weights.keys():
        raise ValueError("it is of another model")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(_fitting(name, weights[name], parameter))


def _load_moments(model: nn.Module, optimizer: torch.optim.Optimizer, moments: Mapping[str, Tensor]) -> None:
    parameters = _trained(model)
    for key, value in moments.items():
        field, name = key.split(":", 1)
        parameter = parameters[name]
        # AdamW's fused kernel wants its step counter beside the parameter.
        moment = value if field == "step" else _fitting(key, value, parameter)
        optimizer.state[parameter][field] = moment.to(parameter.device)


def _fitting(name: str, value: Tensor, parameter: Tensor) -> Tensor:
    if value.shape != parameter.shape:
        raise ValueError(f"{name} is {list(value.shape)}, not {list(parameter.shape)}")
    return like(parameter, value)


def remove_leftovers(directory: Path) -> None:
    """Remove what a killed run left half written in its directory."""
    for path in directory.glob(".*.partial*"):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            os.unlink(path)
