"""The Triton kernels: row maths of a tile of float32 logits [N, V], row-major, in one pass each.

Guarantees: float32 sums in a fixed order (no atomics: the same bits every run), whatever V is; -inf logits and columns
beyond V carry nothing. The statistics kernels read every logit once, keep one running maximum a side a row, and sums in
as many lanes as a block has columns; the gradient kernels read and write each once. Equations: docs/objectives.md.

Compiles ahead of time without a GPU (tests) and runs under TRITON_INTERPRET=1.
"""

# mypy: disable-error-code="no-untyped-def"
# Triton reads annotations and infers what has none, hence no `from __future__ import annotations` here.
import triton
import triton.language as tl

LOWEST = tl.constexpr(-1e38)  # the maximum of nothing: finite, so that differences stay finite


@triton.jit
def _weigh(mass, value):
    """Mass * value with 0 * inf = 0; NaN stays NaN."""
    return tl.where(mass == 0, 0.0, mass * value)


@triton.jit
def pair_sums_kernel(student, teacher, tops, sums, rows, width, BLOCK: tl.constexpr):
    """One program a row. tops[2, rows], sums[6, rows] as in `kernels.engine.RowMaths.pair_sums`, float32."""
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    top_a = LOWEST + tl.sum(tl.zeros([BLOCK], tl.float32))
    top_b = top_a
    mass_a = tl.zeros([BLOCK], tl.float32)
    mass_b, self_a, self_b, gap_a, gap_b = mass_a, mass_a, mass_a, mass_a, mass_a
    for start in range(0, width, BLOCK):
        inside = start + lanes < width
        za = tl.load(student + row * width + start + lanes, mask=inside, other=-float("inf"))
        zb = tl.load(teacher + row * width + start + lanes, mask=inside, other=-float("inf"))
        new_a, new_b = tl.maximum(top_a, tl.max(za, 0)), tl.maximum(top_b, tl.max(zb, 0))
        rise_a, rise_b = top_a - new_a, top_b - new_b
        scale_a, scale_b = tl.exp(rise_a), tl.exp(rise_b)
        a, b = za - new_a, zb - new_b
        exp_a, exp_b = tl.exp(a), tl.exp(b)
        self_a = scale_a * (self_a + mass_a * rise_a) + _weigh(exp_a, a)
        self_b = scale_b * (self_b + mass_b * rise_b) + _weigh(exp_b, b)
        gap_a = scale_a * (gap_a + mass_a * (rise_a - rise_b)) + _weigh(exp_a, a - b)
        gap_b = scale_b * (gap_b + mass_b * (rise_b - rise_a)) + _weigh(exp_b, b - a)
        mass_a, mass_b = scale_a * mass_a + exp_a, scale_b * mass_b + exp_b
        top_a, top_b = new_a, new_b
    tl.store(tops + row, top_a)
    tl.store(tops + rows + row, top_b)
    tl.store(sums + row, tl.sum(mass_a, 0))
    tl.store(sums + rows + row, tl.sum(mass_b, 0))
    tl.store(sums + 2 * rows + row, tl.sum(self_a, 0))
    tl.store(sums + 3 * rows + row, tl.sum(self_b, 0))
    tl.store(sums + 4 * rows + row, tl.sum(gap_a, 0))
    tl.store(sums + 5 * rows + row, tl.sum(gap_b, 0))


@triton.jit
def solo_sums_kernel(student, tops, sums, rows, width, BLOCK: tl.constexpr):
    """One program a row. tops[rows], sums[2, rows] as in `kernels.engine.RowMaths.solo_sums`, float32."""
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    top = LOWEST + tl.sum(tl.zeros([BLOCK], tl.float32))
    mass = tl.zeros([BLOCK], tl.float32)
    own = mass
    for start in range(0, width, BLOCK):
        z = tl.load(student + row * width + start + lanes, mask=start + lanes < width, other=-float("inf"))
        new = tl.maximum(top, tl.max(z, 0))
        rise = top - new
        scale = tl.exp(rise)
        a = z - new
        exp_a = tl.exp(a)
        own = scale * (own + mass * rise) + _weigh(exp_a, a)
        mass = scale * mass + exp_a
        top = new
    tl.store(tops + row, top)
    tl.store(sums + row, tl.sum(mass, 0))
    tl.store(sums + rows + row, tl.sum(own, 0))


@triton.jit
def _chained(gradient, z, scale, inverse_cap, CAPPED: tl.constexpr):
    """Times d logits / d (hidden @ weight.T + bias); no gradient stays none, where a logit is -inf."""
    if CAPPED:
        t = z * inverse_cap
        gradient = tl.where(gradient == 0, 0.0, gradient * (1 - t * t))
    return gradient * scale


@triton.jit
def pair_gradient_kernel(
    student,
    teacher,
    rows_5N,
    rows,
    width,
    forward_weight,
    scale,
    inverse_cap,
    FORWARD: tl.constexpr,
    REVERSE: tl.constexpr,
    CAPPED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program a block of a row: the student's logits become the chained gradient of the mixed loss."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    zs = tl.load(student + row * width + column, mask=inside, other=-float("inf"))
    zt = tl.load(teacher + row * width + column, mask=inside, other=-float("inf"))
    a = zs - tl.load(rows_5N + row)
    b = zt - tl.load(rows_5N + 2 * rows + row)
    q = tl.exp(a) * tl.load(rows_5N + rows + row)
    gradient = tl.zeros([BLOCK], tl.float32)
    if FORWARD:
        gradient += forward_weight * (q - tl.exp(b) * tl.load(rows_5N + 3 * rows + row))
    if REVERSE:
        gradient += (1 - forward_weight) * _weigh(q, a - b - tl.load(rows_5N + 4 * rows + row))
    tl.store(student + row * width + column, _chained(gradient, zs, scale, inverse_cap, CAPPED), mask=inside)


@triton.jit
def solo_gradient_kernel(student, rows_2N, rows, width, scale, inverse_cap, CAPPED: tl.constexpr, BLOCK: tl.constexpr):
    """One program a block of a row: logits become e^(z - base) * factor, chained; kept ids, at -inf, become 0."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    z = tl.load(student + row * width + column, mask=inside, other=-float("inf"))
    share = tl.exp(z - tl.load(rows_2N + row)) * tl.load(rows_2N + rows + row)
    tl.store(student + row * width + column, _chained(share, z, scale, inverse_cap, CAPPED), mask=inside)
