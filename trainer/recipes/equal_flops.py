"""Cells at equal FLOPs: each trained until a budget is spent, several seeds each, measured on the way.

Guarantees: every run starts from the same student, ends inside the step that would exceed the largest budget and is
measured at stated points of every budget; FLOPs follow from seeds and configuration alone, so two runs of the same
command agree on them exactly. Runs that are done are kept, one that was killed goes on; another configuration in the
same place is refused. The runs from the cache come first, before a teacher is loaded.
"""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from logitcache.console import Progress, note
from logitcache.prompts import render_prompts
from logitcache.scorers.fits import check_context
from logitcache.scorers.hf import load_tokenizer
from trainer.answers import AnswerChecker
from trainer.benchmarks import benchmark_digest, load_benchmark
from trainer.budget import BudgetedPrefixes
from trainer.budget_report import summary, write_report
from trainer.checkpoint import Checkpoints, remove_leftovers
from trainer.distributed import require_alone
from trainer.evaluate import evaluate
from trainer.flops import FlopLedger
from trainer.loop import distill
from trainer.planning.study import Study, prefix_name, prefix_of
from trainer.prefixes import MixedPrefixes, PrefixSource
from trainer.recipes.data import (
    IDENTITY,
    CacheData,
    LiveTeacher,
    cached_source,
    configuration,
    held_out_batches,
    load_live_teacher,
    on_policy_source,
    open_student,
    student_writer,
)
from trainer.recipes.equal_flops_setup import Setup, parts
from trainer.recipes.grid import divergence_name
from trainer.recipes.quiz import Quiz
from trainer.report import require_plotting
from trainer.runs import PROVENANCE, MetricsLog, open_run, write_json
from trainer.settings import Prefix, Training
from trainer.student import Student, student_config

RESULT, CHECKPOINTS = "result.json", "checkpoints"
UNBOUNDED = 10**9
"""Steps of a run, whose end is its budget."""
MEGA = 10**6


def run_equal_flops(setup: Setup, study: Study, out: Path) -> dict[str, Any]:
    """Do the runs that are not done, and write `config.json`, `runs/` and the report as JSON, Markdown and a plot.

    Args:
        setup: see `Setup`.
        study: see `Study`.
        out: a new directory, or that of this same study.

    Raises:
        UserError: see the functions called; nothing is written before the inputs are sound.
    """
    require_alone("equal-flops")
    require_plotting()
    data = setup.open(study)
    with ExitStack() as stack:
        quiz, asked = _quiz(setup, stack)
        config = configuration("equal-flops", data, setup.student_dir, setup.training, setup.sampling)
        config |= {"study": study.deciding, "questions": asked, "cross_entropy_share": setup.cross_entropy_share}
        open_run(out, config)
        identity = {name: config[name] for name in IDENTITY}
        bench = _Bench(setup=setup, study=study, data=data, quiz=quiz, identity=identity, out=out)
        start = bench.measure_start()
        runs = list(bench.run_all())
    report = {
        **{name: config.pop(name) for name in PROVENANCE},
        "config": config,
        "cache": {
            **data.reader.manifest.totals,
            "flops": dict(data.reader.manifest.flops),
            "teacher": data.teacher_name,
        },
        "price_per_hour": study.price_per_hour,
        "start": start,
        "runs": runs,
        **summary(runs, start, study, data.build_flops),
    }
    write_report(report, out)
    return report


def _quiz(setup: Setup, stack: ExitStack) -> tuple[Quiz | None, dict[str, Any] | None]:
    """The quiz, and what decides its figures."""
    if setup.questions is None:
        return None, None
    asked = setup.questions
    problems = load_benchmark(asked.source, limit=asked.limit)
    context = student_config(setup.student_dir).get("max_position_embeddings")
    for prompt in render_prompts(load_tokenizer(setup.student_dir), problems, asked.style):
        check_context(prompt.problem_id, len(prompt.token_ids) + asked.max_new_tokens, context)
    checker = stack.enter_context(AnswerChecker())
    checker.require_checkable(problems)
    drawn = {"max_new_tokens": asked.max_new_tokens, "samples_per_problem": asked.samples, "seed": 0}
    sampling = replace(setup.sampling, **drawn)
    facts = {"name": Path(asked.source).name, "count": len(problems), "digest": benchmark_digest(problems)}
    facts |= {"sampling": asdict(sampling), "style": asdict(asked.style)}
    return Quiz(problems=problems, style=asked.style, sampling=sampling, checker=checker), facts


