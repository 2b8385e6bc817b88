"""One student, one cell: train it, measure it, save it."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from logitcache.console import Progress, note
from logitcache.errors import UserError
from logitcache.scoring import Sampling
from trainer.evaluate import evaluate
from trainer.flops import FlopLedger
from trainer.objectives import Objective
from trainer.provenance import commit, device_name, versions
from trainer.recipes.cells import CellRun, flops_of, run_cell, show_step
from trainer.recipes.data import (
    cached_source,
    held_out_batches,
    load_live_teacher,
    on_policy_source,
    open_data,
    require_teacher,
)
from trainer.runs import new_run_dir, write_json
from trainer.settings import Prefix, Training
from trainer.student import load_student


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
) -> dict[str, Any]:
    """Train one student and write `config.json`, `metrics.jsonl`, `ledger.json`, `result.json` and `student/`.

    Args:
        cache_url: a sealed cache with hidden states.
        student_dir: the model to start from.
        out: a new directory.
        prefix: who writes the text; `teacher` trains from the cache alone.
        forward_weight: 1 forward KL, 0 reverse KL.
        teacher: the model that built the cache; needed for student prefixes, unused otherwise.
        training: see `Training`.
        sampling: how the student writes.

    Raises:
        UserError: see the functions called; nothing is written before the inputs are sound.
    """
    if prefix is Prefix.STUDENT and teacher is None:
        raise UserError("student prefixes", "no teacher to score them", "name it with --teacher")
    objective = Objective(forward_weight=forward_weight, temperature=training.kl_temperature)
    data = open_data(cache_url, student_dir, training)
    student = load_student(student_dir, vocab_size=data.head.vocab_size, precision=training.precision)
    live = None
    if prefix is Prefix.STUDENT and teacher is not None:
        require_teacher(teacher, data)
        live = load_live_teacher(teacher, data)
    new_run_dir(out)
    config = {
        "command": "distill",
        "cache_manifest": data.reader.manifest.digest,
        "student": student_dir.name,
        "prefix": str(prefix),
        "objective": asdict(objective),
        "training": asdict(training),
        "sampling": asdict(sampling),
        "versions": versions(),
        "device": device_name(),
        "commit": commit(),
    }
    write_json(out / "config.json", config)
    note("measuring the student before training")
    held_out = held_out_batches(data, student, training)
    before = evaluate(student, held_out, FlopLedger(), step=0)
    if live is None:
        source: Any = cached_source(data, student, training)
    else:
        source = on_policy_source(data, student, training, live, sampling)
    with Progress("distill", training.steps, "steps") as progress:
        run = CellRun(directory=out, on_step=lambda line: show_step(progress, line))
        result, ledger = run_cell(
            student=student,
            source=source,
            objective=objective,
            training=training,
            held_out=held_out,
            before=before,
            run=run,
        )
    build_flops = data.build_flops if live is None else 0
    result = {"flops": flops_of(ledger, build_flops=build_flops, students=1), **result}
    student.save(out / "student")
    write_json(out / "result.json", result)
    return result
