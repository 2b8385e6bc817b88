"""What a divergence is taken between, and what comes out: frozen values, valid once built.

Guarantees: a value that exists has fitting shapes, dtypes, one device, and probabilities that are probabilities (those
of `DenseTargets`, which are many, are added up when first used); what depends on two values together (rows,
vocabularies) is checked in `kernels.checks`. Every refusal is a one-line `ValueError` with what was got and expected.

Letters: T rows, V vocabulary, D model width, E kept entries of all rows together.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kernels.ragged import SampledTargets, TopKTargets
from kernels.validate import FLOATS, require, require_one_device, require_positive, require_tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_MASS_BLOCK = 1 << 20  # log-probabilities added up at a time: 4 MiB of float32
_MASS_TOLERANCE = 1e-3  # a log-softmax in float32 over a large vocabulary, and its sum here


@dataclass(frozen=True, kw_only=True, eq=False)
class VocabShard:
    """Which rows of a head this rank holds, when the vocabulary is split over a process group.

    Attributes:
        start: vocabulary index of the first local row.
        group: the process group over which the shards make up the vocabulary; None is the default group.
    """

    start: int
    group: ProcessGroup | None = None

    def __post_init__(self) -> None:
        require(self.start >= 0, "VocabShard.start", self.start, "0 or more")


@dataclass(frozen=True, kw_only=True, eq=False)
class LinearHead:
    """Hidden states and the output head over them: logits = cap(scale * (hidden @ weight.T + bias)).

    `cap(x)` is `soft_cap * tanh(x / soft_cap)` (Gemma 2, arXiv 2408.00118, section 2) or the identity. Matrix products
    take their inputs in the dtype of `hidden` and accumulate in float32 (float64 for float64); logits are never rounded
    below that.

    Attributes:
        hidden: float[T, D], after the final norm.
        weight: float[V, D], or this rank's rows of it (see `shard`); may be padded beyond `vocab_size`.
        bias: float[V] or None.
        soft_cap: logit units, or None.
        scale: multiplies the logits before the cap (Cohere's logit_scale, Granite's 1/logits_scaling).
        vocab_size: how many tokens are real; rows from there on are padding and carry no probability. None: all rows.
        fingerprint: of the head's weights, where known.
        hidden_fingerprint: of the head that `hidden` was stored for, where known; must equal `fingerprint`.
        shard: this rank's place in a head split over ranks; None for a whole head.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, or hidden states that belong to another head.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None
    soft_cap: float | None = None
    scale: float = 1.0
    vocab_size: int | None = None
    fingerprint: str | None = None
    hidden_fingerprint: str | None = None
    shard: VocabShard | None = None

    def __post_init__(self) -> None:
        require_tensor("LinearHead.hidden", self.hidden, FLOATS, (None, None))
        require_tensor("LinearHead.weight", self.weight, FLOATS, (None, self.hidden.shape[1]))
        if self.bias is not None:
            require_tensor("LinearHead.bias", self.bias, FLOATS, (self.weight.shape[0],))
        require_one_device("LinearHead", self.hidden, self.weight, self.bias)
        if self.soft_cap is not None:
            require_positive("LinearHead.soft_cap", self.soft_cap)
        require(math.isfinite(self.scale) and self.scale != 0, "LinearHead.scale", self.scale, "finite and not 0")
        rows = self.weight.shape[0]
        if self.vocab_size is not None:
            limit = "1 or more" if self.shard else f"1 to the {rows} rows of weight"
            fits = self.vocab_size >= 1 and (self.shard is not None or self.vocab_size <= rows)
            require(fits, "LinearHead.vocab_size", self.vocab_size, limit)
        require(self.shard is None or self.vocab_size is not None, "a sharded LinearHead.vocab_size", None, "a number")
        both = self.fingerprint is not None and self.hidden_fingerprint is not None
        require(
            not both or self.fingerprint == self.hidden_fingerprint,
            "head fingerprint",
            self.fingerprint,
            f"{self.hidden_fingerprint}, which the hidden states were stored for",
        )

    @property
    def rows(self) -> int:
        """T."""
        return self.hidden.shape[0]

    @property
    def width(self) -> int:
        """V: the valid tokens, over all ranks."""
        return self.weight.shape[0] if self.vocab_size is None else self.vocab_size

    @property
    def start(self) -> int:
        """Vocabulary index of the first local row of `weight`."""
        return 0 if self.shard is None else self.shard.start

    @property
    def local_width(self) -> int:
        """How many rows of the local `weight` are valid tokens."""
        return min(max(self.width - self.start, 0), self.weight.shape[0])

    def tempered(self, temperature: float) -> LinearHead:
        """The same head with its logits divided by `temperature`, cap included."""
        if temperature == 1:
            return self
        cap = None if self.soft_cap is None else self.soft_cap / temperature
        return replace(self, scale=self.scale / temperature, soft_cap=cap)


