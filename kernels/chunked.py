"""Divergences by tiles of rows, each over the whole vocabulary, forward and backward fused; an engine does the work.

Guarantees: beyond the gradients themselves, memory is a bounded tile plus a few numbers a row, however many rows there
are. Each tile's logits are computed once: statistics, then the gradient in their place, then its two matrix products.

The gradient of a head needs the weight of every row before backward can tell it. It is accumulated for
`Call.token_weight` (1 where None); backward checks that the upstream gradient is one constant times that, and if it is
not, computes the head's gradient again from fresh logits. The gradient of the hidden states is exact for any upstream
without that. Deliberately not here: second derivatives.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.checks import Call
from kernels.collectives import Ranks
from kernels.engine import Engine, HeadGradient, work_dtype
from kernels.rows import RowValues, pair_values
from kernels.rows_sparse import sparse_gradient_, sparse_rows, sparse_statistics
from kernels.types import DenseTargets, KLOutput, LinearHead, SampledTargets, Targets

UPSTREAM_TOLERANCE = 1e-6
"""How far, relatively, an upstream gradient may be from a constant times the token weights: a few float32 roundings."""


TILE_BYTES = 112 << 20
"""What the logits of both sides may take on a CPU: 96 rows at V = 151,936. Longer tiles gain little."""
CPU_TILE_ROWS = 256
"""Rows of both sides together in a tile on a CPU: small vocabularies do not make one tile of a whole batch."""
ACCELERATOR_TILE_BYTES = 1 << 30
"""The same elsewhere: 864 rows, because a tile must do enough arithmetic for each byte of the head it reads."""


def divergence(call: Call, engine: Engine) -> KLOutput:
    """Compute `call` within `TILE_BYTES` of logits."""
    for head in (call.student, call.targets):
        if isinstance(head, LinearHead):
            engine.require_servable(head)
    student = call.student
    learns: tuple[Tensor | None, ...] = (student.hidden, student.weight, student.bias)
    if not torch.is_grad_enabled():  # a `Function` is not told, and would add gradients up that nobody asks for
        learns = tuple(None if tensor is None else tensor.detach() for tensor in learns)
    loss, forward, reverse, student_entropy, teacher_entropy = _Divergence.apply(*learns, Plan.of(call, engine))
    return KLOutput(
        loss=loss,
        forward_kl=forward,
        reverse_kl=None if isinstance(call.targets, SampledTargets) else reverse,
        student_entropy=student_entropy,
        teacher_entropy=teacher_entropy,
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class Plan:
    """A call with temperature folded into its heads and nothing attached to autograd.

    Attributes:
        engine: what does the work on a tile.
        student: tempered and detached; targets: tempered where they are a head.
        inverse_temperature: still to be applied to dense targets.
        forward_weight: as in `Call`.
        active: int64[A], the rows to compute; None for all.
        token_weight: float[T], the upstream gradient that the head's gradient is accumulated for.
    """

    engine: Engine
    student: LinearHead
    targets: Targets
    inverse_temperature: float
    forward_weight: float
    active: Tensor | None
    token_weight: Tensor

    @classmethod
    def of(cls, call: Call, engine: Engine) -> Plan:
        """The plan of a call."""
        student = call.student.tempered(call.temperature)
        bias = None if student.bias is None else student.bias.detach()
        student = replace(student, hidden=student.hidden.detach(), weight=student.weight.detach(), bias=bias)
        targets = call.targets
        work = work_dtype(student.hidden.dtype)
        ones = torch.ones(student.rows, dtype=work, device=student.hidden.device)
        return cls(
            engine=engine,
            student=student,
            targets=targets.tempered(call.temperature) if isinstance(targets, LinearHead) else targets,
            inverse_temperature=1 / call.temperature,
            forward_weight=call.forward_weight,
            active=call.active_rows(),
            token_weight=ones if call.token_weight is None else call.token_weight.detach().to(work),
        )

    @property
    def ranks(self) -> Ranks:
        """The ranks that share the vocabulary."""
        return Ranks(shard=self.student.shard)

    @property
    def sides(self) -> int:
        """How many full-vocabulary buffers a tile needs."""
        return 2 if isinstance(self.targets, LinearHead | DenseTargets) else 1

    def tiles(self, length: int) -> Iterator[Tensor | slice]:
        """The active rows, `length` at a time."""
        rows = self.student.rows if self.active is None else len(self.active)
        for first in range(0, rows, length):
            tile = slice(first, min(first + length, rows))
            yield tile if self.active is None else self.active[tile]


class Room:
    """Room for one tile's logits of each side, used again for every tile."""

    def __init__(self, plan: Plan) -> None:
        self.engine, self.width = plan.engine, plan.student.local_width
        work = work_dtype(plan.student.hidden.dtype)
        device = plan.student.hidden.device
        self.length = min(_tile_rows(self.width, work, plan.sides, device), max(plan.student.rows, 1))
        size = self.engine.padded(self.length) * self.width
        self.sides = [plan.engine.empty(plan.student.hidden, work, size) for _ in range(plan.sides)]

    def tiles(self, rows: int) -> list[Tensor]:
        """A tile [rows, V] of each side."""
        return [self.engine.tile(side, rows, self.width) for side in self.sides]


