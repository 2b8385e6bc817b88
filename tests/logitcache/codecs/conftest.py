"""A small teacher, a sample of its states, and every codec fitted to it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from logitcache.codecs import Calibration, Codec, calibrate, parse_targets
from logitcache.codecs.dense import DenseHead
from logitcache.codecs.fidelity import targets_of
from logitcache.records import Head, SampledTargets, TeacherTargets
from logitcache.scoring import SampledRequest

VOCAB, WIDTH, ROWS = 97, 8, 600
SPECS = ("topk:p=1e-2", "topk:k=5:p=0", "topk:mass=0.9:p=0", "hidden", "hidden:step=0.05", "full", "sampled:n=20")

MakeTargets = Callable[[Codec, int, int], TeacherTargets]


@pytest.fixture(scope="session")
def head() -> Head:
    rng = np.random.default_rng(0)
    return Head(weight=rng.standard_normal((VOCAB, WIDTH)).astype(np.float32), bias=np.zeros(VOCAB, np.float32))


@pytest.fixture(scope="session")
def sample() -> Calibration:
    rng = np.random.default_rng(1)
    hidden = rng.standard_normal((ROWS, WIDTH)).astype(np.float32)
    ids = rng.integers(0, VOCAB, ROWS, np.int32)
    return Calibration(hidden=hidden, token_ids=ids, sequence=np.arange(ROWS) // 20)


@pytest.fixture(scope="session", params=SPECS)
def codec(request: pytest.FixtureRequest, head: Head, sample: Calibration) -> Codec:
    """Each kind of codec in turn."""
    return calibrate(parse_targets(request.param)[0], DenseHead(head), sample)


@pytest.fixture(scope="session")
def make(head: Head, sample: Calibration) -> MakeTargets:
    """Targets of rows `start` to `stop`, of the kind that a codec asks for."""
    dense = DenseHead(head)

    def targets(codec: Codec, start: int, stop: int) -> TeacherTargets:
        hidden, ids = sample.hidden[start:stop], sample.token_ids[start:stop]
        if isinstance(codec.request, SampledRequest):
            return draws(dense.log_probs(hidden), ids, codec.request.samples)
        return targets_of(codec.request, log_probs_of(dense, hidden), hidden, head.fingerprint, ids)

    return targets


def log_probs_of(dense: DenseHead, hidden: NDArray[np.float32]) -> NDArray[np.float32]:
    return dense.log_probs(hidden) if len(hidden) else np.empty((0, VOCAB), np.float32)


def draws(log_probs: NDArray[np.float32], ids: NDArray[np.int32], samples: int) -> SampledTargets:
    """Multinomial counts of each row."""
    probs = np.exp(log_probs.astype(np.float64))
    counts = np.random.default_rng(2).multinomial(samples, probs / probs.sum(axis=1, keepdims=True))
    rows, drawn = np.nonzero(counts)
    return SampledTargets(
        ids=drawn.astype(np.int32),
        counts=counts[rows, drawn].astype(np.int32),
        row_splits=np.searchsorted(rows, np.arange(len(log_probs) + 1)).astype(np.int64),
        token_log_prob=log_probs[np.arange(len(ids)), ids],
        entropy=-np.einsum("nv,nv->n", np.exp(log_probs), log_probs),
    )
