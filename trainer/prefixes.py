"""Where training text comes from: written by the teacher and cached, or by the student and scored live.

Guarantees: what a source yields is already scored, so the loop never knows which cell of the grid it runs; a source
accounts its own FLOPs; what it draws is a pure function of its seed and how often it drew, which is all its state.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import torch

from logitcache.errors import UserError
from logitcache.flops import ModelShape
from logitcache.loader import Batches, Prefetch, SequenceReader, ShuffledOrder
from logitcache.records import ScoredSequence, TokenSequence
from logitcache.scoring import Generator, HiddenStateRequest, Prompt, Sampling, Scorer, score_counted
from trainer.batch import Batch, TeacherHead, batches_of
from trainer.distributed import ALONE, Ranks
from trainer.flops import FlopLedger, add_rollout, add_scoring
from trainer.settings import BatchPlan, Lora


class PrefixSource(Protocol):
    """Text for the student to be taught on, with the teacher's distributions.

    Obligations: `draw` is reproducible from the state it starts in; FLOPs other than the student's own training are in
    the ledger when it returns; held-out problems never occur.
    """

    def draw(self, step: int, ledger: FlopLedger) -> list[Batch]:
        """The micro-batches of one step, together one batch of sequences; none once the source has ended."""
        ...

    def use_window(self, completion_tokens: int) -> None:
        """Draw sequences of at most so many completion tokens from now on. A source does not remember it."""
        ...

    def state(self) -> dict[str, Any]:
        """Where the source is, as JSON values."""
        ...

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        ...

    def close(self) -> None:
        """Stop what runs in the background. A closed source can still go on."""
        ...


class CachedPrefixes:
    """The teacher's own text with its stored distributions; the teacher itself is not there.

    The next batches are read and decoded while the student trains. See `PrefixSource`.

    Args:
        reader: the cache.
        indices: which of its sequences to train on.
        head: of hidden-state targets, or None for other kinds.
        plan: how much text a step takes.
        seed: of the order.
        device: where batches go.
        ranks: that share each batch; this one draws its part.
    """

    def __init__(
        self,
        *,
        reader: SequenceReader,
        indices: Sequence[int],
        head: TeacherHead | None,
        plan: BatchPlan,
        seed: int,
        device: torch.device,
        ranks: Ranks = ALONE,
    ) -> None:
        self._batches = Batches(
            reader=reader,
            indices=indices,
            sequences=plan.sequences,
            seed=seed,
            max_completion_tokens=plan.max_completion_tokens,
            rank=ranks.rank,
            ranks=ranks.size,
        )
        self._head, self._plan, self._device = head, plan, device
        self._position = 0
        self._ahead: Prefetch[list[ScoredSequence]] | None = None

    def draw(self, step: int, ledger: FlopLedger) -> list[Batch]:
        """See `PrefixSource.draw`. Costs no FLOPs of its own."""
        if self._ahead is None:
            self._ahead = Prefetch(self._batches.__getitem__, start=self._position)
        scored = next(self._ahead)
        self._position += 1
        return batches_of(scored, self._head, self._device, self._plan.micro_batch_tokens)

    def use_window(self, completion_tokens: int) -> None:
        """See `PrefixSource.use_window`. What was read ahead under another window is dropped."""
        if completion_tokens != self._batches.max_completion_tokens:
            self.close()
            self._batches = replace(self._batches, max_completion_tokens=completion_tokens)

    def state(self) -> dict[str, Any]:
        """See `PrefixSource.state`."""
        return {"position": self._position}

    def restore(self, state: dict[str, Any]) -> None:
        """See `PrefixSource.restore`."""
        self.close()
        self._position = state["position"]

    def close(self) -> None:
        """See `PrefixSource.close`."""
        if self._ahead is not None:
            self._ahead.close()
            self._ahead = None


@dataclass(kw_only=True, eq=False)
class OnPolicyPrefixes:
    """The student's own text, written now and scored now by a teacher, in memory or behind a server.

    Attributes:
        generator: the student, as it is at this step; scorer: the teacher.
        prompts: of the training problems only.
        sampling: how the student writes; its seed is replaced at every step by one drawn from `seed` and the step.
        head: the teacher's, on `device`.
        lora: of adapters that run beside the student's weights when it writes.
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
    lora: Lora | None = None
    _order: ShuffledOrder = field(init=False)
    _drawn: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self._order = ShuffledOrder(count=len(self.prompts), seed=self.seed)

    def draw(self, step: int, ledger: FlopLedger) -> list[Batch]:
        """See `PrefixSource.draw`."""
        start = self._drawn * self.plan.sequences
        prompts = [self.prompts[place] for place in self._order.at(range(start, start + self.plan.sequences))]
        sampling = replace(
            self.sampling,
            max_new_tokens=self.plan.max_completion_tokens,
            samples_per_problem=1,
            seed=int(np.random.default_rng([self.seed, self._drawn]).integers(2**63)),
        )
        self._drawn += 1
        rollouts = self.generator.generate(prompts, sampling)
        targets, passes = score_counted(self.scorer, rollouts, [HiddenStateRequest()])
        scored = [
            ScoredSequence(sequence=rollout, targets=kinds[0]) for rollout, kinds in zip(rollouts, targets, strict=True)
        ]
        prompt_tokens = [rollout.prompt_tokens for rollout in rollouts]
        new_tokens = [rollout.completion_tokens for rollout in rollouts]
        add_rollout(ledger, self.student_shape, prompt_tokens, new_tokens, step=step, lora=self.lora)
        scored_rows = [len(rollout) - 1 for rollout, times in zip(rollouts, passes, strict=True) for _ in range(times)]
        add_scoring(ledger, self.teacher_shape, scored_rows, step=step, hits=passes.count(0))
        return batches_of(scored, self.head, self.device, self.plan.micro_batch_tokens)

    def use_window(self, completion_tokens: int) -> None:
        """See `PrefixSource.use_window`."""
        self.plan = replace(self.plan, max_completion_tokens=completion_tokens)

    def state(self) -> dict[str, Any]:
        """See `PrefixSource.state`."""
        return {"drawn": self._drawn}

    def restore(self, state: dict[str, Any]) -> None:
        """See `PrefixSource.restore`."""
        self._drawn = state["drawn"]

    def close(self) -> None:
        """See `PrefixSource.close`. There is nothing to stop."""


