"""The values that decide a run, valid once built. Imports nothing heavy: command lines read their options from here."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

from logitcache.errors import UserError, require
from logitcache.flops import ADAPTED
from trainer.schedules import Decay, LearningRate

Backend = Literal["reference", "chunked", "native", "triton"]
"""Of `kernels`, see `kernels.api`."""


@dataclass(frozen=True, kw_only=True)
class BatchPlan:
    """How much text a step takes.

    Attributes:
        sequences: B, per step.
        max_completion_tokens: the training window.
        micro_batch_tokens: rows that go through the student at once; bounds memory and changes no result.
    """

    sequences: int
    max_completion_tokens: int
    micro_batch_tokens: int = 2048


@dataclass(frozen=True, kw_only=True)
class Optimisation:
    """AdamW under a learning rate with a linear warm-up (arXiv 2605.16826: over 5% of the steps, then constant).

    Attributes:
        steps: optimizer steps.
        learning_rate: after the warm-up.
        warmup_steps: the first steps, over which it rises linearly.
        decay: what follows the warm-up.
        weight_decay: decoupled: times the learning rate, of every weight.
        max_grad_norm: the gradient's 2-norm is clipped to it.
        betas: decay rates of the first and the second moment.
    """

    steps: int
    learning_rate: float
    warmup_steps: int
    decay: Decay = Decay.CONSTANT
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    betas: tuple[float, float] = (0.9, 0.999)

    def __post_init__(self) -> None:
        _ = self.rate  # valid once built
        require(0 <= self.weight_decay < math.inf, "--weight-decay, 0 or above", self.weight_decay)
        require(0 < self.max_grad_norm < math.inf, "--max-grad-norm, above 0", self.max_grad_norm)
        require(all(0 <= beta < 1 for beta in self.betas), "--betas, 0 to below 1", self.betas)

    @property
    def rate(self) -> LearningRate:
        """Of each step."""
        return LearningRate(peak=self.learning_rate, steps=self.steps, warmup_steps=self.warmup_steps, decay=self.decay)


class Prefix(StrEnum):
    """Who writes the text a student is taught on."""

    TEACHER = "teacher"
    """The teacher did; it is in the cache."""
    STUDENT = "student"
    """The student does, at every step; the teacher scores it live."""
    MIXED = "mixed"
    """A stated share of each step's sequences by the student, the rest by the teacher."""


class Weighting(StrEnum):
    """What counts equally in a step's loss."""

    TOKEN = "token"
    """Every completion token of the step."""
    SEQUENCE = "sequence"
    """Every sequence: the mean over sequences of each one's mean over its tokens."""


@dataclass(frozen=True, kw_only=True)
class Lora:
    """Adapters that are trained in place of the weights (arXiv 2106.09685).

    Attributes:
        rank: r.
        alpha: the adapters' products are multiplied by alpha / rank.
        matrices: of every layer, of "q", "k", "v", "o", "gate", "up" and "down".
        seed: of how they begin.
    """

    rank: int
    alpha: int
    matrices: tuple[str, ...] = ADAPTED
    seed: int = 0

    def __post_init__(self) -> None:
        require(self.rank >= 1, "--lora-rank, at least 1", self.rank)
        require(self.alpha >= 1, "--lora-alpha, at least 1", self.alpha)
        known = bool(self.matrices) and set(self.matrices) <= set(ADAPTED)
        require(known, f"--lora-matrices, of {', '.join(ADAPTED)}", ", ".join(self.matrices), "name one or more")


@dataclass(frozen=True, kw_only=True)
class Training:
    """How a student is trained, the same for every cell.

    Attributes:
        steps: optimizer steps.
        sequences: per step.
        window: completion tokens of a sequence that are trained on, and that a student writes.
        learning_rate: of AdamW, after a linear warm-up over `warmup_steps`.
        warmup_steps: steps until the learning rate is reached.
        schedule: what the learning rate does after them: constant or cosine (to 0).
        weight_decay: of AdamW, times the learning rate.
        max_grad_norm: the gradient's 2-norm is clipped to it.
        betas: of AdamW.
        weighting: what counts equally in a step's loss: every token or every sequence.
        gradient_checkpointing: keep the layers' inputs alone and run each layer again in the backward pass: less memory
            for about a third more FLOPs.
        kl_temperature: divides both sides' logits in the divergence.
        micro_batch_tokens: tokens that go through the student at once; bounds memory and changes no result.
        precision: of the matrix products: bfloat16 (over float32 weights) or float32.
        held_out_share: of the problems, chosen by a hash of their id.
        held_out_sequences: how many of those to measure on, at most.
        seed: of order and sampling.
        backend: that computes the divergences (reference, chunked, native, triton); by device if not given.
        lora_rank: train adapters of this rank (LoRA, by peft) and leave the weights as they are; none if not given.
        lora_alpha: adapters count alpha / rank times; twice the rank if not given.
        lora_matrices: of every layer that get one: q, k, v, o, gate, up, down.
    """

    steps: int = 10
    sequences: int = 8
    window: int = 32
    learning_rate: float = 1e-4
    warmup_steps: int = 2
    schedule: Decay = Decay.CONSTANT
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    betas: tuple[float, float] = (0.9, 0.999)
    weighting: Weighting = Weighting.TOKEN
    gradient_checkpointing: bool = False
    kl_temperature: float = 1.0
    micro_batch_tokens: int = 2048
    precision: str = "bfloat16"
    held_out_share: float = 0.2
    held_out_sequences: int = 24
    seed: int = 0
    backend: Backend | None = None
    lora_rank: int | None = None
    lora_alpha: int | None = None
    lora_matrices: tuple[str, ...] = ADAPTED

    def __post_init__(self) -> None:
        for name in ("steps", "sequences", "window", "micro_batch_tokens", "held_out_sequences"):
            if getattr(self, name) < 1:
                option = f"--{name.replace('_', '-')}"
                raise UserError(f"{option} {getattr(self, name)}", "it is below 1", "ask for at least 1")
        if not 0 < self.held_out_share < 1:
            raise UserError(f"--held-out-share {self.held_out_share}", "not between 0 and 1", "try 0.2")
        require(self.seed >= 0, "--seed, 0 or above", self.seed)
        if self.lora_rank is None:
            for name, value, default in (("alpha", self.lora_alpha, None), ("matrices", self.lora_matrices, ADAPTED)):
                if value != default:
                    raise UserError(f"--lora-{name}", "there are no adapters", "give --lora-rank too, or leave it out")
        _ = self.optimisation, self.lora  # valid once built

    @property
    def plan(self) -> BatchPlan:
        """How much text a step takes."""
        return BatchPlan(
            sequences=self.sequences, max_completion_tokens=self.window, micro_batch_tokens=self.micro_batch_tokens
        )

    @property
    def lora(self) -> Lora | None:
        """The adapters; None trains the weights themselves."""
        if self.lora_rank is None:
            return None
        alpha = 2 * self.lora_rank if self.lora_alpha is None else self.lora_alpha
        return Lora(rank=self.lora_rank, alpha=alpha, matrices=self.lora_matrices, seed=self.seed)

    @property
    def optimisation(self) -> Optimisation:
        """What the optimizer does."""
        return Optimisation(
            steps=self.steps,
            learning_rate=self.learning_rate,
            warmup_steps=min(self.warmup_steps, self.steps),
            decay=self.schedule,
            weight_decay=self.weight_decay,
            max_grad_norm=self.max_grad_norm,
            betas=self.betas,
        )
