"""What a model says of completions that it wrote: its entropy and the probability of ending, for each of them.

Guarantees: exact, over the whole vocabulary at temperature 1, whatever the text was drawn with; any engine that gives
hidden states can be asked. `trainer.rollouts.measure_own_text` gives the mean over a draw, for a student in training.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch

from kernels import LinearHead, selected_log_probs
from logitcache.records import ScoredSequence, TokenSequence
from logitcache.scoring import HiddenStateRequest, Scorer
from trainer.batch import collate, teacher_head

_SEQUENCES_AT_ONCE = 16
"""Bounds the hidden states that are held."""


@dataclass(frozen=True, kw_only=True)
class OwnDistribution:
    """Means over the tokens of one completion: entropy in nats, and the probability given to stop tokens."""

    entropy_nats: float
    eos_mass: float


def own_distributions(
    scorer: Scorer, sequences: Sequence[TokenSequence], stop_ids: Collection[int], device: torch.device
) -> list[OwnDistribution]:
    """One for each sequence, in order; `stop_ids` is at least one token."""
    head = teacher_head(scorer.head, device)
    found: list[OwnDistribution] = []
    for start in range(0, len(sequences), _SEQUENCES_AT_ONCE):
        part = sequences[start : start + _SEQUENCES_AT_ONCE]
        targets = scorer.score(part, [HiddenStateRequest()])
        scored = [ScoredSequence(sequence=one, targets=states) for one, (states,) in zip(part, targets, strict=True)]
        own = collate(scored, head, device).targets
        assert isinstance(own, LinearHead)
        with torch.no_grad():
            passes = [selected_log_probs(own, torch.full((own.rows,), token, device=device)) for token in stop_ids]
        entropy_R = passes[0].student_entropy.double()
        stop_R = torch.stack([one.log_probs.double().exp() for one in passes]).sum(dim=0)
        lengths = [one.completion_tokens for one in part]
        found += [
            OwnDistribution(entropy_nats=float(entropy.mean()), eos_mass=float(mass.mean()))
            for entropy, mass in zip(entropy_R.split(lengths), stop_R.split(lengths), strict=True)
        ]
    return found
