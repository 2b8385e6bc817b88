"""The divergences: one signature for every kind of target and every backend.

All return per-row values in nats, unreduced; `KLOutput` says what each field is. Equations: docs/objectives.md.

Exact (`forward_kl`, `reverse_kl`, `mixed_kl`) take a `LinearHead` or `DenseTargets`; `forward_kl` also takes
`SampledTargets`, of which it is an unbiased estimate. Coarse (`*_coarse`) take `TopKTargets` and return the divergence
of the k+1 outcomes (kept ids, everything else): a lower bound of the exact one.

Backends: `reference` (float64, autograd, holds everything: the truth, for tests), `chunked` (torch alone, any device
and dtype, bounded memory), `native` (the same with C++ built on first use: CPU, float32 and bfloat16), `triton` (CUDA).
None picks by device and dtype, see `default_backend`. One that cannot serve a call raises, `native` also when there is
no C++ compiler; none stands in for another.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from kernels import chunked, reference
from kernels.checks import Call
from kernels.eager import EagerEngine
from kernels.types import DenseTargets, KLOutput, LinearHead, SampledTargets, SelectedOutput, Targets, TopKTargets
from kernels.validate import require, require_one_device, require_positive, require_tensor

Backend = Literal["reference", "chunked", "native", "triton"]
BACKENDS = ("reference", "chunked", "native", "triton")


def forward_kl(
    student: LinearHead,
    targets: LinearHead | DenseTargets | SampledTargets,
    *,
    temperature: float = 1.0,
    backend: Backend | None = None,
    row_mask: Tensor | None = None,
    token_weight: Tensor | None = None,
) -> KLOutput:
    """KL(teacher, student) of each row; gradient with respect to the student's logits: q - p.

    Args:
        student: hidden states and head that learn.
        targets: the teacher.
        temperature: divides both sides' logits (no T^2 factor); 1 for sampled targets.
        backend: see the module; None picks by device.
        row_mask: bool[T]; false rows are 0, get no gradient and cost nothing.
        token_weight: float[T], see `kernels.checks.Call`.

    Raises:
        ValueError: inputs that do not fit, with got and expected, before any work.
    """
    _require_kind("forward_kl", targets, (LinearHead, DenseTargets, SampledTargets))
    return _run(student, targets, 1.0, temperature, backend, row_mask, token_weight)


def reverse_kl(
    student: LinearHead,
    targets: LinearHead | DenseTargets,
    *,
    temperature: float = 1.0,
    backend: Backend | None = None,
    row_mask: Tensor | None = None,
    token_weight: Tensor | None = None,
) -> KLOutput:
    """KL(student, teacher) of each row; gradient q (log q - log p - KL). Arguments as in `forward_kl`."""
    _require_kind("reverse_kl", targets, (LinearHead, DenseTargets))
    return _run(student, targets, 0.0, temperature, backend, row_mask, token_weight)


def mixed_kl(
    student: LinearHead,
    targets: LinearHead | DenseTargets,
    *,
    forward_weight: float,
    temperature: float = 1.0,
    backend: Backend | None = None,
    row_mask: Tensor | None = None,
    token_weight: Tensor | None = None,
) -> KLOutput:
    """forward_weight * forward + (1 - forward_weight) * reverse: a linear mix (arXiv 2605.16826), not a JSD."""
    _require_kind("mixed_kl", targets, (LinearHead, DenseTargets))
    return _run(student, targets, forward_weight, temperature, backend, row_mask, token_weight)


def forward_kl_coarse(
    student: LinearHead,
    targets: TopKTargets,
    *,
    temperature: float = 1.0,
    backend: Backend | None = None,
    row_mask: Tensor | None = None,
    token_weight: Tensor | None = None,
) -> KLOutput:
    """Forward KL of the k+1 outcomes; the gap to the exact one is at most what the teacher's recorded tail allows."""
    _require_kind("a coarse divergence", targets, (TopKTargets,))
    return _run(student, targets, 1.0, temperature, backend, row_mask, token_weight)


