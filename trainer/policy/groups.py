"""Groups of answers: the policy writes them now, and they are judged now.

Guarantees: what is drawn is a pure function of the seed, the weights and how often was drawn, which is all the state;
the writing is in the ledger when a draw returns; rewards are finite, or the run stops and says of which problem.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from logitcache.errors import UserError
from logitcache.flops import ModelShape
from logitcache.loader import ShuffledOrder
from logitcache.problems import Problem
from logitcache.records import FinishReason, TokenSequence
from logitcache.scoring import Generator, Prompt, Sampling
from trainer.flops import FlopLedger, add_rollout
from trainer.policy.rewards import Reward


@dataclass(frozen=True, kw_only=True, eq=False)
class Drawn:
    """B = P * G sequences, problem-major, and their rewards, float64[P, G]."""

    sequences: Sequence[TokenSequence]
    reward_PG: Tensor

    def figures(self) -> dict[str, float]:
        """A step's metrics of what was written, by name."""
        lengths = [one.completion_tokens for one in self.sequences]
        silent_P = (self.reward_PG == self.reward_PG[:, :1]).all(dim=1)
        truncated = sum(one.finish_reason is FinishReason.LENGTH for one in self.sequences)
        return {
            "reward_mean": float(self.reward_PG.mean()),
            "no_signal_share": float(silent_P.double().mean()),
            "mean_length": sum(lengths) / len(lengths),
            "truncated_share": truncated / len(lengths),
        }


def problems_drawn(problems: Sequence[Problem], *, seed: int, count: int) -> list[Problem]:
    """Those among the first `count` that `Groups` of this seed draws, each once."""
    order = ShuffledOrder(count=len(problems), seed=seed)
    return [problems[place] for place in np.unique(order.at(range(count))).tolist()]


@dataclass(kw_only=True, eq=False)
class Groups:
    """Problems in a shuffled order without end, G answers to each.

    Attributes:
        generator: the policy, as it is at this step.
        problems: what is asked; prompts: how it is put, one for each problem.
        reward: of each answer.
        tokenizer: turns tokens into the text that is judged.
        sampling: how answers are drawn; `samples_per_problem` is G. Its seed is replaced at every draw.
        count: P, problems of a draw.
        shape: the policy's, for the ledger.
        seed: of order and sampling.
    """

    generator: Generator
    problems: Sequence[Problem]
    prompts: Sequence[Prompt]
    reward: Reward
    tokenizer: Any
    sampling: Sampling
    count: int
    shape: ModelShape
    seed: int
    _order: ShuffledOrder = field(init=False)
    _drawn: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self._order = ShuffledOrder(count=len(self.prompts), seed=self.seed)

    def draw(self, step: int, ledger: FlopLedger) -> Drawn:
        """The answers of one step."""
        start, size = self._drawn * self.count, self.sampling.samples_per_problem
        places = self._order.at(range(start, start + self.count)).tolist()
        seed = int(np.random.default_rng([self.seed, self._drawn]).integers(2**63))
        self._drawn += 1
        written = self.generator.generate([self.prompts[place] for place in places], replace(self.sampling, seed=seed))
        asked = [self.problems[place] for place in places for _ in range(size)]
        rewards = [self._judge(problem, sequence) for problem, sequence in zip(asked, written, strict=True)]
        prompt_tokens = [sequence.prompt_tokens for sequence in written]
        add_rollout(ledger, self.shape, prompt_tokens, [one.completion_tokens for one in written], step=step)
        return Drawn(sequences=written, reward_PG=torch.tensor(rewards, dtype=torch.float64).view(-1, size))

    def _judge(self, problem: Problem, sequence: TokenSequence) -> float:
        reward = self.reward(problem, self.tokenizer.decode(sequence.completion_ids, skip_special_tokens=True))
        if not math.isfinite(reward):
            raise UserError(f"a reward for problem {problem.id}", f"it is {reward}", "return a finite number")
        return reward

    def state(self) -> dict[str, Any]:
        """How often was drawn."""
        return {"drawn": self._drawn}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self._drawn = state["drawn"]
