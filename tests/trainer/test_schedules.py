"""Schedules are functions of the step, and a word on the command line says which."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from logitcache.errors import UserError
from trainer.schedules import Decay, LearningRate, WeightSchedule


@pytest.mark.parametrize(
    "word",
    ["", "a", "1.5", "-0.1", "nan", "1:0", "1:0@0", "1:2@10", "1:0@9:9", "1:0@9:3", "1->0@10", "1:0@-5", "1:0@1.5"],
)
def test_words_that_are_no_schedule_are_refused(word: str) -> None:
    with pytest.raises(UserError, match="forward-weight"):
        WeightSchedule.parse(word)


def test_a_weight_goes_from_start_to_end_over_its_span() -> None:
    weight = WeightSchedule.parse("1.0:0.2@50:150")
    assert [weight.at(step) for step in (0, 50, 100, 150, 900)] == pytest.approx([1.0, 1.0, 0.6, 0.2, 0.2])
    assert WeightSchedule.parse("0:1@4").at(1) == 0.25
    assert {WeightSchedule.parse("0.8").at(step) for step in range(5)} == {0.8}


@given(st.floats(0, 1), st.floats(0, 1), st.integers(0, 100), st.integers(1, 100))
def test_a_word_says_the_whole_schedule(start: float, end: float, first: int, span: int) -> None:
    weight = WeightSchedule(start=start, end=end, first=first, last=first + span)
    again = WeightSchedule.parse(str(weight))
    assert [again.at(step) for step in range(210)] == [weight.at(step) for step in range(210)]
    assert all(0 <= weight.at(step) <= 1 for step in range(210))


def test_a_rate_warms_up_and_stays_or_falls() -> None:
    constant = LearningRate(peak=2.0, steps=8, warmup_steps=4)
    assert [constant.at(step) for step in range(8)] == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0, 2.0, 2.0]
    cosine = LearningRate(peak=2.0, steps=8, warmup_steps=4, decay=Decay.COSINE)
    assert [cosine.at(step) for step in (3, 4, 6, 8, 20)] == pytest.approx([2.0, 2.0, 1.0, 0.0, 0.0])
    assert LearningRate(peak=1.0, steps=3).at(0) == 1.0
    assert LearningRate(peak=1.0, steps=3, warmup_steps=3, decay=Decay.COSINE).at(2) == 1.0


@pytest.mark.parametrize(
    "options",
    [
        {"peak": 0.0},
        {"peak": float("nan")},
        {"peak": float("inf")},
        {"steps": 0},
        {"warmup_steps": 9},
        {"warmup_steps": -1},
    ],
)
def test_impossible_rates_are_refused(options: dict) -> None:
    with pytest.raises(UserError):
        LearningRate(**{"peak": 1.0, "steps": 8, **options})
