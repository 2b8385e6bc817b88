"""An equal-FLOP study: which cells, budgets and seeds, where each run is measured, and what it will come to.

Guarantees: all of it is arithmetic on FLOPs, known before anything is run; imports nothing heavy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from logitcache.errors import UserError, require
from trainer.settings import Prefix


@dataclass(frozen=True, kw_only=True)
class Study:
    """What is compared.

    Attributes:
        budgets: FLOPs of training one student, ascending whole numbers.
        student_shares: of each step's sequences, that the student writes; the teacher's are in the cache.
        mixes: forward weights, each with every share.
        seeds: of order and sampling, a run of every cell for each.
        parts: each budget is measured at so many equal parts of it.
        students: that share the cache.
        price_per_hour: of the machine that trains, for the money.
    """

    budgets: tuple[int, ...]
    student_shares: tuple[float, ...] = (0.0, 1.0)
    mixes: tuple[float, ...] = (1.0, 0.0)
    seeds: tuple[int, ...] = (0, 1, 2)
    parts: int = 4
    students: int = 10
    price_per_hour: float | None = None

    def __post_init__(self) -> None:
        for name in ("budgets", "student_shares", "mixes", "seeds"):
            values = getattr(self, name)
            option = f"--{name.replace('_', '-')}"
            require(0 < len(values) == len(set(values)), f"{option}, at least one and none twice", values)
        for share in self.student_shares:
            require(0 <= share <= 1, "--student-shares, of 0 to 1", share)
        require(self.budgets[0] >= 1, "--budgets, at least 1 FLOP", self.budgets[0])
        require(min(self.seeds) >= 0, "--seeds, 0 or more", self.seeds)
        require(self.parts >= 1, "--parts, at least 1", self.parts)
        require(self.students >= 1, "--students, at least 1", self.students)
        require_rate("--price-per-hour", self.price_per_hour)

    @property
    def deciding(self) -> dict[str, Any]:
        """What its figures follow from; a price only says what they cost."""
        return {name: value for name, value in asdict(self).items() if name != "price_per_hour"}

    @property
    def runs(self) -> int:
        """A run up to the largest budget serves the smaller ones."""
        return len(self.student_shares) * len(self.mixes) * len(self.seeds)

    def share(self, student_share: float, build_flops: int) -> int:
        """FLOPs of the build that one student owes, rounded up; a student that writes all its text owes none."""
        return -(-build_flops // self.students) if student_share < 1 else 0

    def points(self, share: int) -> tuple[int, ...]:
        """Marginal FLOPs at which a run is measured: the parts of every budget, and what `share` leaves of it."""
        parts = {budget * part // self.parts for budget in self.budgets for part in range(1, self.parts + 1)}
        return tuple(sorted(parts | {budget - share for budget in self.budgets if budget > share}))


def prefix_of(student_share: float) -> Prefix:
    """Who writes."""
    return {0.0: Prefix.TEACHER, 1.0: Prefix.STUDENT}.get(student_share, Prefix.MIXED)


def prefix_name(student_share: float) -> str:
    """What a cell's prefixes are called in reports; a mix says how much of it is the student's."""
    prefix = prefix_of(student_share)
    return f"{prefix}-{student_share:g}" if prefix is Prefix.MIXED else str(prefix)


def require_rate(option: str, value: float | None) -> None:
    """Raise UserError unless it is above 0 and finite, if it is given."""
    require(value is None or (math.isfinite(value) and value > 0), f"{option}, above 0", value)


def whole_flops(budgets: Sequence[float]) -> tuple[int, ...]:
    """Budgets as a user writes them (2e13) in ascending order; UserError for one that is none, or there twice."""
    for budget in budgets:
        require(math.isfinite(budget) and budget >= 1, "--budgets, at least 1 FLOP", budget)
    whole = tuple(sorted({int(budget) for budget in budgets}))
    require(len(whole) == len(budgets), "--budgets, none twice", budgets)
    return whole


@dataclass(frozen=True, kw_only=True)
class Column:
    """Who writes, and what a planned step of it costs.

    Attributes:
        prefix: see `prefix_name`.
        tier: of the cache; None for student prefixes.
        step_flops: of one step.
        share: of the build, that one student owes.
    """

    prefix: str
    tier: str | None
    step_flops: int
    share: int


def steps_within(
    columns: Sequence[Column], budgets: Sequence[int], *, epoch_steps: float, flops_per_second: float | None
) -> list[dict[str, Any]]:
    """What each budget pays for in each column: steps if the cache is there, and after its share of the build.

    Args:
        columns: the cells; both divergences cost the same.
        budgets: in FLOPs.
        epoch_steps: that make a pass over the cache's training text.
        flops_per_second: for the time of the steps; None for none.
    """
    rows = []
    for budget in budgets:
        for column in columns:
            steps = budget // column.step_flops
            after = max(0, budget - column.share) // column.step_flops
            seconds = None if flops_per_second is None else steps * column.step_flops / flops_per_second
            row = {"prefix": column.prefix, "tier": column.tier, "budget": budget, "steps": steps}
            rows.append({**row, "amortised_steps": after, "epochs": steps / epoch_steps, "run_s": seconds})
    return rows


def require_a_step(columns: Sequence[Column], budget: int) -> None:
    """Raise UserError unless the smallest budget pays for the longest step of every column."""
    for column in columns:
        if column.step_flops > budget:
            raise UserError(
                f"--budgets {budget:g}",
                f"a step on {column.prefix} prefixes costs up to {column.step_flops:.4g} FLOPs",
                "raise it, or train on fewer --sequences or a shorter --window",
            )
