"""What a model says of completions that it wrote, and how far a teacher is from it there, for each of them.

Guarantees: exact, over the whole vocabulary at temperature 1, whatever the text was drawn with; any engine that gives
hidden states can be asked. `trainer.rollouts.measure_own_text` gives the mean over a draw, for a student in training.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels import LinearHead, forward_kl, selected_log_probs
from logitcache.records import ScoredSequence, TokenSequence
from logitcache.scoring import HiddenStateRequest, Scorer
from trainer.agreement import likeliest_of_head
from trainer.batch import TeacherHead, collate, teacher_head

_SEQUENCES_AT_ONCE = 16
"""Bounds the hidden states that are held."""


@dataclass(frozen=True, kw_only=True)
class OwnDistribution:
    """Means over the tokens of one completion.

    Attributes:
        entropy_nats: of the model.
        eos_mass: the probability it gives to stop tokens.
        forward_kl_nats: KL(teacher, model); None, as the next two, without a teacher.
        reverse_kl_nats: KL(model, teacher).
        top1_share: of the tokens, for which both have the same likeliest one.
    """

    entropy_nats: float
    eos_mass: float
    forward_kl_nats: float | None = None
    reverse_kl_nats: float | None = None
    top1_share: float | None = None


def own_distributions(
    scorer: Scorer,
    sequences: Sequence[TokenSequence],
    stop_ids: Collection[int],
    device: torch.device,
    teacher: Scorer | None = None,
) -> list[OwnDistribution]:
    """One for each sequence, in order.

    Args:
        scorer: the model that wrote them.
        sequences: what it wrote.
        stop_ids: at least one token.
        device: to compute on.
        teacher: of the same vocabulary, to compare with.
    """
    head = teacher_head(scorer.head, device)
    other = None if teacher is None else teacher_head(teacher.head, device)
    found: list[OwnDistribution] = []
    for start in range(0, len(sequences), _SEQUENCES_AT_ONCE):
        part = sequences[start : start + _SEQUENCES_AT_ONCE]
        own = _read(scorer, head, part, device)
        with torch.no_grad():
            passes = [selected_log_probs(own, torch.full((own.rows,), token, device=device)) for token in stop_ids]
        values_R = {
            "entropy_nats": passes[0].student_entropy,
            "eos_mass": torch.stack([one.log_probs.double().exp() for one in passes]).sum(dim=0),
        }
        if teacher is not None and other is not None:
            values_R |= _apart(own, _read(teacher, other, part, device))
        lengths = [one.completion_tokens for one in part]
        means = {name: [float(one.mean()) for one in value.double().split(lengths)] for name, value in values_R.items()}
        found += [
            OwnDistribution(**dict(zip(means, values, strict=True))) for values in zip(*means.values(), strict=True)
        ]
    return found


def _read(scorer: Scorer, head: TeacherHead, part: Sequence[TokenSequence], device: torch.device) -> LinearHead:
    """The distributions of all completion tokens, R rows."""
    targets = scorer.score(part, [HiddenStateRequest()])
    scored = [ScoredSequence(sequence=one, targets=states) for one, (states,) in zip(part, targets, strict=True)]
    rows = collate(scored, head, device).targets
    assert isinstance(rows, LinearHead)
    return rows


def _apart(own: LinearHead, teacher: LinearHead) -> dict[str, Tensor]:
    """How far a teacher is from a model, float[R] each."""
    with torch.no_grad():
        both = forward_kl(own, teacher)  # one pass gives both directions
        same = likeliest_of_head(own) == likeliest_of_head(teacher)
    assert both.reverse_kl is not None
    return {"forward_kl_nats": both.forward_kl, "reverse_kl_nats": both.reverse_kl, "top1_share": same}
