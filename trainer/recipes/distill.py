"""One student, one cell: train it, measure it, save it; killed anywhere, it goes on when it is run again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from contextlib import closing, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from logitcache.console import Progress, note
from logitcache.errors import UserError
from logitcache.scoring import Sampling
from trainer.batch import Batch
from trainer.checkpoint import Checkpoints, remove_leftovers
from trainer.curriculum import Curriculum, CurriculumPlan
from trainer.distributed import ALONE, Ranks
from trainer.evaluate import HeldOut, evaluate
from trainer.flops import FlopLedger
from trainer.objectives import Objective, require_served
from trainer.prefixes import MixedPrefixes, PrefixSource, shares
from trainer.recipes.cells import CellRun, flops_of, run_cell, show_step
from trainer.recipes.data import (
    EXACT,
    CacheData,
    LiveTeacher,
    StudentEngine,
    Writer,
    cached_source,
    configuration,
    held_out_batches,
    held_out_prompts,
    load_live_teacher,
    on_policy_source,
    open_data,
    open_student,
    require_teacher,
    require_window,
    student_vllm_engine,
    student_writer,
)
from trainer.recipes.windows import GatedWindows
from trainer.runs import open_run, write_json
from trainer.schedules import WeightSchedule
from trainer.settings import Prefix, Training
from trainer.student import Student
from trainer.watch import Watch, require_watch, watching


def run_distill(
    *,
    cache_url: str,
    student_dir: Path,
    out: Path,
    prefix: Prefix,
    weights: WeightSchedule,
    teacher: str | None,
    training: Training,
    sampling: Sampling,
    targets: str | None = None,
    student_share: float = 0.5,
    generator: StudentEngine = "transformers",
    curriculum: CurriculumPlan | None = None,
    cross_entropy_share: float = 0.0,
    watch: Sequence[Watch] = (),
    checkpoint_every: int = 100,
    keep: int = 2,
    ranks: Ranks = ALONE,
) -> dict[str, Any]:
    """Train one student and write `config.json`, `metrics.jsonl`, `ledger.json`, `result.json` and `student/`.

    Args:
        cache_url: a sealed cache.
        student_dir: the model to start from.
        out: a new directory, or that of the same run, which goes on from its newest checkpoint.
        prefix: who writes the text; `teacher` trains from the cache alone.
        weights: of forward KL over the steps: 1 forward KL, 0 reverse KL.
        teacher: the model that built the cache; needed for student and mixed prefixes, unused otherwise.
        training: see `Training`.
        sampling: how the student writes.
        targets: the tier to train on; None for the one that says most. Student prefixes are scored live, exactly.
        student_share: mixed prefixes: of each step's sequences.
        generator: the engine that the student writes with, if it writes at all.
        curriculum: in place of the training's window, which becomes the ladder's longest; held-out numbers are taken up
            to that.
        cross_entropy_share: of the loss, see `Objective`; teacher prefixes only.
        watch: where the metrics go besides `metrics.jsonl`.
        checkpoint_every: steps between checkpoints; `keep` of them stay.
        keep: checkpoints that stay.
        ranks: that train this student together, see `trainer.distributed.joined`; all call this alike, over one file
            system, and the first one writes. Teacher prefixes only.

    Raises:
        UserError: see the functions called; nothing is written before the inputs are sound.
    """
    require_watch(watch)
    written_by = generator if prefix is not Prefix.TEACHER or curriculum is not None else None
    if written_by == "vllm":
        from logitcache.scorers.vllm_load import require_vllm

        require_vllm()
    if prefix is not Prefix.TEACHER and teacher is None:
        raise UserError(f"{prefix} prefixes", "no teacher to score them", "name it with --teacher")
    if prefix is Prefix.MIXED:
        shares(training.plan, student_share)
    if curriculum is not None:
        training = replace(training, window=curriculum.lengths[-1])
    if written_by is not None and ranks.size > 1:
        found = "on each of them the student would write with the whole of its weights"
        raise UserError(f"student-written text on {ranks.size} ranks", found, "train from the cache, or on one")
    if training.sequences < ranks.size:
        do = "give every rank one at least"
        raise UserError(f"--sequences {training.sequences} on {ranks.size} ranks", "fewer sequences than ranks", do)
    objective = Objective(
        forward_weight=weights.at(0),
        temperature=training.kl_temperature,
        backend=training.backend,
        cross_entropy_share=cross_entropy_share,
    )
    if prefix is not Prefix.TEACHER and cross_entropy_share:
        found = "text of the student's own, which teaches it nothing by itself"
        raise UserError(f"--cross-entropy-share on {prefix} prefixes", found, "use teacher prefixes, or leave it out")
    checkpoints = Checkpoints(directory=out / "checkpoints", every=checkpoint_every, keep=keep, ranks=ranks)
    data = open_data(cache_url, student_dir, training, targets=targets)
    if prefix is not Prefix.STUDENT:
        asked = f"--window {training.window}" if curriculum is None else f"--curriculum up to {training.window}"
        require_window(asked, training.window, data)
        for weight in (weights.start, weights.end):
            require_served(replace(objective, forward_weight=weight), data.kind)
        if prefix is Prefix.MIXED and data.kind not in EXACT:
            found = f"{data.kind} targets of the cache, which no metric may mix with the teacher's exact ones"
            raise UserError("mixed prefixes", found, "train from hidden states or full vocabularies")
        note(f"targets: tier {data.reader.tier} ({data.kind}); measured on tier {data.measured.tier}")
    student = open_student(data, student_dir, training)
    live = None
    if prefix is not Prefix.TEACHER and teacher is not None:
        require_teacher(teacher, data)
        live = load_live_teacher(teacher, data)
    config = configuration("distill", data, student_dir, training, sampling)
    config |= {"prefix": str(prefix), "objective": asdict(objective), "forward_weight": str(weights)}
    config |= {"student_share": student_share if prefix is Prefix.MIXED else None, "generator": written_by}
    config |= {"ranks": ranks.size}
    config |= {"curriculum": None if curriculum is None else asdict(curriculum)}
    if ranks.agreed(ranks.first and open_run(out, config)):
        if (out / "result.json").exists():
            note(f"{out} is done already")
            finished: dict[str, Any] = json.loads((out / "result.json").read_text())
            return finished
        note(f"going on after step {checkpoints.latest() or 0}")
        if ranks.first:
            remove_leftovers(out)
    held_out = held_out_batches(data, student, training)
    before = _measured_before(student, held_out, training, out / "start.json", ranks)
    engine = student_vllm_engine(data, student, student_dir, training) if written_by == "vllm" else None
    writer = None if written_by is None else student_writer(data, student, live, engine)
    source = _source(prefix, data, student, training, sampling, live, writer, student_share, ranks)
    windows = None
    if curriculum is not None and writer is not None:
        windows = GatedWindows(
            curriculum=Curriculum(curriculum),
            source=source,
            student=student,
            writer=writer,
            prompts=held_out_prompts(data, training),
            sampling=replace(sampling, seed=training.seed),
            micro_batch_tokens=training.micro_batch_tokens,
        )
    first = checkpoints.latest() or 0
    with (
        watching(watch if ranks.first else (), out, config, first_step=first) as sinks,
        Progress("distill", training.steps, "steps") as progress,
        nullcontext() if engine is None else closing(engine),
    ):
        progress.add(first)

        def on_step(line: dict[str, Any]) -> None:
            show_step(progress, line)
            for sink in sinks:
                sink.write(line)

        student = student.sharded(ranks)
        result, ledger = run_cell(
            student=student,
            source=source,
            objective=objective,
            training=training,
            held_out=held_out,
            before=before,
            run=CellRun(directory=out, on_step=on_step, checkpoints=checkpoints, weights=weights, windows=windows),
        )
    from_cache = prefix is not Prefix.STUDENT
    build_flops = data.build_flops if from_cache else 0
    result = {
        "targets": data.reader.tier if from_cache else None,
        "flops": flops_of(ledger, build_flops=build_flops, students=1),
        **result,
    }
    if ranks.first:
        shutil.rmtree(out / "student", ignore_errors=True)  # a run killed between this and its result had saved it
    student.save(out / "student")
    if ranks.first:
        write_json(out / "result.json", result)
    return result


def _source(
    prefix: Prefix,
    data: CacheData,
    student: Student,
    training: Training,
    sampling: Sampling,
    live: LiveTeacher | None,
    writer: Writer | None,
    student_share: float,
    ranks: Ranks,
) -> PrefixSource:
    if live is None or writer is None:
        return cached_source(data, student, training, ranks=ranks)
    if prefix is Prefix.STUDENT:
        return on_policy_source(data, student, training, live, sampling, generator=writer.generator)
    cached, own = shares(training.plan, student_share)
    return MixedPrefixes(
        teacher=cached_source(data, student, training, cached),
        student=on_policy_source(data, student, training, live, sampling, generator=writer.generator, plan=own),
    )


def _measured_before(student: Student, held_out: list[Batch], training: Training, file: Path, ranks: Ranks) -> HeldOut:
    """The student before training, measured once and kept for a run that goes on."""
    if file.exists():
        return HeldOut(**json.loads(file.read_text()))
    note("measuring the student before training")
    before = evaluate(student, held_out, FlopLedger(), step=0, backend=training.backend)
    if ranks.first:
        write_json(file, asdict(before))
    return before
