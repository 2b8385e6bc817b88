"""An equal-FLOP study: which cells, budgets and seeds, where each run is measured, and what it will come to.

Guarantees: all of it is arithmetic on FLOPs, known before anything is run; imports nothing heavy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from logitcache.errors import UserError, require
from trainer.settings import Prefix


@dataclass(frozen=True, kw_only=True)
class Study:
    """What is compared.

    Attributes:
        budgets: FLOPs of training one student, ascending whole numbers.
        mixes: forward weights, each on teacher and on student prefixes.
        seeds: of order and sampling, a run of every cell for each.
        parts: each budget is measured at so many equal parts of it.
        students: that share the cache.
        price_per_hour: of the machine that trains, for the money.
    """

    budgets: tuple[int, ...]
    mixes: tuple[float, ...] = (1.0, 0.0)
    seeds: tuple[int, ...] = (0, 1, 2)
    parts: int = 4
    students: int = 10
    price_per_hour: float | None = None

    def __post_init__(self) -> None:
        for name in ("budgets", "mixes", "seeds"):
            values = getattr(self, name)
            require(0 < len(values) == len(set(values)), f"--{name}, at least one and none twice", values)
        require(self.budgets[0] >= 1, "--budgets, at least 1 FLOP", self.budgets[0])
        require(min(self.seeds) >= 0, "--seeds, 0 or more", self.seeds)
        require(self.parts >= 1, "--parts, at least 1", self.parts)
        require(self.students >= 1, "--students, at least 1", self.students)
        priced = self.price_per_hour is None or (math.isfinite(self.price_per_hour) and self.price_per_hour > 0)
        require(priced, "--price-per-hour, above 0", self.price_per_hour)

    @property
    def runs(self) -> int:
        """A run up to the largest budget serves the smaller ones."""
        return 2 * len(self.mixes) * len(self.seeds)

    def share(self, prefix: Prefix, build_flops: int) -> int:
        """FLOPs of the build that one student owes, rounded up; a student that writes for itself owes none."""
        return -(-build_flops // self.students) if prefix is Prefix.TEACHER else 0

    def points(self, share: int) -> tuple[int, ...]:
        """Marginal FLOPs at which a run is measured: the parts of every budget, and what `share` leaves of it."""
        parts = {budget * part // self.parts for budget in self.budgets for part in range(1, self.parts + 1)}
        return tuple(sorted(parts | {budget - share for budget in self.budgets if budget > share}))


def whole_flops(budgets: Sequence[float]) -> tuple[int, ...]:
    """Budgets as a user writes them (2e13) in ascending order; UserError for one that is none."""
    for budget in budgets:
        require(math.isfinite(budget) and budget >= 1, "--budgets, at least 1 FLOP", budget)
    return tuple(sorted(int(budget) for budget in budgets))


@dataclass(frozen=True, kw_only=True)
class Column:
    """A prefix, and what a planned step of it costs.

    Attributes:
        tier: of the cache; None for student prefixes.
        step_flops: of one step.
        share: of the build, that one student owes.
    """

    prefix: Prefix
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
            row = {"prefix": str(column.prefix), "tier": column.tier, "budget": budget, "steps": steps}
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
