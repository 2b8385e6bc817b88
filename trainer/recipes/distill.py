"""One student, one cell: train it, measure it, save it; killed anywhere, it goes on when it is run again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, replace
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
from trainer.flops import FlopLedger, FlopRow, Phase
from trainer.objectives import Objective, require_served
from trainer.prefixes import MixedPrefixes, PrefixSource, shares
from trainer.recipes.cells import CellRun, flops_of, run_cell, show_step
from trainer.recipes.data import (
    EXACT,
    IDENTITY,
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
    require_fits,
    require_teacher,
    require_warmup,
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


@dataclass(frozen=True, kw_only=True)
class Distillation:
    """What a student learns from, and what it minimises there.

    Attributes:
        prefix: who writes the text; `teacher` trains from the cache alone.
        weights: of forward KL over the steps: 1 forward KL, 0 reverse KL.
        teacher: the model that built the cache; for student and mixed prefixes.
        targets: the tier to train on; None for the one that says most. Student prefixes are scored live, exactly.
        student_share: mixed prefixes: of each step's sequences; None for half of them.
        generator: the engine that the student writes with, if it writes at all; None for transformers.
        curriculum: in place of the training's window, which becomes the ladder's longest; held-out numbers are taken up
            to that.
        cross_entropy_share: of the loss, see `Objective`; teacher prefixes only.

    Raises:
        UserError: values that do not go together, or that decide nothing here.
    """

    prefix: Prefix
    weights: WeightSchedule
    teacher: str | None = None
    targets: str | None = None
    student_share: float | None = None
    generator: StudentEngine | None = None
    curriculum: CurriculumPlan | None = None
    cross_entropy_share: float = 0.0

    def __post_init__(self) -> None:
        if self.student_share is not None and self.prefix is not Prefix.MIXED:
            raise UserError("--student-share", f"{self.prefix} prefixes share nothing", "leave it out, or mix them")
        if self.generator is not None and self.written_by is None:
            raise UserError("--generator", "on teacher prefixes the student writes nothing", "leave it out")
        if self.prefix is Prefix.TEACHER:
            if self.teacher is not None:
                raise UserError("--teacher", "teacher prefixes come from the cache, without it", "leave it out")
            return
        if self.teacher is None:
            raise UserError(f"{self.prefix} prefixes", "no teacher to score them", "name it with --teacher")
        if self.cross_entropy_share:
            found = "text of the student's own, which teaches it nothing by itself"
            do = "use teacher prefixes, or leave it out"
            raise UserError(f"--cross-entropy-share on {self.prefix} prefixes", found, do)

    @property
    def written_by(self) -> StudentEngine | None:
        """The engine that the student writes with; None if it writes nothing, neither to learn nor to be checked."""
        return None if self.prefix is Prefix.TEACHER and self.curriculum is None else self.generator or "transformers"

    @property
    def own_share(self) -> float:
        """Of mixed prefixes: the student's."""
        return 0.5 if self.student_share is None else self.student_share

    def objective(self, training: Training) -> Objective:
        """What is minimised at the first step."""
        return Objective(
            forward_weight=self.weights.at(0),
            temperature=training.kl_temperature,
            backend=training.backend,
            cross_entropy_share=self.cross_entropy_share,
        )

    def config(self) -> dict[str, Any]:
        """As a run's configuration has it."""
        return {
            "prefix": str(self.prefix),
            "forward_weight": str(self.weights),
            "student_share": self.own_share if self.prefix is Prefix.MIXED else None,
            "generator": self.written_by,
            "curriculum": None if self.curriculum is None else asdict(self.curriculum),
        }

    def require_trainable(self, training: Training, ranks: Ranks) -> None:
        """Raise UserError for what this machine or these settings cannot do."""
        require_warmup(training)
        if self.written_by == "vllm":
            from logitcache.scorers.vllm_load import require_vllm

            require_vllm()
        if self.prefix is Prefix.MIXED:
            shares(training.plan, self.own_share)
        if self.written_by is not None and ranks.size > 1:
            found = "on each of them the student would write with the whole of its weights"
            raise UserError(f"student-written text on {ranks.size} ranks", found, "train from the cache, or on one")
        if training.sequences < ranks.size:
            found, do = "fewer sequences than ranks", "give every rank one at least"
            raise UserError(f"--sequences {training.sequences} on {ranks.size} ranks", found, do)

    def require_served(self, training: Training, data: CacheData) -> None:
        """Raise UserError unless the cache has what is to be learned from it."""
        if self.prefix is Prefix.STUDENT:
            return
        asked = f"--window {training.window}" if self.curriculum is None else f"--curriculum up to {training.window}"
        require_window(asked, training.window, data)
        for weight in (self.weights.start, self.weights.end):
            require_served(replace(self.objective(training), forward_weight=weight), data.kind)
        if self.prefix is Prefix.MIXED and data.kind not in EXACT:
            found = f"{data.kind} targets of the cache, which no metric may mix with the teacher's exact ones"
            raise UserError("mixed prefixes", found, "train from hidden states or full vocabularies")
        note(f"targets: tier {data.reader.tier} ({data.kind}); measured on tier {data.measured.tier}")
        if data.kind == "topk" and min(self.weights.start, self.weights.end) < 1:
            bound = "a lower bound, blind to how the student spreads its mass over tokens that were not kept"
            note(f"warning: reverse KL of top-k targets is {bound} (docs/objectives.md); hidden states are exact")