def _tile_rows(width: int, dtype: torch.dtype, sides: int, device: torch.device) -> int:
    """How many rows fit, a multiple of 32 where that many do."""
    row_bytes = max(sides * width * dtype.itemsize, 1)
    on_cpu = device.type == "cpu"
    rows = min(TILE_BYTES // row_bytes, CPU_TILE_ROWS // sides) if on_cpu else ACCELERATOR_TILE_BYTES // row_bytes
    return max(rows - rows % 32 if rows >= 32 else rows, 1)


def _tile(plan: Plan, rows: Tensor | slice, room: Room, gradient: bool) -> tuple[RowValues, Tensor]:
    """Values of a tile and, in place of its logits, the gradient with respect to hidden @ weight.T + bias."""
    student, targets, engine = plan.student, plan.targets, plan.engine
    hidden_ND = student.hidden[rows]
    student_NV, *others = room.tiles(len(hidden_ND))
    engine.logits_into(student, hidden_ND, student_NV)
    if not isinstance(targets, LinearHead | DenseTargets):
        kept = sparse_rows(targets, rows, student.start, student.local_width)
        statistics, values = sparse_statistics(student_NV, kept, engine, plan.ranks)
        if gradient:
            sparse_gradient_(student_NV, kept, statistics, plan.forward_weight, student, engine)
        return values, student_NV
    (teacher_NV,) = others
    if isinstance(targets, LinearHead):
        engine.logits_into(targets, targets.hidden[rows], teacher_NV)
    else:
        teacher_NV.copy_(targets.values[rows, : student.local_width]).mul_(plan.inverse_temperature)
    values, rows_5N = pair_values(*engine.pair_sums(student_NV, teacher_NV), plan.ranks)
    if gradient:
        engine.pair_gradient_(student_NV, teacher_NV, rows_5N, plan.forward_weight, student)
    return values, student_NV


def _sweep(plan: Plan, gradient: HeadGradient | None, token_weight: Tensor) -> tuple[Tensor, ...]:
    """Every tile once: the five fields of the output, and the sums of `gradient` if it is wanted."""
    room = Room(plan)
    out = torch.zeros(5, plan.student.rows, dtype=plan.token_weight.dtype, device=plan.token_weight.device)
    for rows in plan.tiles(room.length):
        values, gradient_NV = _tile(plan, rows, room, gradient is not None)
        out[:, rows] = torch.stack(_fields(values, plan.forward_weight)).to(out.dtype)
        if gradient is not None:
            plan.engine.add(gradient, plan.student, rows, gradient_NV, token_weight[rows])
    return out.unbind()


def _fields(values: RowValues, forward_weight: float) -> tuple[Tensor, ...]:
    forward, reverse = values.forward_kl, values.reverse_kl
    if reverse is None or forward_weight == 1:
        loss = forward
    else:
        loss = forward_weight * forward + (1 - forward_weight) * reverse if forward_weight > 0 else reverse
    nothing = torch.zeros_like(forward) if reverse is None else reverse
    return loss, forward, nothing, values.student_entropy, values.teacher_entropy


def constant_factor(upstream: Tensor, token_weight: Tensor, active: Tensor | None) -> float | None:
    """C with upstream = c * token_weight on the active rows, or None if there is none."""
    if active is not None:
        upstream, token_weight = upstream[active], token_weight[active]
    if not len(upstream):
        return 0.0
    largest = int(token_weight.abs().argmax())
    weight = float(token_weight[largest])
    if weight == 0:
        return None if bool(upstream.any()) else 0.0
    factor = float(upstream[largest]) / weight
    tolerance = UPSTREAM_TOLERANCE * abs(factor)
    fits = (upstream - factor * token_weight).abs() <= tolerance * token_weight.abs()
    return factor if bool(fits.all()) else None


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, plan: Plan) -> tuple[Tensor, ...]:
        ctx.save_for_backward(hidden, weight, bias)  # only so that autograd notices a change in place before backward
        ctx.plan, ctx.sums = plan, _zeros(plan, ctx.needs_input_grad) if any(ctx.needs_input_grad) else None
        loss, *others = _sweep(plan, ctx.sums, plan.token_weight)
        ctx.mark_non_differentiable(*others)
        return loss, *others

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        assert ctx.saved_tensors
        plan: Plan = ctx.plan
        upstream = _only(upstream, plan.active)
        sums, ctx.sums = ctx.sums, None  # the sums become the gradients, in place: a second backward starts afresh
        factor: float | None = 1.0
        if sums is not None and sums.has_head:
            factor = constant_factor(upstream, plan.token_weight, plan.active)
        if sums is None or factor is None:
            sums = None  # frees the first sums before there are others: a head's gradient is held once
            sums, factor = _zeros(plan, ctx.needs_input_grad), 1.0
            _sweep(plan, sums, upstream)
        hidden_TD = sums.hidden_TD
        if hidden_TD is not None:
            hidden_TD = plan.ranks.sum_(hidden_TD.mul_(upstream[:, None])).to(plan.student.hidden.dtype)
        return hidden_TD, *sums.take_head(plan.student, plan.engine, factor), None


def _only(upstream: Tensor, active: Tensor | None) -> Tensor:
    """`upstream` of the active rows, 0 on the others, whose own may be NaN."""
    return upstream if active is None else torch.zeros_like(upstream).index_copy(0, active, upstream[active])


def _zeros(plan: Plan, needs: tuple[bool, ...]) -> HeadGradient:
    return HeadGradient.zeros(plan.student, plan.engine, needs[:3])
