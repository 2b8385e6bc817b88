"""How far a student is from its teacher on text that neither was trained on here.

Guarantees: both divergences and both entropies are exact over the full vocabulary, at temperature 1, and means over
tokens (not means of means); only tiles of logits exist at any time; nothing is trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kernels import DenseTargets, LinearHead, mixed_kl
from trainer.batch import Batch, teacher_head_flops
from trainer.flops import FlopLedger, add_evaluation
from trainer.student import Student


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """Means over `tokens` held-out completion tokens of `sequences` sequences the teacher wrote, in nats."""

    forward_kl_nats: float
    reverse_kl_nats: float
    student_entropy_nats: float
    teacher_entropy_nats: float
    tokens: int
    sequences: int


def evaluate(student: Student, batches: Sequence[Batch], ledger: FlopLedger, *, step: int) -> HeldOut:
    """Measure `student` on batches with exact targets (hidden states or full vocabularies).

    Raises:
        TypeError: coarse targets, whose numbers must not stand beside exact ones.
    """
    sums = torch.zeros(4, dtype=torch.float64)
    tokens = sequences = 0
    with torch.no_grad():
        for batch in batches:
            if not isinstance(batch.targets, LinearHead | DenseTargets):
                raise TypeError(f"exact divergences from {type(batch.targets).__name__}, which are coarse")
            out = mixed_kl(student.head_over(batch), batch.targets, forward_weight=1.0)
            assert out.reverse_kl is not None
            fields = (out.forward_kl, out.reverse_kl, out.student_entropy, out.teacher_entropy)
            sums += torch.stack([field.double().sum() for field in fields]).cpu()
            tokens += batch.target_rows
            sequences += len(batch.sequence_lengths)
            add_evaluation(ledger, student.shape, batch, teacher_head_flops=teacher_head_flops(batch), step=step)
    forward, reverse, entropy, teacher_entropy = (sums / tokens).tolist()
    return HeldOut(
        forward_kl_nats=forward,
        reverse_kl_nats=reverse,
        student_entropy_nats=entropy,
        teacher_entropy_nats=teacher_entropy,
        tokens=tokens,
        sequences=sequences,
    )
