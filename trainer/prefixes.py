"""Where training text comes from: written by the teacher and cached, or by the student and scored live.

Guarantees: what a source yields is already scored, so the loop never knows which cell of the grid it runs; a source
accounts its own FLOPs; randomness is a generator of its own, whose state can be saved and restored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import torch

from logitcache.flops import ModelShape
from logitcache.records import ScoredSequence, TokenSequence
from logitcache.scoring import Generator, HiddenStateRequest, Prompt, Sampling, Scorer
from trainer.batch import Batch, TeacherHead, collate, micro_batches
from trainer.flops import FlopLedger, add_rollout, add_scoring
from trainer.settings import BatchPlan


class CacheReader(Protocol):
    """What training needs of a cache; `logitcache.open_cache` returns one."""

    def __len__(self) -> int: ...

    def read(self, indices: Sequence[int], *, max_completion_tokens: int | None = None) -> list[ScoredSequence]:
        """Sequences with their targets, cut to the window if one is given."""
        ...


class PrefixSource(Protocol):
    """Text for the student to be taught on, with the teacher's distributions.

    Obligations: `draw` is reproducible from the state it starts in; FLOPs other than the student's own training are in
    the ledger when it returns; held-out problems never occur.
    """

    def draw(self, step: int, ledger: FlopLedger) -> list[Batch]:
        """The micro-batches of one step, together one batch of sequences."""
        ...

    def state(self) -> dict[str, Any]:
        """Where the source is, as JSON values."""
        ...

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        ...


class ShuffledOrder:
    """Numbers 0..count-1 in a new random order each time round."""

    def __init__(self, count: int, seed: int) -> None:
        self._random = np.random.default_rng(seed)
        self._order = self._random.permutation(count)
        self._next = 0

    def take(self, many: int) -> list[int]:
        """The next `many` numbers, across the end of a round where need be."""
        taken: list[int] = []
        while len(taken) < many:
            if self._next == len(self._order):
                self._order, self._next = self._random.permutation(len(self._order)), 0
            part = self._order[self._next : self._next + many - len(taken)]
            taken += part.tolist()
            self._next += len(part)
        return taken

    def state(self) -> dict[str, Any]:
        """Order, place in it and the generator, as JSON values."""
        return {"order": self._order.tolist(), "next": self._next, "generator": self._random.bit_generator.state}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self._order, self._next = np.array(state["order"], np.int64), state["next"]
        self._random.bit_generator.state = state["generator"]


@dataclass(frozen=True, kw_only=True, eq=False)
class CachedPrefixes:
    """The teacher's own text with its stored distributions; the teacher itself is not there.

    Attributes:
        reader: the cache; indices: which of its sequences to train on.
        head: of hidden-state targets, or None for other kinds.
    """

    reader: CacheReader
    indices: Sequence[int]
    head: TeacherHead | None
    plan: BatchPlan
    seed: int
    device: torch.device
    order: ShuffledOrder = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "order", ShuffledOrder(len(self.indices), self.seed))

    def draw(self, step: int, ledger: FlopLedger) -> list[Batch]:
        """See `PrefixSource.draw`. Costs no FLOPs of its own."""
        indices = [self.indices[place] for place in self.order.take(self.plan.sequences)]
        scored = self.reader.read(indices, max_completion_tokens=self.plan.max_completion_tokens)
        return [collate(part, self.head, self.device) for part in micro_batches(scored, self.plan.micro_batch_tokens)]

    def state(self) -> dict[str, Any]:
        """See `PrefixSource.state`."""
        return self.order.state()

    def restore(self, state: dict[str, Any]) -> None:
        """See `PrefixSource.restore`."""
        self.order.restore(state)


@dataclass(frozen=True, kw_only=True, eq=False)
class OnPolicyPrefixes:
    """The student's own text, written now and scored now by a teacher in memory.

    Attributes:
        generator: the student, as it is at this step; scorer: the teacher.
        prompts: of the training problems only.
        sampling: how the student writes; its seed is replaced at every step by a draw from this source's generator.
        head: the teacher's, on `device`.
    """

    generator: Generator
    scorer: Scorer
    prompts: Sequence[Prompt]
    sampling: Sampling
    head: TeacherHead
    plan: BatchPlan
    student_shape: ModelShape
    teacher_shape: ModelShape
    seed: int
    device: torch.device
    order: ShuffledOrder = field(init=False)
    random: np.random.Generator = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "order", ShuffledOrder(len(self.prompts), self.seed))
        object.__setattr__(self, "random", np.random.default_rng([self.seed, 1]))

    def draw(self, step: int, ledger: FlopLedger) -> list[Batch]:
        """See `PrefixSource.draw`."""
        prompts = [self.prompts[place] for place in self.order.take(self.plan.sequences)]
        sampling = replace(
            self.sampling,
            max_new_tokens=self.plan.max_completion_tokens,
            samples_per_problem=1,
            seed=int(self.random.integers(2**63)),
        )
        rollouts = self.generator.generate(prompts, sampling)
        targets = self.scorer.score(rollouts, [HiddenStateRequest()])
        scored = [
            ScoredSequence(sequence=rollout, targets=kinds[0]) for rollout, kinds in zip(rollouts, targets, strict=True)
        ]
        prompt_tokens = [rollout.prompt_tokens for rollout in rollouts]
        new_tokens = [rollout.completion_tokens for rollout in rollouts]
        add_rollout(ledger, self.student_shape, prompt_tokens, new_tokens, step=step)
        add_scoring(ledger, self.teacher_shape, [len(rollout) - 1 for rollout in rollouts], step=step)
        return [collate(part, self.head, self.device) for part in micro_batches(scored, self.plan.micro_batch_tokens)]

    def state(self) -> dict[str, Any]:
        """See `PrefixSource.state`."""
        return {"order": self.order.state(), "generator": self.random.bit_generator.state}

    def restore(self, state: dict[str, Any]) -> None:
        """See `PrefixSource.restore`."""
        self.order.restore(state["order"])
        self.random.bit_generator.state = state["generator"]


def prompts_of(sequences: Sequence[TokenSequence]) -> list[Prompt]:
    """The distinct prompts of cached sequences, in order: what a student continues in the teacher's stead."""
    distinct = {
        (sequence.problem_id, tuple(sequence.token_ids[: sequence.prompt_tokens].tolist())): None
        for sequence in sequences
    }
    return [Prompt(problem_id=problem_id, token_ids=token_ids) for problem_id, token_ids in distinct]
