"""The policy-gradient loss of GRPO: advantages within groups, a clipped ratio, k3, and what they are divided by.

Guarantees: values per row, in nats where they are logarithms, unreduced; weights that add the loss up are taken over
the whole step, so that micro-batches change no result; no logits here, only the log-probabilities of realised tokens.
Formulas and sources: docs/grpo.md. Letters: P problems, G answers to each, B = P * G sequences, R completion tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.policy.settings import AdvantageScale, Normalisation, ReferenceKL, Surrogate

STD_FLOOR = 1e-4
"""Added to a group's standard deviation, as TRL does."""


def group_advantages(reward_PG: Tensor, scale: AdvantageScale) -> Tensor:
    """float64[P, G]: each reward less its group's mean, perhaps over the group's sample standard deviation.

    A group whose rewards are all equal is exactly 0: it says nothing of which answer was better.
    """
    reward_PG = reward_PG.double()
    equal_P1 = (reward_PG == reward_PG[:, :1]).all(dim=1, keepdim=True)
    advantage_PG = (reward_PG - reward_PG.mean(dim=1, keepdim=True)).masked_fill(equal_P1, 0.0)
    match scale:
        case AdvantageScale.STD:
            return advantage_PG / (reward_PG.std(dim=1, keepdim=True) + STD_FLOOR)
        case AdvantageScale.NONE:
            return advantage_PG


def sequence_weights(lengths: Sequence[int], normalisation: Normalisation, max_new_tokens: int) -> Tensor:
    """float64[B]: what each token's loss of a sequence is multiplied by, for the step's loss to be the sum."""
    count = len(lengths)
    match normalisation:
        case Normalisation.TOKEN:
            return torch.full((count,), 1 / sum(lengths), dtype=torch.float64)
        case Normalisation.SEQUENCE:
            return 1 / (count * torch.tensor(lengths, dtype=torch.float64))
        case Normalisation.CONSTANT:
            return torch.full((count,), 1 / (count * max_new_tokens), dtype=torch.float64)


@dataclass(frozen=True, kw_only=True, eq=False)
class SurrogateOutput:
    """float[R] each; only the loss has a gradient. `clipped` is bool[R]; `kl` is 0 without a reference."""

    loss: Tensor
    ratio: Tensor
    clipped: Tensor
    kl: Tensor


def surrogate_loss(
    settings: Surrogate, log_probs: Tensor, old_log_probs: Tensor, advantage: Tensor, reference: Tensor | None
) -> SurrogateOutput:
    """-min(ratio * A, clip(ratio) * A) + kl_weight * KL of each row, with ratio = exp(log_probs - old_log_probs).

    Args:
        settings: the clip range, and the weight and estimate of the divergence from the reference.
        log_probs: float[R], of the realised tokens under the policy, with a gradient.
        old_log_probs: float[R], under the policy that wrote them.
        advantage: float[R], of each token's answer.
        reference: float[R], log-probabilities under the reference; None leaves the divergence out.
    """
    low, high = 1 - settings.clip_low, 1 + settings.clip_high
    ratio = (log_probs - old_log_probs).exp()
    loss = -torch.minimum(ratio * advantage, ratio.clamp(low, high) * advantage)
    clipped = (ratio > high) & (advantage > 0) | (ratio < low) & (advantage < 0)
    kl = torch.zeros_like(loss)
    if reference is not None:
        away = reference - log_probs
        kl = away.exp() - away - 1  # k3 of http://joschu.net/blog/kl-approx.html
        if settings.kl is ReferenceKL.CORRECTED:
            kl = kl * ratio
        loss = loss + settings.kl_weight * kl
    return SurrogateOutput(loss=loss, ratio=ratio.detach(), clipped=clipped, kl=kl.detach())
