"""The ledger of what a run cost in FLOPs: append-only rows by phase and step.

Guarantees: nothing is ever taken back or merged; totals are exact integers; a ledger survives JSON unchanged. The
formulas are `logitcache.flops`; docs/flops.md says what each phase holds. Causal attention is counted throughout: the
kernels used here skip the other half.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol

from logitcache.flops import (
    ModelShape,
    adapters,
    backward,
    before_adapters,
    body,
    forward,
    generate,
    head,
    projections,
    recomputation,
)
from trainer.settings import Lora


class Packed(Protocol):
    """Sequences packed for a student: a `trainer.batch.Batch`, or the lengths that a plan puts in its place."""

    @property
    def sequence_lengths(self) -> tuple[int, ...]:
        """Rows of each sequence."""
        ...

    @property
    def target_rows(self) -> int:
        """Rows that have a loss."""
        ...


class Phase(StrEnum):
    """What was computed, by whom."""

    TEACHER_DECODE = "teacher_decode"
    """Generating with the teacher, its prompts included. Only a cache's build has it."""
    TEACHER_PREFILL = "teacher_prefill"
    """Running the teacher over given tokens, up to its final hidden states."""
    STUDENT_ROLLOUT = "student_rollout"
    """Generating with the student, its prompts included."""
    STUDENT_FORWARD = "student_forward"
    STUDENT_BACKWARD = "student_backward"
    HEAD_REPROJECTION = "head_reprojection"
    """The teacher's logits from its hidden states, cached or fresh."""
    REFERENCE_FORWARD = "reference_forward"
    """A frozen reference over what a policy wrote, its logits included: GRPO with a KL term."""
    EVALUATION = "evaluation"
    """Measuring: needed by no student, so in no cost of training."""


@dataclass(frozen=True, kw_only=True)
class FlopRow:
    """FLOPs of one phase of one step.

    Attributes:
        step: None is outside the steps.
        phase: what was computed.
        flops: multiply-add counts 2.
        hits: of a teacher that was asked, the sequences that it was not run over: their answers were kept or shared.
        misses: those that it was run over; both None for what asks no teacher.
    """

    step: int | None
    phase: Phase
    flops: int
    hits: int | None = None
    misses: int | None = None


