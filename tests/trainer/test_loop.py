"""The loop: what a step does to the weights does not depend on how it is cut, and bad numbers never reach them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from logitcache.errors import UserError
from logitcache.records import HiddenStateTargets, ScoredSequence, TopKTargets
from trainer.batch import TeacherHead, collate
from trainer.evaluate import evaluate
from trainer.flops import FlopLedger, Phase
from trainer.loop import distill
from trainer.objectives import Objective
from trainer.prefixes import CachedPrefixes
from trainer.runs import MetricsLog
from trainer.schedules import WeightSchedule
from trainer.settings import BatchPlan, Optimisation, Weighting
from trainer.student import Student, load_student

CPU = torch.device("cpu")


@pytest.fixture
def other(student: Student) -> Student:
    """A student that is not its teacher: the twin with noise on every matrix."""
    noise = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in student.parameters:
            parameter += 0.05 * torch.randn(parameter.shape, generator=noise)
    return student


def train(
    student: Student,
    reader: Any,
    head: TeacherHead,
    directory: Path,
    *,
    forward_weight: float = 1.0,
    steps: int = 3,
    micro_batch_tokens: int = 4096,
    objective: Objective | None = None,
    **options: Any,
) -> FlopLedger:
    ledger = FlopLedger()
    plan = BatchPlan(sequences=4, max_completion_tokens=16, micro_batch_tokens=micro_batch_tokens)
    source = CachedPrefixes(reader=reader, indices=range(len(reader)), head=head, plan=plan, seed=3, device=CPU)
    directory.mkdir(exist_ok=True)
    with MetricsLog(directory / "metrics.jsonl") as metrics:
        distill(
            student=student,
            source=source,
            objective=objective or Objective(forward_weight=forward_weight),
            optimisation=Optimisation(steps=steps, learning_rate=3e-3, warmup_steps=2),
            ledger=ledger,
            metrics=metrics,
            **options,
        )
    return ledger


def lines(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("weighting", Weighting)
def test_micro_batches_change_no_result(
    weighting: Weighting, other: Student, tiny_dir: Path, reader: Any, head: TeacherHead, tmp_path: Path
) -> None:
    twin = load_student(tiny_dir, vocab_size=other.vocab_size, precision="float32")
    twin.model.load_state_dict(other.model.state_dict())
    train(other, reader, head, tmp_path / "whole", weighting=weighting)
    train(twin, reader, head, tmp_path / "cut", micro_batch_tokens=1, weighting=weighting)
    for whole, cut in zip(lines(tmp_path / "whole"), lines(tmp_path / "cut"), strict=True):
        assert whole["completion_tokens"] == cut["completion_tokens"]
        assert cut["loss_nats"] == pytest.approx(whole["loss_nats"], rel=1e-4)
        assert cut["grad_norm"] == pytest.approx(whole["grad_norm"], rel=1e-3)
    # Adam's first steps are signs of gradients, so elements whose gradient is rounding noise may differ: compare most.
    for one, two in zip(other.parameters, twin.parameters, strict=True):
        assert float(((one - two).abs() > 1e-4).float().mean()) < 1e-3


def test_gradient_checkpointing_changes_memory_and_flops_alone(
    other: Student, tiny_dir: Path, reader: Any, head: TeacherHead, tmp_path: Path
) -> None:
    twin = load_student(tiny_dir, vocab_size=other.vocab_size, precision="float32", gradient_checkpointing=True)
    twin.model.load_state_dict(other.model.state_dict())
    runs = 0
    layer = type(twin.model.get_decoder().layers[0])
    forward = layer.forward

    def counted(self: Any, *args: Any, **more: Any) -> Any:
        nonlocal runs
        runs += 1
        return forward(self, *args, **more)

    kept = train(other, reader, head, tmp_path / "kept")
    layer.forward = counted
    try:
        again = train(twin, reader, head, tmp_path / "again")
    finally:
        layer.forward = forward
    layers = len(twin.model.get_decoder().layers)
    assert runs == 2 * layers * 3  # each layer twice in each of three steps
    for one, two in zip(lines(tmp_path / "kept"), lines(tmp_path / "again"), strict=True):
        assert (one["loss_nats"], one["grad_norm"]) == (two["loss_nats"], two["grad_norm"])
    assert all(torch.equal(a, b) for a, b in zip(other.parameters, twin.parameters, strict=True))
    extra = again.by_phase()[Phase.STUDENT_BACKWARD] - kept.by_phase()[Phase.STUDENT_BACKWARD]
    assert 0 < extra < again.by_phase()[Phase.STUDENT_FORWARD]
    assert again.by_phase()[Phase.STUDENT_FORWARD] == kept.by_phase()[Phase.STUDENT_FORWARD]


def test_schedules_are_followed(other: Student, reader: Any, head: TeacherHead, tmp_path: Path) -> None:
    train(other, reader, head, tmp_path, steps=4, weights=WeightSchedule.parse("1.0:0.0@2"))
    metrics = lines(tmp_path)
    assert [line["forward_weight"] for line in metrics] == [1.0, 0.5, 0.0, 0.0]
    assert metrics[0]["loss_nats"] == metrics[0]["forward_kl_nats"]
    assert metrics[3]["loss_nats"] == metrics[3]["reverse_kl_nats"]
    half = (metrics[1]["forward_kl_nats"] + metrics[1]["reverse_kl_nats"]) / 2
    assert metrics[1]["loss_nats"] == pytest.approx(half)


@pytest.mark.parametrize(("forward_weight", "name"), [(1.0, "forward_kl_nats"), (0.0, "reverse_kl_nats")])
def test_the_divergence_that_is_trained_falls(
    forward_weight: float, name: str, other: Student, scored: list[ScoredSequence], reader: Any, head: TeacherHead,
    tmp_path: Path,
) -> None:  # fmt: skip
    held_out = [collate(scored, head, CPU)]
    before = evaluate(other, held_out, FlopLedger(), step=0)
    train(other, reader, head, tmp_path, forward_weight=forward_weight, steps=12)
    after = evaluate(other, held_out, FlopLedger(), step=12)
    assert (after.nats[name] or 0) < 0.6 * (before.nats[name] or 0)
    metrics = lines(tmp_path)
    assert [line["loss_nats"] for line in metrics] == [line[name] for line in metrics]
    assert [line["learning_rate"] for line in metrics[:3]] == pytest.approx([1.5e-3, 3e-3, 3e-3])


def test_a_loss_that_is_not_finite_stops_before_the_step(
    other: Student, scored: list[ScoredSequence], reader: Any, head: TeacherHead, tmp_path: Path
) -> None:
    targets = scored[5].targets
    assert isinstance(targets, HiddenStateTargets)
    bad = targets.hidden.copy()
    bad[1, 0] = np.nan
    spoiled = ScoredSequence(sequence=scored[5].sequence, targets=replace(targets, hidden=bad))
    items = [spoiled if number == 5 else item for number, item in enumerate(scored)]
    # Alone in its micro-batch, it alone is named.
    untouched = [parameter.clone() for parameter in other.parameters]

    def after_step(_: dict[str, Any]) -> None:
        untouched[:] = [parameter.clone() for parameter in other.parameters]

    with pytest.raises(UserError, match=scored[5].sequence.sample_id) as error:
        train(other, type(reader)(items), head, tmp_path, steps=2, micro_batch_tokens=1, on_step=after_step)
    assert error.value.asked.startswith("the loss of step ")
    assert len(lines(tmp_path)) == int(error.value.asked.removeprefix("the loss of step "))
    assert all(torch.equal(a, b) for a, b in zip(untouched, other.parameters, strict=True))


def test_a_source_that_ends_ends_the_training(other: Student, reader: Any, head: TeacherHead, tmp_path: Path) -> None:
    class TwoSteps(CachedPrefixes):
        def draw(self, step: int, ledger: FlopLedger) -> list[Any]:
            return super().draw(step, ledger) if step < 2 else []

    plan = BatchPlan(sequences=4, max_completion_tokens=16)
    source = TwoSteps(reader=reader, indices=range(len(reader)), head=head, plan=plan, seed=3, device=CPU)
    with MetricsLog(tmp_path / "metrics.jsonl") as metrics:
        trained = distill(
            student=other,
            source=source,
            objective=Objective(forward_weight=1.0),
            optimisation=Optimisation(steps=5, learning_rate=3e-3, warmup_steps=2),
            ledger=FlopLedger(),
            metrics=metrics,
        )
    assert [line["step"] for line in lines(tmp_path)] == [0, 1]
    assert trained.completion_tokens == sum(line["completion_tokens"] for line in lines(tmp_path))


def test_plain_fine_tuning_does_not_look_at_the_teacher(
    other: Student, reader: Any, head: TeacherHead, tmp_path: Path
) -> None:
    objective = Objective(forward_weight=1.0, cross_entropy_share=1.0)
    ledger = train(other, reader, head, tmp_path, objective=objective, steps=6)
    metrics = lines(tmp_path)
    assert metrics[-1]["loss_nats"] < metrics[0]["loss_nats"]
    assert [line["loss_nats"] for line in metrics] == [line["cross_entropy_nats"] for line in metrics]
    assert metrics[0]["forward_kl_nats"] is metrics[0]["teacher_entropy_nats"] is None
    assert ledger.by_phase()[Phase.HEAD_REPROJECTION] == 0


def test_every_flop_of_training_is_in_the_ledger(
    other: Student, reader: Any, head: TeacherHead, tmp_path: Path
) -> None:
    ledger = train(other, reader, head, tmp_path, steps=2)
    totals = ledger.by_phase()
    rows = sum(line["completion_tokens"] for line in lines(tmp_path))
    assert totals[Phase.HEAD_REPROJECTION] == 2 * rows * head.weight.numel()
    assert totals[Phase.STUDENT_BACKWARD] == 2 * totals[Phase.STUDENT_FORWARD] > 0
    assert totals[Phase.TEACHER_PREFILL] == totals[Phase.STUDENT_ROLLOUT] == totals[Phase.EVALUATION] == 0
    assert lines(tmp_path)[-1]["flops"] == ledger.marginal()


def test_evaluation_equals_plain_double_precision(
    other: Student, scored: list[ScoredSequence], head: TeacherHead
) -> None:
    ledger = FlopLedger()
    found = evaluate(other, [collate(scored[:3], head, CPU), collate(scored[3:], head, CPU)], ledger, step=0)
    sums = np.zeros(4)
    tokens = 0
    with torch.no_grad():
        for item in scored:
            ids = torch.from_numpy(item.sequence.token_ids[None].astype("int64"))
            rows = slice(item.sequence.first_row, len(item.sequence) - 1)
            student_logits = other.model(input_ids=ids).logits[0, rows, : other.vocab_size].double()
            assert isinstance(item.targets, HiddenStateTargets)
            teacher_logits = torch.from_numpy(item.targets.hidden).double() @ head.weight.double().T
            q, p = student_logits.log_softmax(-1), teacher_logits.log_softmax(-1)
            terms = (p.exp() * (p - q), q.exp() * (q - p), -q.exp() * q, -p.exp() * p)
            sums += [float(term.sum()) for term in terms]
            tokens += item.sequence.completion_tokens
    assert list(found.nats.values()) == pytest.approx((sums / tokens).tolist(), rel=1e-4)
    assert (found.tokens, found.sequences) == (tokens, len(scored))
    assert ledger.marginal() == 0 < ledger.by_phase()[Phase.EVALUATION]


def test_an_entropy_that_a_server_did_not_report_is_null(
    other: Student, scored: list[ScoredSequence], head: TeacherHead
) -> None:
    """Also where only some rows lack it: a mean over the others would be another quantity."""
    items = []
    for number, item in enumerate(scored):
        rows = item.sequence.completion_tokens
        targets = TopKTargets(
            ids=np.zeros(rows, np.int32),
            log_probs=np.full(rows, -1, np.float32),
            row_splits=np.arange(rows + 1, dtype=np.int64),
            tail_log_mass=np.full(rows, np.log(-np.expm1(-1)), np.float32),
            token_log_prob=np.full(rows, -1, np.float32),
            entropy=np.full(rows, np.nan if number == 3 else 2, np.float32),
        )
        items.append(ScoredSequence(sequence=item.sequence, targets=targets))
    found = evaluate(other, [collate(items, None, CPU)], FlopLedger(), step=0)
    assert found.nats["teacher_entropy_nats"] is None
    assert found.nats["forward_kl_nats_coarse"] is not None
    without = evaluate(other, [collate(items[:3], None, CPU)], FlopLedger(), step=0)
    assert without.nats["teacher_entropy_nats"] == pytest.approx(2)
    with pytest.raises(TypeError, match="exact and coarse"):
        evaluate(other, [collate(items[:1], None, CPU), collate(scored[:1], head, CPU)], FlopLedger(), step=0)


@pytest.mark.parametrize("options", [{"steps": 0}, {"learning_rate": 0.0}, {"learning_rate": float("nan")}])
def test_impossible_optimisation_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UserError):
        Optimisation(**{"steps": 1, "learning_rate": 1e-3, "warmup_steps": 1, **options})
