"""What is minimised: a per-token divergence, chosen by what is known of the teacher.

Guarantees: losses are per token, in nats, unreduced; the division happens in `step_mean` and `token_mean` and nowhere
else, by counts of the whole step, so that micro-batches change no result; targets that cannot give the divergence asked
for are refused, never approximated.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import kernels
from kernels import DenseTargets, KLOutput, LinearHead, SampledTargets, Targets, TopKTargets
from logitcache.errors import UserError
from trainer.batch import Batch
from trainer.distributed import ALONE, Ranks
from trainer.settings import Backend, Weighting


@dataclass(frozen=True, kw_only=True)
class Objective:
    """(1 - s) * (forward_weight * KL(teacher, student) + (1 - forward_weight) * KL(student, teacher)) + s * CE.

    Attributes:
        forward_weight: 1 forward, 0 reverse, between them a linear mix (arXiv 2605.16826).
        temperature: divides both sides' logits in the divergences; not in the cross-entropy.
        backend: of `kernels`; None picks by device.
        cross_entropy_share: s, of the cross-entropy of the text itself: 0 none, 1 nothing else (plain fine-tuning on
            what the teacher wrote; its distributions are not looked at). Not for text that the student wrote: of its
            own draws the expected gradient is zero, and what sampling cuts off (top-p, top-k) only sharpens it.
    """

    forward_weight: float
    temperature: float = 1.0
    backend: Backend | None = None
    cross_entropy_share: float = 0.0

    def __post_init__(self) -> None:
        share = self.cross_entropy_share
        if not 0 <= share <= 1:
            raise UserError("a cross-entropy share of 0 to 1", f"got {share}", "0 is none, 1 is nothing else")
        if not 0 <= self.forward_weight <= 1:
            raise UserError("a forward weight of 0 to 1", f"got {self.forward_weight}", "1 is forward KL, 0 reverse KL")
        if not 0 < self.temperature < math.inf:
            raise UserError("a finite temperature above 0", f"got {self.temperature}", "1 is what the paper uses")

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

    def names(self, targets: Targets) -> tuple[str, ...]:
        """What `over` sums, as it is called in metrics."""
        text = ("cross_entropy_nats",) if self.cross_entropy_share else ()
        return ("loss_nats", *names_of(targets).values(), *text)

    def over(self, student: LinearHead, batch: Batch) -> tuple[Tensor, Tensor]:
        """The loss of each of the batch's R rows, with its gradient; and the sums over rows of what `names` names.

        Returns:
            float[R], nats; float64 on the CPU, NaN where something is not known.

        Raises:
            UserError: as a call does.
        """
        share = self.cross_entropy_share
        if share == 0:
            out = self(student, batch.targets)
            return out.loss, field_sums(out)
        text = kernels.selected_log_probs(student, batch.next_ids, backend=self.backend)
        text_loss_R = -text.log_probs
        if share == 1:
            unknown = torch.full_like(text_loss_R, math.nan)
            entropies = {"student_entropy": text.student_entropy, "teacher_entropy": unknown}
            out = KLOutput(loss=text_loss_R, forward_kl=unknown, reverse_kl=None, **entropies)
        else:
            out = self(student, batch.targets)
            out = replace(out, loss=(1 - share) * out.loss + share * text_loss_R)
        return out.loss, torch.cat([field_sums(out), text_loss_R.detach().double().sum().cpu()[None]])

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


@dataclass(frozen=True, kw_only=True)
class StepSize:
    """What a step holds, over all its micro-batches and ranks.

    Attributes:
        target_rows: completion tokens.
        sequences: sequences.
        tokens: packed rows.
        micro_batches: of the rank that has most; 0 if the text has ended.
    """

    target_rows: int
    sequences: int
    tokens: int
    micro_batches: int

    @classmethod
    def of(cls, batches: Sequence[Batch], ranks: Ranks = ALONE) -> StepSize:
        """Of this rank's micro-batches and the other ranks'."""
        sizes = [(one.target_rows, len(one.sequence_lengths), one.tokens, 1) for one in batches]
        by_rank = ranks.gathered(torch.tensor(sizes, dtype=torch.int64).reshape(-1, 4).sum(0))
        rows, sequences, tokens, _ = by_rank.sum(0).tolist()
        counts = by_rank[:, 3].tolist()
        most = max(counts) if all(counts) else 0
        return cls(target_rows=rows, sequences=sequences, tokens=tokens, micro_batches=most)


def step_mean(loss_R: Tensor, batch: Batch, step: StepSize, weighting: Weighting = Weighting.TOKEN) -> Tensor:
    """A micro-batch's part of the mean over all completion tokens, or all sequences, of the step."""
    match weighting:
        case Weighting.TOKEN:
            return token_mean(loss_R, step.target_rows)
        case Weighting.SEQUENCE:
            ends = torch.tensor(batch.sequence_lengths, device=loss_R.device).cumsum(0)
            sequence_R = torch.bucketize(batch.rows, ends, right=True)
            tokens_R = torch.bincount(sequence_R)[sequence_R]
            return (loss_R / tokens_R).sum() / step.sequences
