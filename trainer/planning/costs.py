"""FLOPs of a step, of a build, and the point from which the build pays, for given lengths.

Guarantees: a step is counted by the functions of `trainer.flops` that a run's own ledger is filled by, so plan and
ledger cannot disagree where the lengths are the same; a build is counted as its manifest does.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum

from logitcache import flops
from logitcache.flops import ModelShape
from trainer.flops import FlopLedger, Phase, add_rollout, add_scoring, add_training
from trainer.planning.case import Have
from trainer.settings import Lora, Prefix


@dataclass(frozen=True, kw_only=True)
class Text:
    """The lengths of some sequences, in tokens, a number for each; packed as `trainer.batch.Batch` packs them."""

    prompt_tokens: tuple[int, ...]
    completion_tokens: tuple[int, ...]

    @classmethod
    def alike(cls, *, sequences: int, prompt_tokens: int, completion_tokens: int) -> Text:
        """So many sequences of one length."""
        return cls(prompt_tokens=(prompt_tokens,) * sequences, completion_tokens=(completion_tokens,) * sequences)

    @property
    def sequence_lengths(self) -> tuple[int, ...]:
        """Rows of each: its tokens but the last."""
        pairs = zip(self.prompt_tokens, self.completion_tokens, strict=True)
        return tuple(prompt + completion - 1 for prompt, completion in pairs)

    @property
    def target_rows(self) -> int:
        """Completion tokens in all."""
        return sum(self.completion_tokens)

    def within(self, window: int) -> Text:
        """The same, trained on up to `window` completion tokens."""
        cut = tuple(min(length, window) for length in self.completion_tokens)
        return Text(prompt_tokens=self.prompt_tokens, completion_tokens=cut)


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A student and its teacher.

    Attributes:
        student: its shape.
        teacher: its shape.
        vocab: real tokens of the teacher: a cache's head has no padding rows. None for as many as its config says.
    """

    student: ModelShape
    teacher: ModelShape
    vocab: int | None = None

    def teacher_logits(self, rows: int) -> int:
        """The teacher's logits of so many rows, from its hidden states."""
        return flops.head(replace(self.teacher, vocab=self.vocab or self.teacher.vocab), rows)


def step_cost(
    pair: Pair,
    text: Text,
    *,
    prefix: Prefix,
    kind: str = "hidden",
    gradient_checkpointing: bool = False,
    lora: Lora | None = None,
    cross_entropy_share: float = 0.0,
) -> dict[Phase, int]:
    """One training step over this text, by phase, as its ledger will have it.

    Args:
        pair: the models.
        text: what is trained on.
        prefix: who writes it: the teacher (it is in the cache) or the student.
        kind: of the cache's targets; from hidden states the teacher's logits are made anew. Live ones always are.
        gradient_checkpointing: the student's layers run twice.
        lora: adapters that are trained in place of the weights.
        cross_entropy_share: of the loss, for the text itself.

    Raises:
        ValueError: mixed prefixes, whose step is the sum of one from the cache and one live, each over its own text.
    """
    if prefix is Prefix.MIXED:
        raise ValueError("mixed prefixes: cost each part's text on its own")
    ledger = FlopLedger()
    if prefix is Prefix.STUDENT:
        add_rollout(ledger, pair.student, text.prompt_tokens, text.completion_tokens, step=0, lora=lora)
        add_scoring(ledger, pair.teacher, text.sequence_lengths, step=0)
    projected = prefix is Prefix.STUDENT or kind == "hidden"
    teacher_logits = pair.teacher_logits(text.target_rows) if projected else 0
    add_training(
        ledger,
        pair.student,
        text,
        teacher_head_flops=teacher_logits,
        step=0,
        gradient_checkpointing=gradient_checkpointing,
        lora=lora,
        cross_entropy_share=cross_entropy_share,
    )
    return ledger.by_phase()


def build_cost(teacher: ModelShape, text: Text, *, kind: str, have: Have = Have.NOTHING) -> dict[str, int]:
    """What building a cache of this text with one tier of this kind costs: `generate` and `score`."""
    generate = score = 0
    if have is Have.NOTHING:
        generate = sum(flops.generate(teacher, text.prompt_tokens, text.completion_tokens))
    if have is not Have.CACHE:
        head_rows = 0 if kind == "hidden" else text.target_rows
        score = flops.forward(teacher, text.sequence_lengths, head_rows=head_rows)
    return {"generate": generate, "score": score}


class Instead(StrEnum):
    """What would be done without a cache."""

    STUDENT_PREFIX = "student prefixes"
    """The student writes at every step and the teacher reads it."""
    RESCORING = "scoring the same text at every step"
    """The teacher's text is there, and the teacher reads it again every time it is trained on."""


@dataclass(frozen=True, kw_only=True)
class BreakEven:
    """When a cache pays: once students x epochs exceed `passes`, an epoch being one pass over the cache's sequences.

    `passes` is build / saved: b / s, with b the FLOPs that a sequence costs to build and s those that training on it
    once saves. The number of problems cancels out.

    Attributes:
        build_flops: of the whole text.
        saved_flops: by one pass over it, of a student that would otherwise do the other thing.
        tokens: completion tokens trained on in one pass.
    """

    build_flops: int
    saved_flops: int
    tokens: int

    @property
    def passes(self) -> float:
        """Passes over the cache, of all students together, that save what the build cost."""
        return self.build_flops / self.saved_flops

    @property
    def trained_tokens(self) -> float:
        """Completion tokens that all students together train on until then."""
        return self.passes * self.tokens

    def students(self, epochs: float) -> int:
        """The least number of students, each of so many epochs, with which the build costs no more than it saves."""
        return max(1, -int(-self.passes // epochs))


def break_even(pair: Pair, text: Text, *, window: int, kind: str, have: Have, instead: Instead) -> BreakEven:
    """Compare training from a cache of this text, up to `window` tokens, with doing without.

    Args:
        pair: the models.
        text: of the whole cache.
        window: completion tokens that are trained on.
        kind: of the tier, as for `step_cost`.
        have: what need not be built.
        instead: the alternative. Its text is taken to be as long as the cache's.
    """
    trained = text.within(window)
    cached = sum(step_cost(pair, trained, prefix=Prefix.TEACHER, kind=kind).values())
    other = step_cost(pair, trained, prefix=Prefix.STUDENT)
    if instead is Instead.RESCORING:
        other[Phase.STUDENT_ROLLOUT] = 0
    build = build_cost(pair.teacher, text, kind=kind, have=have)
    return BreakEven(
        build_flops=sum(build.values()), saved_flops=sum(other.values()) - cached, tokens=trained.target_rows
    )
