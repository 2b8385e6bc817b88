"""What is minimised: a per-token divergence, chosen by what is known of the teacher.

Guarantees: losses are per token, in nats, unreduced; the division happens in `step_mean` and `token_mean` and nowhere
else, by counts of the whole step, so that micro-batches change no result; targets that cannot give the divergence asked
for are refused, never approximated.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import kernels
from kernels import DenseTargets, KLOutput, LinearHead, SampledTargets, Targets, TopKTargets
from logitcache.errors import UserError
from trainer.batch import Batch
from trainer.settings import Backend, Weighting


@dataclass(frozen=True, kw_only=True)
class Objective:
    """forward_weight * KL(teacher, student) + (1 - forward_weight) * KL(student, teacher).

    Attributes:
        forward_weight: 1 forward, 0 reverse, between them a linear mix (arXiv 2605.16826).
        temperature: divides both sides' logits.
        backend: of `kernels`; None picks by device.
    """

    forward_weight: float
    temperature: float = 1.0
    backend: Backend | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.forward_weight <= 1:
            raise UserError("a forward weight of 0 to 1", f"got {self.forward_weight}", "1 is forward KL, 0 reverse KL")
        if not self.temperature > 0:
            raise UserError("a temperature above 0", f"got {self.temperature}", "1 is what the paper uses")

    def __call__(self, student: LinearHead, targets: Targets) -> KLOutput:
        """The divergence of each row; coarse for top-k targets, exact for hidden states and full vocabularies.

        Raises:
            UserError: sampled targets and anything but forward KL.
        """
        match targets:
            case LinearHead() | DenseTargets():
                return kernels.mixed_kl(student, targets, forward_weight=self.forward_weight, **self._how)
            case TopKTargets():
                return kernels.mixed_kl_coarse(student, targets, forward_weight=self.forward_weight, **self._how)
            case SampledTargets():
                if self.forward_weight != 1:
                    found = "sampled targets, which say nothing of it"
                    raise UserError("reverse KL", found, "train from hidden states, or use forward weight 1")
                return kernels.forward_kl(student, targets, **self._how)

    @property
    def _how(self) -> dict[str, Any]:
        return {"temperature": self.temperature, "backend": self.backend}


def require_served(objective: Objective, kind: str) -> None:
    """Raise UserError unless a tier of this kind can give the divergence, before any work."""
    if kind == "sampled" and objective.forward_weight != 1:
        found = "a sampled tier, which says nothing of it"
        raise UserError("reverse KL", found, "train from hidden states, or use forward weight 1")
    if kind in ("topk", "sampled") and objective.temperature != 1:
        found = f"a {kind} tier, which is kept at temperature 1"
        raise UserError(f"--kl-temperature {objective.temperature}", found, "use hidden states, or temperature 1")


def names_of(targets: Targets) -> dict[str, str]:
    """What a divergence of these targets is called in metrics and results, by field of `KLOutput`.

    Exact numbers have the plain names. Those from top-k targets end in `_coarse` (lower bounds), and those estimated
    from samples in `_sampled`. Entropies are of full distributions whatever was kept.
    """
    match targets:
        case LinearHead() | DenseTargets():
            ending = ""
        case TopKTargets():
            ending = "_coarse"
        case SampledTargets():
            ending = "_sampled"
    names = {name: f"{name}_nats{ending}" for name in ("forward_kl", "reverse_kl")}
    return names | {name: f"{name}_nats" for name in ("student_entropy", "teacher_entropy")}


def field_sums(out: KLOutput) -> Tensor:
    """float64[5] on the CPU: sums over rows of loss, both divergences and both entropies.

    NaN where something is not known: the reverse KL of samples, or an entropy that a server did not report.
    """
    reverse = torch.full_like(out.loss, math.nan) if out.reverse_kl is None else out.reverse_kl
    fields = (out.loss, out.forward_kl, reverse, out.student_entropy, out.teacher_entropy)
    return torch.stack([field.detach().double().sum() for field in fields]).cpu()


def known(value: float) -> float | None:
    """A mean, or None if any of what it is the mean of is not known."""
    return None if math.isnan(value) else value


def token_mean(loss_R: Tensor, step_rows: int) -> Tensor:
    """A micro-batch's part of the mean over all completion tokens of the step: summed, divided once."""
    return loss_R.sum() / step_rows


def step_mean(loss_R: Tensor, batch: Batch, step: Sequence[Batch], weighting: Weighting = Weighting.TOKEN) -> Tensor:
    """A micro-batch's part of the mean over all completion tokens, or all sequences, of the step."""
    match weighting:
        case Weighting.TOKEN:
            return token_mean(loss_R, sum(one.target_rows for one in step))
        case Weighting.SEQUENCE:
            ends = torch.tensor(batch.sequence_lengths, device=loss_R.device).cumsum(0)
            sequence_R = torch.bucketize(batch.rows, ends, right=True)
            tokens_R = torch.bincount(sequence_R)[sequence_R]
            return (loss_R / tokens_R).sum() / sum(len(one.sequence_lengths) for one in step)
