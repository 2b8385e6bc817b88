"""Timing several subjects against each other, so that what drifts meanwhile meets all of them alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping


def interleaved(subjects: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each subject, one after the other in each of `rounds` rounds after one that warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in subjects}
    for number in range(rounds + 1):
        for name, action in subjects.items():
            started = time.perf_counter()
            action()
            if number:
                seconds[name].append(time.perf_counter() - started)
    return seconds
