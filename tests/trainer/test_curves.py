"""Intervals by hand, and crossings where they must and must not be."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.curves import Curve, Estimate, crossings, t_975


def test_an_interval_by_hand() -> None:
    found = Estimate.of([1.0, 2.0, 3.0])  # standard error 1 / sqrt(3), t of 2 degrees of freedom 4.303
    assert found.mean == 2
    assert found.low == pytest.approx(2 - 4.303 / 3**0.5)
    assert found.high == pytest.approx(2 + 4.303 / 3**0.5)
    assert Estimate.of([1.5]) == Estimate(mean=1.5, low=None, high=None)


@pytest.mark.parametrize(("degrees", "value"), [(1, 12.706), (10, 2.228), (11, 2.201), (20, 2.086), (120, 1.980)])
def test_quantiles_of_students_t_are_those_of_the_tables(degrees: int, value: float) -> None:
    assert t_975(degrees) == pytest.approx(value, rel=2e-3)


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        (([0, 10], [0, 10]), ([0, 10], [4, 4]), [4]),
        (([0, 10], [4, 0]), ([0, 10], [4, 2]), []),  # the common start is none
        (([0, 10, 20], [4, 0, 4]), ([0, 20], [2, 2]), [5, 15]),
        (([0, 10, 20], [4, 2, 0]), ([0, 10, 20], [0, 2, 4]), [10]),  # in a measured point
        (([0, 10, 20, 30], [4, 2, 2, 0]), ([0, 10, 20, 30], [0, 2, 2, 4]), [10]),  # from there on
        (([0, 10, 20], [4, 2, 4]), ([0, 20], [2, 2]), []),  # they touch
        (([5, 20], [9, 0]), ([0, 10], [3, 3]), []),  # it would be at 15, where one was not measured
        (([5, 20], [9, 0]), ([0, 20], [3, 3]), [15]),
    ],
)
def test_crossings_by_hand(
    one: tuple[list[float], list[float]], other: tuple[list[float], list[float]], expected: list[float]
) -> None:
    curves = [Curve(cost=cost, value=value) for cost, value in (one, other)]
    assert crossings(*curves) == pytest.approx(expected)
    assert crossings(*reversed(curves)) == pytest.approx(expected)


VALUES = st.lists(st.integers(-5, 5).map(float), min_size=5, max_size=5)


@given(one=VALUES, other=VALUES)
def test_the_better_one_changes_as_often_as_there_are_crossings(one: list[float], other: list[float]) -> None:
    places = [0.0, 1.0, 2.5, 4.0, 8.0]
    found = crossings(Curve(cost=places, value=one), Curve(cost=places, value=other))
    signs = [a > b for a, b in zip(one, other, strict=True) if a != b]
    assert len(found) == sum(a != b for a, b in itertools.pairwise(signs))
    assert found == sorted(found)
