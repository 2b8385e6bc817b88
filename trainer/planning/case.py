"""What is planned, and for what aim. Imports nothing heavy: command lines read their options from here."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

from logitcache.errors import UserError, require


class Have(StrEnum):
    """What is there before the first step."""

    NOTHING = "nothing"
    """The teacher must write and score."""
    TEXT = "text"
    """A cache of trajectories without the tier: the teacher must score."""
    CACHE = "cache"
    """All of it."""


class Aim(StrEnum):
    """What the student is for."""

    ANSWER = "answer"
    """The best single answer: Avg@k, and nothing after it."""
    RL = "rl"
    """A start for reinforcement learning: entropy must survive."""
    COMPUTE = "compute"
    """As cheap as can be: bound by compute, or the trajectories are there already."""
    LONG = "long"
    """Long completions."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is planned: the options of `trainer plan` and `trainer advise`.

    Attributes:
        student: a directory with a config.json, that file, `embedded`, a hub id already on this machine, or Qwen3-SIZE.
        teacher: likewise.
        problems: the cache's, one completion each.
        prompt_tokens: of every problem; the default is what fits arXiv 2605.16826's figures.
        completion_tokens: of every completion in the cache.
        window: completion tokens of each that are trained on, and that a student writes; all by default.
        sequences: per step.
        student_share: of each step's sequences, that the student writes on mixed prefixes; plans those too.
        steps: per student; as many as the budget pays for, or 1,000 without one.
        budget: FLOPs for one student.
        students: that share the build.
        have: what is there already: nothing, the text (a cache without the tier), or the whole cache.
        gradient_checkpointing: as for `trainer distill`.
        vocab: the tokenizer's tokens, where the teacher's head has padding rows; the config's vocab_size by default.
        flops_per_second: that the hardware is known to achieve at this work, for the time.
        price_per_hour: of that hardware, for the money.
    """

    student: str = "Qwen3-0.6B"
    teacher: str = "Qwen3-4B"
    problems: int = 40_000
    prompt_tokens: int = 94
    completion_tokens: int = 4096
    window: int | None = None
    sequences: int = 32
    student_share: float | None = None
    steps: int | None = None
    budget: float | None = None
    students: int = 1
    have: Have = Have.NOTHING
    gradient_checkpointing: bool = False
    vocab: int | None = None
    flops_per_second: float | None = None
    price_per_hour: float | None = None

    def __post_init__(self) -> None:
        counts = ("problems", "prompt_tokens", "completion_tokens", "window", "sequences", "steps", "students", "vocab")
        for name in (*counts, "budget", "flops_per_second", "price_per_hour"):
            value = getattr(self, name)
            least = 1 if name in counts else 0
            sound = value is None or (math.isfinite(value) and value >= least and value > 0)
            require(sound, f"--{name.replace('_', '-')}, {'at least 1' if least else 'above 0'}", value)
        own = (self.student_share or 0) * self.sequences
        fits = self.student_share is None or (0 < own < self.sequences and math.isclose(own, round(own)))
        do = "choose a share that makes 1 or more of either"
        require(fits, f"--student-share, a whole part of {self.sequences} sequences", self.student_share, do)
        if self.price_per_hour is not None and self.flops_per_second is None:
            raise UserError("--price-per-hour", "no hours follow from FLOPs alone", "give --flops-per-second, measured")
        if self.budget is not None and self.steps is not None:
            raise UserError("--budget and --steps", "each decides the other", "give one of them")
