"""What arXiv 2605.16826 claims, and the rule by which the study agrees or does not. Pure.

Guarantees: a claim is a difference that the paper says is above 0, one value a seed; the verdict follows from its 95%
interval over seeds and from nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np

from tools.studies.measuring import mean_over_levels
from tools.studies.study import CORNERS, WINDOWS, Distilled, Rewarded, Run, Size, Window
from trainer.curves import Estimate
from trainer.settings import Prefix

COLLAPSED = 0.1
"""Of the teacher's entropy: below it, a student's has collapsed. (An untrained student's is mostly ignorance.)"""
PREFIXES = (Prefix.TEACHER, Prefix.STUDENT)


@dataclass(frozen=True, kw_only=True)
class Results:
    """All runs of a study by name, and its two models before any.

    Attributes:
        size: of the study.
        start: figures by level of `student` and `teacher`.
        runs: each with `points`, in order of their steps.
    """

    size: Size
    start: Mapping[str, Any]
    runs: Mapping[str, Mapping[str, Any]]

    def final(self, run: Run, figure: str) -> float:
        """At the end, mean over levels."""
        return mean_over_levels(self.runs[run.name]["points"][-1], figure)

    def before(self, figure: str) -> float:
        """Of the student that all runs start from, mean over levels."""
        return mean_over_levels(self.start["student"], figure)

    def curve(self, run: Run, figure: str, over: str) -> tuple[list[float], list[float]]:
        """A figure over `step` or `flops`, from where the run starts."""
        points = self.runs[run.name]["points"]
        first = self.final(run.start, figure) if isinstance(run, Rewarded) else self.before(figure)
        return [0, *(point[over] for point in points)], [first, *(mean_over_levels(one, figure) for one in points)]


@dataclass(frozen=True, kw_only=True)
class Claim:
    """In words, what the paper says of it, and the difference that is then above 0.

    Attributes:
        difference: of one seed.
        scale: of it for people; unit: what it then is in.
    """

    words: str
    paper: str
    difference: Callable[[Results, int], float]
    unit: str
    scale: float = 1.0

    def estimate(self, results: Results) -> Estimate:
        """Over seeds, in `unit`."""
        return Estimate.of([self.scale * self.difference(results, seed) for seed in results.size.seeds])


def verdict(estimate: Estimate) -> str:
    """By whether the interval excludes 0."""
    if estimate.low is not None and estimate.low > 0:
        return "agrees"
    if estimate.high is not None and estimate.high < 0:
        return "does not"
    return "cannot tell"


def cell(prefix: Prefix, weight: float, window: Window, seed: int) -> Distilled:
    """A run of the grid."""
    return Distilled(prefix=prefix, forward_weight=weight, window=window, seed=seed)


def _reverse_minus_forward(figure: str) -> Callable[[Results, int], float]:
    def difference(results: Results, seed: int) -> float:
        pairs = [[cell(p, weight, w, seed) for weight in (0.0, 1.0)] for p in PREFIXES for w in WINDOWS]
        return fmean(results.final(reverse, figure) - results.final(forward, figure) for reverse, forward in pairs)

    return difference


def _own_minus_teacher(results: Results, seed: int) -> float:
    pairs = _prefix_pairs(results, seed)
    return fmean(results.final(own, "avg_at_8") - results.final(cached, "avg_at_8") for own, cached in pairs)


def _lost_at_equal_flops(results: Results, seed: int) -> float:
    """The own-text cells' final Avg@8 minus what they had at the FLOPs that the cached cells cost in all."""
    lost = []
    for own, cached in _prefix_pairs(results, seed):
        budget = results.runs[cached.name]["points"][-1]["flops"]
        flops, avg = results.curve(own, "avg_at_8", "flops")
        lost.append(avg[-1] - float(np.interp(budget, flops, avg)))
    return fmean(lost)


def _prefix_pairs(results: Results, seed: int) -> list[Sequence[Distilled]]:
    return [
        [cell(prefix, weight, window, seed) for prefix in (Prefix.STUDENT, Prefix.TEACHER)]
        for weight in CORNERS
        for window in WINDOWS
    ]


def _long_minus_short(results: Results, seed: int) -> float:
    return fmean(
        results.final(cell(prefix, weight, Window.LONG, seed), "avg_at_8")
        - results.final(cell(prefix, weight, Window.SHORT, seed), "avg_at_8")
        for prefix in PREFIXES
        for weight in CORNERS
    )


def _below_collapse(results: Results, seed: int) -> float:
    entropy = results.final(cell(Prefix.STUDENT, 0.0, Window.LONG, seed), "entropy_nats")
    return COLLAPSED * mean_over_levels(results.start["teacher"], "entropy_nats") - entropy


def _kept_by_mixing(results: Results, seed: int) -> float:
    """How far above the middle between reverse's and forward's entropy a weight of 0.8 ends."""
    reverse, mixed, forward = (
        results.final(cell(Prefix.STUDENT, weight, Window.LONG, seed), "entropy_nats") for weight in (0.0, 0.8, 1.0)
    )
    return mixed - (reverse + forward) / 2


def _gated_minus_fixed(figure: str) -> Callable[[Results, int], float]:
    def difference(results: Results, seed: int) -> float:
        gated, fixed = (cell(Prefix.STUDENT, 0.0, window, seed) for window in (Window.CURRICULUM, Window.LONG))
        return results.final(gated, figure) - results.final(fixed, figure)

    return difference


def _forward_gains_more(results: Results, seed: int) -> float:
    def gain(prefix: Prefix, weight: float) -> float:
        start = cell(prefix, weight, Window.LONG, seed)
        return results.final(Rewarded(start=start), "avg_at_8") - results.final(start, "avg_at_8")

    return fmean(gain(prefix, 1.0) - gain(prefix, 0.0) for prefix in PREFIXES)


def _negative(of: Callable[[Results, int], float]) -> Callable[[Results, int], float]:
    return lambda results, seed: -of(results, seed)


_POINTS: dict[str, Any] = {"unit": "points of Avg@8", "scale": 100.0}
CLAIMS = (
    Claim(words="reverse KL raises accuracy", paper="+2.45", difference=_reverse_minus_forward("avg_at_8"), **_POINTS),
    Claim(
        words="reverse KL lowers entropy",
        paper="in every cell",
        difference=_negative(_reverse_minus_forward("entropy_nats")),
        unit="nats",
    ),
    Claim(words="student prefixes win at equal steps", paper="+1.80", difference=_own_minus_teacher, **_POINTS),
    Claim(words="and lose part of it at equal FLOPs", paper="part", difference=_lost_at_equal_flops, **_POINTS),
    Claim(words="long windows win", paper="+2.56", difference=_long_minus_short, **_POINTS),
    Claim(
        words=f"reverse KL on long student prefixes collapses entropy (below {COLLAPSED:.0%} of a teacher's)",
        paper="to 0",
        difference=_below_collapse,
        unit="nats below that",
    ),
    Claim(
        words="a forward weight of 0.8 keeps entropy (nearer to forward's than to reverse's)",
        paper="0.8 or more",
        difference=_kept_by_mixing,
        unit="nats above the middle",
    ),
    Claim(
        words="the curriculum beats a fixed long window",
        paper="+3.6",
        difference=_gated_minus_fixed("avg_at_8"),
        **_POINTS,
    ),
    Claim(
        words="and shortens answers",
        paper="8185 to 2688 tokens",
        difference=_negative(_gated_minus_fixed("length_tokens")),
        unit="tokens",
    ),
    Claim(
        words="forward checkpoints gain more from GRPO",
        paper="+5 against -9 (MATH500)",
        difference=_forward_gains_more,
        **_POINTS,
    ),
)
