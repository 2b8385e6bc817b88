"""A run's cost before it is run: steps, text, FLOPs, bytes, and time and money where their rates are given.

Guarantees: everything follows from two configurations and stated lengths; what needs a measurement that is not there
is None. All sequences are taken to be of one length, which for a spread of lengths is a little too low: attention grows
with the square.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from logitcache.errors import UserError, require
from trainer.flops import Phase
from trainer.planning.case import Case, Have
from trainer.planning.costs import BreakEven, Instead, Pair, Text, break_even, build_cost, step_cost
from trainer.planning.models import model_shape
from trainer.planning.storage import kind_of_tier, storage
from trainer.planning.study import Column, require_a_step, steps_within
from trainer.settings import Prefix

PAPER_STEPS = 1_000
"""Of arXiv 2605.16826."""


def models(case: Case) -> Pair:
    """The shapes of its models; UserError for one that is not known."""
    return Pair(student=model_shape(case.student), teacher=model_shape(case.teacher), vocab=case.vocab)


def cache_text(case: Case) -> Text:
    """The text of the whole cache."""
    lengths = {"prompt_tokens": case.prompt_tokens, "completion_tokens": case.completion_tokens}
    return Text.alike(sequences=case.problems, **lengths)


def step_text(case: Case, sequences: int | None = None) -> Text:
    """The text of one step, or of so many of its sequences."""
    trained = min(case.completion_tokens, case.window or case.completion_tokens)
    return Text.alike(
        sequences=case.sequences if sequences is None else sequences,
        prompt_tokens=case.prompt_tokens,
        completion_tokens=trained,
    )


@dataclass(frozen=True, kw_only=True)
class CellCost:
    """One student's cost in a column of the grid; forward and reverse KL cost the same.

    Attributes:
        prefix: who writes.
        tier: from the cache; None for student prefixes.
        step: FLOPs of one step by phase.
        build: FLOPs of the whole build, `generate` and `score`; zero for student prefixes, which owe it nothing.
        steps: planned; under a budget, what it pays for if the cache is there.
        amortised_steps: what the budget pays for after this student's share of the build; `steps` without a budget.
    """

    prefix: Prefix
    tier: str | None
    step: dict[str, int]
    build: dict[str, int]
    steps: int
    amortised_steps: int

    @property
    def step_flops(self) -> int:
        """All phases."""
        return sum(self.step.values())

    def amortised(self, students: int) -> int:
        """FLOPs of `amortised_steps` steps and a share of the build, rounded up as a ledger does."""
        return self.amortised_steps * self.step_flops + self.share(students)

    def share(self, students: int) -> int:
        """Of the build, rounded up."""
        return -(-sum(self.build.values()) // students)


def cell_cost(case: Case, prefix: Prefix, tier: str | None) -> CellCost:
    """Cost one column of the grid; under a budget too small for it, a column of no steps."""
    kind = "hidden" if tier is None else kind_of_tier(tier)
    step = dict.fromkeys(Phase, 0)
    for written_by, sequences in _parts(case, prefix):
        text, checkpointed = step_text(case, sequences), case.gradient_checkpointing
        part = step_cost(models(case), text, prefix=written_by, kind=kind, gradient_checkpointing=checkpointed)
        step = {phase: flops + part[phase] for phase, flops in step.items()}
    step_flops, build = sum(step.values()), {"generate": 0, "score": 0}
    if prefix is not Prefix.STUDENT:
        build = build_cost(models(case).teacher, cache_text(case), kind=kind, have=case.have)
    steps = amortised_steps = case.steps or PAPER_STEPS
    if case.budget is not None:
        budget = int(case.budget)
        steps = budget // step_flops
        share = -(-sum(build.values()) // case.students)
        amortised_steps = max(0, (budget - share) // step_flops)
    by_phase = {str(phase): flops for phase, flops in step.items()}
    return CellCost(prefix=prefix, tier=tier, step=by_phase, build=build, steps=steps, amortised_steps=amortised_steps)


def _parts(case: Case, prefix: Prefix) -> list[tuple[Prefix, int]]:
    """Who writes how many of a step's sequences."""
    if prefix is not Prefix.MIXED:
        return [(prefix, case.sequences)]
    own = round((case.student_share or 0) * case.sequences)
    return [(Prefix.TEACHER, case.sequences - own), (Prefix.STUDENT, own)]


