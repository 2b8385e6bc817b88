"""A server that is killed while the training loop reads from it: see `tools.bench.service_faults`."""

from __future__ import annotations

import queue
import random
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from logitcache.records import ScoredSequence
from logitcache.store import open_cache
from tools.bench.service import start_server
from trainer.batch import teacher_head
from trainer.flops import FlopLedger
from trainer.loop import distill
from trainer.objectives import Objective
from trainer.prefixes import CachedPrefixes
from trainer.runs import Unlogged
from trainer.settings import BatchPlan, Optimisation
from trainer.student import load_student

LATEST_KILL_S = 0.01
"""After a read began: about what one takes."""
CPU = torch.device("cpu")


@dataclass(kw_only=True)
class Noted:
    """A reader that notes what it was asked for, and says when a read begins."""

    reader: Any
    began: Callable[[int], None] = lambda number: None
    reads: list[list[str]] = field(default_factory=list)
    reading: bool = False

    def __len__(self) -> int:
        return len(self.reader)

    def read(
        self, indices: Sequence[int], *, first_completion_token: int = 0, max_completion_tokens: int | None = None
    ) -> list[ScoredSequence]:
        """See `Reader.read`."""
        self.reading = True
        self.began(len(self.reads))
        found: list[ScoredSequence] = self.reader.read(
            indices, first_completion_token=first_completion_token, max_completion_tokens=max_completion_tokens
        )
        self.reading = False
        self.reads.append([item.sequence.sample_id for item in found])
        return found


class Killer:
    """A server that is killed and started again, at its address, in reads that are drawn beforehand."""

    def __init__(self, place: str, kills: Sequence[int]) -> None:
        self._place, self._due, self._rng = place, set(kills), random.Random(1)
        self._process, self.location = start_server(place, "--port", "0")
        self._port = self.location.rpartition(":")[2]
        self._moments: queue.SimpleQueue[Noted | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run)
        self.killed = self.while_reading = 0
        self._thread.start()

    def read_began(self, noted: Noted, number: int) -> None:
        """Kill it soon if this read's time has come."""
        if number in self._due:
            self._due.remove(number)
            self._moments.put(noted)

    def close(self) -> None:
        """End it once it has been killed as often as it should."""
        self._moments.put(None)
        self._thread.join()
        _end(self._process)

    def _run(self) -> None:
        while (noted := self._moments.get()) is not None:
            time.sleep(self._rng.uniform(0, LATEST_KILL_S))
            self.while_reading += noted.reading
            _end(self._process)
            self.killed += 1
            self._process, _ = start_server(self._place, "--port", self._port)


def _end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


def kills(model: Path, place: str, plan: BatchPlan, count: int) -> dict[str, Any]:
    """An epoch from a disk, and one from a server that is killed so often during it.

    Args:
        model: directory of the teacher, and of the student once it is disturbed.
        place: a cache of its hidden states.
        plan: of a step.
        count: of kills, fewer than steps.
    """
    local = Noted(reader=open_cache(place, targets="hidden"))
    wanted = _epoch(model, local, plan)
    steps = len(wanted)
    with closing(Killer(place, [1 + number * (steps - 1) // count for number in range(count)])) as killer:
        served = Noted(reader=open_cache(f"{killer.location}/cache", targets="hidden"))
        served.began = lambda number: killer.read_began(served, number)
        started = time.monotonic()
        found = _epoch(model, served, plan)
        seconds = time.monotonic() - started
    given = [sample for read in served.reads[:steps] for sample in read]
    return {
        "kills": killer.killed,
        "kills_during_a_read": killer.while_reading,
        "steps": steps,
        "identical_steps": sum(map(tuple.__eq__, wanted, found)),
        "sequences": len(local),
        "sequences_given_once": sum(given.count(sample) == 1 for sample in set(given)),
        "reads_in_order": sum(map(list.__eq__, local.reads[:steps], served.reads[:steps])),
        "served_epoch_s": seconds,
    }


def _epoch(model: Path, reader: Noted, plan: BatchPlan) -> list[tuple[float, float]]:
    """Loss and gradient norm of each step of one epoch."""
    head = teacher_head(reader.reader.head, CPU)
    student = load_student(model, vocab_size=head.weight.shape[0], precision="float32")
    noise = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in student.parameters:  # its teacher's twin has nothing to learn
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=noise))
    steps: list[dict[str, Any]] = []
    distill(
        student=student,
        source=CachedPrefixes(reader=reader, indices=range(len(reader)), head=head, plan=plan, seed=3, device=CPU),
        objective=Objective(forward_weight=0.5),
        optimisation=Optimisation(steps=len(reader) // plan.sequences, learning_rate=1e-3, warmup_steps=2),
        ledger=FlopLedger(),
        metrics=Unlogged(),
        on_step=steps.append,
    )
    return [(step["loss_nats"], step["grad_norm"]) for step in steps]
