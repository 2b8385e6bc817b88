"""The compiled engine: float32 and bfloat16 on CPUs, vocabulary-major tiles, float32 logits and sums.

Guarantees: same numbers for the same thread count, run after run. Rows of a tile are padded to a whole register panel;
what the padding holds never reaches a result. Deliberately not here: float64 and float16 (use `chunked`).
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kernels.engine import HeadGradient, WeightSums
from kernels.native.build import library
from kernels.types import LinearHead
from kernels.validate import require

NAMES = {torch.float32: "f32", torch.bfloat16: "bf16"}


def _long(value: int) -> ctypes.c_long:
    return ctypes.c_long(value)


def _float(value: float) -> ctypes.c_float:
    return ctypes.c_float(value)


def _at(tensor: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def _threads() -> ctypes.c_int:
    return ctypes.c_int(torch.get_num_threads())


def _levelling(hidden_TD: Tensor) -> Tensor:
    """float32[D]: powers of two that bring the columns' mean sizes, by some 256 of the rows, to 0.5..1."""
    mean_D = hidden_TD[:: len(hidden_TD) // 256 + 1].float().abs().mean(0)
    usable_D = torch.where((mean_D > 1e-30) & (mean_D < 1e30), mean_D, 1.0)
    return torch.ldexp(torch.ones_like(usable_D), -torch.frexp(usable_D).exponent)


@dataclass(frozen=True, kw_only=True, eq=False)
class NativeEngine:
    """See `kernels.engine.Engine`.

    Attributes:
        library: the compiled entry points of native.cpp.
        panel: rows that tiles are padded to a multiple of.
    """

    library: Any
    panel: int

    @classmethod
    def load(cls) -> NativeEngine:
        """The engine, built on first use.

        Raises:
            NativeUnavailableError: it cannot be built here.
        """
        loaded = library()
        return cls(library=loaded, panel=int(loaded.panel_tokens()))

    def require_servable(self, head: LinearHead) -> None:
        """Refuse what only `chunked` can serve."""
        what = "backend 'native' (pass backend='chunked')"
        require(head.hidden.device.type == "cpu", f"{what} device", head.hidden.device, "cpu")
        for name in ("hidden", "weight"):
            dtype = getattr(head, name).dtype
            require(dtype in NAMES, f"{what} {name}", dtype, "float32 or bfloat16")
        odd = head.hidden.dtype == torch.bfloat16 and head.hidden.shape[1] % 2
        require(not odd, f"{what} width of bfloat16 hidden states", head.hidden.shape[1], "an even number")

    def empty(self, like: Tensor, dtype: torch.dtype, *shape: int) -> Tensor:
        """In huge pages where the system allows: the products walk hundreds of MiB, a page fault every 4 KiB."""
        memory = torch.empty(shape, dtype=dtype)
        self.library.advise_huge_pages(_at(memory), _long(memory.nbytes))
        return memory

    def weight_sums(self, head: LinearHead, work: torch.dtype) -> WeightSums:
        """Float32; for a bfloat16 weight `Blocks` (sums.h), where exponents of zero make zeros of whatever is there."""
        sums_VD = self.empty(head.weight, head.weight.dtype, *head.weight.shape)
        if head.weight.dtype == torch.float32:
            return WeightSums(sums_VD=sums_VD.zero_())
        panels = -(-head.weight.shape[1] // self.panel)
        exponents_VP = torch.zeros(len(head.weight), panels, dtype=torch.uint8)
        return WeightSums(sums_VD=sums_VD, exponents_VP=exponents_VP, scale_D=_levelling(head.hidden))

    def rounded(self, sums: WeightSums, factor: float, dtype: torch.dtype) -> Tensor:
        """In the memory of the sums."""
        if sums.exponents_VP is None or sums.scale_D is None:
            return sums.sums_VD.mul_(factor)
        vocab, width = sums.sums_VD.shape
        factors_D = factor / sums.scale_D
        self.library.round_sums(
            _at(sums.sums_VD), _at(sums.exponents_VP), _at(factors_D), _long(vocab), _long(width), _threads()
        )
        return sums.sums_VD

    def padded(self, rows: int) -> int:
        """Rows up to a whole panel."""
        return -(-rows // self.panel) * self.panel

    def tile(self, storage: Tensor, rows: int, width: int) -> Tensor:
        """Vocabulary-major; the view leaves the padding out."""
        pitch = self.padded(rows)
        return storage[: width * pitch].view(width, pitch).T[:rows]

    def _function(self, name: str, head: LinearHead) -> Any:
        return getattr(self.library, f"{name}_{NAMES[head.hidden.dtype]}_{NAMES[head.weight.dtype]}")

    def _shape(self, head: LinearHead, rows: int) -> tuple[ctypes.c_long, ...]:
        return _long(rows), _long(head.local_width), _long(head.hidden.shape[1]), _long(self.padded(rows))

    def logits_into(self, head: LinearHead, hidden_ND: Tensor, out_NV: Tensor) -> None:
        """See `Products`."""
        hidden_ND, weight_VD = hidden_ND.contiguous(), head.weight.contiguous()
        bias_V = None if head.bias is None else head.bias.float().contiguous()
        self._function("logits", head)(
            _at(hidden_ND), _at(weight_VD), _at(bias_V), _at(out_NV), *self._shape(head, len(hidden_ND)),
            _float(head.scale), _float(head.soft_cap or 0.0), _threads(),
        )  # fmt: skip

    def add(
        self, sums: HeadGradient, head: LinearHead, rows: Tensor | slice, gradient_NV: Tensor, weight_N: Tensor
    ) -> None:
        """See `Products`."""
        weight_N = weight_N.float().contiguous()
        weighted_ND = head.hidden[rows] * weight_N[:, None]
        if sums.weight and sums.weight.scale_D is not None:
            weighted_ND *= sums.weight.scale_D
        weighted_ND = weighted_ND.to(head.hidden.dtype).contiguous()
        head_weight = head.weight.contiguous()
        hidden_ND = None if sums.hidden_TD is None else torch.empty(weighted_ND.shape)
        sums_VD, exponents_VP = (sums.weight.sums_VD, sums.weight.exponents_VP) if sums.weight else (None, None)
        self._function("backward", head)(
            _at(gradient_NV), _at(weighted_ND), _at(head_weight), _at(weight_N), _at(hidden_ND),
            _at(sums_VD), _at(exponents_VP), _at(sums.bias_V), *self._shape(head, len(weighted_ND)), _threads(),
        )  # fmt: skip
        if sums.hidden_TD is not None and hidden_ND is not None:
            sums.hidden_TD[rows] = hidden_ND.to(sums.hidden_TD.dtype)

    def pair_sums(self, student_NV: Tensor, teacher_NV: Tensor) -> tuple[Tensor, Tensor]:
        """See `RowMaths`."""
        rows, width = student_NV.shape
        tops, sums = (torch.empty(n, self.padded(rows), dtype=torch.float64) for n in (2, 6))
        self.library.pair_sums(
            _at(student_NV), _at(teacher_NV), _long(width), _long(self.padded(rows)), _at(tops), _at(sums), _threads()
        )
        return tops[:, :rows], sums[:, :rows]

    def pair_gradient_(
        self, student_NV: Tensor, teacher_NV: Tensor, rows_5N: Tensor, forward_weight: float, head: LinearHead
    ) -> None:
        """See `RowMaths`."""
        self._gradient("pair_gradient_into", (student_NV, teacher_NV), rows_5N, (_float(forward_weight),), head)

    def solo_sums(self, student_NV: Tensor) -> tuple[Tensor, Tensor]:
        """See `RowMaths`."""
        rows, width = student_NV.shape
        tops, sums = (torch.empty(n, self.padded(rows), dtype=torch.float64) for n in (1, 2))
        self.library.solo_sums(
            _at(student_NV), _long(width), _long(self.padded(rows)), _at(tops), _at(sums), _threads()
        )
        return tops[0, :rows], sums[:, :rows]

    def solo_gradient_(self, student_NV: Tensor, base_N: Tensor, factor_N: Tensor, head: LinearHead) -> None:
        """See `RowMaths`."""
        self._gradient("solo_gradient_into", (student_NV,), torch.stack([base_N, factor_N]), (), head)

    def _gradient(
        self, name: str, tiles: tuple[Tensor, ...], rows_XN: Tensor, more: tuple[Any, ...], head: LinearHead
    ) -> None:
        rows, width = tiles[0].shape
        padded = torch.zeros(len(rows_XN), self.padded(rows))
        padded[:, :rows] = rows_XN
        inverse_cap = 0.0 if head.soft_cap is None else 1 / head.soft_cap
        getattr(self.library, name)(
            *(_at(tile) for tile in tiles), _long(width), _long(self.padded(rows)), _at(padded), *more,
            _float(head.scale), _float(inverse_cap), _threads(),
        )  # fmt: skip