class FlopLedger:
    """Rows in the order they were added."""

    def __init__(self, rows: Iterable[FlopRow] = ()) -> None:
        self._rows: list[FlopRow] = []
        self._totals = dict.fromkeys(Phase, 0)
        self.extend(rows)

    @property
    def rows(self) -> tuple[FlopRow, ...]:
        """All of them."""
        return tuple(self._rows)

    def add(
        self, phase: Phase, flops: int, *, step: int | None, hits: int | None = None, misses: int | None = None
    ) -> None:
        """Append a row."""
        if flops < 0:
            raise ValueError(f"FLOPs of {phase}: got {flops}, expected 0 or more")
        self._append(FlopRow(step=step, phase=phase, flops=flops, hits=hits, misses=misses))

    def extend(self, rows: Iterable[FlopRow]) -> None:
        """Append another ledger's rows, as they are."""
        for row in rows:
            self._append(row)

    def _append(self, row: FlopRow) -> None:
        self._rows.append(row)
        self._totals[row.phase] += row.flops

    def by_phase(self) -> dict[Phase, int]:
        """Totals, a phase without rows being 0."""
        return dict(self._totals)

    def marginal(self) -> int:
        """What this run cost, given that the store exists: every phase but evaluation."""
        return sum(flops for phase, flops in self._totals.items() if phase is not Phase.EVALUATION)

    def amortised(self, *, build_flops: int, students: int) -> int:
        """`marginal` plus this student's share of a build that `students` students train from, rounded up.

        Args:
            build_flops: generating and scoring the cache; 0 for a run that needs none.
            students: how many share it, at least 1.
        """
        if students < 1:
            raise ValueError(f"students: got {students}, expected 1 or more")
        return self.marginal() - (-build_flops // students)

    def total(self, *, build_flops: int) -> int:
        """All that was computed: every phase, evaluation too, and the whole build."""
        return sum(self._totals.values()) + build_flops

    def to_json(self) -> list[dict[str, Any]]:
        """Rows as plain values; `hits` and `misses` where a teacher was asked."""
        told = ("step", "phase", "flops")
        return [{k: v for k, v in vars(row).items() if k in told or v is not None} for row in self._rows]

    def state(self) -> dict[str, Any]:
        """Its rows, as JSON values; a checkpoint's."""
        return {"rows": [[row.step, str(row.phase), row.flops, row.hits, row.misses] for row in self._rows]}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        names = ("step", "phase", "flops", "hits", "misses")
        FlopLedger.__init__(self, (_row(dict(zip(names, row, strict=True))) for row in state["rows"]))

    @classmethod
    def from_json(cls, rows: Sequence[Mapping[str, Any]] | str) -> FlopLedger:
        """The ledger that `to_json` (or `json.dumps` of it) came from."""
        plain = json.loads(rows) if isinstance(rows, str) else rows
        return cls(map(_row, plain))


def _row(values: Mapping[str, Any]) -> FlopRow:
    return FlopRow(**{**values, "phase": Phase(values["phase"])})


def add_training(
    ledger: FlopLedger,
    shape: ModelShape,
    batch: Packed,
    *,
    teacher_head_flops: int,
    step: int,
    gradient_checkpointing: bool = False,
    cross_entropy_share: float = 0.0,
    lora: Lora | None = None,
) -> None:
    """A training step's rows for one batch: the student twice forward backwards, the teacher's logits once.

    The chunked and Triton divergences compute both sides' logits once and take the gradient in place, so the head's
    backward is two products, as everywhere else. With gradient checkpointing the backward holds the layers' second
    forward too. The cross-entropy beside a divergence is a pass of the student's head of its own; alone, it asks for no
    logits of the teacher. With adapters, only they have a gradient.
    """
    head_passes = 2 if 0 < cross_entropy_share < 1 else 1
    head_rows, tokens = head_passes * batch.target_rows, sum(batch.sequence_lengths)
    thin, frozen = _thin(shape, tokens, lora), 0
    if lora is not None:
        frozen = projections(shape, tokens) + head(shape, head_rows)
        frozen += before_adapters(shape, batch.sequence_lengths, rank=lora.rank, matrices=lora.matrices)
    cost = forward(shape, batch.sequence_lengths, head_rows=head_rows) + thin
    ledger.add(Phase.STUDENT_FORWARD, cost, step=step)
    again = recomputation(shape, batch.sequence_lengths) + thin if gradient_checkpointing else 0
    ledger.add(Phase.STUDENT_BACKWARD, backward(cost, frozen=frozen) + again, step=step)
    ledger.add(Phase.HEAD_REPROJECTION, 0 if cross_entropy_share == 1 else teacher_head_flops, step=step)


def add_evaluation(
    ledger: FlopLedger,
    shape: ModelShape,
    batch: Packed,
    *,
    teacher_head_flops: int,
    step: int | None,
    lora: Lora | None = None,
) -> None:
    """An evaluation's row for one batch: the student's forward, with its adapters, and the teacher's logits."""
    cost = forward(shape, batch.sequence_lengths, head_rows=batch.target_rows)
    cost += _thin(shape, sum(batch.sequence_lengths), lora)
    ledger.add(Phase.EVALUATION, cost + teacher_head_flops, step=step)


def add_rollout(
    ledger: FlopLedger,
    shape: ModelShape,
    prompt_tokens: Sequence[int],
    new_tokens: Sequence[int],
    *,
    step: int,
    lora: Lora | None = None,
) -> None:
    """See `rollout`."""
    ledger.add(Phase.STUDENT_ROLLOUT, rollout(shape, prompt_tokens, new_tokens, lora), step=step)


def rollout(shape: ModelShape, prompt_tokens: Sequence[int], new_tokens: Sequence[int], lora: Lora | None) -> int:
    """A student's generation, its prefill included; `lora` of adapters that run beside the weights, not merged."""
    run = sum(prompt + new - 1 for prompt, new in zip(prompt_tokens, new_tokens, strict=True) if new)
    return sum(generate(shape, prompt_tokens, new_tokens)) + _thin(shape, run, lora)


def _thin(shape: ModelShape, tokens: int, lora: Lora | None) -> int:
    return 0 if lora is None else adapters(shape, tokens, rank=lora.rank, matrices=lora.matrices)


def add_scoring(ledger: FlopLedger, shape: ModelShape, lengths: Sequence[int], *, step: int, hits: int = 0) -> None:
    """A teacher's prefill over sequences of these many rows, up to its hidden states; `hits` more cost nothing."""
    ledger.add(Phase.TEACHER_PREFILL, body(shape, lengths), step=step, hits=hits, misses=len(lengths))
