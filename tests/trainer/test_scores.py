"""Avg@k, Pass@k, maj@k and the bootstrap, by hand, by enumeration and by the formula that was published."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from logitcache.errors import UserError
from trainer.scores import avg_at_k, bootstrap, maj_at_k, pass_at_k, pass_at_k_plain, score_table

BY_HAND = np.array([[1, 0, 0, 1], [0, 0, 0, 0], [0, 1, 0, 0], [1, 1, 1, 1]], bool)


@pytest.mark.parametrize(
    ("score", "k", "values"),
    [
        (avg_at_k, 1, [1, 0, 0, 1]),
        (avg_at_k, 2, [0.5, 0, 0.5, 1]),
        (avg_at_k, 4, [0.5, 0, 0.25, 1]),
        (pass_at_k, 1, [0.5, 0, 0.25, 1]),
        (pass_at_k, 2, [5 / 6, 0, 0.5, 1]),
        (pass_at_k, 3, [1, 0, 0.75, 1]),
        (pass_at_k, 4, [1, 0, 1, 1]),
        (pass_at_k_plain, 1, [1, 0, 0, 1]),
        (pass_at_k_plain, 2, [1, 0, 1, 1]),
        (pass_at_k_plain, 4, [1, 0, 1, 1]),
    ],
)
def test_by_hand(score, k: int, values: list[float]) -> None:
    assert score(BY_HAND, k) == pytest.approx(values, abs=1e-15)


@st.composite
def outcomes(draw: st.DrawFn) -> NDArray[np.bool_]:
    problems, samples = draw(st.integers(1, 5)), draw(st.integers(1, 8))
    cells = st.lists(st.booleans(), min_size=problems * samples, max_size=problems * samples)
    return np.array(draw(cells)).reshape(problems, samples)


@given(outcomes(), st.data())
def test_pass_at_k_is_the_mean_over_all_subsets(correct: NDArray[np.bool_], data: st.DataObject) -> None:
    k = data.draw(st.integers(1, correct.shape[1]))
    subsets = [list(chosen) for chosen in combinations(range(correct.shape[1]), k)]
    by_enumeration = np.mean([correct[:, chosen].any(axis=1) for chosen in subsets], axis=0)
    assert pass_at_k(correct, k) == pytest.approx(by_enumeration, abs=1e-12)


def test_pass_at_k_is_the_published_estimator() -> None:
    """The numpy formula of Chen et al. 2021 (figure 3), on random inputs as large as evaluations are."""

    def published(n: int, c: int, k: int) -> float:
        return 1.0 if n - c < k else float(1.0 - np.prod(1.0 - k / np.arange(n - c + 1, n + 1)))

    rng = np.random.default_rng(0)
    for n, k in [(1, 1), (8, 8), (16, 4), (200, 1), (200, 10), (200, 100), (1024, 256)]:
        correct = rng.random((50, n)) < rng.random((50, 1))
        expected = [published(n, int(count), k) for count in correct.sum(axis=1)]
        assert pass_at_k(correct, k) == pytest.approx(expected, abs=1e-11)


@pytest.mark.parametrize(
    ("correct", "answers", "k", "value"),
    [
        ([0, 0, 1], ["3", "3", "4"], 3, 0),
        ([1, 1, 0], ["4", "4", "3"], 3, 1),
        ([1, 1, 0, 0, 0], ["1/2", "0.5", "3", "3", "5"], 5, 1 / 2),  # right answers are one, so they draw
        ([1, 1, 1, 0, 0], ["1/2", "0.5", None, "3", "3"], 5, 1),
        ([0, 1], ["3", "4"], 1, 0),
        ([0, 1, 0], ["3", "4", "5"], 3, 1 / 3),
        ([0, 0, 1], [None, None, "4"], 3, 1),  # who gives no answer does not vote
        ([0, 0], [None, None], 2, 0),
    ],
)
def test_majorities(correct: list[int], answers: list[str | None], k: int, value: float) -> None:
    assert maj_at_k(np.array([correct], bool), [answers], k) == pytest.approx([value])


def test_intervals_hold_the_truth_about_as_often_as_they_say() -> None:
    rng = np.random.default_rng(1)
    held = 0
    for _ in range(100):
        score = bootstrap((rng.random(60) < 0.4).astype(float), rng)
        held += score.low <= 0.4 <= score.high
    assert 88 <= held <= 100  # 95 in expectation, standard deviation 2.2


def test_an_interval_is_about_problems_and_not_about_samples() -> None:
    """Twice the samples of the same problems, all alike, tell nothing new."""
    correct = np.random.default_rng(2).random((40, 1)) < 0.5
    once, often = (score_table(np.repeat(correct, n, axis=1), [["1"] * n] * 40, [1])["pass_at_1"] for n in (1, 8))
    assert once == often
    assert once.low < once.mean < once.high


@pytest.mark.parametrize(
    ("value", "problems", "low", "high"),
    [
        (0.0, 8, 0.0, 0.3694),  # Clopper-Pearson's of 0 of 8, as published tables have it
        (1.0, 8, 0.6306, 1.0),
        (0.0, 30, 0.0, 0.1157),
        (0.0, 1, 0.0, 0.975),
        (0.25, 1, 0.00625, 0.98125),
    ],
)
def test_values_that_are_all_equal_are_no_certainty(value: float, problems: int, low: float, high: float) -> None:
    score = bootstrap(np.full(problems, value), np.random.default_rng(0))
    assert (score.mean, score.low, score.high) == pytest.approx((value, low, high), abs=5e-5)


def test_a_table_names_every_score() -> None:
    table = score_table(BY_HAND, [["1"] * 4] * 4, [1, 4])
    assert list(table) == [
        "avg_at_4", "pass_at_1", "pass_at_1_plain", "maj_at_1", "pass_at_4", "pass_at_4_plain", "maj_at_4",
    ]  # fmt: skip
    assert table["avg_at_4"].mean == table["pass_at_1"].mean == pytest.approx(7 / 16)


@pytest.mark.parametrize("k", [0, 5])
@pytest.mark.parametrize("score", [avg_at_k, pass_at_k, pass_at_k_plain])
def test_a_k_beyond_the_samples_is_refused(score, k: int) -> None:
    with pytest.raises(UserError, match=f"1 to the 4 samples of a problem: got {k}; take {k} samples"):
        score(BY_HAND, k)
