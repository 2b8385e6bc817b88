"""The entropy-gated length curriculum (arXiv 2605.16826): train on a longer window only while the student stays unsure.

Guarantees: the window is a rung of the ladder, never falls, and rises by one rung at a time, only at a check whose
entropy is at or above the floor; a frozen window stays; what is saved and restored goes on exactly. Imports nothing
heavy and measures nothing: `trainer.rollouts` does.

The rule is the paper's: start at 128 tokens, raise while the held-out mean token entropy is at or above a floor, else
freeze. What the paper leaves open, and what is chosen here:

- *Ladder*: doublings. From the paper's start (128) to its end (4,096) that is six rungs; a finer one makes more checks,
  not another rule.
- *Floor*: half the entropy at the start. Entropies differ severalfold between models and kinds of text, and a ratio
  carries over from one to the next where an absolute number of nats does not.
- *Interval*: every 50 steps, 20 checks in the paper's 1,000 steps. A check costs rollouts, so it must be rare; a rung
  must be felt before it is judged, so it must not be rarer than the ladder has rungs.
- *Held-out set*: prompts of held-out problems, the same ones and the same seed at every check, so that two checks
  differ by the student and not by the draw. Completions are as long as the window that is being judged.
- *Freezing*: for good, at the first check below. A window that is trained on under reverse KL drives entropy down
  further, so a rise soon after is more likely noise. `patience` allows for noise: that many checks in a row must be
  below; until then the window holds. None never freezes and only holds.
"""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

from logitcache.errors import UserError, require


@dataclass(frozen=True, kw_only=True)
class AbsoluteFloor:
    """Nats per token."""

    nats: float

    def __post_init__(self) -> None:
        require(math.isfinite(self.nats) and self.nats >= 0, "an entropy floor, 0 nats or more", self.nats)

    def __str__(self) -> str:
        return repr(self.nats)


@dataclass(frozen=True, kw_only=True)
class RelativeFloor:
    """A share of the entropy that was measured before the first step."""

    share: float

    def __post_init__(self) -> None:
        require(math.isfinite(self.share) and self.share >= 0, "an entropy floor, 0% of the start or more", self.share)

    def __str__(self) -> str:
        return f"{self.share * 100:g}%"


Floor = AbsoluteFloor | RelativeFloor


def parse_floor(word: str) -> Floor:
    """`0.3` is nats per token, `50%` a share of the entropy at the start. Raises UserError for anything else."""
    found = re.fullmatch(r"(\d+\.?\d*|\.\d+)(%?)", word.strip())
    if found is None:
        raise UserError(f"an entropy floor {word}", "it is no number", "give nats (0.3) or a share of the start (50%)")
    value = float(found[1])
    return RelativeFloor(share=value / 100) if found[2] else AbsoluteFloor(nats=value)


@dataclass(frozen=True, kw_only=True)
class CurriculumPlan:
    """The ladder and the rule; the module says why the defaults are what they are.

    Attributes:
        lengths: windows in completion tokens, ascending.
        floor: of the held-out mean token entropy.
        check_every: steps between checks; the first is before step 0.
        patience: checks in a row below the floor that freeze the window; None never freezes it.
    """

    lengths: tuple[int, ...] = (128, 256, 512, 1024, 2048, 4096)
    floor: Floor = RelativeFloor(share=0.5)
    check_every: int = 50
    patience: int | None = 1

    def __post_init__(self) -> None:
        rising = all(a < b for a, b in zip(self.lengths, self.lengths[1:], strict=False))
        require(bool(self.lengths) and self.lengths[0] >= 1 and rising, "ascending windows above 0", self.lengths)
        require(self.check_every >= 1, "steps between checks, at least 1", self.check_every)
        require(self.patience is None or self.patience >= 1, "a patience of at least 1 check", self.patience)


