"""Errors of loss and gradients against float64, with bfloat16 and float32 inputs, a hair from the teacher."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import kernels
from tools.bench.kernels_subjects import DTYPES, FORWARD_WEIGHT, SUBJECTS, Shape, Work

NUDGES = (0.01, 0.03, 0.1)
"""Standard deviation added to the teacher's states: KL of about 1e-4, 1e-3 and 1e-2 nats with logits of deviation 2."""


def _near(shape: Shape, dtype: torch.dtype, nudge: float) -> Work:
    """The student has the teacher's head, and its states moved by `nudge`."""
    work = Work.random(shape, dtype)
    noise = torch.randn(work.teacher_hidden.shape, generator=torch.Generator().manual_seed(2))
    moved = (work.teacher_hidden.float() + nudge * noise).to(dtype)
    return replace(
        work,
        student_hidden=moved.requires_grad_(),
        student_weight=work.teacher_weight.clone().requires_grad_(),
    )


def _error(value: Tensor, truth: Tensor) -> float:
    return float((value.double() - truth.double()).norm() / truth.double().norm())


def _truth(work: Work, objective: str) -> Tensor:
    student, teacher = work.heads
    loss = kernels.mixed_kl(student, teacher, forward_weight=FORWARD_WEIGHT[objective], backend="reference").loss.mean()
    loss.backward()
    return loss.detach()


def precision(shape: Shape, with_liger: bool) -> list[dict[str, Any]]:
    """One entry for each dtype, distance and objective: relative errors of each subject."""
    found = []
    for dtype in DTYPES:
        for nudge in NUDGES:
            for objective in ("forward", "reverse"):
                work = _near(shape, DTYPES[dtype], nudge)
                true_loss = _truth(work, objective)
                true_gradients = work.take_gradients()
                errors = {}
                for subject in ("native", "plain", "liger") if with_liger else ("native", "plain"):
                    loss = SUBJECTS[subject](work, objective)
                    pairs = zip(work.take_gradients(), true_gradients, strict=True)
                    hidden, weight = (
                        _error(got, truth) for got, truth in pairs if got is not None and truth is not None
                    )
                    errors[subject] = {
                        "loss_relative_error": _error(loss, true_loss),
                        "hidden_gradient_relative_error": hidden,
                        "weight_gradient_relative_error": weight,
                    }
                found.append({"dtype": dtype, "objective": objective, "kl_nats": float(true_loss), "errors": errors})
    return found