@dataclass(frozen=True, kw_only=True, eq=False)
class DenseTargets:
    """A teacher's full distribution of every row; exactly one of the two is given.

    Attributes:
        logits: float[T, V], any constant may be added to a row; -inf is allowed.
        log_probs: float[T, V], nats, <= 0, with a mass of at most 1 in each row beyond rounding. Renormalised by the
            divergence, so low precision does no harm to its sign.
        start: vocabulary index of the first column, for a vocabulary split over ranks.

    Raises:
        ValueError: both or none given; from the first divergence that uses them, log-probabilities that are not (NaN,
            above 0, a mass above 1).
    """

    logits: Tensor | None = None
    log_probs: Tensor | None = None
    start: int = 0

    def __post_init__(self) -> None:
        require((self.logits is None) != (self.log_probs is None), "DenseTargets", "both or none", "one of the two")
        require_tensor("DenseTargets", self.values, FLOATS, (None, None))

    @cached_property
    def heaviest(self) -> float:
        """The largest mass of a row of `log_probs`, 0 where there are none; NaN if one is.

        Computed once: 0.11 s for [1024, 151,936] on one core, 4 MiB of room, one synchronisation of the device.
        """
        if self.log_probs is None or not self.log_probs.numel():
            return 0.0
        parts = self.log_probs.detach().split(max(_MASS_BLOCK // self.log_probs.shape[1], 1))
        room = torch.empty_like(parts[0], dtype=torch.float32)
        return float(torch.stack([room[: len(part)].copy_(part).exp_().sum(1).max() for part in parts]).max())

    @property
    def heaviest_allowed(self) -> float:
        """1 and rounding: log-probabilities off by a share u of their size bring a mass of 1 to at most V^u."""
        unit_roundoff = torch.finfo(self.values.dtype).eps / 2
        return max(self.values.shape[1], 1) ** unit_roundoff + _MASS_TOLERANCE

    @property
    def values(self) -> Tensor:
        """Logits or log-probabilities, float[T, V]: the same thing up to a constant in each row."""
        given = self.logits if self.logits is not None else self.log_probs
        assert given is not None
        return given

    @property
    def rows(self) -> int:
        """T."""
        return self.values.shape[0]


Targets = LinearHead | DenseTargets | TopKTargets | SampledTargets


@dataclass(frozen=True, kw_only=True, eq=False)
class KLOutput:
    """Per-token divergences in nats, unreduced: float32[T] (float64[T] from `reference` and for float64 inputs).

    Rows whose mask is false are 0 in every field.

    Attributes:
        loss: what was asked for; the only field that carries a gradient.
        forward_kl: KL(teacher, student).
        reverse_kl: KL(student, teacher); None for sampled targets, which say nothing about it.
        student_entropy: of the student's full distribution at the temperature asked for.
        teacher_entropy: of the teacher's (as recorded for top-k and sampled targets).
    """

    loss: Tensor
    forward_kl: Tensor
    reverse_kl: Tensor | None
    student_entropy: Tensor
    teacher_entropy: Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class SelectedOutput:
    """Log-probabilities of given tokens: both float32[T], nats; only `log_probs` carries a gradient."""

    log_probs: Tensor
    student_entropy: Tensor
