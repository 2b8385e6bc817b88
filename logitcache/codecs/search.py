"""Finding the coarsest setting of one dial that keeps a measured KL within a bound.

Guarantees: what is returned was measured and is within the bound; deterministic; a handful of trials, because
each is a pass over the vocabulary. The KL is taken to grow with the dial, about as a power of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from logitcache.errors import UserError

_TRIALS = 8
_CLOSE_ENOUGH = 0.9
_AIM = 0.96

Fitted = TypeVar("Fitted")


@dataclass(frozen=True, kw_only=True)
class Dial:
    """A positive setting: where to start, its range, and how the KL grows with it (a power, roughly)."""

    start: float
    lowest: float
    highest: float
    exponent: float


def coarsest_within(dial: Dial, max_kl: float, attempt: Callable[[float], tuple[Fitted, float]], what: str) -> Fitted:
    """The fitted thing whose setting is coarsest among those tried with a KL of at most `max_kl` nats.

    Stops at 0.9 to 1 times `max_kl`, or after eight trials with the best of them.

    Args:
        dial: what is turned.
        max_kl: nats.
        attempt: a setting to what it fits and its measured KL.
        what: for the error.

    Raises:
        UserError: the finest setting is not fine enough.
    """
    low, high, exponent = dial.lowest, dial.highest, dial.exponent
    setting = min(max(dial.start, low), high)
    tried: dict[float, float] = {}
    best: tuple[float, Fitted] | None = None
    for _ in range(_TRIALS):
        fitted, kl = attempt(setting)
        exponent = _slope(tried, setting, kl, exponent)
        tried[setting] = kl
        if kl <= max_kl:
            best, low = (setting, fitted), setting
        else:
            high = setting
        if _CLOSE_ENOUGH * max_kl <= kl <= max_kl:
            break
        guess = setting * (_AIM * max_kl / max(kl, 1e-12)) ** (1 / exponent)
        setting = guess if low < guess < high else _edge(guess, low, high, tried)
        if setting in tried:
            break
    if best is None:
        raise UserError(f"--targets {what}", f"{min(tried.values()):.3g} nats at best", "allow more, or keep hidden")
    return best[1]


def _slope(tried: dict[float, float], setting: float, kl: float, otherwise: float) -> float:
    """The power that joins the last trial to this one, kept between 1/5 and 5; `otherwise` where there is no last."""
    if not tried:
        return otherwise
    last, last_kl = next(reversed(tried.items()))
    power = math.log(max(kl, 1e-12) / max(last_kl, 1e-12)) / math.log(setting / last)
    return min(max(power, 0.2), 5.0)


def _edge(guess: float, low: float, high: float, tried: dict[float, float]) -> float:
    """The end of the range that a guess went beyond, or, if that was tried, the middle of the range (in logs)."""
    end = low if guess <= low else high
    return (low * high) ** 0.5 if end in tried else end
