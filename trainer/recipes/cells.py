"""One cell of the grid: train a student from a source of prefixes, measure it before and after."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from logitcache.console import Progress
from trainer.batch import Batch
from trainer.checkpoint import Checkpoints
from trainer.evaluate import HeldOut, evaluate
from trainer.flops import FlopLedger
from trainer.loop import distill
from trainer.objectives import Objective
from trainer.prefixes import PrefixSource
from trainer.recipes.windows import GatedWindows
from trainer.runs import MetricsLog, Unlogged, write_json
from trainer.schedules import WeightSchedule
from trainer.settings import Training
from trainer.student import Student

ENGINE_MODULE = "logitcache.scorers.hf"


@dataclass(frozen=True, kw_only=True, eq=False)
class CellRun:
    """What one cell's run needs: where it writes, who is told of every step, and what it has besides.

    Attributes:
        checkpoints, weights: see `trainer.loop.distill`.
        ledger: gets the FLOPs, after those that it holds.
        windows: the curriculum; None keeps the source's window.
    """

    directory: Path
    on_step: Callable[[dict[str, Any]], None]
    checkpoints: Checkpoints | None = None
    weights: WeightSchedule | None = None
    windows: GatedWindows | None = None
    ledger: FlopLedger = field(default_factory=FlopLedger)


def run_cell(
    *,
    student: Student,
    source: PrefixSource,
    objective: Objective,
    training: Training,
    held_out: list[Batch],
    before: HeldOut,
    run: CellRun,
) -> tuple[dict[str, Any], FlopLedger]:
    """Train and measure; writes `metrics.jsonl` and `ledger.json`. Returns the cell's result and its ledger.

    A student on several ranks is measured by each of them alike; the first one writes.
    """
    ledger = run.ledger
    gated: dict[str, Any] = {}
    if run.windows is not None:
        gated = {"check": run.windows.check, "stateful": {"curriculum": run.windows.curriculum}}
    first = student.ranks.first
    with MetricsLog(run.directory / "metrics.jsonl") if first else Unlogged() as metrics:
        trained = distill(
            student=student,
            source=source,
            objective=objective,
            optimisation=training.optimisation,
            ledger=ledger,
            metrics=metrics,
            weights=run.weights,
            weighting=training.weighting,
            checkpoints=run.checkpoints,
            on_step=run.on_step,
            **gated,
        )
    # Asked before anything else could load one: was the teacher's engine in this process while the cell trained?
    engine_imported = ENGINE_MODULE in sys.modules
    after = evaluate(student, held_out, ledger, step=training.steps, backend=training.backend)
    if first:
        write_json(run.directory / "ledger.json", {"rows": ledger.to_json()})
    result = {
        "held_out": {name: {"before": value, "after": after.nats[name]} for name, value in before.nats.items()},
        **trained.facts(),
        "teacher_engine_imported": engine_imported,
    }
    return result, ledger


def flops_of(ledger: FlopLedger, *, build_flops: int, students: int) -> dict[str, Any]:
    """A report's FLOPs of one run: by phase, marginal, amortised over `students`, and all that was spent."""
    return {
        "by_phase": {str(phase): flops for phase, flops in ledger.by_phase().items()},
        "marginal": ledger.marginal(),
        "amortised": ledger.amortised(build_flops=build_flops, students=students),
        "amortised_over_students": students,
        "total": ledger.total(build_flops=build_flops),
    }


def show_step(progress: Progress, line: dict[str, Any]) -> None:
    """Move a progress line on by one step."""
    values = {
        name.replace("_nats", ""): "unknown" if value is None else f"{value:.3f}"
        for name, value in line.items()
        if "_nats" in name and name != "teacher_entropy_nats"
    }
    tokens = line["completion_tokens"]
    progress.show(
        **values,
        length=f"{tokens / line['sequences']:.0f}",
        tokens_per_s=f"{tokens / line['step_s']:.0f}",
        flops=f"{line['flops']:.3g}",
    )
    progress.add()
