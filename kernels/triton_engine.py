"""The engine for CUDA: torch's own matrix products (cuBLAS), and row maths by the kernels of `triton_rows`.

Guarantees: products take float16 or bfloat16 inputs as they are and accumulate in float32; everything, the head's
gradient included, is summed in a fixed order. docs/kernels.md says why the products are not fused into the kernels: an
exact KL would need the logits of both sides a second time. Also runs on CPU tensors where TRITON_INTERPRET=1 was set
before Triton was imported, for tests. Deliberately not here: float64 (use `chunked`).
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field

import torch
import triton
from torch import Tensor

from kernels import triton_rows
from kernels.eager import EagerEngine
from kernels.engine import HeadGradient, WeightSums
from kernels.types import LinearHead
from kernels.validate import require


@dataclass(frozen=True, kw_only=True)
class Launch:
    """How a kernel is launched: columns a step, and warps a program."""

    block: int
    warps: int


SUMS = Launch(block=2048, warps=8)
"""Eight columns a thread: six sums of them and the two inputs stay in registers (asserted in the tests)."""
GRADIENT = Launch(block=2048, warps=8)


@dataclass(frozen=True, kw_only=True)
class TritonEngine:
    """See `kernels.engine.Engine`."""

    products: EagerEngine = field(default_factory=EagerEngine)

    def require_servable(self, head: LinearHead) -> None:
        """Refuse what only `chunked` can serve."""
        what = "backend 'triton' (pass backend='chunked')"
        interpreted = os.environ.get("TRITON_INTERPRET") == "1"
        require(head.hidden.is_cuda or interpreted, f"{what} device", head.hidden.device, "cuda")
        require(head.hidden.dtype != torch.float64, f"{what} dtype", "float64", "float32, bfloat16 or float16")

    def empty(self, like: Tensor, dtype: torch.dtype, *shape: int) -> Tensor:
        """As torch gives it."""
        return self.products.empty(like, dtype, *shape)

    def weight_sums(self, head: LinearHead, work: torch.dtype) -> WeightSums:
        """See `Products`."""
        return self.products.weight_sums(head, work)

    def rounded(self, sums: WeightSums, factor: float, dtype: torch.dtype) -> Tensor:
        """See `Products`."""
        return self.products.rounded(sums, factor, dtype)

    def padded(self, rows: int) -> int:
        """No padding."""
        return self.products.padded(rows)

    def tile(self, storage: Tensor, rows: int, width: int) -> Tensor:
        """Row-major, contiguous: what the kernels index."""
        return self.products.tile(storage, rows, width)

    def logits_into(self, head: LinearHead, hidden_ND: Tensor, out_NV: Tensor) -> None:
        """See `Products`."""
        self.products.logits_into(head, hidden_ND, out_NV)

    def add(
        self, sums: HeadGradient, head: LinearHead, rows: Tensor | slice, gradient_NV: Tensor, weight_N: Tensor
    ) -> None:
        """See `Products`."""
        self.products.add(sums, head, rows, gradient_NV, weight_N)

    def pair_sums(self, student_NV: Tensor, teacher_NV: Tensor) -> tuple[Tensor, Tensor]:
        """See `RowMaths`."""
        rows, width = student_NV.shape
        tops, sums = (student_NV.new_empty(n, rows) for n in (2, 6))
        if rows:
            triton_rows.pair_sums_kernel[(rows,)](
                student_NV, teacher_NV, tops, sums, rows, width, BLOCK=SUMS.block, num_warps=SUMS.warps
            )
        return tops.double(), sums.double()

    def solo_sums(self, student_NV: Tensor) -> tuple[Tensor, Tensor]:
        """See `RowMaths`."""
        rows, width = student_NV.shape
        tops, sums = student_NV.new_empty(rows), student_NV.new_empty(2, rows)
        if rows:
            triton_rows.solo_sums_kernel[(rows,)](
                student_NV, tops, sums, rows, width, BLOCK=SUMS.block, num_warps=SUMS.warps
            )
        return tops.double(), sums.double()

    def pair_gradient_(
        self, student_NV: Tensor, teacher_NV: Tensor, rows_5N: Tensor, forward_weight: float, head: LinearHead
    ) -> None:
        """See `RowMaths`."""
        rows, width = student_NV.shape
        if not student_NV.numel():
            return
        triton_rows.pair_gradient_kernel[(rows, triton.cdiv(width, GRADIENT.block))](
            student_NV,
            teacher_NV,
            rows_5N.float().contiguous(),
            rows,
            width,
            float(forward_weight),
            float(head.scale),
            _inverse_cap(head),
            FORWARD=forward_weight > 0,
            REVERSE=forward_weight < 1,
            CAPPED=head.soft_cap is not None,
            BLOCK=GRADIENT.block,
            num_warps=GRADIENT.warps,
        )

    def solo_gradient_(self, student_NV: Tensor, base_N: Tensor, factor_N: Tensor, head: LinearHead) -> None:
        """See `RowMaths`."""
        rows, width = student_NV.shape
        if not student_NV.numel():
            return
        triton_rows.solo_gradient_kernel[(rows, triton.cdiv(width, GRADIENT.block))](
            student_NV,
            torch.stack([base_N, factor_N]).float(),
            rows,
            width,
            float(head.scale),
            _inverse_cap(head),
            CAPPED=head.soft_cap is not None,
            BLOCK=GRADIENT.block,
            num_warps=GRADIENT.warps,
        )


def _inverse_cap(head: LinearHead) -> float:
    return 0.0 if head.soft_cap is None else 1 / head.soft_cap