def reverse_kl_coarse(
    student: LinearHead,
    targets: TopKTargets,
    *,
    temperature: float = 1.0,
    backend: Backend | None = None,
    row_mask: Tensor | None = None,
    token_weight: Tensor | None = None,
) -> KLOutput:
    """Reverse KL of the k+1 outcomes; its gap depends on the student's mass outside the kept ids, unbounded."""
    _require_kind("a coarse divergence", targets, (TopKTargets,))
    return _run(student, targets, 0.0, temperature, backend, row_mask, token_weight)


def mixed_kl_coarse(
    student: LinearHead,
    targets: TopKTargets,
    *,
    forward_weight: float,
    temperature: float = 1.0,
    backend: Backend | None = None,
    row_mask: Tensor | None = None,
    token_weight: Tensor | None = None,
) -> KLOutput:
    """The linear mix of the two coarse divergences. `temperature` must be 1: a tail cannot be tempered."""
    _require_kind("a coarse divergence", targets, (TopKTargets,))
    return _run(student, targets, forward_weight, temperature, backend, row_mask, token_weight)


def selected_log_probs(
    student: LinearHead,
    token_ids: Tensor,
    *,
    temperature: float = 1.0,
    backend: Backend | None = None,
    row_mask: Tensor | None = None,
    token_weight: Tensor | None = None,
) -> SelectedOutput:
    """Log-probability of one given token a row, and the student's entropy: for cross-entropy and policy gradients.

    Args:
        student: hidden states and head that learn.
        token_ids: int[T].
        temperature: divides the logits.
        backend: see the module; None picks by device.
        row_mask: bool[T]; false rows are 0.
        token_weight: float[T], see `kernels.checks.Call`; for cross-entropy leave it None (all rows alike).

    Raises:
        ValueError: inputs that do not fit, before any work.
    """
    require_tensor("token_ids", token_ids, (torch.int64, torch.int32), (student.rows,))
    require_positive("temperature", temperature)
    require_one_device("token_ids and student", token_ids, student.hidden)
    tempered = student.tempered(temperature)
    ones = torch.ones(student.rows, dtype=torch.float32, device=token_ids.device)
    splits = torch.arange(student.rows + 1, device=token_ids.device)
    point = SampledTargets(ids=token_ids, counts=ones, row_splits=splits, entropy=torch.zeros_like(ones))
    out = _run(tempered, point, 1.0, 1.0, backend, row_mask, token_weight)
    return SelectedOutput(log_probs=-out.loss, student_entropy=out.student_entropy)


def _require_kind(name: str, targets: object, kinds: tuple[type, ...]) -> None:
    expected = " or ".join(kind.__name__ for kind in kinds)
    require(isinstance(targets, kinds), f"{name} targets", type(targets).__name__, expected)


def _run(
    student: LinearHead,
    targets: Targets,
    forward_weight: float,
    temperature: float,
    backend: Backend | None,
    row_mask: Tensor | None,
    token_weight: Tensor | None,
) -> KLOutput:
    call = Call(
        student=student,
        targets=targets,
        forward_weight=forward_weight,
        temperature=temperature,
        row_mask=row_mask,
        token_weight=token_weight,
    )
    match backend or default_backend(call.student.hidden.device, call.student.hidden.dtype):
        case "reference":
            return reference.divergence(call)
        case "chunked":
            return chunked.divergence(call, EagerEngine())
        case "native":
            from kernels.native.engine import NativeEngine

            return chunked.divergence(call, NativeEngine.load())
        case "triton":
            from kernels.triton_engine import TritonEngine

            return chunked.divergence(call, TritonEngine())
    raise ValueError(f"backend: got {backend!r}, expected one of {', '.join(BACKENDS)}")


def default_backend(device: torch.device, dtype: torch.dtype) -> Backend:
    """The backend used when none is named, for hidden states of `dtype` on `device`."""
    if device.type == "cuda":
        return "triton"
    return "native" if device.type == "cpu" and dtype in (torch.float32, torch.bfloat16) else "chunked"
