"""What the chunked driver needs done to a tile, as two small protocols: row maths, and products with a head.

A tile is a float tensor [N, V] of one side's logits, N rows over this rank's valid vocabulary. Its layout belongs to
the engine (rows may be padded, the vocabulary may be the slow axis), so tiles come from `tile` only; indexing one works
as on any tensor. Implementations: `kernels.eager` (torch alone), `kernels.native.engine` (compiled, CPU).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from kernels.types import LinearHead

LOWEST = -1e38
"""Stands for the maximum of an empty vocabulary: finite in float32, so that differences stay finite."""


def work_dtype(dtype: torch.dtype) -> torch.dtype:
    """What logits, statistics and gradient sums are held in for inputs of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass(frozen=True, kw_only=True, eq=False)
class WeightSums:
    """Where an engine sums the gradient of a head's weight, tile by tile.

    Attributes:
        sums_VD: the sums in the work dtype; or, where there are exponents, integers of 16 bits in a tensor of bfloat16.
        exponents_VP: uint8, of what such an integer counts, shared by panels of columns; None where there are none.
        scale_D: powers of two that columns are multiplied by while they are summed, so that those which share an
            exponent are alike; there where exponents are.
    """

    sums_VD: Tensor
    exponents_VP: Tensor | None = None
    scale_D: Tensor | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class HeadGradient:
    """Where the gradients of a head's inputs are summed; None for one that is not wanted.

    Attributes:
        hidden_TD: each row is written once; work dtype, but bfloat16 for bfloat16 states of a whole head: nothing of
            T x D is then larger than the gradient, which is rounded again when it meets the upstream gradient.
        weight: tiles are added.
        bias_V: work dtype; tiles are added.
    """

    hidden_TD: Tensor | None
    weight: WeightSums | None
    bias_V: Tensor | None

    @classmethod
    def zeros(cls, head: LinearHead, engine: Products, wanted: tuple[bool, ...]) -> HeadGradient:
        """Sums at zero for those of hidden, weight and bias that want a gradient."""
        work = work_dtype(head.hidden.dtype)
        hidden, weight, bias = wanted
        whole = head.shard is None and head.hidden.dtype == torch.bfloat16  # ranks add theirs up before rounding
        return cls(
            hidden_TD=torch.zeros_like(head.hidden, dtype=torch.bfloat16 if whole else work) if hidden else None,
            weight=engine.weight_sums(head, work) if weight else None,
            bias_V=torch.zeros_like(head.bias, dtype=work) if bias and head.bias is not None else None,
        )

    @property
    def has_head(self) -> bool:
        """Whether the head's own gradients are summed here."""
        return self.weight is not None or self.bias_V is not None

    def take_head(self, head: LinearHead, engine: Products, factor: float) -> tuple[Tensor | None, Tensor | None]:
        """The head's sums times `factor`, in the dtypes of the head; they are used up."""
        weight_VD = None if self.weight is None else engine.rounded(self.weight, factor, head.weight.dtype)
        if self.bias_V is None or head.bias is None:
            return weight_VD, None
        return weight_VD, self.bias_V.mul_(factor).to(head.bias.dtype)


class Products(Protocol):
    """A head's matrix products: inputs in the dtype of `hidden`, sums and results in the work dtype."""

    def require_servable(self, head: LinearHead) -> None:
        """Raise `ValueError` for a device, dtype or width that this engine has no code for."""
        ...

    def empty(self, like: Tensor, dtype: torch.dtype, *shape: int) -> Tensor:
        """Uninitialised memory on the device of `like`, of the kind this engine works fastest in."""
        ...

    def weight_sums(self, head: LinearHead, work: torch.dtype) -> WeightSums:
        """Zeros to sum the gradient of the head's weight in."""
        ...

    def rounded(self, sums: WeightSums, factor: float, dtype: torch.dtype) -> Tensor:
        """The sums times `factor`, in the weight's `dtype`; may be in their own memory."""
        ...

    def padded(self, rows: int) -> int:
        """How many rows' room a tile of `rows` takes."""
        ...

    def tile(self, storage: Tensor, rows: int, width: int) -> Tensor:
        """A tile [rows, width] within a flat storage of at least padded(rows) * width elements."""
        ...

    def logits_into(self, head: LinearHead, hidden_ND: Tensor, out_NV: Tensor) -> None:
        """Out = cap(scale * (hidden @ weight.T + bias)) over the valid local rows of `weight`."""
        ...

    def add(
        self, sums: HeadGradient, head: LinearHead, rows: Tensor | slice, gradient_NV: Tensor, weight_N: Tensor
    ) -> None:
        """Add a tile's gradient with respect to hidden @ weight.T + bias.

        The head's sums take row n times `weight_N[n]`; `hidden_TD` takes it unweighted.
        """
        ...


class RowMaths(Protocol):
    """Statistics of a tile, relative to its maximum over the local vocabulary (at least `LOWEST`), and gradients."""

    def pair_sums(self, student_NV: Tensor, teacher_NV: Tensor) -> tuple[Tensor, Tensor]:
        """float64 maxima [2, N] and sums [6, N]: e^a, e^b, e^a a, e^b b, e^a (a - b), e^b (b - a).

        a = student - its maximum, b = teacher - its maximum; an entry without mass adds nothing.
        """
        ...

    def pair_gradient_(
        self, student_NV: Tensor, teacher_NV: Tensor, rows_5N: Tensor, forward_weight: float, head: LinearHead
    ) -> None:
        """Overwrite the student's logits with the chained gradient.

        That is forward_weight * (q - p) + (1 - forward_weight) * q (a - b - offset).
        `rows_5N` float64: student max, 1 / student sum, teacher max, 1 / teacher sum, offset. "Chained" is times
        d logits / d (hidden @ weight.T + bias) = scale * (1 - (logits / cap)^2).
        """
        ...

    def solo_sums(self, student_NV: Tensor) -> tuple[Tensor, Tensor]:
        """float64 maximum [N] and sums [2, N]: e^a, e^a a."""
        ...

    def solo_gradient_(self, student_NV: Tensor, base_N: Tensor, factor_N: Tensor, head: LinearHead) -> None:
        """Overwrite the logits with e^(logits - base) * factor, chained; -inf gives 0."""
        ...


class Engine(Products, RowMaths, Protocol):
    """Both."""
