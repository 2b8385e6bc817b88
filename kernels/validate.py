"""The refusals of this package: one line, what was got, what was expected."""

from __future__ import annotations

import math

import torch
from torch import Tensor

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
INTEGERS = (torch.int64, torch.int32)


def require(condition: bool, what: str, got: object, expected: object) -> None:
    """Raise a one-line `ValueError` with got and expected unless `condition` holds."""
    if not condition:
        raise ValueError(f"{what}: got {got}, expected {expected}")


def require_positive(what: str, value: float) -> None:
    """A finite number above 0."""
    require(0 < value < math.inf, what, value, "finite and above 0")


def require_tensor(name: str, value: Tensor, dtypes: tuple[torch.dtype, ...], shape: tuple[int | None, ...]) -> None:
    """Check dtype and shape; None in `shape` stands for any size."""
    sizes = ", ".join("*" if size is None else str(size) for size in shape)
    expected = f"{' or '.join(str(dtype).removeprefix('torch.') for dtype in dtypes)}[{sizes}]"
    got = f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    fits = value.ndim == len(shape) and all(
        want is None or want == have for want, have in zip(shape, value.shape, strict=True)
    )
    require(fits and value.dtype in dtypes, name, got, expected)


def require_one_device(what: str, *tensors: Tensor | None) -> None:
    """All the tensors that are there lie on one device."""
    devices = sorted({str(tensor.device) for tensor in tensors if tensor is not None})
    require(len(devices) == 1, f"{what} device", " and ".join(devices), "one device")
