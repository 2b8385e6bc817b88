"""Quality over cost: means over seeds with intervals, and where two curves cross. Pure; imports numpy alone.

Guarantees: an interval is Student's t over independent runs, so it says what another seed would do, not what other
problems would; from one run there is none. A crossing is where the better one of two curves changes, on straight lines
between measured points and only where both were measured.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

import numpy as np
from numpy.typing import NDArray

_T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
"""97.5% quantiles of Student's t for 1 to 10 degrees of freedom."""
_Z_975 = 1.959964


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean over runs and its 95% interval, which one run does not give."""

    mean: float
    low: float | None
    high: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> Estimate:
        """From a value a run, at least one."""
        mean = fmean(values)
        if len(values) == 1:
            return cls(mean=mean, low=None, high=None)
        half = t_975(len(values) - 1) * stdev(values) / len(values) ** 0.5
        return cls(mean=mean, low=mean - half, high=mean + half)


def t_975(degrees: int) -> float:
    """The 97.5% quantile of Student's t, within 0.2%.

    From 11 degrees of freedom on the first two terms of Cornish and Fisher's expansion (Abramowitz and Stegun 26.7.5).
    """
    if degrees <= len(_T_975):
        return _T_975[degrees - 1]
    z = _Z_975
    return z + (z**3 + z) / (4 * degrees) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)


@dataclass(frozen=True, kw_only=True, eq=False)
class Curve:
    """Straight lines between points; `cost` ascends."""

    cost: Sequence[float]
    value: Sequence[float]


def crossings(one: Curve, other: Curve) -> list[float]:
    """Costs at which the better one changes, ascending, within the range of both; ties at its ends are none."""
    low, high = max(one.cost[0], other.cost[0]), min(one.cost[-1], other.cost[-1])
    places = np.array(sorted({low, high, *(x for x in (*one.cost, *other.cost) if low < x < high)}), np.float64)
    difference = _at(one, places) - _at(other, places)
    (decided,) = np.nonzero(difference)
    found = []
    for before, after in itertools.pairwise(decided.tolist()):
        left, right = difference[before], difference[after]
        if (left < 0) != (right < 0):
            if after > before + 1:  # they meet in a measured point
                found.append(float(places[before + 1]))
            else:
                share = left / (left - right)
                found.append(float(places[before] + share * (places[after] - places[before])))
    return found


def _at(curve: Curve, places: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.interp(places, curve.cost, curve.value)
