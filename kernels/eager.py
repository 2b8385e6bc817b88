"""The engine of torch operations: any device, any float dtype, nothing compiled.

Guarantees: products take bfloat16 and float16 inputs as they are and give float32 (on CPUs, where torch cannot, by
exact widening of blocks of the weight). Temporaries are blocks of `BLOCK_ELEMENTS` elements.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from kernels.engine import LOWEST, HeadGradient, WeightSums, work_dtype
from kernels.types import LinearHead

BLOCK_ELEMENTS = 1 << 19
"""How much of a tile elementwise work touches at a time: 2 MiB of float32 for each temporary."""

OUTER_ROWS = 1 << 14
"""Vocabulary rows of a product that is added to a weight's gradient and cannot be in place: 64 MiB at D = 1,024."""


def column_blocks(rows: int, width: int) -> Iterator[slice]:
    """Slices that cover `width` vocabulary columns of `rows` rows, `BLOCK_ELEMENTS` at a time."""
    columns = max(BLOCK_ELEMENTS // max(rows, 1), 64)
    return (slice(start, min(start + columns, width)) for start in range(0, width, columns))


class EagerEngine:
    """See `kernels.engine.Engine`."""

    def require_servable(self, head: LinearHead) -> None:
        """All of them."""

    def empty(self, like: Tensor, dtype: torch.dtype, *shape: int) -> Tensor:
        """As torch gives it."""
        return torch.empty(shape, dtype=dtype, device=like.device)

    def weight_sums(self, head: LinearHead, work: torch.dtype) -> WeightSums:
        """In the work dtype."""
        return WeightSums(sums_VD=torch.zeros_like(head.weight, dtype=work))

    def rounded(self, sums: WeightSums, factor: float, dtype: torch.dtype) -> Tensor:
        """Scaled in place and rounded once."""
        return sums.sums_VD.mul_(factor).to(dtype)

    def padded(self, rows: int) -> int:
        """No padding."""
        return rows

    def tile(self, storage: Tensor, rows: int, width: int) -> Tensor:
        """Row-major."""
        return storage[: rows * width].view(rows, width)

    def logits_into(self, head: LinearHead, hidden_ND: Tensor, out_NV: Tensor) -> None:
        """See `Products`."""
        weight_VD, width = head.weight, head.local_width
        if hidden_ND.dtype == weight_VD.dtype == out_NV.dtype:
            torch.mm(hidden_ND, weight_VD[:width].T, out=out_NV)
        elif hidden_ND.is_cuda:
            out_NV.copy_(torch.mm(hidden_ND, weight_VD[:width].to(hidden_ND.dtype).T, out_dtype=out_NV.dtype))
        else:
            wide_ND = hidden_ND.to(out_NV.dtype)
            for block in column_blocks(*out_NV.shape):
                rounded = weight_VD[block].to(hidden_ND.dtype)
                out_NV[:, block] = wide_ND @ rounded.to(out_NV.dtype).T
        for block in column_blocks(*out_NV.shape):
            if head.bias is not None:
                out_NV[:, block] += head.bias[block].to(out_NV.dtype)
            if head.scale != 1:
                out_NV[:, block] *= head.scale
            if head.soft_cap is not None:
                out_NV[:, block].div_(head.soft_cap).tanh_().mul_(head.soft_cap)

    def add(
        self, sums: HeadGradient, head: LinearHead, rows: Tensor | slice, gradient_NV: Tensor, weight_N: Tensor
    ) -> None:
        """See `Products`."""
        hidden_ND, width = head.hidden[rows], head.local_width
        if sums.bias_V is not None:
            sums.bias_V[:width] += weight_N.to(gradient_NV.dtype) @ gradient_NV
        if gradient_NV.is_cuda:
            gradient_NV = gradient_NV.to(hidden_ND.dtype)  # once, for both products
        if sums.hidden_TD is not None:
            product_ND = _times_weight(gradient_NV, head.weight[:width])
            sums.hidden_TD[rows] = product_ND.to(sums.hidden_TD.dtype)
        if sums.weight is not None:
            total_VD = sums.weight.sums_VD[:width]
            weighted_ND = hidden_ND.to(total_VD.dtype) * weight_N.to(total_VD.dtype)[:, None]
            _add_outer(total_VD, gradient_NV, weighted_ND.to(gradient_NV.dtype))

    def pair_sums(self, student_NV: Tensor, teacher_NV: Tensor) -> tuple[Tensor, Tensor]:
        """See `RowMaths`."""
        tops = torch.stack([_top(student_NV), _top(teacher_NV)])
        sums = torch.zeros(6, len(student_NV), dtype=torch.float64, device=student_NV.device)
        for block in column_blocks(*student_NV.shape):
            a, exp_a = _from_top(student_NV[:, block], tops[0])
            b, exp_b = _from_top(teacher_NV[:, block], tops[1])
            terms = (exp_a, exp_b, weigh(exp_a, a), weigh(exp_b, b), weigh(exp_a, a - b), weigh(exp_b, b - a))
            for total, term in zip(sums, terms, strict=True):
                total += term.sum(1)
        return tops, sums

    def pair_gradient_(
        self, student_NV: Tensor, teacher_NV: Tensor, rows_5N: Tensor, forward_weight: float, head: LinearHead
    ) -> None:
        """See `RowMaths`."""
        student_max, student_rate, teacher_max, teacher_rate, offset = rows_5N.to(student_NV.dtype)[:, :, None]
        for block in column_blocks(*student_NV.shape):
            logits = student_NV[:, block]
            a, b = logits - student_max, teacher_NV[:, block] - teacher_max
            q = a.exp().mul_(student_rate)
            gradient = torch.zeros_like(q)
            if forward_weight > 0:
                gradient.add_(q - b.exp().mul_(teacher_rate), alpha=forward_weight)
            if forward_weight < 1:
                gradient.add_(weigh(q, a - b - offset), alpha=1 - forward_weight)
            student_NV[:, block] = _chained(gradient, logits, head)

    def solo_sums(self, student_NV: Tensor) -> tuple[Tensor, Tensor]:
        """See `RowMaths`."""
        top = _top(student_NV)
        sums = torch.zeros(2, len(student_NV), dtype=torch.float64, device=student_NV.device)
        for block in column_blocks(*student_NV.shape):
            a, exp_a = _from_top(student_NV[:, block], top)
            sums[0] += exp_a.sum(1)
            sums[1] += weigh(exp_a, a).sum(1)
        return top, sums

    def solo_gradient_(self, student_NV: Tensor, base_N: Tensor, factor_N: Tensor, head: LinearHead) -> None:
        """See `RowMaths`."""
        base_N1, factor_N1 = (value.to(student_NV.dtype)[:, None] for value in (base_N, factor_N))
        for block in column_blocks(*student_NV.shape):
            logits = student_NV[:, block]
            student_NV[:, block] = _chained((logits - base_N1).exp_().mul_(factor_N1), logits, head)


def weigh(mass: Tensor, value: Tensor) -> Tensor:
    """Mass * value with 0 * inf = 0."""
    return torch.where(mass > 0, mass * value, torch.where(mass.isnan(), mass, 0.0))


def _top(logits_NV: Tensor) -> Tensor:
    if not logits_NV.shape[1]:
        return torch.full((len(logits_NV),), LOWEST, dtype=torch.float64, device=logits_NV.device)
    return logits_NV.amax(1).clamp_min(LOWEST).double()


def _from_top(logits: Tensor, top_N: Tensor) -> tuple[Tensor, Tensor]:
    shifted = logits - top_N.to(logits.dtype)[:, None]
    return shifted, shifted.exp()


def _chained(gradient: Tensor, logits: Tensor, head: LinearHead) -> Tensor:
    if head.soft_cap is None:
        return gradient.mul_(head.scale)
    slope = (logits / head.soft_cap).square_().neg_().add_(1).mul_(head.scale)
    return torch.where(gradient == 0, 0.0, gradient * slope)


def _times_weight(gradient_NV: Tensor, weight_VD: Tensor) -> Tensor:
    work = work_dtype(gradient_NV.dtype)
    if gradient_NV.dtype != work:
        return torch.mm(gradient_NV, weight_VD.to(gradient_NV.dtype), out_dtype=work)
    if weight_VD.dtype == gradient_NV.dtype:
        return gradient_NV @ weight_VD
    total_ND = gradient_NV.new_zeros(gradient_NV.shape[0], weight_VD.shape[1])
    for block in column_blocks(*gradient_NV.shape):
        total_ND.addmm_(gradient_NV[:, block], weight_VD[block].to(gradient_NV.dtype))
    return total_ND


def _add_outer(total_VD: Tensor, gradient_NV: Tensor, hidden_ND: Tensor) -> None:
    if gradient_NV.dtype == total_VD.dtype:
        total_VD.addmm_(gradient_NV.T, hidden_ND)
        return
    for gradient_NB, total_BD in zip(gradient_NV.split(OUTER_ROWS, 1), total_VD.split(OUTER_ROWS), strict=True):
        total_BD += torch.mm(gradient_NB.T, hidden_ND, out_dtype=total_VD.dtype)
