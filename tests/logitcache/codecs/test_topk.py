"""Top-k: every number that comes back is within the bound that its docstring states."""

from __future__ import annotations

import dataclasses
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from logitcache.codecs import TopKCodec, TopKSpec, spread_tail, uniform_prior
from logitcache.codecs.calibrate import fit_topk_to_targets
from logitcache.codecs.dense import log_softmax, select_topk
from logitcache.codecs.entries import MAX_VOCAB, pack, rank_of_token, row_of_entry, splits_of, unpack
from logitcache.codecs.fidelity import kl_nats
from logitcache.codecs.quantize import ROOT_STEP
from logitcache.codecs.topk import ENTRIES, ROWS
from logitcache.codecs.topk_values import Levels, RootGrid, head_values
from logitcache.errors import DamagedError, UserError
from logitcache.records import TopKTargets
from logitcache.scoring import TopKRequest


def codec_for(vocab: int, request: TopKRequest, step: float = 0.01) -> TopKCodec:
    levels = RootGrid(offset=request.min_probability**0.5, step=step).midpoints()
    return TopKCodec(prior=uniform_prior(vocab), request=request, step=step, levels=levels)


def again(codec: TopKCodec, targets: TopKTargets) -> TopKTargets:
    return codec.decode(codec.encode([targets]).arrays)


def kept_mass(targets: TopKTargets) -> NDArray[np.float64]:
    return np.add.reduceat(np.exp(targets.log_probs.astype(np.float64)), targets.row_splits[:-1])


requests = st.builds(
    TopKRequest,
    max_k=st.integers(1, 40),
    min_probability=st.sampled_from([0.0, 1e-5, 1e-3, 0.1]),
    mass=st.sampled_from([1.0, 0.9, 0.5]),
)
# Draws from few values, so that there are ties; widths from flat to one token with nearly everything.
logits = arrays(np.float32, (5, 30), elements=st.sampled_from([-60.0, -8.0, -3.0, 0.0, 0.5, 4.0, 12.0]))


@given(logits, requests, st.integers(0, 29))
@settings(deadline=None, max_examples=150)
def test_everything_is_within_its_bound(values: NDArray[np.float32], request: TopKRequest, token: int) -> None:
    targets = select_topk(log_softmax(values), np.full(5, token, np.int32), request)
    codec = codec_for(30, request)
    back = again(codec, targets)
    np.testing.assert_array_equal(back.ids, targets.ids)
    np.testing.assert_array_equal(back.row_splits, targets.row_splits)
    assert (back.log_probs <= 1e-6).all()
    assert np.isfinite(back.log_probs).all()
    tail = np.exp(back.tail_log_mass.astype(np.float64))
    np.testing.assert_allclose(kept_mass(back) + tail, 1, atol=1e-5)
    np.testing.assert_array_equal(np.isneginf(back.tail_log_mass), np.isneginf(targets.tail_log_mass))
    some = np.isfinite(targets.tail_log_mass) & (targets.tail_log_mass > -30)
    np.testing.assert_allclose(back.tail_log_mass[some], targets.tail_log_mass[some], atol=1 / 32 + 1e-4)
    for name, sign in (("token_log_prob", -1), ("entropy", 1)):
        mine, theirs = (np.sqrt(np.maximum(sign * getattr(part, name), 0)) for part in (back, targets))
        np.testing.assert_allclose(mine, theirs, atol=ROOT_STEP / 2 + 1e-4)
    _check_roots(codec, targets, back)


def _check_roots(codec: TopKCodec, targets: TopKTargets, back: TopKTargets) -> None:
    for start, stop in zip(targets.row_splits, targets.row_splits[1:], strict=False):
        truth, mine = (np.exp(part.log_probs[start:stop].astype(np.float64) / 2) for part in (targets, back))
        top = truth.argmax()
        others = np.arange(len(truth)) != top
        unclamped = mine[top] > mine[others].max(initial=0) * 1.0001
        if unclamped:
            assert (np.abs(mine - truth)[others] <= codec.step + 1e-6).all()
        assert mine[top] >= mine.max() - 1e-6


@pytest.mark.parametrize("vocab", [2, 49_152, 151_936])
def test_vocabularies_of_any_size(vocab: int) -> None:
    log_probs = log_softmax(np.random.default_rng(0).standard_normal((3, vocab)).astype(np.float32) * 3)
    request = TopKRequest(max_k=64, min_probability=1e-4)
    targets = select_topk(log_probs, np.array([0, 1, vocab - 1], np.int32), request)
    back = again(codec_for(vocab, request), targets)
    np.testing.assert_array_equal(back.ids, targets.ids)


