"""The values that flow through the whole system: sequences, a teacher's targets, a head.

Guarantees: every value is valid once built (shapes, dtypes, ranges are checked in one place), and
arrays are numpy. Alignment is stated here once: N token ids make T = N-1 rows; row t is the
distribution of token t+1 given tokens 0..t; `loss_mask[t]` speaks of row t. Targets are kept for
exactly the rows whose mask is true, the C = N - prompt_tokens rows that predict completion tokens:
target row c is row `first_row + c` and predicts token `prompt_tokens + c`.

Deliberately not here: how anything is stored, and anything of torch.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

from logitcache.errors import UserError, require

MAX_TOKENS = 1 << 24
"""Longest sequence accepted, in tokens: far above any context, far below any overflow."""


class Origin(StrEnum):
    """Who wrote a completion."""

    TEACHER = "teacher"
    STUDENT = "student"
    CORPUS = "corpus"


class FinishReason(StrEnum):
    """Why a completion ended."""

    STOP = "stop"
    LENGTH = "length"
    GIVEN = "given"
    """It was not generated here: corpus text."""


def _array(name: str, value: NDArray, dtypes: tuple[type, ...], shape: tuple[int | None, ...]) -> None:
    fits = len(value.shape) == len(shape) and all(
        want is None or want == have for want, have in zip(shape, value.shape, strict=True)
    )
    if fits and value.dtype in dtypes:
        return
    names = " or ".join(np.dtype(dtype).name for dtype in dtypes)
    expected = f"{name}: {names}[{', '.join('*' if size is None else str(size) for size in shape)}]"
    raise UserError(expected, f"got {value.dtype.name}{list(value.shape)}", "pass an array of that dtype and shape")


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenSequence:
    """A prompt and its completion.

    Attributes:
        token_ids: int32[N], prompt then completion, the end-of-sequence token included when sampled.
        prompt_tokens: how many of them are the prompt, 1..N.
        origin: who wrote the completion.
        sample_id: content hash of tokens and tokenizer (see `sample_id_of`), 32 hex digits.
        problem_id: the problem it answers.
        finish_reason: why it ended.
        seed: the seed its sampling started from; None for given text.
    """

    token_ids: NDArray[np.int32]
    prompt_tokens: int
    origin: Origin
    sample_id: str
    problem_id: str
    finish_reason: FinishReason
    seed: int | None = None

    def __post_init__(self) -> None:
        _array("token_ids", self.token_ids, (np.int32,), (None,))
        n = len(self.token_ids)
        require(0 < n <= MAX_TOKENS, f"a sequence of 1 to {MAX_TOKENS} tokens", n, "drop or split it")
        require(int(self.token_ids.min()) >= 0, "token ids >= 0", self.token_ids.min(), "check the tokenizer")
        require(1 <= self.prompt_tokens <= n, f"1 to {n} prompt tokens", self.prompt_tokens, "prepend a BOS token")

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def completion_tokens(self) -> int:
        """C, the number of completion tokens and of target rows."""
        return len(self.token_ids) - self.prompt_tokens

    @property
    def first_row(self) -> int:
        """The row that predicts the first completion token."""
        return self.prompt_tokens - 1

    @property
    def loss_mask(self) -> NDArray[np.bool_]:
        """bool[T]: the rows that predict completion tokens."""
        return np.arange(len(self.token_ids) - 1) >= self.first_row

    @property
    def completion_ids(self) -> NDArray[np.int32]:
        """int32[C]: the token that each target row predicts."""
        return self.token_ids[self.prompt_tokens :]


def sample_id_of(token_ids: NDArray[np.int32], prompt_tokens: int, tokenizer_fingerprint: str) -> str:
    """Content hash of a sequence: 32 hex digits of SHA-256 over tokenizer, prompt length and tokens (int32 LE)."""
    digest = hashlib.sha256(f"{tokenizer_fingerprint}\n{prompt_tokens}\n".encode())
    digest.update(np.ascontiguousarray(token_ids, "<i4").tobytes())
    return digest.hexdigest()[:32]


@dataclass(frozen=True, kw_only=True, eq=False)
class TopKTargets:
    """The likeliest tokens of each row, raw (never renormalised), and what is left over.

    Attributes:
        ids: int32[E], the kept token ids of all rows one after another, ascending within a row.
        log_probs: float32[E], their log-probabilities in nats under the teacher, temperature 1.
        row_splits: int64[C+1]; row c keeps entries row_splits[c]:row_splits[c+1].
        tail_log_mass: float32[C], log of the probability mass outside the kept ids; -inf if none.
        token_log_prob: float32[C], log-probability of the realised token, kept or not.
        entropy: float32[C], entropy of the teacher's full distribution, nats; NaN if nobody could tell.
    """

    ids: NDArray[np.int32]
    log_probs: NDArray[np.float32]
    row_splits: NDArray[np.int64]
    tail_log_mass: NDArray[np.float32]
    token_log_prob: NDArray[np.float32]
    entropy: NDArray[np.float32]

    def __post_init__(self) -> None:
        _array("row_splits", self.row_splits, (np.int64,), (None,))
        entries = int(self.row_splits[-1])
        _array("ids", self.ids, (np.int32,), (entries,))
        _array("log_probs", self.log_probs, (np.float32,), (entries,))
        for name in ("tail_log_mass", "token_log_prob", "entropy"):
            _array(name, getattr(self, name), (np.float32,), (len(self),))

    def __len__(self) -> int:
        return len(self.row_splits) - 1


@dataclass(frozen=True, kw_only=True, eq=False)
class HiddenStateTargets:
    """States after the final norm, which a head turns back into full-vocabulary logits.

    Attributes:
        hidden: uint16[C, D] (bfloat16 bits) or float32[C, D].
        head_fingerprint: the `Head` these belong to, and no other.
    """

    hidden: NDArray[np.uint16] | NDArray[np.float32]
    head_fingerprint: str

    def __post_init__(self) -> None:
        _array("hidden", self.hidden, (np.uint16, np.float32), (None, None))

    def __len__(self) -> int:
        return len(self.hidden)


@dataclass(frozen=True, kw_only=True, eq=False)
class FullVocabTargets:
    """Every log-probability of every row: log_probs float32[C, V], nats."""

    log_probs: NDArray[np.float32]

    def __post_init__(self) -> None:
        _array("log_probs", self.log_probs, (np.float32,), (None, None))

    def __len__(self) -> int:
        return len(self.log_probs)


@dataclass(frozen=True, kw_only=True, eq=False)
class SampledTargets:
    """Token ids drawn from each row's distribution with their counts: unbiased for forward KL only.

    Attributes:
        ids: int32[E], distinct ids of each row, ascending within a row.
        counts: int32[E], how often each was drawn, >= 1.
        row_splits: int64[C+1].
        token_log_prob: float32[C]; entropy: float32[C], both as in `TopKTargets`.
    """

    ids: NDArray[np.int32]
    counts: NDArray[np.int32]
    row_splits: NDArray[np.int64]
    token_log_prob: NDArray[np.float32]
    entropy: NDArray[np.float32]

    def __post_init__(self) -> None:
        _array("row_splits", self.row_splits, (np.int64,), (None,))
        entries = int(self.row_splits[-1])
        _array("ids", self.ids, (np.int32,), (entries,))
        _array("counts", self.counts, (np.int32,), (entries,))
        for name in ("token_log_prob", "entropy"):
            _array(name, getattr(self, name), (np.float32,), (len(self),))

    def __len__(self) -> int:
        return len(self.row_splits) - 1


TeacherTargets = TopKTargets | HiddenStateTargets | FullVocabTargets | SampledTargets


@dataclass(frozen=True, kw_only=True, eq=False)
class Head:
    """A teacher's output head: logits = cap(scale * (hidden @ weight.T + bias)) over the valid rows.

    `cap(x)` is `soft_cap * tanh(x / soft_cap)` (Gemma 2, arXiv 2408.00118, section 2) or the identity.

    Attributes:
        weight: uint16[V, D] (bfloat16 bits) or float32[V, D]; padding rows already cut off.
        bias: float32[V] or None.
        soft_cap: logit units, or None.
        scale: multiplies the logits before the cap (Cohere's logit_scale, Granite's 1/logits_scaling).
    """

    weight: NDArray[np.uint16] | NDArray[np.float32]
    bias: NDArray[np.float32] | None = None
    soft_cap: float | None = None
    scale: float = 1.0
    fingerprint: str = field(init=False)

    def __post_init__(self) -> None:
        _array("weight", self.weight, (np.uint16, np.float32), (None, None))
        if self.bias is not None:
            _array("bias", self.bias, (np.float32,), (self.weight.shape[0],))
        require(self.soft_cap is None or self.soft_cap > 0, "a soft cap above 0", self.soft_cap, "pass None for none")
        digest = hashlib.sha256(f"{self.weight.dtype}{self.weight.shape}{self.soft_cap}{self.scale}".encode())
        digest.update(np.ascontiguousarray(self.weight).data)
        if self.bias is not None:
            digest.update(np.ascontiguousarray(self.bias).data)
        object.__setattr__(self, "fingerprint", digest.hexdigest()[:32])

    @property
    def vocab_size(self) -> int:
        """V, the number of real tokens."""
        return self.weight.shape[0]


@dataclass(frozen=True, kw_only=True, eq=False)
class ScoredSequence:
    """A sequence and what a teacher said of its C completion rows, one of them per target row."""

    sequence: TokenSequence
    targets: TeacherTargets

    def __post_init__(self) -> None:
        rows, have = self.sequence.completion_tokens, len(self.targets)
        require(rows == have, f"{rows} target rows for {self.sequence.sample_id}", have, "score the sequence again")
