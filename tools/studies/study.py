"""What the study runs, as values: which cells, mixes, curricula and policies, from which seeds, and how large.

Guarantees: a run has one name, whatever studies it belongs to; the order is that in which runs depend on each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from logitcache.errors import UserError
from tools.studies.world import LONGEST
from trainer.settings import Prefix

SHORT = 16
"""Completion tokens: about the first step of a working."""
LADDER = (SHORT, 32, 64, LONGEST)
"""Of the curriculum: as the paper's, from the short window to the long one by doublings."""
CORNERS = (1.0, 0.0)
"""Forward weights of the four cells."""


class Window(StrEnum):
    """How much of a completion is trained on."""

    SHORT = "short"
    LONG = "long"
    CURRICULUM = "curriculum"

    @property
    def tokens(self) -> int:
        """Completion tokens, at most."""
        return SHORT if self is Window.SHORT else LONGEST


WINDOWS = (Window.SHORT, Window.LONG)
"""Of the four cells."""


@dataclass(frozen=True, kw_only=True)
class Distilled:
    """A student taught by the teacher."""

    prefix: Prefix
    forward_weight: float
    window: Window
    seed: int

    @property
    def name(self) -> str:
        """Of its files."""
        return f"{self.prefix}-{self.forward_weight:g}-{self.window}-{self.seed}"

    def with_seed(self, seed: int) -> Distilled:
        """The same from another seed."""
        return replace(self, seed=seed)


@dataclass(frozen=True, kw_only=True)
class Rewarded:
    """The same student, by GRPO from there on."""

    start: Distilled

    @property
    def name(self) -> str:
        """Of its files."""
        return f"grpo-{self.start.name}"

    def with_seed(self, seed: int) -> Rewarded:
        """The same from another seed."""
        return Rewarded(start=self.start.with_seed(seed))


Run = Distilled | Rewarded


@dataclass(frozen=True, kw_only=True)
class Size:
    """How large a study is.

    Attributes:
        problems: of each level, in the cache.
        exam: held-out problems of each level that students are measured on.
        steps: of distillation; points: how often a run is measured, its end included.
        sequences: of a step.
        learning_rate: of distillation; grpo_learning_rate: of GRPO.
        check_every: steps between checks of the curriculum; floor: of entropy, see `trainer.curriculum.parse_floor`.
        grpo_steps: rollout batches, of `grpo_prompts` problems and `grpo_group` answers to each.
        grpo_top_p: that these are drawn with; below 1, from another distribution than the one that is trained.
        seeds: of each run.
        mixes: forward weights, on student prefixes and long windows.
    """

    problems: int = 2048
    exam: int = 64
    steps: int = 160
    points: int = 4
    sequences: int = 32
    learning_rate: float = 5e-4
    check_every: int = 20
    floor: str = "50%"
    grpo_steps: int = 40
    grpo_prompts: int = 16
    grpo_group: int = 8
    grpo_learning_rate: float = 1e-4
    grpo_top_p: float = 1.0
    seeds: tuple[int, ...] = (0, 1, 2)
    mixes: tuple[float, ...] = (0.0, 0.2, 0.5, 0.8, 1.0)


SIZES = {
    "full": Size(),
    "quick": Size(
        problems=192,
        exam=24,
        steps=16,
        points=2,
        sequences=16,
        check_every=4,
        grpo_steps=4,
        grpo_prompts=4,
        seeds=(0,),
        mixes=(0.0, 0.8, 1.0),
    ),
}


def cells(size: Size) -> list[Distilled]:
    """The four cells, on each window, from each seed."""
    return [
        Distilled(prefix=prefix, forward_weight=weight, window=window, seed=seed)
        for seed in size.seeds
        for window in WINDOWS
        for prefix in (Prefix.STUDENT, Prefix.TEACHER)
        for weight in CORNERS
    ]


def mixes(size: Size) -> list[Distilled]:
    """From reverse to forward on the student's own text; both ends are cells."""
    return [_own_text(weight, Window.LONG, seed) for seed in size.seeds for weight in size.mixes]


def curricula(size: Size) -> list[Distilled]:
    """In place of the long window, for on-policy distillation."""
    return [_own_text(0.0, Window.CURRICULUM, seed) for seed in size.seeds]


def policies(size: Size) -> list[Rewarded]:
    """From each of the four cells on long windows."""
    return [Rewarded(start=cell) for cell in cells(size) if cell.window is Window.LONG]


def stages(size: Size) -> list[Sequence[Run]]:
    """All runs, each once; those of a stage need nothing of each other, the slow ones come first."""
    distilled = list(dict.fromkeys([*cells(size), *mixes(size), *curricula(size)]))
    distilled.sort(key=lambda run: run.prefix is Prefix.TEACHER)
    return [distilled, policies(size)]


def named(name: str, size: str) -> tuple[Run, Size]:
    """A run of a study, and the study's size.

    Raises:
        UserError: there is no such run or size.
    """
    if size not in SIZES:
        raise UserError(f"a study of size {size}", "there is none", f"choose {' or '.join(SIZES)}")
    runs = {run.name: run for stage in stages(SIZES[size]) for run in stage}
    if name not in runs:
        raise UserError(f"run {name} of the {size} study", "there is none", f"such as {next(iter(runs))}")
    return runs[name], SIZES[size]


def _own_text(weight: float, window: Window, seed: int) -> Distilled:
    return Distilled(prefix=Prefix.STUDENT, forward_weight=weight, window=window, seed=seed)
