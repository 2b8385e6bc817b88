"""The four cells of the grid from one start: who writes the prefix, times which divergence is minimised.

Guarantees: every cell starts from the same student and sees the same problems in the same order; the cells that train
from the cache run first, before a teacher is loaded; the report is written once all four are done.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from logitcache.console import Progress, note
from logitcache.errors import UserError
from logitcache.scoring import Sampling
from trainer.evaluate import HeldOut, evaluate
from trainer.flops import FlopLedger
from trainer.objectives import Objective
from trainer.prefixes import PrefixSource
from trainer.provenance import commit, device_name, versions
from trainer.recipes.cells import CellRun, flops_of, run_cell, show_step
from trainer.recipes.data import (
    CacheData,
    LiveTeacher,
    cached_source,
    held_out_batches,
    load_live_teacher,
    on_policy_source,
    open_data,
    require_teacher,
)
from trainer.report import require_plotting, write_report
from trainer.runs import new_run_dir, write_json
from trainer.settings import Prefix, Training
from trainer.student import Student, load_student

DIVERGENCES = {"forward": 1.0, "reverse": 0.0}
"""Names of the two divergences and their forward weights."""


def run_grid(
    *,
    cache_url: str,
    student_dir: Path,
    teacher: str,
    out: Path,
    training: Training,
    sampling: Sampling,
    students: int,
) -> dict[str, Any]:
    """Train the four cells and write `config.json`, `cells/`, and the report as JSON, Markdown and a plot.

    Args:
        cache_url: a sealed cache with hidden states.
        student_dir: the model that every cell starts from.
        teacher: the model that built the cache; loaded only for the cells on student prefixes.
        out: a new directory, or one that holds nothing but the cache and the student.
        training: see `Training`.
        sampling: how students write.
        students: how many students share the cache, for the amortised cost.

    Raises:
        UserError: see the functions called; nothing is written before the inputs are sound.
    """
    started = time.perf_counter()
    require_plotting()
    if students < 1:
        raise UserError(f"--students {students}", "a cache is shared by at least 1", "give 1 or more")
    data = open_data(cache_url, student_dir, training)
    require_teacher(teacher, data)
    new_run_dir(out, may_hold=(cache_url, str(student_dir)))
    config = {
        "command": "grid",
        "cache_manifest": data.reader.manifest.digest,
        "student": student_dir.name,
        "training": asdict(training),
        "sampling": asdict(sampling),
        "students": students,
    }
    write_json(out / "config.json", config)
    with Progress("grid", 4 * training.steps, "steps") as progress:
        grid = _Grid(
            data=data,
            student_dir=student_dir,
            training=training,
            sampling=sampling,
            students=students,
            out=out,
            progress=progress,
        )
        grid.measure_start()
        for divergence in DIVERGENCES:
            grid.run(Prefix.TEACHER, divergence, None)
        note("loading the teacher, to score what students write")
        live = load_live_teacher(teacher, data)
        for divergence in DIVERGENCES:
            grid.run(Prefix.STUDENT, divergence, live)
    report = {
        "run_s": time.perf_counter() - started,
        "device": device_name(),
        "commit": commit(),
        "versions": versions(),
        "config": config,
        **grid.facts(),
        "cells": grid.cells,
    }
    write_report(report, out)
    return report


@dataclass(kw_only=True)
class _Grid:
    """The cells done so far, and what they share."""

    data: CacheData
    student_dir: Path
    training: Training
    sampling: Sampling
    students: int
    out: Path
    progress: Progress
    cells: list[dict[str, Any]] = field(default_factory=list)
    before: HeldOut | None = None
    parameters: int = 0

    def measure_start(self) -> None:
        """Evaluate the student that all cells start from."""
        note("measuring the student before training")
        student = self._student()
        self.parameters = sum(parameter.numel() for parameter in student.parameters)
        self.before = evaluate(student, held_out_batches(self.data, student, self.training), FlopLedger(), step=0)

    def run(self, prefix: Prefix, divergence: str, live: LiveTeacher | None) -> None:
        """Train and measure one cell."""
        assert self.before is not None
        note(f"cell {len(self.cells) + 1} of 4: {prefix} prefix, {divergence} KL")
        directory = self.out / "cells" / f"{prefix}-{divergence}"
        directory.mkdir(parents=True)
        student = self._student()
        result, ledger = run_cell(
            student=student,
            source=self._source(student, live),
            objective=Objective(forward_weight=DIVERGENCES[divergence], temperature=self.training.kl_temperature),
            training=self.training,
            held_out=held_out_batches(self.data, student, self.training),
            before=self.before,
            run=CellRun(directory=directory, on_step=lambda line: show_step(self.progress, line)),
        )
        # A student that writes its own text needs no cache: nothing of its build is charged to it.
        build_flops = self.data.build_flops if prefix is Prefix.TEACHER else 0
        flops = flops_of(ledger, build_flops=build_flops, students=self.students)
        self.cells.append({"prefix": str(prefix), "divergence": divergence, **result, "flops": flops})

    def facts(self) -> dict[str, Any]:
        """What the report says of cache, student and held-out set."""
        assert self.before is not None
        manifest = self.data.reader.manifest
        return {
            "cache": {**manifest.totals, "flops": dict(manifest.flops), "teacher": self.data.teacher_name},
            "student": {"parameters": self.parameters},
            "held_out": {
                "sequences": self.before.sequences,
                "tokens": self.before.tokens,
                "teacher_entropy_nats": self.before.teacher_entropy_nats,
            },
        }

    def _student(self) -> Student:
        vocab_size = self.data.head.vocab_size
        return load_student(self.student_dir, vocab_size=vocab_size, precision=self.training.precision)

    def _source(self, student: Student, live: LiveTeacher | None) -> PrefixSource:
        if live is None:
            return cached_source(self.data, student, self.training)
        return on_policy_source(self.data, student, self.training, live, self.sampling)
