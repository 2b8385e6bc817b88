"""One student, one cell: train it, measure it, save it; killed anywhere, it goes on when it is run again."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from logitcache.console import Progress, note
from logitcache.errors import UserError
from logitcache.scoring import Sampling
from trainer.batch import Batch
from trainer.checkpoint import Checkpoints, remove_leftovers
from trainer.evaluate import HeldOut, evaluate
from trainer.flops import FlopLedger
from trainer.objectives import Objective, require_served
from trainer.recipes.cells import CellRun, flops_of, run_cell, show_step
from trainer.recipes.data import (
    cached_source,
    configuration,
    held_out_batches,
    load_live_teacher,
    on_policy_source,
    open_data,
    open_student,
    require_teacher,
)
from trainer.runs import open_run, write_json
from trainer.settings import Prefix, Training
from trainer.student import Student


def run_distill(
    *,
    cache_url: str,
    student_dir: Path,
    out: Path,
    prefix: Prefix,
    forward_weight: float,
    teacher: str | None,
    training: Training,
    sampling: Sampling,
    targets: str | None = None,
    checkpoint_every: int = 100,
    keep: int = 2,
) -> dict[str, Any]:
    """Train one student and write `config.json`, `metrics.jsonl`, `ledger.json`, `result.json` and `student/`.

    Args:
        cache_url: a sealed cache.
        student_dir: the model to start from.
        out: a new directory, or that of the same run, which goes on from its newest checkpoint.
        prefix: who writes the text; `teacher` trains from the cache alone.
        forward_weight: 1 forward KL, 0 reverse KL.
        teacher: the model that built the cache; needed for student prefixes, unused otherwise.
        training: see `Training`.
        sampling: how the student writes.
        targets: the tier to train on; None for the one that says most. Student prefixes are scored live, exactly.
        checkpoint_every: steps between checkpoints; `keep` of them stay.
        keep: checkpoints that stay.

    Raises:
        UserError: see the functions called; nothing is written before the inputs are sound.
    """
    if prefix is Prefix.STUDENT and teacher is None:
        raise UserError("student prefixes", "no teacher to score them", "name it with --teacher")
    objective = Objective(forward_weight=forward_weight, temperature=training.kl_temperature, backend=training.backend)
    checkpoints = Checkpoints(directory=out / "checkpoints", every=checkpoint_every, keep=keep)
    data = open_data(cache_url, student_dir, training, targets=targets)
    if prefix is Prefix.TEACHER:
        require_served(objective, data.kind)
        note(f"targets: tier {data.reader.tier} ({data.kind}); measured on tier {data.measured.tier}")
    student = open_student(data, student_dir, training)
    live = None
    if prefix is Prefix.STUDENT and teacher is not None:
        require_teacher(teacher, data)
        live = load_live_teacher(teacher, data)
    config = configuration("distill", data, student_dir, training, sampling)
    if open_run(out, {**config, "prefix": str(prefix), "objective": asdict(objective)}):
        if (out / "result.json").exists():
            note(f"{out} is done already")
            finished: dict[str, Any] = json.loads((out / "result.json").read_text())
            return finished
        note(f"going on after step {checkpoints.latest() or 0}")
        remove_leftovers(out)
    held_out = held_out_batches(data, student, training)
    before = _measured_before(student, held_out, training, out / "start.json")
    source = (
        cached_source(data, student, training)
        if live is None
        else on_policy_source(data, student, training, live, sampling)
    )
    with Progress("distill", training.steps, "steps") as progress:
        progress.add(checkpoints.latest() or 0)
        result, ledger = run_cell(
            student=student,
            source=source,
            objective=objective,
            training=training,
            held_out=held_out,
            before=before,
            run=CellRun(directory=out, on_step=lambda line: show_step(progress, line), checkpoints=checkpoints),
        )
    build_flops = data.build_flops if live is None else 0
    result = {
        "targets": data.reader.tier if live is None else None,
        "flops": flops_of(ledger, build_flops=build_flops, students=1),
        **result,
    }
    shutil.rmtree(out / "student", ignore_errors=True)  # a run killed between this and its result had saved it
    student.save(out / "student")
    write_json(out / "result.json", result)
    return result


def _measured_before(student: Student, held_out: list[Batch], training: Training, file: Path) -> HeldOut:
    """The student before training, measured once and kept for a run that goes on."""
    if file.exists():
        return HeldOut(**json.loads(file.read_text()))
    note("measuring the student before training")
    before = evaluate(student, held_out, FlopLedger(), step=0, backend=training.backend)
    write_json(file, asdict(before))
    return before
