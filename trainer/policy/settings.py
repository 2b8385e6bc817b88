"""The values that decide a GRPO run, valid once built. Imports nothing heavy: command lines read their options here."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

from logitcache.errors import require
from trainer.schedules import Decay
from trainer.settings import Backend, Optimisation


class RewardKind(StrEnum):
    """How an answer is judged: 1 or 0."""

    MATH = "math"
    """Equal to the known one as mathematics, by math-verify (`trainer.answers`)."""
    EXACT = "exact"
    """The known one letter by letter, in the last box or, without a box, as the last word."""


class AdvantageScale(StrEnum):
    """What a reward's distance from its group's mean is divided by."""

    STD = "std"
    """The group's standard deviation (DeepSeekMath, arXiv 2402.03300)."""
    NONE = "none"
    """Nothing: problems that are nearly always or nearly never solved do not weigh more (Dr. GRPO, 2503.20783)."""


class Normalisation(StrEnum):
    """What the summed loss of a step's tokens is divided by."""

    TOKEN = "token"
    """All completion tokens of the step: every token counts equally (DAPO, arXiv 2503.14476)."""
    SEQUENCE = "sequence"
    """Each completion by its length, then by their number: every completion counts equally (DeepSeekMath)."""
    CONSTANT = "constant"
    """Completions times the longest that is allowed: no length is favoured (Dr. GRPO)."""


class ReferenceKL(StrEnum):
    """How the divergence from the reference is estimated on the policy's own tokens."""

    CORRECTED = "corrected"
    """k3 times the ratio: its gradient is that of KL(policy, reference) (DeepSeek-V3.2, arXiv 2512.02556)."""
    K3 = "k3"
    """k3 alone (DeepSeekMath): the same value, but in expectation the gradient of KL(reference, policy)."""


@dataclass(frozen=True, kw_only=True)
class Surrogate:
    """What is minimised, see docs/grpo.md.

    Attributes:
        advantage: divide a reward's distance from its group's mean by: std (GRPO) or none (Dr. GRPO).
        normalisation: divide the summed loss by: token (DAPO), sequence (GRPO) or constant (Dr. GRPO).
        clip_low: a ratio below 1 - clip_low earns nothing more by falling.
        clip_high: a ratio above 1 + clip_high earns nothing more by rising.
        kl_weight: of KL(policy, reference), the reference being the policy before its first step; 0 keeps none.
        kl: how that is estimated: corrected (its own gradient) or k3 (as first published).
    """

    advantage: AdvantageScale = AdvantageScale.STD
    normalisation: Normalisation = Normalisation.TOKEN
    clip_low: float = 0.2
    clip_high: float = 0.28
    kl_weight: float = 0.0
    kl: ReferenceKL = ReferenceKL.CORRECTED

    def __post_init__(self) -> None:
        require(0 < self.clip_low <= 1, "--clip-low, above 0, at most 1", self.clip_low)
        require(0 < self.clip_high < math.inf, "--clip-high, above 0", self.clip_high)
        require(0 <= self.kl_weight < math.inf, "--kl-weight, 0 or above", self.kl_weight)


@dataclass(frozen=True, kw_only=True)
class PolicyTraining:
    """How a policy is trained.

    Attributes:
        steps: rollout batches.
        prompts: problems of a step.
        group: answers to each problem, at least 2.
        updates: optimizer steps taken on each rollout batch, each over all of it.
        learning_rate: of AdamW, after a linear warm-up over `warmup_steps` steps.
        warmup_steps: steps until the learning rate is reached.
        schedule: what the learning rate does after them: constant or cosine (to 0).
        micro_batch_tokens: tokens that go through the policy at once; bounds memory and changes no result.
        precision: of the matrix products: bfloat16 (over float32 weights) or float32.
        gradient_checkpointing: keep the layers' inputs alone and run each layer again in the backward pass.
        seed: of the problems' order and of sampling.
        backend: that computes log-probabilities (reference, chunked, native, triton); by device if not given.
    """

    steps: int = 100
    prompts: int = 8
    group: int = 8
    updates: int = 1
    learning_rate: float = 1e-6
    warmup_steps: int = 5
    schedule: Decay = Decay.CONSTANT
    micro_batch_tokens: int = 4096
    precision: str = "bfloat16"
    gradient_checkpointing: bool = False
    seed: int = 0
    backend: Backend | None = None

    def __post_init__(self) -> None:
        for name in ("steps", "prompts", "updates", "micro_batch_tokens"):
            value = getattr(self, name)
            require(value >= 1, f"--{name.replace('_', '-')}, at least 1", value)
        require(self.seed >= 0, "--seed, 0 or above", self.seed)
        require(self.group >= 2, "--group, at least 2: an answer is compared with others of its group", self.group)
        _ = self.optimisation  # valid once built

    @property
    def optimisation(self) -> Optimisation:
        """What the optimizer does."""
        return Optimisation(
            steps=self.steps,
            learning_rate=self.learning_rate,
            warmup_steps=min(self.warmup_steps, self.steps),
            decay=self.schedule,
        )
