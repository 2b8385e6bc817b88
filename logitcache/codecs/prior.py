"""What a top-k tier knows of its vocabulary before it has seen a row: how to name ids, how to spread a tail.

Guarantees: a `VocabularyPrior` holds for every token, seen in calibration or not. `spread_tail` turns
top-k targets into proper full distributions. Which of its S tail shapes a row has is not stored: it is
read off the ids the row kept, by naive Bayes, which loses little against storing it and costs no byte.
Nothing here is needed for the coarse (k + 1 outcome) divergences.
Not here: learning a prior from a teacher (`fit_prior`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from logitcache.codecs.entries import rank_of_token, row_of_entry
from logitcache.errors import UserError
from logitcache.records import TopKTargets


@dataclass(frozen=True, kw_only=True, eq=False)
class VocabularyPrior:
    """Popularity of tokens, and the shapes that unkept tails take.

    Attributes:
        token_of_rank: uint32[V], token ids from the one kept most often to the one kept least: a permutation.
        log_shapes: float16[S, V], nats; each row the log-probabilities of one shape of tail, over all V tokens.
        evidence: float16[S, V], nats; how much keeping token v speaks for shape s (a log likelihood ratio).
    """

    token_of_rank: NDArray[np.uint32]
    log_shapes: NDArray[np.float16]
    evidence: NDArray[np.float16]

    def __post_init__(self) -> None:
        v = self.vocab_size
        counts = np.bincount(self.token_of_rank, minlength=v)
        if len(counts) != v or (counts != 1).any():
            raise UserError("a vocabulary prior", f"ranks that are no permutation of {v} tokens", "calibrate again")
        sums = np.exp(self.log_shapes.astype(np.float32)).sum(axis=1, dtype=np.float64)
        if self.evidence.shape != self.log_shapes.shape or (np.abs(sums - 1) > 0.01).any():
            raise UserError("tail shapes that sum to 1", f"sums of {sums.min()} to {sums.max()}", "calibrate again")

    @property
    def vocab_size(self) -> int:
        """V."""
        return self.log_shapes.shape[1]

    @cached_property
    def rank_of_token(self) -> NDArray[np.int64]:
        """int64[V], the inverse of `token_of_rank`."""
        return rank_of_token(self.token_of_rank)

    @property
    def arrays(self) -> dict[str, NDArray[Any]]:
        """The prior as a tier keeps it."""
        return {"token_of_rank": self.token_of_rank, "log_shapes": self.log_shapes, "evidence": self.evidence}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]]) -> VocabularyPrior:
        """The prior from `arrays`."""
        names = ("token_of_rank", "log_shapes", "evidence")
        return cls(**{name: arrays[name] for name in names})


def uniform_prior(vocab_size: int) -> VocabularyPrior:
    """The prior of someone who has seen nothing: ids in their own order, one flat tail."""
    return VocabularyPrior(
        token_of_rank=np.arange(vocab_size, dtype=np.uint32),
        log_shapes=np.full((1, vocab_size), -np.log(vocab_size), np.float16),
        evidence=np.zeros((1, vocab_size), np.float16),
    )


def tail_shapes(targets: TopKTargets, prior: VocabularyPrior) -> NDArray[np.int64]:
    """int64[C]: the shape of each row's tail, the one its kept ids speak for most (the first of equals)."""
    rows = row_of_entry(targets.row_splits)
    scores = [np.bincount(rows, evidence[targets.ids], len(targets)) for evidence in prior.evidence]
    return np.argmax(np.stack(scores), axis=0)


def spread_tail(targets: TopKTargets, prior: VocabularyPrior) -> NDArray[np.float32]:
    """Full log-probabilities float32[C, V] in nats: kept tokens as they are, the tail shared out by the prior.

    With s the shape of row c's tail and K its kept set, an unkept token v gets tail(c) * s(v) / (1 - s(K)): a proper
    distribution, up to the rounding of the values themselves. A row that keeps everything has no tail to share.
    """
    rows = row_of_entry(targets.row_splits)
    shape = tail_shapes(targets, prior)
    dense = prior.log_shapes[shape].astype(np.float32)
    np.exp(dense, out=dense)
    dense[rows, targets.ids] = 0
    with np.errstate(divide="ignore", invalid="ignore"):
        free = dense.sum(axis=1, dtype=np.float64)
        dense = prior.log_shapes[shape].astype(np.float32)
        dense += (targets.tail_log_mass - np.log(free)).astype(np.float32)[:, None]
    dense[rows, targets.ids] = targets.log_probs
    return dense