def plan_of(
    lengths: tuple[int, ...], *, floor: str | None, check_every: int | None, patience: int | None
) -> CurriculumPlan | None:
    """What a command line asks for; None is not given, and no lengths are no curriculum.

    Raises:
        UserError: a value that is none of its kind, or one that decides nothing without a curriculum.
    """
    given = {"entropy_floor": floor, "check_every": check_every, "patience": patience}
    chosen: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if not lengths:
        for name in chosen:
            found, do = "without a curriculum there are no checks", "give --curriculum too, or leave it out"
            raise UserError(f"--{name.replace('_', '-')}", found, do)
        return None
    if floor is not None:
        chosen["floor"] = parse_floor(chosen.pop("entropy_floor"))
    return CurriculumPlan(lengths=lengths, **chosen)


class Decision(StrEnum):
    """What a check decided."""

    START = "start"
    """It was the first: the student before training, which a relative floor refers to."""
    RAISE = "raise"
    TOP = "top"
    """At or above the floor, with no longer window left."""
    HOLD = "hold"
    """Below the floor, within the patience."""
    FREEZE = "freeze"
    """Below the floor once too often; from now on for good."""


@dataclass(kw_only=True)
class _State:
    rung: int = 0
    start_nats: float | None = None
    checks_below: int = 0
    frozen: bool = False
    last_step: int | None = None


class Curriculum:
    """Where a run is on the ladder."""

    def __init__(self, plan: CurriculumPlan) -> None:
        self.plan = plan
        self._state = _State()

    @property
    def window(self) -> int:
        """Completion tokens to train on now."""
        return self.plan.lengths[self._state.rung]

    @property
    def frozen(self) -> bool:
        """Whether the window stays for good."""
        return self._state.frozen

    @property
    def floor_nats(self) -> float | None:
        """The floor in nats; None for a relative one before the first check."""
        match self.plan.floor:
            case AbsoluteFloor(nats=nats):
                return nats
            case RelativeFloor(share=share):
                start = self._state.start_nats
                return None if start is None else share * start

    def due(self, step: int) -> bool:
        """Whether to check before this step: every `check_every`, and not twice (a run may be resumed right there)."""
        return step % self.plan.check_every == 0 and step != self._state.last_step

    def observe(self, step: int, entropy_nats: float) -> Decision:
        """Decide by a check made before `step`, which comes after all steps observed before.

        Args:
            step: the next one to train.
            entropy_nats: held-out mean token entropy of the student's own completions, nats.

        Raises:
            ValueError: an entropy that is none, or a step that is not later than the last.
        """
        state = self._state
        if not (math.isfinite(entropy_nats) and entropy_nats >= 0):
            raise ValueError(f"entropy_nats: got {entropy_nats}, expected 0 or more")
        if state.last_step is not None and step <= state.last_step:
            raise ValueError(f"step: got {step}, expected one after {state.last_step}")
        state.last_step = step
        if state.start_nats is None:
            state.start_nats = entropy_nats
            return Decision.START
        floor_nats = self.floor_nats
        assert floor_nats is not None
        if entropy_nats < floor_nats:
            state.checks_below += 1
            state.frozen = state.frozen or state.checks_below == self.plan.patience
        else:
            state.checks_below = 0
        return self._decide()

    def _decide(self) -> Decision:
        state = self._state
        if state.frozen:
            return Decision.FREEZE
        if state.checks_below:
            return Decision.HOLD
        if state.rung == len(self.plan.lengths) - 1:
            return Decision.TOP
        state.rung += 1
        return Decision.RAISE

    def state(self) -> dict[str, Any]:
        """Where it is, as JSON values."""
        return asdict(self._state)

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from there, under the same plan.

        Raises:
            UserError: a rung that this plan's ladder does not have.
        """
        restored = _State(**state)
        rungs = len(self.plan.lengths)
        require(0 <= restored.rung < rungs, f"a rung of a ladder of {rungs}", restored.rung, "resume with its ladder")
        self._state = restored
