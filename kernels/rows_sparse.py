"""Row maths against kept ids: the only full-vocabulary work is the student's own log-sum-exp and softmax.

Guarantees: kept entries are never spread over a dense row; the student's mass outside the kept ids is summed by itself
(never 1 - kept, which cancels). Serves top-k with tail (k+1 outcomes) and samples, which define only forward KL.
Equations: docs/objectives.md.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.collectives import Ranks
from kernels.eager import weigh
from kernels.engine import LOWEST, RowMaths
from kernels.rows import RowValues, solo_values
from kernels.types import LinearHead, SampledTargets, TopKTargets


@dataclass(frozen=True, kw_only=True, eq=False)
class SparseRows:
    """The kept entries of a tile whose ids lie in this rank's part of the vocabulary, float64.

    Attributes:
        row_E: int64, the tile's row of each entry; id_E: int64, its local column.
        p_E, log_p_E: the teacher's probability (share of the draws for samples) and its log.
        tail_N, log_tail_N: the teacher's mass outside the kept ids; None for samples.
        mass_N: kept plus tail mass, 1 up to rounding.
        entropy_N: the teacher's, as recorded.
    """

    row_E: Tensor
    id_E: Tensor
    p_E: Tensor
    log_p_E: Tensor
    log_tail_N: Tensor | None
    mass_N: Tensor
    entropy_N: Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class SparseStatistics:
    """What the gradient needs: float64[N] log-sums, and float64[E] of the kept entries."""

    log_sum_rest: Tensor
    log_q_rest: Tensor
    log_q_E: Tensor
    logits_E: Tensor
    reverse_kl: Tensor | None


def sparse_rows(targets: TopKTargets | SampledTargets, rows: Tensor | slice, start: int, width: int) -> SparseRows:
    """The entries of `rows` with ids in start..start+width."""
    splits = targets.row_splits
    first, last = splits[:-1][rows], splits[1:][rows]
    length_N = last - first
    row_E = torch.repeat_interleave(torch.arange(len(length_N), device=splits.device), length_N)
    before_N = length_N.cumsum(0) - length_N
    entry_E = torch.arange(len(row_E), device=splits.device) + (first - before_N)[row_E]
    log_tail_N: Tensor | None
    match targets:
        case TopKTargets():
            log_p_E = targets.log_probs[entry_E].double()
            log_tail_N = targets.tail_log_mass[rows].double()
            tail_N = log_tail_N.exp()
        case SampledTargets():
            count_E = targets.counts[entry_E].double()
            drawn_N = count_E.new_zeros(len(length_N)).index_add_(0, row_E, count_E)
            log_p_E, log_tail_N, tail_N = (count_E / drawn_N[row_E]).log(), None, torch.zeros_like(drawn_N)
    p_E = log_p_E.exp()
    mass_N = tail_N.index_add(0, row_E, p_E)
    id_E = targets.ids[entry_E].long() - start
    here = ((id_E >= 0) & (id_E < width)).nonzero()[:, 0]
    return SparseRows(
        row_E=row_E[here],
        id_E=id_E[here],
        p_E=p_E[here],
        log_p_E=log_p_E[here],
        log_tail_N=log_tail_N,
        mass_N=mass_N,
        entropy_N=targets.entropy[rows].double(),
    )


def sparse_statistics(
    student_NV: Tensor, kept: SparseRows, engine: RowMaths, ranks: Ranks
) -> tuple[SparseStatistics, RowValues]:
    """Log-sums of the kept and of the other ids apart; leaves -inf at the kept ids (the gradient fills them in)."""
    logits_E = student_NV[kept.row_E, kept.id_E].double()
    student_NV[kept.row_E, kept.id_E] = -torch.inf
    rest_max, (rest_sum, rest_self) = solo_values(*engine.solo_sums(student_NV), ranks)
    kept_max = torch.full_like(rest_max, LOWEST).scatter_reduce_(0, kept.row_E, logits_E, reduce="amax")
    top = torch.maximum(rest_max, ranks.max_(kept_max))
    kept_sum = ranks.sum_(_per_row(kept, (logits_E - top[kept.row_E]).exp()))
    log_sum_rest = rest_max + rest_sum.log()  # -inf when every id is kept
    log_sum = torch.logaddexp(log_sum_rest, top + kept_sum.log())
    statistics = _Student(
        log_q_E=logits_E - log_sum[kept.row_E],
        log_q_rest=log_sum_rest - log_sum,
        mean_log_q_rest=torch.where(rest_sum > 0, rest_self / rest_sum + rest_max - log_sum, 0.0),
    )
    values = _values(kept, statistics, ranks)
    return SparseStatistics(
        log_sum_rest=log_sum_rest,
        log_q_rest=statistics.log_q_rest,
        log_q_E=statistics.log_q_E,
        logits_E=logits_E,
        reverse_kl=values.reverse_kl,
    ), values


@dataclass(frozen=True, kw_only=True, eq=False)
class _Student:
    log_q_E: Tensor
    log_q_rest: Tensor
    mean_log_q_rest: Tensor


def _per_row(kept: SparseRows, value_E: Tensor) -> Tensor:
    return torch.zeros_like(kept.mass_N).index_add_(0, kept.row_E, value_E)


def _values(kept: SparseRows, student: _Student, ranks: Ranks) -> RowValues:
    q_E, q_rest = student.log_q_E.exp(), student.log_q_rest.exp()
    gap_E = -student.log_q_E if kept.log_tail_N is None else kept.log_p_E - student.log_q_E
    terms = (weigh(q_E, student.log_q_E), weigh(kept.p_E, gap_E), weigh(q_E, -gap_E))
    student_self, forward, reverse = ranks.sum_(torch.stack([_per_row(kept, term) for term in terms]))
    reverse_kl: Tensor | None = None
    if kept.log_tail_N is None:
        forward = forward - kept.entropy_N
    else:
        gap_rest = kept.log_tail_N - student.log_q_rest
        forward = forward + weigh(kept.log_tail_N.exp(), gap_rest)
        reverse_kl = reverse + weigh(q_rest, -gap_rest)
    return RowValues(
        forward_kl=forward,
        reverse_kl=reverse_kl,
        student_entropy=-(student_self + q_rest * student.mean_log_q_rest),
        teacher_entropy=kept.entropy_N,
    )


def sparse_gradient_(
    student_NV: Tensor,
    kept: SparseRows,
    statistics: SparseStatistics,
    forward_weight: float,
    head: LinearHead,
    engine: RowMaths,
) -> None:
    """Overwrite the student's logits with the gradient with respect to hidden @ weight.T + bias."""
    q_E, q_rest = statistics.log_q_E.exp(), statistics.log_q_rest.exp()
    gradient_E = forward_weight * (kept.mass_N[kept.row_E] * q_E - kept.p_E)
    factor_N = forward_weight * kept.mass_N * q_rest
    if kept.log_tail_N is not None:
        factor_N = factor_N - forward_weight * kept.log_tail_N.exp()
    if kept.log_tail_N is not None and forward_weight < 1:
        reverse_kl = statistics.reverse_kl
        assert reverse_kl is not None
        tail = weigh(q_rest, statistics.log_q_rest - kept.log_tail_N - reverse_kl)
        entry = weigh(q_E, statistics.log_q_E - kept.log_p_E - reverse_kl[kept.row_E])
        factor_N = factor_N + (1 - forward_weight) * tail
        gradient_E = gradient_E + (1 - forward_weight) * entry
    nothing_left = torch.isneginf(statistics.log_sum_rest)
    engine.solo_gradient_(student_NV, torch.where(nothing_left, 0.0, statistics.log_sum_rest), factor_N, head)
    slope_E: Tensor | float = head.scale
    if head.soft_cap is not None:
        slope_E = head.scale * (1 - (statistics.logits_E / head.soft_cap).square())
    student_NV[kept.row_E, kept.id_E] = (gradient_E * slope_E).to(student_NV.dtype)
