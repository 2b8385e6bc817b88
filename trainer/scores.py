"""From right and wrong answers to Avg@k, Pass@k and maj@k, with intervals.

Guarantees: pure numpy; every estimator gives one value a problem, and a score is their mean, so that each problem
counts equally and the bootstrap draws problems, never single answers. P problems, N samples of each.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from logitcache.errors import require

Answers = Sequence[Sequence[str | None]]
"""P x N final answers, of numbers in one spelling each; None where a sample gave none."""

RESAMPLES = 10_000
_RESAMPLED_AT_ONCE = 500


@dataclass(frozen=True, kw_only=True)
class Score:
    """A mean over problems, each a share of 1, and its 95% interval, see `bootstrap`."""

    mean: float
    low: float
    high: float


def avg_at_k(correct_PN: NDArray[np.bool_], k: int) -> NDArray[np.float64]:
    """float64[P]: the share of right answers among the first k samples.

    Raises:
        UserError: k is not within 1 to N.
    """
    return _first(correct_PN, k).mean(axis=1, dtype=np.float64)


def pass_at_k(correct_PN: NDArray[np.bool_], k: int) -> NDArray[np.float64]:
    """float64[P]: the chance that at least one of k samples drawn from the N is right, 1 - C(N-c, k) / C(N, k).

    Unbiased for k samples of the model (Chen et al., "Evaluating Large Language Models Trained on Code", 2021,
    equation 1).

    Raises:
        UserError: k is not within 1 to N.
    """
    n = correct_PN.shape[1]
    require_ks([k], n)
    by_count = np.array([1 - math.comb(n - right, k) / math.comb(n, k) for right in range(n + 1)])
    return by_count[correct_PN.sum(axis=1)]


def pass_at_k_plain(correct_PN: NDArray[np.bool_], k: int) -> NDArray[np.float64]:
    """float64[P], each 0 or 1: whether one of the first k samples is right.

    Raises:
        UserError: k is not within 1 to N.
    """
    return np.asarray(_first(correct_PN, k).any(axis=1), np.float64)


def maj_at_k(correct_PN: NDArray[np.bool_], answers: Answers, k: int) -> NDArray[np.float64]:
    """float64[P]: whether the most frequent answer of the first k samples is right.

    All right answers are one, however they are written, and wrong ones as far as `trainer.answers` spells them alike; a
    sample without an answer does not vote. Where several answers are equally frequent, one of them is drawn, and the
    value is the chance that it is the right one.

    Raises:
        UserError: k is not within 1 to N.
    """
    rows = zip(_first(correct_PN, k).tolist(), answers, strict=True)
    return np.array([_majority(correct, row[:k]) for correct, row in rows])


def bootstrap(values_P: NDArray[np.float64], rng: np.random.Generator) -> Score:
    """The mean of one value a problem, 0 to 1, and where it lies in 95% of the draws of P problems with replacement.

    Where all values are equal, every draw is too, and its percentiles would claim certainty. There the interval is
    what P equal values exclude: with a share u of other problems, none of P is one with probability (1-u)^P, which is
    2.5% at the largest u that is not excluded; those problems may have any value. Of 0 and 1 it is the exact binomial
    interval (Clopper and Pearson 1934), of 100 problems nearly the rule of three.
    """
    problems, mean = len(values_P), float(values_P.mean())
    if (values_P == values_P[0]).all():
        others = 1 - 0.025 ** (1 / problems)
        return Score(mean=mean, low=mean - others * mean, high=mean + others * (1 - mean))
    means = []
    for _ in range(RESAMPLES // _RESAMPLED_AT_ONCE):  # in pieces: the draws of a large set are not held at once
        drawn = rng.integers(0, problems, (_RESAMPLED_AT_ONCE, problems))
        means.append(values_P[drawn].mean(axis=1))
    low, high = np.percentile(np.concatenate(means), [2.5, 97.5])
    return Score(mean=mean, low=float(low), high=float(high))


def score_table(
    correct_PN: NDArray[np.bool_], answers: Answers, ks: Sequence[int], *, seed: int = 0
) -> dict[str, Score]:
    """`avg_at_N` over all samples, and for each k `pass_at_k`, `pass_at_k_plain` and `maj_at_k`.

    Every score is judged on the same draws of problems, made from `seed`.

    Raises:
        UserError: a k that is not within 1 to N.
    """
    values = {f"avg_at_{correct_PN.shape[1]}": avg_at_k(correct_PN, correct_PN.shape[1])}
    for k in ks:
        values[f"pass_at_{k}"] = pass_at_k(correct_PN, k)
        values[f"pass_at_{k}_plain"] = pass_at_k_plain(correct_PN, k)
        values[f"maj_at_{k}"] = maj_at_k(correct_PN, answers, k)
    return {name: bootstrap(value, np.random.default_rng(seed)) for name, value in values.items()}


def require_ks(ks: Sequence[int], samples: int) -> None:
    """Raise UserError unless every k can be had from so many samples of a problem."""
    for k in ks:
        do = f"take {k} samples or more, or a smaller k"
        require(1 <= k <= samples, f"k, 1 to the {samples} samples of a problem", k, do)


def _first(correct_PN: NDArray[np.bool_], k: int) -> NDArray[np.bool_]:
    require_ks([k], correct_PN.shape[1])
    return correct_PN[:, :k]


_RIGHT = object()


def _majority(correct: Sequence[bool], answers: Sequence[str | None]) -> float:
    votes = Counter(
        _RIGHT if right else answer
        for right, answer in zip(correct, answers, strict=True)
        if right or answer is not None
    )
    if not votes:
        return 0.0
    most = max(votes.values())
    return float(votes[_RIGHT] == most) / sum(count == most for count in votes.values())
