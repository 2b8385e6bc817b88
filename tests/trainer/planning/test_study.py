"""A study's arithmetic: what it refuses, where it measures, what each budget pays for."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from logitcache.errors import UserError
from trainer.planning.study import Column, Study, prefix_name, require_a_step, steps_within, whole_flops


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"budgets": ()}, "--budgets, at least one"),
        ({"budgets": (5, 5)}, "--budgets, at least one and none twice"),
        ({"budgets": (0, 5)}, "--budgets, at least 1 FLOP"),
        ({"mixes": ()}, "--mixes, at least one"),
        ({"student_shares": (0.5, 0.5)}, "--student-shares, at least one and none twice"),
        ({"student_shares": (1.5,)}, "--student-shares, of 0 to 1"),
        ({"seeds": (1, 1)}, "--seeds, at least one and none twice"),
        ({"seeds": (0, -1)}, "--seeds, 0 or more"),
        ({"parts": 0}, "--parts, at least 1"),
        ({"students": 0}, "--students, at least 1"),
        ({"price_per_hour": 0.0}, "--price-per-hour, above 0"),
    ],
)
def test_a_study_that_makes_no_sense_is_an_error(options: dict[str, Any], found: str) -> None:
    with pytest.raises(UserError, match=found):
        Study(**{"budgets": (10,), **options})


@pytest.mark.parametrize("budget", [0.5, -1.0, math.inf, math.nan])
def test_a_budget_that_is_none_is_an_error(budget: float) -> None:
    with pytest.raises(UserError, match="--budgets, at least 1 FLOP"):
        whole_flops([1e12, budget])


def test_budgets_are_whole_and_ascend() -> None:
    assert whole_flops([2e13, 1e12]) == (10**12, 2 * 10**13)


def test_points_are_parts_of_every_budget_and_what_the_build_leaves() -> None:
    study = Study(budgets=(100, 200), parts=2, students=3)
    assert study.runs == 12
    assert [study.share(share, 100) for share in (0.0, 0.5, 1.0)] == [34, 34, 0]
    assert [prefix_name(share) for share in (0.0, 0.5, 1.0)] == ["teacher", "mixed-0.5", "student"]
    assert replace(study, student_shares=(0.0, 0.25, 1.0)).runs == 18
    assert study.points(34) == (50, 66, 100, 166, 200)
    assert study.points(0) == (50, 100, 200)
    assert study.points(150) == (50, 100, 200)  # of the smaller budget nothing is left


def test_what_budgets_pay_for_by_hand() -> None:
    cached = Column(prefix="teacher", tier="hidden", step_flops=10, share=35)
    live = Column(prefix="student", tier=None, step_flops=30, share=0)
    with pytest.raises(UserError, match=r"--budgets 29: a step on student prefixes costs up to 30 FLOPs"):
        require_a_step([cached, live], 29)
    require_a_step([cached, live], 30)
    rows = steps_within([cached, live], [30, 100], epoch_steps=5, flops_per_second=2.0)
    assert [(row["steps"], row["amortised_steps"], row["epochs"], row["run_s"]) for row in rows] == [
        (3, 0, 0.6, 15.0),
        (1, 1, 0.2, 15.0),
        (10, 6, 2.0, 50.0),
        (3, 3, 0.6, 45.0),
    ]
