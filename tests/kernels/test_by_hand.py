"""The first rung: two- and three-token distributions small enough to compute on paper, on every backend."""

from __future__ import annotations

import math

import pytest
import torch

import kernels
from kernels import DenseTargets, LinearHead, SampledTargets, TopKTargets

BACKENDS = ["reference", "chunked", "native"]
LN2 = math.log(2)


def student_of(logits: list[float]) -> LinearHead:
    """One row whose logits are the weights themselves (width 2, so that bfloat16 pairs are whole)."""
    weight = torch.tensor([[z, 0.0] for z in logits], requires_grad=True)
    return LinearHead(hidden=torch.tensor([[1.0, 0.0]]), weight=weight)


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_tokens_by_hand(backend: kernels.Backend) -> None:
    """Student (1/2, 1/2), teacher (1/4, 3/4): both divergences, both entropies, and q - p."""
    student = student_of([0.0, 0.0])
    teacher = DenseTargets(log_probs=torch.tensor([[0.25, 0.75]]).log())
    out = kernels.forward_kl(student, teacher, backend=backend)
    teacher_entropy = 2 * LN2 - 0.75 * math.log(3)
    assert out.forward_kl.item() == pytest.approx(LN2 - teacher_entropy, rel=1e-6)
    assert out.reverse_kl is not None
    assert out.reverse_kl.item() == pytest.approx(LN2 - 0.5 * math.log(3), rel=1e-6)
    assert out.student_entropy.item() == pytest.approx(LN2, rel=1e-6)
    assert out.teacher_entropy.item() == pytest.approx(teacher_entropy, rel=1e-6)
    out.loss.sum().backward()
    assert student.weight.grad is not None
    assert student.weight.grad[:, 0].tolist() == pytest.approx([0.25, -0.25], rel=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_reverse_gradient_by_hand(backend: kernels.Backend) -> None:
    """Q (log q - log p - KL) of student (1/2, 1/4, 1/4) and a uniform teacher: log p cancels, so q (log q + H(q))."""
    student = student_of([LN2, 0.0, 0.0])
    out = kernels.reverse_kl(student, DenseTargets(logits=torch.full((1, 3), 7.0)), backend=backend)
    out.loss.sum().backward()
    assert student.weight.grad is not None
    expected = [0.5 * 0.5 * LN2, -0.25 * 0.5 * LN2, -0.25 * 0.5 * LN2]
    assert student.weight.grad[:, 0].tolist() == pytest.approx(expected, rel=1e-6)
    assert out.loss.item() == pytest.approx(math.log(3) - 1.5 * LN2, rel=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_top_one_with_tail_by_hand(backend: kernels.Backend) -> None:
    """Student (1/2, 1/4, 1/4); teacher keeps token 0 at 1/4 and a tail of 3/4: the two-outcome divergences."""
    student = student_of([LN2, 0.0, 0.0])
    targets = TopKTargets(
        ids=torch.tensor([0]),
        log_probs=torch.tensor([0.25]).log(),
        row_splits=torch.tensor([0, 1]),
        tail_log_mass=torch.tensor([0.75]).log(),
        entropy=torch.tensor([1.0]),
    )
    out = kernels.forward_kl_coarse(student, targets, backend=backend)
    assert out.loss.item() == pytest.approx(0.25 * math.log(0.5) + 0.75 * math.log(1.5), rel=1e-6)
    assert out.reverse_kl is not None
    assert out.reverse_kl.item() == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3), rel=1e-6)
    assert out.student_entropy.item() == pytest.approx(1.5 * LN2, rel=1e-6)
    assert out.teacher_entropy.item() == 1.0
    out.loss.sum().backward()
    assert student.weight.grad is not None
    assert student.weight.grad[:, 0].tolist() == pytest.approx([0.25, -0.125, -0.125], rel=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_samples_by_hand(backend: kernels.Backend) -> None:
    """Draws (0, 0, 1) against a uniform student of two: cross-entropy ln 2, less the recorded entropy."""
    student = student_of([3.0, 3.0])
    targets = SampledTargets(
        ids=torch.tensor([0, 1]),
        counts=torch.tensor([2, 1]),
        row_splits=torch.tensor([0, 2]),
        entropy=torch.tensor([0.5]),
    )
    out = kernels.forward_kl(student, targets, backend=backend)
    assert out.loss.item() == pytest.approx(LN2 - 0.5, rel=1e-6)
    assert out.reverse_kl is None
    out.loss.sum().backward()
    assert student.weight.grad is not None
    assert student.weight.grad[:, 0].tolist() == pytest.approx([0.5 - 2 / 3, 0.5 - 1 / 3], rel=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_selected_log_prob_by_hand(backend: kernels.Backend) -> None:
    """Temperature 2 of logits (ln 4, 0) is (2/3, 1/3)."""
    student = student_of([2 * LN2, 0.0])
    out = kernels.selected_log_probs(student, torch.tensor([1]), temperature=2.0, backend=backend)
    assert out.log_probs.item() == pytest.approx(-math.log(3), rel=1e-6)
    out.log_probs.sum().backward()
    assert student.weight.grad is not None
    assert student.weight.grad[:, 0].tolist() == pytest.approx([-1 / 3, 1 / 3], rel=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_ties_and_impossible_tokens(backend: kernels.Backend) -> None:
    """Equal logits share; a token impossible on both sides (-inf) adds nothing and gets no gradient."""
    bias = torch.tensor([0.0, 0.0, -torch.inf], requires_grad=True)
    student = LinearHead(hidden=torch.zeros(1, 2), weight=torch.zeros(3, 2), bias=bias)
    teacher = DenseTargets(logits=torch.tensor([[LN2, 0.0, -torch.inf]]))
    for loss in (kernels.forward_kl, kernels.reverse_kl):
        out = loss(student, teacher, backend=backend)
        assert torch.isfinite(out.loss).all()
    assert out.student_entropy.item() == pytest.approx(LN2, rel=1e-6)
    assert out.reverse_kl is not None
    assert out.reverse_kl.item() == pytest.approx(0.5 * math.log(9 / 8), rel=1e-5)
    out.loss.sum().backward()
    assert bias.grad is not None
    assert bias.grad[2].item() == 0.0
    assert bias.grad[:2].tolist() == pytest.approx([-0.25 * LN2, 0.25 * LN2], rel=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_infinite_divergence_is_said_to_be_infinite(backend: kernels.Backend) -> None:
    """Reverse KL where the teacher rules out what the student allows; forward KL of the same pair is finite."""
    teacher = DenseTargets(logits=torch.tensor([[0.0, -torch.inf]]))
    out = kernels.forward_kl(student_of([0.0, 0.0]), teacher, backend=backend)
    assert out.loss.item() == pytest.approx(LN2, rel=1e-6)
    assert out.reverse_kl is not None
    assert out.reverse_kl.item() == math.inf