@dataclass(kw_only=True, eq=False)
class _Bench:
    """What all runs of a study share."""

    setup: Setup
    study: Study
    data: CacheData
    quiz: Quiz | None
    identity: dict[str, Any]
    out: Path

    def measure_start(self) -> dict[str, Any]:
        """The student that all runs start from, measured once."""
        file = self.out / "start.json"
        if not file.exists():
            note("measuring the student before training")
            write_json(file, self._measuring(self._student())(0, FlopLedger()))
        found: dict[str, Any] = json.loads(file.read_text())
        return found

    def run_all(self) -> Iterator[dict[str, Any]]:
        """Every run's result, those from the cache first."""
        cells = itertools.product(sorted(self.study.student_shares), self.study.mixes, self.study.seeds)
        live, size, total = None, self.study.budgets[-1] // MEGA, self.study.budgets[-1] // MEGA * self.study.runs
        with Progress("equal FLOPs", total, "MFLOP") as progress:
            for number, (share, weight, seed) in enumerate(cells):

                def on_step(line: dict[str, Any], done: int = number * size) -> None:
                    progress.show(step=str(line["step"]), loss=f"{line['loss_nats']:.3f}")
                    progress.reach(done + line["flops"] // MEGA, total)

                directory = self.out / "runs" / f"{prefix_name(share)}-{divergence_name(weight)}-{seed}"
                if not (directory / RESULT).exists():
                    if share > 0 and live is None:
                        note("loading the teacher, to score what students write")
                        live = load_live_teacher(self.setup.teacher, self.data)
                    note(f"run {number + 1} of {self.study.runs}: {directory.name}")
                    self._run(directory, live, share, weight, seed, on_step)
                shutil.rmtree(directory / CHECKPOINTS, ignore_errors=True)
                progress.reach((number + 1) * size, total)
                yield json.loads((directory / RESULT).read_text())

    def _run(
        self,
        directory: Path,
        live: LiveTeacher | None,
        share: float,
        weight: float,
        seed: int,
        on_step: Callable[[dict[str, Any]], None],
    ) -> None:
        """One run, to its end."""
        directory.mkdir(parents=True, exist_ok=True)
        remove_leftovers(directory)
        training = replace(self.setup.training, seed=seed, steps=UNBOUNDED)
        student = self._student()
        objective = self.setup.objective(prefix_of(share), weight)
        source = BudgetedPrefixes(
            source=self._source(student, training, live, share),
            student=student,
            objective=objective,
            points=self.study.points(self.study.share(share, self.data.build_flops)),
            measure=self._measuring(student),
        )
        ledger, checkpoints = FlopLedger(), directory / CHECKPOINTS
        with MetricsLog(directory / "metrics.jsonl") as metrics:
            trained = distill(
                student=student,
                source=source,
                objective=objective,
                optimisation=training.optimisation,
                ledger=ledger,
                metrics=metrics,
                weighting=training.weighting,
                checkpoints=Checkpoints(
                    directory=checkpoints, every=self.setup.checkpoint_every, keep=1, identity=self.identity
                ),
                on_step=on_step,
            )
        write_json(directory / "ledger.json", {"rows": ledger.to_json()})
        result = {
            "prefix": prefix_name(share),
            "student_share": share,
            "divergence": divergence_name(weight),
            "forward_weight": weight,
            "seed": seed,
            "steps": source.measured[-1]["steps"],
            "completion_tokens": trained.completion_tokens,
            "flops": {str(phase): flops for phase, flops in ledger.by_phase().items()},
            "spent_flops": ledger.marginal(),
            "abandoned_flops": source.abandoned_flops,
            **source.usage.state(),
            "flops_per_second": ledger.marginal() / source.usage.seconds,
            "points": source.measured,
        }
        write_json(directory / RESULT, result)

    def _measuring(self, student: Student) -> Callable[[int, FlopLedger], dict[str, Any]]:
        """Of this student, as it then is: on held-out text, and on the problems if there are any."""
        training, quiz = self.setup.training, self.quiz
        held_out = held_out_batches(self.data, student, training)
        # Without the teacher's own stop tokens, which are not known where it is not loaded: all cells stop alike.
        generator = None if quiz is None else student_writer(self.data, student, None).generator

        def measure(step: int, ledger: FlopLedger) -> dict[str, Any]:
            found = dict(evaluate(student, held_out, ledger, step=step, backend=training.backend).nats)
            if quiz is not None and generator is not None:
                found |= quiz.measure(student, generator, ledger, step=step)
            return found

        return measure

    def _student(self) -> Student:
        return open_student(self.data, self.setup.student_dir, self.setup.training)

    def _source(self, student: Student, training: Training, live: LiveTeacher | None, share: float) -> PrefixSource:
        sources: dict[Prefix, PrefixSource] = {}
        for prefix, plan in parts(training.plan, share).items():
            if prefix is Prefix.TEACHER:
                sources[prefix] = cached_source(self.data, student, training, plan)
            else:
                assert live is not None
                generator = student_writer(self.data, student, live).generator
                sources[prefix] = on_policy_source(
                    self.data, student, training, live, self.setup.sampling, generator=generator, plan=plan
                )
        if len(sources) == 1:
            return next(iter(sources.values()))
        return MixedPrefixes(teacher=sources[Prefix.TEACHER], student=sources[Prefix.STUDENT])
