"""The prior: decoded distributions are proper, a fitted tail beats a flat one, coarse never exceeds exact."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from logitcache.codecs import Calibration, VocabularyPrior, spread_tail, tail_shapes, uniform_prior
from logitcache.codecs.dense import DenseHead, log_softmax, select_topk
from logitcache.codecs.fidelity import kl_nats
from logitcache.codecs.fit_prior import cluster, fit_prior, gather
from logitcache.errors import UserError
from logitcache.records import Head, TopKTargets
from logitcache.scoring import TopKRequest

REQUEST = TopKRequest(max_k=6)


def coarse_kl(targets: TopKTargets, student: NDArray[np.float32]) -> NDArray[np.float64]:
    """KL of the k + 1 outcomes, row by row."""
    out = []
    for row, (start, stop) in enumerate(zip(targets.row_splits, targets.row_splits[1:], strict=False)):
        kept = student[row, targets.ids[start:stop]]
        log_p = np.append(targets.log_probs[start:stop], targets.tail_log_mass[row]).astype(np.float64)
        log_q = np.append(kept, np.log(max(1 - np.exp(kept.astype(np.float64)).sum(), 1e-12)))
        out.append(float((np.exp(log_p) * (log_p - log_q)).sum()))
    return np.array(out)


@pytest.fixture
def exact(head: Head, sample: Calibration) -> NDArray[np.float32]:
    return DenseHead(head).log_probs(sample.hidden[300:400])


@pytest.fixture
def fitted(head: Head, sample: Calibration) -> VocabularyPrior:
    return fit_prior(gather(DenseHead(head), sample.rows(slice(300)), REQUEST))


def test_spread_rows_are_proper_and_keep_what_was_kept(exact: NDArray[np.float32], fitted: VocabularyPrior) -> None:
    targets = select_topk(exact, np.zeros(len(exact), np.int32), REQUEST)
    spread = spread_tail(targets, fitted)
    np.testing.assert_allclose(np.exp(spread.astype(np.float64)).sum(axis=1), 1, atol=1e-5)
    rows = np.repeat(np.arange(len(exact)), 6)
    np.testing.assert_array_equal(spread[rows, targets.ids], targets.log_probs)


def test_kl_is_never_negative_and_coarse_never_exceeds_exact(
    exact: NDArray[np.float32], fitted: VocabularyPrior
) -> None:
    targets = select_topk(exact, np.zeros(len(exact), np.int32), REQUEST)
    student = log_softmax(exact + np.random.default_rng(3).standard_normal(exact.shape).astype(np.float32))
    full = kl_nats(exact, student)
    assert (full >= 0).all()
    assert (kl_nats(spread_tail(targets, fitted), exact) >= 0).all()
    assert (coarse_kl(targets, student) <= full + 1e-5).all()


def test_kl_agrees_with_its_definition_from_near_to_far(exact: NDArray[np.float32]) -> None:
    rng = np.random.default_rng(4)
    for size in (1e-3, 0.1, 3.0, 40.0):
        other = log_softmax(exact + size * rng.standard_normal(exact.shape).astype(np.float32))
        left, right = exact.astype(np.float64), other.astype(np.float64)
        truth = (np.exp(left) * (left - right)).sum(axis=1)
        np.testing.assert_allclose(kl_nats(exact, other), truth, rtol=2e-3, atol=2e-6)


def test_a_fitted_tail_is_nearer_than_a_flat_one(exact: NDArray[np.float32], fitted: VocabularyPrior) -> None:
    targets = select_topk(exact, np.zeros(len(exact), np.int32), REQUEST)
    assert fitted.log_shapes.shape[0] > 1
    learnt, flat = (kl_nats(exact, spread_tail(targets, prior)).mean() for prior in (fitted, uniform_prior(97)))
    assert learnt < 0.95 * flat


def test_the_shape_of_a_row_is_the_one_its_ids_speak_for() -> None:
    shapes = np.log(np.float32([[0.1, 0.1, 0.4, 0.4], [0.4, 0.4, 0.1, 0.1]])).astype(np.float16)
    prior = VocabularyPrior(
        token_of_rank=np.arange(4, dtype=np.uint32),
        log_shapes=shapes,
        evidence=np.float16([[0, 2, 0, 0], [0, 0, 1, 0]]),
    )
    targets = select_topk(
        np.log(np.float32([[0.2, 0.6, 0.1, 0.1], [0.2, 0.1, 0.6, 0.1]])), np.zeros(2, np.int32), TopKRequest(max_k=1)
    )
    assert tail_shapes(targets, prior).tolist() == [0, 1]
    # Hand-computed: the tail of 0.4 goes 1:4:4 over tokens 0, 2, 3 in the first row, 4:4:1 over 0, 1, 3 in the second.
    expected = [[0.4 / 9, 0.6, 1.6 / 9, 1.6 / 9], [1.6 / 9, 1.6 / 9, 0.6, 0.4 / 9]]
    np.testing.assert_allclose(np.exp(spread_tail(targets, prior)), expected, rtol=2e-3)


def test_a_row_that_keeps_everything_has_no_tail() -> None:
    log_probs = np.log(np.float32([[0.5, 0.25, 0.25]]))
    targets = select_topk(log_probs, np.zeros(1, np.int32), TopKRequest(max_k=3))
    assert np.isneginf(targets.tail_log_mass).all()
    np.testing.assert_array_equal(spread_tail(targets, uniform_prior(3)), log_probs)


def test_fitting_is_deterministic_and_popularity_is_by_count(head: Head, sample: Calibration) -> None:
    seen = [gather(DenseHead(head), sample, REQUEST) for _ in range(2)]
    first, second = (fit_prior(each) for each in seen)
    for name, array in first.arrays.items():
        assert array.tobytes() == second.arrays[name].tobytes()
    counts = np.bincount(seen[0].ids, minlength=97)[first.token_of_rank]
    assert (np.diff(counts) <= 0).all()
    assert np.bincount(cluster(sample.hidden, 5)).sum() == len(sample)


def test_a_prior_that_is_no_permutation_or_no_distribution_is_refused() -> None:
    good = uniform_prior(3)
    with pytest.raises(UserError, match="permutation"):
        VocabularyPrior(token_of_rank=np.uint32([0, 0, 2]), log_shapes=good.log_shapes, evidence=good.evidence)
    with pytest.raises(UserError, match="sum to 1"):
        VocabularyPrior(
            token_of_rank=good.token_of_rank, log_shapes=good.log_shapes + np.float16(1), evidence=good.evidence
        )
