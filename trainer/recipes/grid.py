"""The cells of the grid from one start: who writes the prefix, times which mix of the divergences is minimised.

Guarantees: every cell starts from the same student and sees the same problems in the same order; the cells that train
from the cache run first, before a teacher is loaded; the report is written once all are done. Killed anywhere, the same
command goes on: a cell that is done is kept, the one under way goes on from its newest checkpoint, to the same numbers.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from logitcache.console import Progress, note
from logitcache.errors import UserError
from logitcache.scoring import Sampling
from trainer.batch import Batch
from trainer.checkpoint import Checkpoints
from trainer.distributed import require_alone
from trainer.evaluate import HeldOut, evaluate
from trainer.flops import FlopLedger
from trainer.objectives import Objective, require_served
from trainer.prefixes import PrefixSource
from trainer.recipes.cells import CellRun, flops_of, run_cell, show_step
from trainer.recipes.data import (
    EXACT,
    IDENTITY,
    CacheData,
    LiveTeacher,
    StudentEngine,
    cached_source,
    configuration,
    held_out_batches,
    kind_of,
    load_live_teacher,
    on_policy_source,
    open_data,
    open_student,
    require_fits,
    require_teacher,
    require_warmup,
    require_window,
    student_vllm_engine,
    student_writer,
)
from trainer.report import require_plotting, write_report
from trainer.runs import CONFIG, PROVENANCE, new_run_dir, open_run, write_json
from trainer.settings import Prefix, Training
from trainer.student import Student

CORNERS = (1.0, 0.0)
"""Forward weights of the four cells."""


def run_grid(
    *,
    cache_url: str,
    student_dir: Path,
    teacher: str,
    out: Path,
    training: Training,
    sampling: Sampling,
    students: int,
    mixes: Sequence[float] = CORNERS,
    targets: str | None = None,
    generator: StudentEngine = "transformers",
    checkpoint_every: int = 100,
) -> dict[str, Any]:
    """Train two cells a mix and write `config.json`, `cells/`, and the report as JSON, Markdown and a plot.

    Args:
        cache_url: a sealed cache with hidden states or full vocabularies, to measure on.
        student_dir: the model that every cell starts from.
        teacher: the model that built the cache; loaded only for the cells on student prefixes.
        out: a new directory, one that holds nothing but the cache and the student, or that of this grid.
        training: see `Training`.
        sampling: how students write.
        students: how many students share the cache, for the amortised cost.
        mixes: forward weights, for either prefix.
        targets: the tier that the cells on teacher prefixes are trained from; None for the one that says most.
        generator: the engine that students write with.
        checkpoint_every: steps between checkpoints of the cell under way; they go when it is done.

    Raises:
        UserError: see the functions called; nothing is written before the inputs are sound.
    """
    started = time.perf_counter()
    require_alone("grid")
    require_plotting()
    require_warmup(training)
    if generator == "vllm":
        from logitcache.scorers.vllm_load import require_vllm

        require_vllm()
    if students < 1:
        raise UserError(f"--students {students}", "a cache is shared by at least 1", "give 1 or more")
    objectives = {
        divergence_name(weight): Objective(
            forward_weight=weight, temperature=training.kl_temperature, backend=training.backend
        )
        for weight in mixes
    }
    data = open_data(cache_url, student_dir, training, targets=targets)
    if kind_of(data.measured) not in EXACT:
        raise UserError(
            f"a grid from {cache_url}",
            "it has no exact targets to measure on",
            "add `logitcache score --targets hidden`",
        )
    for objective in objectives.values():
        require_served(objective, data.kind)
    require_teacher(teacher, data)
    require_window(f"--window {training.window}", training.window, data)
    require_fits(data, student_dir, training, writes=True)
    student = open_student(data, student_dir, training)
    held_out = held_out_batches(data, student, training)
    config = {
        **configuration("grid", data, student_dir, training, sampling),
        "students": students,
        "mixes": list(mixes),
        "generator": generator,
    }
    if not (out / CONFIG).exists():
        new_run_dir(out, may_hold=(cache_url, str(student_dir)))
        write_json(out / CONFIG, config)
    elif open_run(out, config) and (out / "report.json").exists():
        note(f"{out} is done already")
        finished: dict[str, Any] = json.loads((out / "report.json").read_text())
        return finished
    with Progress("grid", 2 * len(objectives) * training.steps, "steps") as progress:
        grid = _Grid(
            data=data,
            student_dir=student_dir,
            teacher=teacher,
            training=training,
            sampling=sampling,
            students=students,
            generator=generator,
            checkpoint_every=checkpoint_every,
            out=out,
            progress=progress,
            objectives=objectives,
            identity={name: config[name] for name in IDENTITY},
            held_out=held_out,
        )
        grid.measure_start(student)
        del student  # every cell has its own
        with closing(grid):
            for prefix in (Prefix.TEACHER, Prefix.STUDENT):
                for divergence in objectives:
                    grid.run(prefix, divergence)
    report = {
        "run_s": time.perf_counter() - started,
        **{name: config.pop(name) for name in PROVENANCE},
        "config": config,
        **grid.facts(),
        "cells": grid.cells,
    }
    write_report(report, out)
    return report


def divergence_name(forward_weight: float) -> str:
    """What a mix is called in reports."""
    return {1.0: "forward", 0.0: "reverse"}.get(forward_weight, f"mixed-{forward_weight:g}")


@dataclass(kw_only=True)
class _Grid:
    """The cells done so far, and what they share."""

    data: CacheData
    student_dir: Path
    teacher: str
    training: Training
    sampling: Sampling
    students: int
    generator: StudentEngine
    checkpoint_every: int
    out: Path
    progress: Progress
    objectives: Mapping[str, Objective]
    identity: dict[str, Any]
    held_out: list[Batch]
    cells: list[dict[str, Any]] = field(default_factory=list)
    before: HeldOut | None = None
    parameters: int = 0
    vllm_engine: Any = None

    def measure_start(self, student: Student) -> None:
        """Evaluate the student that all cells start from."""
        note("measuring the student before training")
        self.parameters = sum(parameter.numel() for parameter in student.parameters)
        self.before = evaluate(student, self.held_out, FlopLedger(), step=None, backend=self.training.backend)

    def run(self, prefix: Prefix, divergence: str) -> None:
        """Train and measure one cell, unless it is done."""
        note(f"cell {len(self.cells) + 1} of {2 * len(self.objectives)}: {prefix} prefix, {divergence} KL")
        directory = self.out / "cells" / f"{prefix}-{divergence}"
        directory.mkdir(parents=True, exist_ok=True)
        checkpoints = Checkpoints(
            directory=directory / "checkpoints", every=self.checkpoint_every, keep=1, identity=self.identity
        )
        result = directory / "result.json"
        if result.exists():
            self.progress.add(self.training.steps)
        else:
            self.progress.add(checkpoints.latest() or 0)
            write_json(result, self._trained(prefix, divergence, checkpoints))
        shutil.rmtree(checkpoints.directory, ignore_errors=True)
        self.cells.append(json.loads(result.read_text()))

    def _trained(self, prefix: Prefix, divergence: str, checkpoints: Checkpoints) -> dict[str, Any]:
        assert self.before is not None
        student = self._student()
        result, ledger = run_cell(
            student=student,
            source=self._source(prefix, student),
            objective=self.objectives[divergence],
            training=self.training,
            held_out=self.held_out,
            before=self.before,
            run=CellRun(
                directory=checkpoints.directory.parent,
                on_step=lambda line: show_step(self.progress, line),
                checkpoints=checkpoints,
            ),
        )
        # A student that writes its own text needs no cache: nothing of its build is charged to it.
        build_flops = self.data.build_flops if prefix is Prefix.TEACHER else 0
        flops = flops_of(ledger, build_flops=build_flops, students=self.students)
        weight = self.objectives[divergence].forward_weight
        cell = {"prefix": str(prefix), "divergence": divergence, "forward_weight": weight}
        return {**cell, **result, "flops": flops}

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
                "flops_before": self.before.flops,
                "teacher_entropy_nats": self.before.nats["teacher_entropy_nats"],
            },
        }

    def close(self) -> None:
        """Free vLLM."""
        if self.vllm_engine is not None:
            self.vllm_engine.close()

    @cached_property
    def _live(self) -> LiveTeacher:
        note("loading the teacher, to score what students write")
        return load_live_teacher(self.teacher, self.data)

    def _student(self) -> Student:
        return open_student(self.data, self.student_dir, self.training)

    def _source(self, prefix: Prefix, student: Student) -> PrefixSource:
        if prefix is Prefix.TEACHER:
            return cached_source(self.data, student, self.training)
        if self.generator == "vllm" and self.vllm_engine is None:  # one for all cells: it takes each student's weights
            self.vllm_engine = student_vllm_engine(self.data, student, self.student_dir, self.training)
        generator = student_writer(self.data, student, self._live, self.vllm_engine).generator
        return on_policy_source(self.data, student, self.training, self._live, self.sampling, generator=generator)
