"""Hidden states: bfloat16 as it is, and the transform whose inverse the head carries."""

from __future__ import annotations

import numpy as np
import pytest

from logitcache.codecs import Calibration, HiddenSpec, TransformCodec, calibrate, measured_kl
from logitcache.codecs.calibration import upper_bound
from logitcache.codecs.dense import DenseHead, log_softmax
from logitcache.codecs.fidelity import kl_nats
from logitcache.codecs.fit_transform import fisher_information
from logitcache.codecs.hidden_state import HiddenStateCodec
from logitcache.codecs.quantize import bf16_bits, bf16_values
from logitcache.errors import IdentityError, UserError
from logitcache.records import Head, HiddenStateTargets

RNG = np.random.default_rng(5)
WEIGHT = RNG.standard_normal((50, 8)).astype(np.float32)
HEADS = {
    "plain": Head(weight=WEIGHT),
    "bias and scale": Head(weight=WEIGHT, bias=RNG.standard_normal(50).astype(np.float32), scale=0.7),
    "soft cap": Head(weight=WEIGHT, soft_cap=4.0, scale=1.5),
    "bfloat16": Head(weight=bf16_bits(WEIGHT)),
}
SAMPLE = Calibration(
    hidden=RNG.standard_normal((400, 8)).astype(np.float32),
    token_ids=np.zeros(400, np.int32),
    sequence=np.arange(400) // 10,
)


@pytest.fixture(params=list(HEADS))
def teacher(request: pytest.FixtureRequest) -> Head:
    return HEADS[request.param]


def coded(teacher: Head, step: float) -> TransformCodec:
    codec = calibrate(HiddenSpec(step=step), DenseHead(teacher), SAMPLE)
    assert isinstance(codec, TransformCodec)
    return codec


def test_the_folded_head_gives_the_teachers_logits(teacher: Head) -> None:
    codec = coded(teacher, 1e-3)
    targets = HiddenStateTargets(hidden=SAMPLE.hidden, head_fingerprint=teacher.fingerprint)
    decoded = codec.decode(codec.encode([targets]).arrays)
    exact, mine = DenseHead(teacher).logits(SAMPLE.hidden), DenseHead(codec.head).logits(decoded.hidden)
    np.testing.assert_allclose(mine, exact, atol=0.2 if teacher.weight.dtype == np.uint16 else 0.02)
    assert codec.head.weight.dtype == teacher.weight.dtype


def test_coordinates_are_within_half_a_step(teacher: Head) -> None:
    codec = coded(teacher, 0.1)
    targets = HiddenStateTargets(hidden=SAMPLE.hidden, head_fingerprint=teacher.fingerprint)
    exact = (SAMPLE.hidden - codec.mean) @ codec.analysis
    assert np.abs(codec.decode(codec.encode([targets]).arrays).hidden - exact).max() <= 0.5001


def test_a_finer_step_costs_less_in_both_directions(teacher: Head) -> None:
    coarse, fine = (measured_kl(coded(teacher, step), teacher, SAMPLE.hidden) for step in (0.3, 0.1))
    assert 0 < fine.mean < coarse.mean / 4
    assert 0 < fine.reverse.mean() < coarse.reverse.mean() / 4
    assert fine.p99 >= fine.mean


def test_max_kl_is_kept_on_rows_that_were_not_fitted(teacher: Head) -> None:
    codec = calibrate(HiddenSpec(max_kl=5e-3), DenseHead(teacher), SAMPLE)
    judges = SAMPLE.held_out
    found = measured_kl(codec, teacher, judges.hidden)
    bounds = [upper_bound(kl, judges.sequence) for kl in (found.forward, found.reverse)]
    assert 4e-3 <= max(bounds) <= 5e-3
    assert found.mean < bounds[0]


def test_fisher_information_is_the_curvature_of_the_kl(teacher: Head) -> None:
    dense, at = DenseHead(teacher), SAMPLE.hidden[:1]
    fisher = fisher_information(dense, at)
    for _ in range(5):
        nudge = (RNG.standard_normal((1, 8)) * 0.02).astype(np.float32)
        kl = kl_nats(dense.log_probs(at), dense.log_probs(at + nudge))[0]
        np.testing.assert_allclose(kl, 0.5 * (nudge @ fisher @ nudge.T).item(), rtol=0.15)


def test_variances_fall_along_the_dimensions(teacher: Head) -> None:
    codec = coded(teacher, 1e-3)
    variances = ((SAMPLE.hidden - codec.mean) @ codec.analysis).var(axis=0)
    assert (np.diff(variances) <= 1e-3 * variances[0]).all()


def test_bfloat16_states_come_back_bit_for_bit(teacher: Head) -> None:
    codec = HiddenStateCodec(head=teacher)
    bits = bf16_bits(SAMPLE.hidden)
    for hidden in (bits, bf16_values(bits)):
        targets = HiddenStateTargets(hidden=hidden, head_fingerprint=teacher.fingerprint)
        np.testing.assert_array_equal(codec.decode(codec.encode([targets]).arrays).hidden, bits)
    assert codec.head is teacher


@pytest.mark.parametrize("step", [None, 0.1])
def test_states_of_another_head_are_refused(step: float | None) -> None:
    codec = calibrate(HiddenSpec(step=step), DenseHead(HEADS["plain"]), SAMPLE)
    foreign = HiddenStateTargets(hidden=SAMPLE.hidden, head_fingerprint=HEADS["soft cap"].fingerprint)
    with pytest.raises(IdentityError):
        codec.encode([foreign])


def test_states_too_far_for_16_bits_are_refused() -> None:
    codec = coded(HEADS["plain"], 1e-3)
    far = HiddenStateTargets(hidden=1e4 * SAMPLE.hidden, head_fingerprint=HEADS["plain"].fingerprint)
    with pytest.raises(UserError, match="larger step"):
        codec.encode([far])


def test_logits_that_are_not_finite_are_refused() -> None:
    with pytest.raises(UserError, match="finite logits"):
        log_softmax(np.float32([[0.0, np.inf]]))
