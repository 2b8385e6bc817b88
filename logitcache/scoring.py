"""The two abilities an engine can have: to score sequences and to generate them.

Seams are named by what they do to tokens. An implementation owes what its protocol's docstring says;
`tests/` holds one contract suite that all of them pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

from logitcache.errors import require
from logitcache.records import Head, TeacherTargets, TokenSequence

DTYPES = ("bfloat16", "float32")
"""Precisions a teacher may compute in."""


@dataclass(frozen=True, kw_only=True)
class TopKRequest:
    """Keep, in each row, the likeliest tokens with probability >= `min_probability`, at most `max_k`.

    `mass` < 1 additionally stops once the kept mass reaches it (nucleus). At least one token is kept.
    """

    max_k: int = 64
    min_probability: float = 0.0
    mass: float = 1.0


@dataclass(frozen=True, kw_only=True)
class HiddenStateRequest:
    """The state after the final norm, in the engine's precision."""


@dataclass(frozen=True, kw_only=True)
class FullVocabRequest:
    """Every log-probability."""


@dataclass(frozen=True, kw_only=True)
class SampledRequest:
    """`samples` draws from each row's distribution at temperature 1, seeded by the sequence's content."""

    samples: int = 64


TargetRequest = TopKRequest | HiddenStateRequest | FullVocabRequest | SampledRequest


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How completions are drawn.

    Temperature, top-p and top-k are by default those of arXiv 2605.16826.

    Attributes:
        max_new_tokens: of a completion, the longest.
        temperature: of sampling; 0 is greedy.
        top_p: nucleus: the likeliest tokens up to this mass are drawn from.
        top_k: so many of the likeliest tokens are drawn from; none for all.
        samples_per_problem: completions of each.
        seed: of sampling.
    """

    max_new_tokens: int = 128
    temperature: float = 1.0
    top_p: float = 0.95
    top_k: int | None = 20
    samples_per_problem: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        require(self.max_new_tokens >= 1, "--max-new-tokens, at least 1", self.max_new_tokens)
        require(self.temperature >= 0, "--temperature, 0 (greedy) or above", self.temperature)
        require(0 < self.top_p <= 1, "--top-p, a probability above 0", self.top_p)
        require(self.top_k is None or self.top_k >= 1, "--top-k, at least 1", self.top_k)
        require(self.samples_per_problem >= 1, "--samples-per-problem, at least 1", self.samples_per_problem)


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One prompt to continue: its token ids and the problem it came from."""

    problem_id: str
    token_ids: tuple[int, ...]


class Scorer(Protocol):
    """Runs a teacher over given tokens (teacher-forced prefill)."""

    @property
    def head(self) -> Head:
        """The teacher's output head, padding rows cut off."""
        ...

    def score(
        self, sequences: Sequence[TokenSequence], want: Sequence[TargetRequest]
    ) -> list[tuple[TeacherTargets, ...]]:
        """Targets for each sequence, in the order given, one per request and of the kind requested.

        Obligations: never a lesser kind than asked for; finite or an error, but for entropies that an engine cannot
        know, which are NaN in every row; the same call twice gives the same bytes; a sequence without completion rows
        gets targets of zero rows.
        """
        ...


class Scores(NamedTuple):
    """What `Scorer.score` returns, and how often the teacher was run over each sequence for it."""

    targets: list[tuple[TeacherTargets, ...]]
    passes: list[int]


@runtime_checkable
class CountsPasses(Protocol):
    """A scorer that may answer without running its teacher."""

    def score_counted(self, sequences: Sequence[TokenSequence], want: Sequence[TargetRequest]) -> Scores:
        """`Scorer.score`, and the passes that it took: what a ledger counts."""
        ...


def score_counted(scorer: Scorer, sequences: Sequence[TokenSequence], want: Sequence[TargetRequest]) -> Scores:
    """The same of any scorer: one that does not count runs its teacher once over every sequence."""
    if isinstance(scorer, CountsPasses):
        return scorer.score_counted(sequences, want)
    return Scores(scorer.score(sequences, want), [1] * len(sequences))


class Generator(Protocol):
    """Continues prompts."""

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[TokenSequence]:
        """`samples_per_problem` completions for each prompt, prompt-major, in the order given.

        Obligations: reproducible from `sampling.seed` and the prompts alone; a completion ends at a stop token, which
        it includes (finish_reason STOP), or at `max_new_tokens` (LENGTH).
        """
        ...
