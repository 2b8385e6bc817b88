"""Learning a top-k tier's prior from a sample of the teacher's own rows.

Guarantees: deterministic in its arguments; one pass over the vocabulary; memory is a block of rows and a
few [S, V] tables.

Rows are clustered by their states (k-means), and each cluster gets the shape that maximises the forward
objective itself. `spread_tail` gives an unkept token t * s(v) / (1 - s(K)); the derivative of
sum_rows sum_unkept p(v) log of that is zero where
    s(v) = sum_rows p(v) [v unkept]  /  sum_rows t / (1 - s(K)) [v unkept],
which is iterated to a fixed point. Clustering by the tails themselves (k-means in KL) was measured: 2% better
for three more passes over the vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from logitcache.codecs.calibration import Calibration
from logitcache.codecs.dense import DenseHead, row_blocks, select_topk
from logitcache.codecs.entries import row_of_entry
from logitcache.codecs.prior import VocabularyPrior
from logitcache.scoring import TopKRequest

MAX_SHAPES = 64
ROWS_PER_SHAPE = 64
"""With fewer rows than this a shape, the shapes learn the sample and not the teacher."""

_LLOYD_ROUNDS = 8
_FIXED_POINT_ROUNDS = 4
_SHRINKAGE = 0.02
_PSEUDO_COUNT = 0.05
_SMALLEST_SHAPE = 1e-11


@dataclass(frozen=True, kw_only=True, eq=False)
class Sample:
    """What n rows kept and left, summed by cluster.

    Attributes:
        shape_of_row: int64[n], the cluster of each row, 0..S-1.
        tail: float64[n], mass each row left.
        rows, ids, log_probs: of the kept entries: int64[E], int32[E], float32[E] (nats).
        tail_sums: float64[S, V], unkept probability by cluster and token.
        tail_nats: mean entropy of a tail's own distribution, weighted by tail mass.
    """

    shape_of_row: NDArray[np.int64]
    tail: NDArray[np.float64]
    rows: NDArray[np.int64]
    ids: NDArray[np.int32]
    log_probs: NDArray[np.float32]
    tail_sums: NDArray[np.float64]
    tail_nats: float


def gather(head: DenseHead, sample: Calibration, request: TopKRequest) -> Sample:
    """The one pass over the vocabulary: `request` applied to every row of the sample."""
    shapes = int(np.clip(len(sample) // ROWS_PER_SHAPE, 1, MAX_SHAPES))
    shape_of_row = cluster(sample.hidden, shapes)
    tail_sums = np.zeros((shapes, head.head.vocab_size))
    rows, ids, log_probs_kept, tails = [], [], [], []
    surprise = 0.0
    for block in row_blocks(len(sample)):
        log_probs = head.log_probs(sample.hidden[block])
        kept = select_topk(log_probs, sample.token_ids[block], request)
        unkept = np.exp(log_probs)
        local = row_of_entry(kept.row_splits)
        unkept[local, kept.ids] = 0
        members = np.equal.outer(np.arange(shapes), shape_of_row[block]).astype(np.float32)
        tail_sums += members @ unkept
        tails.append(unkept.sum(axis=1, dtype=np.float64))
        rows.append(local + block.start)
        ids.append(kept.ids)
        log_probs_kept.append(kept.log_probs)
        surprise -= float(np.vdot(unkept, log_probs))
    tail = np.concatenate(tails)
    own = surprise + float(tail @ np.log(np.maximum(tail, 1e-30)))
    return Sample(
        shape_of_row=shape_of_row,
        tail=tail,
        rows=np.concatenate(rows),
        ids=np.concatenate(ids),
        log_probs=np.concatenate(log_probs_kept),
        tail_sums=tail_sums,
        tail_nats=own / max(float(tail.sum()), 1e-30),
    )


def cluster(states: NDArray[np.float32], clusters: int) -> NDArray[np.int64]:
    """int64[n]: k-means (Lloyd) assignments of float32[n, D]; an empty cluster starts again at a random row."""
    rng = np.random.default_rng(0)
    centred = states - states.mean(axis=0)
    centres = centred[rng.choice(len(states), clusters, replace=False)]
    nearest = np.zeros(len(states), np.int64)
    for _ in range(_LLOYD_ROUNDS):
        nearest = (np.square(centres).sum(axis=1) - 2 * centred @ centres.T).argmin(axis=1)
        members = np.equal.outer(np.arange(clusters), nearest).astype(np.float32)
        sizes = members.sum(axis=1, keepdims=True)
        strays = centred[rng.integers(len(states), size=clusters)]
        centres = np.where(sizes > 0, members @ centred / np.maximum(sizes, 1), strays)
    return nearest


def popularity(sample: Sample) -> NDArray[np.uint32]:
    """uint32[V]: ids by how often they were kept, then by what they had in the tails, most first."""
    counts = np.bincount(sample.ids, minlength=sample.tail_sums.shape[1])
    return np.lexsort((-sample.tail_sums.sum(axis=0), -counts)).astype(np.uint32)


def fit_prior(sample: Sample) -> VocabularyPrior:
    """Popularity and tail shapes of what a sample kept."""
    vocab = sample.tail_sums.shape[1]
    total = sample.tail_sums.sum(axis=0, keepdims=True)
    common = _fixed_point(total + 1e-6 * max(total.sum(), 1e-9) / vocab, sample, np.zeros_like(sample.shape_of_row))
    weight = sample.tail_sums.sum(axis=1, keepdims=True)
    shrunk = sample.tail_sums + (_SHRINKAGE * weight + 1e-9) * common
    shapes = np.maximum(_fixed_point(shrunk, sample, sample.shape_of_row), _SMALLEST_SHAPE)
    return VocabularyPrior(
        token_of_rank=popularity(sample),
        log_shapes=np.log(shapes / shapes.sum(axis=1, keepdims=True)).astype(np.float16),
        evidence=_evidence(sample),
    )


def prior_of_kept(ids: NDArray[np.int32], vocab_size: int) -> VocabularyPrior:
    """A prior from kept ids int32[E] alone, where nobody can say what the tails held: one shape, the root of counts.

    Where a token is not kept it is less likely than elsewhere, so tails are flatter than counts; of the powers tried,
    the root was closest. Tokens that were never kept share the count of those kept once (Good, Biometrika 1953).
    """
    counts = np.bincount(ids, minlength=vocab_size)
    shape = np.sqrt(counts + max(int((counts == 1).sum()), 1) / vocab_size)
    return VocabularyPrior(
        token_of_rank=np.argsort(-counts, kind="stable").astype(np.uint32),
        log_shapes=np.log(shape / shape.sum())[None].astype(np.float16),
        evidence=np.zeros((1, vocab_size), np.float16),
    )


def _fixed_point(sums: NDArray[np.float64], sample: Sample, shape_of_row: NDArray[np.int64]) -> NDArray[np.float64]:
    """float64[S, V]: the shapes that the module's equation defines, `sums` being its numerator."""
    clusters, vocab = sums.shape
    cell = shape_of_row[sample.rows] * vocab + sample.ids
    shapes = sums / sums.sum(axis=1, keepdims=True)
    for _ in range(_FIXED_POINT_ROUNDS):
        kept_mass = np.bincount(sample.rows, shapes.ravel()[cell], len(sample.tail))
        weight = sample.tail / np.maximum(1 - kept_mass, 1e-6)
        whole = np.bincount(shape_of_row, weight, clusters)[:, None]
        spared = np.bincount(cell, weight[sample.rows], clusters * vocab).reshape(clusters, vocab)
        shapes = sums / np.maximum(whole - spared, 1e-3 * whole + 1e-12)
        shapes /= shapes.sum(axis=1, keepdims=True)
    return shapes


def _evidence(sample: Sample) -> NDArray[np.float16]:
    """float16[S, V]: log of how much likelier a row of shape s keeps token v than any row does."""
    clusters, vocab = sample.tail_sums.shape
    cell = sample.shape_of_row[sample.rows] * vocab + sample.ids
    kept = np.bincount(cell, minlength=clusters * vocab).reshape(clusters, vocab)
    share = np.bincount(sample.shape_of_row, minlength=clusters)[:, None] / len(sample.tail)
    expected = kept.sum(axis=0, keepdims=True) * share
    return np.log((kept + _PSEUDO_COUNT) / (expected + _PSEUDO_COUNT)).astype(np.float16)
