"""What the kernels' benchmark compares: each takes a `Work` and does one forward and backward of it.

Baselines are what one would write or import: plain torch, and Liger's chunked loss where it is installed.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

import kernels
from kernels import LinearHead

FORWARD_WEIGHT = {"forward": 1.0, "reverse": 0.0, "mixed": 0.5}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class Shape:
    """T rows, V vocabulary, and the widths of both sides."""

    rows: int
    vocab: int
    student_width: int
    teacher_width: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Work:
    """A student and a teacher: hidden states and heads."""

    student_hidden: Tensor
    student_weight: Tensor
    teacher_hidden: Tensor
    teacher_weight: Tensor

    @classmethod
    def random(cls, shape: Shape, dtype: torch.dtype, *, frozen_head: bool = False) -> Work:
        """Logits of standard deviation about 2; only the student wants gradients."""
        generator = torch.Generator().manual_seed(0)

        def normal(rows: int, width: int, scale: float) -> Tensor:
            return torch.empty(rows, width, dtype=dtype).normal_(0, scale, generator=generator)

        s, t = shape.student_width, shape.teacher_width
        return cls(
            student_hidden=normal(shape.rows, s, 1.0).requires_grad_(),
            student_weight=normal(shape.vocab, s, 2 / s**0.5).requires_grad_(not frozen_head),
            teacher_hidden=normal(shape.rows, t, 1.0),
            teacher_weight=normal(shape.vocab, t, 2 / t**0.5),
        )

    @property
    def heads(self) -> tuple[LinearHead, LinearHead]:
        """Student and teacher as the kernels take them."""
        return (
            LinearHead(hidden=self.student_hidden, weight=self.student_weight),
            LinearHead(hidden=self.teacher_hidden, weight=self.teacher_weight),
        )

    @property
    def gradient_bytes(self) -> int:
        """What every subject must leave behind."""
        return sum(t.nbytes for t in (self.student_hidden, self.student_weight) if t.requires_grad)

    def take_gradients(self) -> tuple[Tensor | None, Tensor | None]:
        """The gradients, removed from the leaves."""
        found = self.student_hidden.grad, self.student_weight.grad
        self.student_hidden.grad = self.student_weight.grad = None
        return found


Step = Callable[[Work, str], Tensor]
"""(work, objective) -> the mean loss, gradients left on the leaves."""


def ours(backend: kernels.Backend) -> Step:
    """One of our own backends."""

    def step(work: Work, objective: str) -> Tensor:
        student, teacher = work.heads
        weight = FORWARD_WEIGHT[objective]
        loss = kernels.mixed_kl(student, teacher, forward_weight=weight, backend=backend).loss.mean()
        loss.backward()
        return loss.detach()

    return step


def plain(work: Work, objective: str) -> Tensor:
    """Dense logits in the inputs' dtype, float32 log-softmax, autograd."""
    log_q = (work.student_hidden @ work.student_weight.T).float().log_softmax(1)
    with torch.no_grad():
        log_p = (work.teacher_hidden @ work.teacher_weight.T).float().log_softmax(1)
    kl_div, weight = torch.nn.functional.kl_div, FORWARD_WEIGHT[objective]
    loss = torch.zeros(())
    if weight > 0:
        loss = loss + weight * kl_div(log_q, log_p, log_target=True, reduction="sum")
    if weight < 1:
        loss = loss + (1 - weight) * kl_div(log_p, log_q, log_target=True, reduction="sum")
    loss = loss / len(log_q)
    loss.backward()
    return loss.detach()


@cache
def _liger_loss(beta: float) -> Any:
    module = importlib.import_module("liger_kernel.chunked_loss")
    return module.LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=beta, chunk_size=512)


def liger(work: Work, objective: str) -> Tensor:
    """Liger's fused_linear_jsd at beta 0 (forward) or 1 (reverse), torch.compile on, chunks of 512 rows."""
    loss = _liger_loss({"forward": 0.0, "reverse": 1.0}[objective])(
        work.student_hidden,
        work.student_weight,
        work.teacher_hidden,
        work.teacher_weight,
        torch.zeros(len(work.student_hidden), dtype=torch.long),
    )
    loss.backward()
    return loss.detach()


SUBJECTS: dict[str, Step] = {"native": ours("native"), "chunked": ours("chunked"), "plain": plain, "liger": liger}


class Floor:
    """The matrix products nobody can avoid, alone: both sides' logits, dX and, for a trainable head, dW."""

    def __init__(self, work: Work) -> None:
        self.work = work
        rows, vocab = len(work.student_hidden), len(work.student_weight)
        self.student_logits = torch.empty(rows, vocab, dtype=work.student_hidden.dtype)
        self.teacher_logits = torch.empty_like(self.student_logits)
        self.hidden_gradient = torch.empty_like(work.student_hidden)
        self.weight_gradient = torch.empty_like(work.student_weight) if work.student_weight.requires_grad else None

    @torch.no_grad()
    def __call__(self) -> None:
        """Run them."""
        work = self.work
        torch.mm(work.student_hidden, work.student_weight.T, out=self.student_logits)
        torch.mm(work.teacher_hidden, work.teacher_weight.T, out=self.teacher_logits)
        torch.mm(self.student_logits, work.student_weight, out=self.hidden_gradient)
        if self.weight_gradient is not None:
            torch.mm(self.student_logits.T, work.student_hidden, out=self.weight_gradient)
