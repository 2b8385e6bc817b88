"""A budget round a source: kept to the last FLOP, measured on the way, exact over a restart."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from logitcache.flops import ModelShape
from logitcache.records import Origin, ScoredSequence
from logitcache.scorers.hf import HFEngine, engine_for
from logitcache.scoring import Sampling
from trainer.batch import TeacherHead
from trainer.budget import BudgetedPrefixes
from trainer.checkpoint import Checkpoints
from trainer.flops import FlopLedger, Phase
from trainer.loop import distill
from trainer.objectives import Objective
from trainer.prefixes import CachedPrefixes, OnPolicyPrefixes, PrefixSource, prompts_of
from trainer.runs import MetricsLog
from trainer.settings import BatchPlan, Optimisation
from trainer.student import Student, load_student

CPU = torch.device("cpu")
PLAN = BatchPlan(sequences=3, max_completion_tokens=12, micro_batch_tokens=16)
STEPS = 6
OBJECTIVE = Objective(forward_weight=1.0)


@pytest.fixture(params=["cached", "on policy"])
def make(
    request: pytest.FixtureRequest,
    reader: Any,
    tiny_dir: Path,
    teacher: HFEngine,
    scored: list[ScoredSequence],
    head: TeacherHead,
) -> Any:
    """A student from its start, and a source of its text."""

    def made() -> tuple[Student, PrefixSource]:
        student = load_student(tiny_dir, vocab_size=teacher.vocab_size, precision="float32")
        if request.param == "cached":
            return student, CachedPrefixes(reader=reader, indices=range(8), head=head, plan=PLAN, seed=5, device=CPU)
        return student, OnPolicyPrefixes(
            generator=engine_for(student.model, student.tokenizer, origin=Origin.STUDENT),
            scorer=teacher,
            prompts=prompts_of([item.sequence for item in scored]),
            sampling=Sampling(),
            head=head,
            plan=PLAN,
            student_shape=student.shape,
            teacher_shape=ModelShape.from_config(teacher.model.config.to_dict()),
            seed=5,
            device=CPU,
        )

    return made


def budgeted(
    student: Student, source: PrefixSource, points: tuple[int, ...], objective: Objective = OBJECTIVE
) -> BudgetedPrefixes:
    """Measures a weight, and costs evaluation."""

    def measure(step: int, ledger: FlopLedger) -> dict[str, Any]:
        ledger.add(Phase.EVALUATION, 10**9, step=step)
        return {"weight": float(student.parameters[0].detach().double().sum())}

    return BudgetedPrefixes(source=source, student=student, objective=objective, points=points, measure=measure)


def train(
    student: Student,
    source: PrefixSource,
    directory: Path,
    *,
    steps: int = 10**9,
    checkpoints: Checkpoints | None = None,
    objective: Objective = OBJECTIVE,
) -> tuple[FlopLedger, list[dict[str, Any]]]:
    """The ledger, and the lines of metrics."""
    directory.mkdir(exist_ok=True)
    ledger = FlopLedger()
    with MetricsLog(directory / "metrics.jsonl") as metrics:
        distill(
            student=student,
            source=source,
            objective=objective,
            optimisation=Optimisation(steps=steps, learning_rate=1e-3, warmup_steps=2),
            ledger=ledger,
            metrics=metrics,
            checkpoints=checkpoints,
        )
    return ledger, [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def without_clock(measured: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in line.items() if name not in ("seconds", "joules")} for line in measured]


def test_it_ends_in_the_step_that_would_exceed_it_and_measures_where_points_are_passed(
    make: Any, tmp_path: Path
) -> None:
    _, lines = train(*make(), tmp_path / "free", steps=STEPS)
    costs = [0, *(line["flops"] for line in lines)]
    points = (costs[1] - 1, costs[1], costs[3] + 1, costs[3] + 2, costs[5] - 1)
    student, inner = make()
    source = budgeted(student, inner, points)
    ledger, held = train(student, source, tmp_path / "held")
    assert [line["loss_nats"] for line in held] == [line["loss_nats"] for line in lines[:4]]
    assert ledger.marginal() == costs[4] <= points[-1] < costs[5]
    assert [(line["flops"], line["steps"]) for line in source.measured] == list(
        zip(points, (0, 1, 3, 3, 4), strict=True)
    )
    assert [line["spent_flops"] for line in source.measured] == [costs[step] for step in (0, 1, 3, 3, 4)]
    assert len({line["weight"] for line in source.measured}) == 4
    assert ledger.by_phase()[Phase.EVALUATION] == 4 * 10**9  # two points passed by one step are one measuring
    own = isinstance(inner, OnPolicyPrefixes)
    assert (source.abandoned_flops > 0) == own
    assert all(row.step < 4 for row in ledger.rows if row.phase is not Phase.EVALUATION)
    assert source.measured[-1]["seconds"] >= source.measured[0]["seconds"] >= 0


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_the_cross_entropy_of_the_text_is_in_the_prediction(
    share: float, student: Student, reader: Any, head: TeacherHead, tmp_path: Path
) -> None:
    inner = CachedPrefixes(reader=reader, indices=range(8), head=head, plan=PLAN, seed=5, device=CPU)
    objective = Objective(forward_weight=1.0, cross_entropy_share=share)
    source = budgeted(student, inner, (10**9,), objective)
    ledger, lines = train(student, source, tmp_path, objective=objective)
    assert ledger.marginal() == lines[-1]["flops"] <= 10**9  # a wrong prediction ends the run as an error
    assert (ledger.by_phase()[Phase.HEAD_REPROJECTION] == 0) == (share == 1)


def test_a_run_to_a_budget_is_the_beginning_of_one_to_a_larger_one(make: Any, tmp_path: Path) -> None:
    _, lines = train(*make(), tmp_path / "free", steps=STEPS)
    points = (lines[1]["flops"], lines[4]["flops"] + 1)
    student, inner = make()
    long, short = budgeted(student, inner, points), None
    train(student, long, tmp_path / "long")
    student, inner = make()
    short = budgeted(student, inner, points[:1])
    train(student, short, tmp_path / "short")
    assert without_clock(short.measured) == without_clock(long.measured)[:1]


def test_killed_and_started_again_it_ends_alike(make: Any, tmp_path: Path) -> None:
    _, lines = train(*make(), tmp_path / "free", steps=STEPS)
    points = (lines[0]["flops"], lines[2]["flops"], lines[5]["flops"] - 1)
    student, inner = make()
    whole = budgeted(student, inner, points)
    expected, metrics = train(student, whole, tmp_path / "whole")
    checkpoints = Checkpoints(directory=tmp_path / "checkpoints", every=2, keep=1)
    student, inner = make()
    train(student, budgeted(student, inner, points), tmp_path / "again", steps=4, checkpoints=checkpoints)
    student, inner = make()
    again = budgeted(student, inner, points)
    ledger, lines = train(student, again, tmp_path / "again", checkpoints=checkpoints)
    assert ledger.rows == expected.rows
    assert without_clock(again.measured) == without_clock(whole.measured)
    assert again.abandoned_flops == whole.abandoned_flops
    assert [line["loss_nats"] for line in lines] == [line["loss_nats"] for line in metrics]


def test_a_step_that_costs_something_else_than_predicted_is_an_error(make: Any) -> None:
    student, inner = make()
    source, ledger = budgeted(student, inner, (10**15,)), FlopLedger()
    source.draw(0, ledger)
    ledger.add(Phase.STUDENT_FORWARD, 1, step=0)
    with pytest.raises(RuntimeError, match="step 0: the ledger holds"):
        source.draw(1, ledger)
    source.close()