def test_the_last_ids_of_a_large_vocabulary() -> None:
    targets = dataclasses.replace(_row([0, 151_935], [0.6, 0.3]), tail_log_mass=np.log(np.float32([0.1])))
    back = again(codec_for(151_936, TopKRequest()), targets)
    assert back.ids.tolist() == [0, 151_935]
    np.testing.assert_allclose(np.exp(back.log_probs), [0.6, 0.3], atol=0.02)


def test_one_kept_token_has_all_that_is_not_tail() -> None:
    back = again(codec_for(10, TopKRequest(max_k=1)), _row([7], [0.75]))
    np.testing.assert_allclose(np.exp(back.log_probs), 0.75, atol=0.01)
    certain = dataclasses.replace(_row([7], [1.0]), tail_log_mass=np.float32([-np.inf]))
    assert again(codec_for(10, TopKRequest(max_k=1)), certain).log_probs.tolist() == [0.0]


def test_equal_probabilities_stay_nearly_equal() -> None:
    back = again(codec_for(10, TopKRequest()), _row([1, 2, 3], [0.3, 0.3, 0.3]))
    assert np.ptp(np.exp(back.log_probs / 2)) <= 0.02


@pytest.mark.parametrize("request_", [TopKRequest(max_k=3), TopKRequest(max_k=9, min_probability=0.2)])
def test_selection_takes_the_likeliest_and_of_equals_the_first(request_: TopKRequest) -> None:
    log_probs = np.log(np.float32([[0.1, 0.25, 0.25, 0.25, 0.15], [0.96, 0.01, 0.01, 0.01, 0.01]]))
    targets = select_topk(log_probs, np.zeros(2, np.int32), request_)
    expected = [1, 2, 3, 0, 1, 2] if request_.max_k == 3 else [1, 2, 3, 0]
    assert targets.ids.tolist() == expected
    np.testing.assert_allclose(kept_mass(targets) + np.exp(targets.tail_log_mass), 1, atol=1e-6)


def test_nucleus_stops_once_the_mass_is_reached() -> None:
    log_probs = np.log(np.float32([[0.1, 0.5, 0.3, 0.1]]))
    for mass, expected in ((0.4, [1]), (0.5, [1]), (0.51, [1, 2]), (0.85, [0, 1, 2])):
        request = TopKRequest(max_k=4, mass=mass)
        assert select_topk(log_probs, np.zeros(1, np.int32), request).ids.tolist() == expected


def test_a_repeated_id_and_an_empty_row_are_refused() -> None:
    codec = codec_for(10, TopKRequest())
    with pytest.raises(UserError, match="repeated"):
        codec.encode([_row([3, 3], [0.3, 0.3])])
    with pytest.raises(UserError, match="empty row"):
        codec.encode([_row([], [])])


def test_bytes_that_do_not_fit_together_are_damage() -> None:
    codec = codec_for(10, TopKRequest())
    arrays = dict(codec.encode([_row([1, 2, 3], [0.3, 0.2, 0.1])]).arrays)
    with pytest.raises(DamagedError, match="entries"):
        codec.decode(arrays | {ENTRIES: arrays[ENTRIES][:-1]})
    with pytest.raises(DamagedError, match="below 10"):
        codec.decode(arrays | {ENTRIES: arrays[ENTRIES] | np.uint32(1 << 20)})
    assert codec.decode({ROWS: arrays[ROWS][:0], ENTRIES: arrays[ENTRIES][:0]}).ids.size == 0


@pytest.mark.parametrize("counts", [[], [0], [3], [0, 2, 0, 0, 1, 4, 0, 0]])
def test_the_row_of_each_entry(counts: list[int]) -> None:
    splits = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    np.testing.assert_array_equal(row_of_entry(splits), np.repeat(np.arange(len(counts)), counts))


def test_ranks_that_wrap_round_are_damage() -> None:
    """257 gaps of 2^24 - 1 come back to rank 0 in 32 bits."""
    entries = np.full(257, 0xFFFFFF00, np.uint32)
    splits = splits_of(np.int16([257]), 257)
    with pytest.raises(DamagedError, match="below 10"):
        unpack(entries, splits, row_of_entry(splits), np.arange(10, dtype=np.uint32))


@pytest.mark.parametrize("vocab", [1, 2, 97, 151_936, MAX_VOCAB])
@pytest.mark.parametrize("most", [1, 3, 60, 2000])
def test_sets_of_any_width_come_back_sorted_by_id(vocab: int, most: int) -> None:
    rng = np.random.default_rng(most)
    counts = rng.integers(1, min(vocab, most) + 1, 300)
    rows = [rng.choice(vocab, count, replace=False, shuffle=False) for count in counts[: 20 if most > 60 else 300]]
    ids = np.concatenate(rows).astype(np.int32)
    splits = np.concatenate([[0], np.cumsum([len(row) for row in rows])])
    values = rng.integers(0, 256, len(ids))
    token_of_rank = rng.permutation(vocab).astype(np.uint32)
    entries = pack(ids, values, splits, rank_of_token(token_of_rank))
    back, codes = unpack(entries, splits, row_of_entry(splits), token_of_rank)
    for start, stop in pairwise(splits.tolist()):
        order = start + np.argsort(ids[start:stop])
        np.testing.assert_array_equal(back[start:stop], ids[order])
        np.testing.assert_array_equal(codes[start:stop], values[order])