def run_distill(
    *,
    cache_url: str,
    student_dir: Path,
    out: Path,
    distillation: Distillation,
    training: Training,
    sampling: Sampling,
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
        distillation: see `Distillation`.
        training: see `Training`.
        sampling: how the student writes.
        watch: where the metrics go besides `metrics.jsonl`.
        checkpoint_every: steps between checkpoints; `keep` of them stay.
        keep: checkpoints that stay.
        ranks: that train this student together, see `trainer.distributed.joined`; all call this alike, over one file
            system, and the first one writes. Teacher prefixes only.

    Raises:
        UserError: see the functions called; nothing is written before the inputs are sound.
    """
    require_watch(watch)
    curriculum, teacher = distillation.curriculum, distillation.teacher
    if curriculum is not None:
        training = replace(training, window=curriculum.lengths[-1])
    distillation.require_trainable(training, ranks)
    objective = distillation.objective(training)
    checkpoints = Checkpoints(directory=out / "checkpoints", every=checkpoint_every, keep=keep, ranks=ranks)
    data = open_data(cache_url, student_dir, training, targets=distillation.targets)
    distillation.require_served(training, data)
    require_fits(data, student_dir, training, writes=distillation.written_by is not None)
    student = open_student(data, student_dir, training)
    held_out = held_out_batches(data, student, training)
    live = None
    if distillation.prefix is not Prefix.TEACHER and teacher is not None:
        require_teacher(teacher, data)
        live = load_live_teacher(teacher, data)
    config = configuration("distill", data, student_dir, training, sampling)
    config |= {**distillation.config(), "objective": asdict(objective), "ranks": ranks.size}
    checkpoints = replace(checkpoints, identity={name: config[name] for name in IDENTITY})
    if ranks.agreed(ranks.first and open_run(out, config)):
        if (out / "result.json").exists():
            note(f"{out} is done already")
            finished: dict[str, Any] = json.loads((out / "result.json").read_text())
            return finished
        note(f"going on after step {checkpoints.latest() or 0}")
        if ranks.first:
            remove_leftovers(out)
    before = _measured_before(student, held_out, training, out / "start.json", ranks)
    first = checkpoints.latest() or 0
    with ExitStack() as stack:
        writer = None
        if distillation.written_by is not None:
            engine = None
            if distillation.written_by == "vllm":
                engine = stack.enter_context(closing(student_vllm_engine(data, student, student_dir, training)))
            writer = student_writer(data, student, live, engine)
        source = _source(distillation, data, student, training, sampling, live, writer, ranks)
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
        sinks = stack.enter_context(watching(watch if ranks.first else (), out, config, first_step=first))
        progress = stack.enter_context(Progress("distill", training.steps, "steps"))
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
            run=CellRun(
                directory=out,
                on_step=on_step,
                checkpoints=checkpoints,
                weights=distillation.weights,
                windows=windows,
                ledger=FlopLedger([FlopRow(step=None, phase=Phase.EVALUATION, flops=before.flops)]),
            ),
        )
    from_cache = distillation.prefix is not Prefix.STUDENT
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
    distillation: Distillation,
    data: CacheData,
    student: Student,
    training: Training,
    sampling: Sampling,
    live: LiveTeacher | None,
    writer: Writer | None,
    ranks: Ranks,
) -> PrefixSource:
    if live is None or writer is None:
        return cached_source(data, student, training, ranks=ranks)
    if distillation.prefix is Prefix.STUDENT:
        return on_policy_source(data, student, training, live, sampling, generator=writer.generator)
    cached, own = shares(training.plan, distillation.own_share)
    return MixedPrefixes(
        teacher=cached_source(data, student, training, cached),
        student=on_policy_source(data, student, training, live, sampling, generator=writer.generator, plan=own),
    )


def _measured_before(student: Student, held_out: list[Batch], training: Training, file: Path, ranks: Ranks) -> HeldOut:
    """The student before training, measured once and kept for a run that goes on."""
    if file.exists():
        return HeldOut(**json.loads(file.read_text()))
    note("measuring the student before training")
    before = evaluate(student, held_out, FlopLedger(), step=None, backend=training.backend)
    if ranks.first:
        write_json(file, asdict(before))
    return before