@dataclass(frozen=True, kw_only=True, eq=False)
class MixedPrefixes:
    """Both sources in every step, each with its own number of sequences. Their targets must be of one exactness."""

    teacher: PrefixSource
    student: PrefixSource

    def draw(self, step: int, ledger: FlopLedger) -> list[Batch]:
        """See `PrefixSource.draw`."""
        return self.teacher.draw(step, ledger) + self.student.draw(step, ledger)

    def use_window(self, completion_tokens: int) -> None:
        """See `PrefixSource.use_window`."""
        self.teacher.use_window(completion_tokens)
        self.student.use_window(completion_tokens)

    def state(self) -> dict[str, Any]:
        """See `PrefixSource.state`."""
        return {"teacher": self.teacher.state(), "student": self.student.state()}

    def restore(self, state: dict[str, Any]) -> None:
        """See `PrefixSource.restore`."""
        self.teacher.restore(state["teacher"])
        self.student.restore(state["student"])

    def close(self) -> None:
        """See `PrefixSource.close`."""
        self.teacher.close()
        self.student.close()


def shares(plan: BatchPlan, student_share: float) -> tuple[BatchPlan, BatchPlan]:
    """The teacher's and the student's part of a step.

    Raises:
        UserError: a share that is no whole number of sequences of either.
    """
    exact = student_share * plan.sequences
    own = round(exact) if 0 < student_share < 1 else 0
    if not (0 < own < plan.sequences and math.isclose(own, exact)):
        found = f"of {plan.sequences} sequences that is {exact:g}"
        raise UserError(f"--student-share {student_share}", found, "choose a share that makes 1 or more of either")
    return replace(plan, sequences=plan.sequences - own), replace(plan, sequences=own)


def prompts_of(sequences: Sequence[TokenSequence]) -> list[Prompt]:
    """The distinct prompts of cached sequences, in order: what a student continues in the teacher's stead."""
    distinct = {
        (sequence.problem_id, tuple(sequence.token_ids[: sequence.prompt_tokens].tolist())): None
        for sequence in sequences
    }
    return [Prompt(problem_id=problem_id, token_ids=token_ids) for problem_id, token_ids in distinct]