def test_an_entropy_that_the_teacher_cannot_tell_comes_back_unknown_and_moves_nothing_else() -> None:
    rows = select_topk(log_softmax(np.eye(4, 30, dtype=np.float32) * 9), np.zeros(4, np.int32), TopKRequest(max_k=5))
    untold = dataclasses.replace(rows, entropy=np.full(4, np.nan, np.float32))
    codec = codec_for(30, TopKRequest(max_k=5))
    told, back = again(codec, rows), again(codec, untold)
    assert np.isnan(back.entropy).all()
    for name in ("ids", "log_probs", "row_splits", "tail_log_mass", "token_log_prob"):
        np.testing.assert_array_equal(getattr(back, name), getattr(told, name))
    some = dataclasses.replace(rows, entropy=np.float32([1, np.nan, 1, 1]))
    with pytest.raises(UserError, match="finite entropy"):
        codec.encode([some])


def test_a_codec_fitted_to_targets_spreads_their_tail_better_than_evenly() -> None:
    rng = np.random.default_rng(5)
    log_probs = log_softmax((rng.standard_normal((400, 97)) + np.linspace(4, 0, 97)).astype(np.float32))
    targets = select_topk(log_probs, np.zeros(400, np.int32), TopKRequest(max_k=8))
    codec = fit_topk_to_targets(TopKSpec(p=0, k=8), 97, [targets])
    learnt, even = (
        kl_nats(log_probs, spread_tail(targets, prior)).mean() for prior in (codec.prior, uniform_prior(97))
    )
    assert learnt < 0.8 * even
    counts = np.bincount(targets.ids, minlength=97)
    assert (np.diff(counts[codec.prior.token_of_rank]) <= 0).all()
    rebuilt = TopKCodec.from_config(codec.config, codec.shared)
    np.testing.assert_array_equal(again(rebuilt, targets).log_probs, again(codec, targets).log_probs)
    with pytest.raises(UserError, match="calibration sample"):
        fit_topk_to_targets(TopKSpec(p=0, k=8), 97, [])


def test_levels_that_are_not_one_a_code_are_refused() -> None:
    codec = codec_for(10, TopKRequest())
    with pytest.raises(UserError, match="256 levels"):
        TopKCodec.from_config(codec.config, {**codec.shared, "levels": codec.levels[:100]})


def test_a_step_that_cannot_reach_one_half_is_refused() -> None:
    with pytest.raises(UserError, match="255 cells"):
        codec_for(10, TopKRequest(), step=0.001)


def _row(ids: list[int], probs: list[float]) -> TopKTargets:
    kept = np.array(probs, np.float32)
    return TopKTargets(
        ids=np.array(ids, np.int32),
        log_probs=np.log(kept),
        row_splits=np.array([0, len(ids)], np.int64),
        tail_log_mass=np.log(np.maximum(1 - kept.sum(keepdims=True), 1e-9)).astype(np.float32),
        token_log_prob=np.float32([-0.5]),
        entropy=np.float32([1.0]),
    )


@pytest.mark.parametrize("log_head", [0.0, -1e-3, -0.7])
def test_values_are_those_of_a_sum_row_by_row(log_head: float) -> None:
    rng = np.random.default_rng(7)
    levels = RootGrid(offset=0.01, step=0.01).midpoints()
    counts = rng.integers(1, 200, 300)
    splits = np.concatenate([[0], np.cumsum(counts)])
    code = np.minimum(rng.geometric(1 / 9, splits[-1]), 60)
    code[splits[:-1] + rng.integers(0, counts)] = 0
    found = head_values(code, splits, row_of_entry(splits), np.full(300, np.exp(log_head)), Levels(levels))
    floors = 0
    for row, (start, stop) in enumerate(pairwise(splits.tolist())):
        others = levels[code[start:stop]].astype(np.float64)
        top = max(np.exp(log_head) - others.sum(), others.max())
        floors += top == others.max() and len(others) > 1
        probs = np.where(code[start:stop] == 0, top, others) * np.exp(log_head) / (top + others.sum())
        np.testing.assert_allclose(found.log_probs[start:stop], np.log(probs), atol=1e-6)
        np.testing.assert_allclose(found.top[row], np.log(probs[code[start:stop] == 0][0]), atol=1e-6)
        np.testing.assert_allclose(found.entropy[row], -(probs * np.log(probs)).sum(), atol=1e-6)
    assert 0 < floors < 300