def make_plan(case: Case, tiers: Sequence[str], budgets: Sequence[int] = ()) -> dict[str, Any]:
    """Everything that can be said of a case before it is run, as JSON values.

    Args:
        case: what is planned.
        tiers: to compare, each as for `logitcache build --targets`, as if it were the cache's only one.
        budgets: FLOPs to compare the cells at, ascending, besides what the case itself has.

    Raises:
        UserError: no tier, an unknown model or tier, a budget of the case that pays for no step of any cell, or one of
            `budgets` that does not pay for a step of every cell.
    """
    if not tiers:
        raise UserError("--tiers", "none was named", "name at least one, such as hidden")
    cells = [cell_cost(case, Prefix.TEACHER, tier) for tier in tiers]
    if case.student_share is not None:  # from exact tiers alone: no metric mixes them with coarse ones
        exact = [tier for tier in tiers if kind_of_tier(tier) in ("hidden", "full")]
        require(bool(exact), "--student-share, with hidden or full among the --tiers", ", ".join(tiers), "add hidden")
        cells += [cell_cost(case, Prefix.MIXED, tier) for tier in exact]
    cells.append(cell_cost(case, Prefix.STUDENT, None))
    columns = [
        Column(prefix=str(cell.prefix), tier=cell.tier, step_flops=cell.step_flops, share=cell.share(case.students))
        for cell in cells
    ]
    if budgets:
        require_a_step(columns, budgets[0])
    if case.budget is not None and not any(cell.steps for cell in cells):
        cheapest = min(cell.step_flops for cell in cells)
        raise UserError(
            f"--budget {case.budget:g}",
            f"one step costs {cheapest:.4g} FLOPs at the least",
            "raise it, or train on fewer --sequences or a shorter --window",
        )
    return {
        "case": asdict(case),
        "cells": [_cell_facts(case, cell) for cell in cells],
        "budgets": steps_within(
            columns, budgets, epoch_steps=case.problems / case.sequences, flops_per_second=case.flops_per_second
        ),
        "storage": [_storage_facts(case, tier) for tier in tiers],
        "break_even": [facts for tier in tiers for facts in break_even_facts(case, tier)],
    }


def _cell_facts(case: Case, cell: CellCost) -> dict[str, Any]:
    marginal, amortised = cell.steps * cell.step_flops, cell.amortised(case.students)
    rate, price = case.flops_per_second, case.price_per_hour
    seconds = None if rate is None else amortised / rate
    return {
        **asdict(cell),
        "step_flops": cell.step_flops,
        "trajectories": cell.steps * case.sequences,
        "completion_tokens": cell.steps * step_text(case).target_rows,
        "marginal": marginal,
        "amortised": amortised,
        "amortised_s": seconds,
        "amortised_money": None if seconds is None or price is None else seconds / 3600 * price,
    }


def _storage_facts(case: Case, tier: str) -> dict[str, Any]:
    found = storage(models(case).teacher, tier)
    return {"tier": tier, **asdict(found), "bytes": found.total_bytes(cache_text(case).target_rows)}


def break_even_facts(case: Case, tier: str) -> list[dict[str, Any]]:
    """When a tier pays, against either alternative and with what may be there already."""
    window = case.window or case.completion_tokens
    comparisons = [
        (Have.NOTHING, Instead.STUDENT_PREFIX),
        (Have.TEXT, Instead.STUDENT_PREFIX),
        (Have.TEXT, Instead.RESCORING),
    ]
    found = []
    for have, instead in comparisons:
        point: BreakEven = break_even(
            models(case), cache_text(case), window=window, kind=kind_of_tier(tier), have=have, instead=instead
        )
        epochs = (case.steps or PAPER_STEPS) * case.sequences / case.problems
        facts = {"tier": tier, "have": str(have), "instead": str(instead), **asdict(point), "passes": point.passes}
        facts |= {"trained_tokens": point.trained_tokens, "epochs_per_student": epochs}
        found.append(facts | {"students": point.students(epochs)})
    return found
