"""Values that change over a run: the learning rate, and the weight of forward KL.

Guarantees: pure functions of the step, so a run that is resumed needs no state of theirs; valid once built. Steps count
from 0. Imports nothing heavy: command lines are read with it.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from enum import StrEnum

from logitcache.errors import UserError, require


class Decay(StrEnum):
    """What the learning rate does after its warm-up."""

    CONSTANT = "constant"
    """It stays (arXiv 2605.16826)."""
    COSINE = "cosine"
    """It falls to 0 along half a cosine (arXiv 1608.03983, equation 5, without restarts)."""


@dataclass(frozen=True, kw_only=True)
class LearningRate:
    """A linear warm-up, then constant or a cosine to 0 over the steps that are left.

    Attributes:
        peak: reached in the last step of the warm-up.
        steps: of the whole run.
        warmup_steps: at most `steps`; 0 starts at the peak. The paper's is 5% of its steps.
        decay: what follows.
    """

    peak: float
    steps: int
    warmup_steps: int = 0
    decay: Decay = Decay.CONSTANT

    def __post_init__(self) -> None:
        require(math.isfinite(self.peak) and self.peak > 0, "--learning-rate, above 0", self.peak)
        require(self.steps >= 1, "--steps, at least 1", self.steps)
        fits = 0 <= self.warmup_steps <= self.steps
        require(fits, f"--warmup-steps, 0 to the run's {self.steps} steps", self.warmup_steps)

    def at(self, step: int) -> float:
        """The rate of step 0, 1, ..."""
        if step < self.warmup_steps:
            return self.peak * (step + 1) / self.warmup_steps
        match self.decay:
            case Decay.CONSTANT:
                return self.peak
            case Decay.COSINE:
                done = (step - self.warmup_steps) / (self.steps - self.warmup_steps)
                return self.peak * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))


@dataclass(frozen=True, kw_only=True)
class WeightSchedule:
    """A forward weight, 0..1: `start` up to step `first`, `end` from step `last` on, on a straight line between them.

    As a word, which `parse` reads and `str` writes: `0.8`, `1.0:0.2@100` (over steps 0 to 100) or `1.0:0.2@50:150`.
    """

    start: float
    end: float
    first: int = 0
    last: int = 0

    def __post_init__(self) -> None:
        for weight in (self.start, self.end):
            require(0 <= weight <= 1, "--forward-weight, 0 (reverse KL) to 1 (forward KL)", weight)
        require(self.first < self.last or self.start == self.end, "steps to change the weight over, at least 1", 0)

    @classmethod
    def constant(cls, weight: float) -> WeightSchedule:
        """The same weight at every step."""
        return cls(start=weight, end=weight)

    @classmethod
    def parse(cls, word: str) -> WeightSchedule:
        """Read a schedule from a command line. The colon is no arrow because a shell would take `>` for itself.

        Raises:
            UserError: not a schedule, or weights outside 0..1.
        """
        found = _WORD.fullmatch(word.strip())
        if found is None:
            do = "give 0.8, or 1.0:0.2@100 to go from 1.0 to 0.2 over steps 0 to 100, or 1.0:0.2@50:150"
            raise UserError(f"--forward-weight {word}", "it is no weight and no schedule", do)
        start = float(found["start"])
        if found["end"] is None:
            return cls.constant(start)
        first, last = int(found["first"] or 0), int(found["last"])
        require(first < last, f"--forward-weight {word}, over at least 1 step", f"steps {first} to {last}")
        return cls(start=start, end=float(found["end"]), first=first, last=last)

    def at(self, step: int) -> float:
        """The weight of step 0, 1, ..."""
        if step >= self.last:
            return self.end
        done = max(step - self.first, 0) / (self.last - self.first)
        return self.start + (self.end - self.start) * done

    def __str__(self) -> str:
        if self.start == self.end:
            return repr(self.start)
        return f"{self.start!r}:{self.end!r}@{self.first}:{self.last}"


_NUMBER = r"(?:\d+\.?\d*|\.\d+)(?:e-?\d+)?"
_WORD = re.compile(rf"(?P<start>{_NUMBER})(?::(?P<end>{_NUMBER})@(?:(?P<first>\d+):)?(?P<last>\d+))?")
