"""How far a student is from its teacher on text that neither was trained on here.

Guarantees: at temperature 1, means over tokens (not means of means); exact over the full vocabulary from hidden states
and full vocabularies, and named so only then (see `trainer.objectives.names_of`); only tiles of logits exist at any
time; nothing is trained.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from trainer.batch import Batch, teacher_head_flops
from trainer.flops import FlopLedger, Phase, add_evaluation
from trainer.objectives import Backend, Objective, field_sums, known, names_of
from trainer.student import Student


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """Means over `tokens` held-out completion tokens of `sequences` sequences the teacher wrote, in nats.

    Attributes:
        nats: by name, such as `forward_kl_nats` or `forward_kl_nats_coarse`; None where the targets do not say.
        flops: that measuring took.
    """

    nats: Mapping[str, float | None]
    tokens: int
    sequences: int
    flops: int


def evaluate(
    student: Student, batches: Sequence[Batch], ledger: FlopLedger, *, step: int | None, backend: Backend | None = None
) -> HeldOut:
    """Measure `student` on batches whose targets are all of one kind.

    Raises:
        TypeError: kinds mixed, whose numbers must not be averaged.
    """
    objective = Objective(forward_weight=1.0, backend=backend)
    names = names_of(batches[0].targets)
    sums = torch.zeros(1 + len(names), dtype=torch.float64)
    tokens = sequences = 0
    before = ledger.by_phase()[Phase.EVALUATION]
    with torch.no_grad():
        for batch in batches:
            if names_of(batch.targets) != names:
                raise TypeError("exact and coarse targets in one mean")
            sums += field_sums(objective(student.head_over(batch), batch.targets))
            tokens += batch.target_rows
            sequences += len(batch.sequence_lengths)
            projected = teacher_head_flops(batch)
            add_evaluation(ledger, student.shape, batch, teacher_head_flops=projected, step=step, lora=student.lora)
    means = map(known, (sums[1:] / tokens).tolist())
    return HeldOut(
        nats=dict(zip(names.values(), means, strict=True)),
        tokens=tokens,
        sequences=sequences,
        flops=ledger.by_phase()[Phase.EVALUATION] - before,
    )
