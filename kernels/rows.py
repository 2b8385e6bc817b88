"""From a tile's sums to its divergences, entropies and what the gradient needs, against a full distribution.

Guarantees: a handful of float64 numbers a row; everything is relative to each side's maximum and differences are taken
before they are summed, so that a divergence of 1e-4 nats keeps its digits. Ranks that share the vocabulary exchange
these numbers and nothing else. Equations: docs/objectives.md.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.collectives import Ranks


@dataclass(frozen=True, kw_only=True, eq=False)
class RowValues:
    """What a tile reports, float64[N] each, nats; None where the targets do not tell."""

    forward_kl: Tensor
    reverse_kl: Tensor | None
    student_entropy: Tensor
    teacher_entropy: Tensor


def pair_values(tops_2N: Tensor, sums_6N: Tensor, ranks: Ranks) -> tuple[RowValues, Tensor]:
    """Values of a tile from `RowMaths.pair_sums`, and the [5, N] that `RowMaths.pair_gradient_` takes."""
    tops, sums = _over_ranks(tops_2N, sums_6N, ranks)
    student_sum, teacher_sum, student_self, teacher_self, student_gap, teacher_gap = sums
    log_ratio = (teacher_sum / student_sum).log()
    values = RowValues(
        forward_kl=(teacher_gap / teacher_sum - log_ratio).clamp_min(0),
        reverse_kl=(reverse_kl := (student_gap / student_sum + log_ratio).clamp_min(0)),
        student_entropy=student_sum.log() - student_self / student_sum,
        teacher_entropy=teacher_sum.log() - teacher_self / teacher_sum,
    )
    return values, torch.stack([tops[0], 1 / student_sum, tops[1], 1 / teacher_sum, reverse_kl - log_ratio])


def _over_ranks(tops_2N: Tensor, sums_6N: Tensor, ranks: Ranks) -> tuple[Tensor, Tensor]:
    """Move each rank's sums to the common maxima and add them up."""
    if ranks.shard is None:
        return tops_2N, sums_6N
    tops = ranks.max_(tops_2N.clone())
    rise_a, rise_b = tops_2N - tops
    exp_a, exp_b = rise_a.exp(), rise_b.exp()
    ea, eb, self_a, self_b, gap_a, gap_b = sums_6N
    moved = [
        exp_a * ea,
        exp_b * eb,
        exp_a * (self_a + ea * rise_a),
        exp_b * (self_b + eb * rise_b),
        exp_a * (gap_a + ea * (rise_a - rise_b)),
        exp_b * (gap_b + eb * (rise_b - rise_a)),
    ]
    return tops, ranks.sum_(torch.stack(moved))


def solo_values(top_N: Tensor, sums_2N: Tensor, ranks: Ranks) -> tuple[Tensor, Tensor]:
    """`RowMaths.solo_sums` over all ranks: float64[N] maximum and [2, N] sums."""
    if ranks.shard is None:
        return top_N, sums_2N
    top = ranks.max_(top_N.clone())
    rise = top_N - top
    moved = torch.stack([rise.exp() * sums_2N[0], rise.exp() * (sums_2N[1] + sums_2N[0] * rise)])
    return top, ranks.sum_(moved)
