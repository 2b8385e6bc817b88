"""The scalar grids, specs, and the search: small things with exact answers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from logitcache.codecs import FullVocabSpec, HiddenSpec, SampledSpec, TopKSpec, parse_targets
from logitcache.codecs import quantize as q
from logitcache.codecs.search import Dial, coarsest_within
from logitcache.codecs.topk_values import RootGrid, matching_step
from logitcache.errors import UserError

floats = st.floats(-(2.0**100), 2.0**100, width=32)


@given(st.lists(floats, min_size=1))
def test_bfloat16_is_the_nearest(values: list[float]) -> None:
    exact = np.float32(values)
    back = q.bf16_values(q.bf16_bits(exact))
    assert (np.abs(back - exact) <= np.abs(exact) * 2.0**-8 + 1e-38).all()
    np.testing.assert_array_equal(q.bf16_bits(back), q.bf16_bits(exact))


def test_bfloat16_ties_go_to_even_and_overflow_is_refused() -> None:
    assert q.bf16_bits(np.uint32([0x3F808000, 0x3F818000]).view(np.float32)).tolist() == [0x3F80, 0x3F82]
    for bad in (np.nan, np.inf, 3.4e38):
        with pytest.raises(UserError):
            q.bf16_bits(np.float32([bad]))


@given(st.floats(0, 250_000, width=32))
def test_root_grid(value: float) -> None:
    back = q.decode_root(q.encode_root(np.float32([value])))[0]
    assert abs(back**0.5 - value**0.5) <= q.ROOT_STEP / 2 + 1e-4


@given(st.floats(-60, -(2.0**-20), width=32))
def test_log_odds_grid_holds_both_sides(log_mass: float) -> None:
    codes = q.encode_log_odds(np.float32([log_mass]))
    log_m, log_rest = (part[0] for part in q.decode_log_odds(codes))
    half, mass = q.LOG_ODDS_STEP / 2 * 1.05 + 1e-6, np.exp(np.float64(np.float32(log_mass)))
    assert abs(log_m - np.float32(log_mass)) <= half
    assert abs(log_rest - np.log1p(-mass)) <= half
    np.testing.assert_allclose(np.exp(log_m) + np.exp(log_rest), 1, rtol=1e-12)


def test_no_mass_and_all_the_mass() -> None:
    log_m, log_rest = q.decode_log_odds(q.encode_log_odds(np.float32([-np.inf, 0.0])))
    assert log_m[0] == -np.inf
    assert log_rest[0] == 0
    assert log_m[1] == pytest.approx(0, abs=1e-12)
    assert np.isfinite(log_rest[1])


@given(st.lists(st.integers(-16_383, 16_383)))
def test_zigzag(values: list[int]) -> None:
    codes = q.zigzag(np.int16(values))
    assert (codes >= 0).all()
    np.testing.assert_array_equal(q.unzigzag(codes), np.int16(values))


@given(st.floats(-14, -0.75, width=32), st.sampled_from([0.0, 1e-5, 1e-3]), st.sampled_from([0.003, 0.01, 0.03]))
def test_a_value_and_its_level_share_a_cell(log_prob: float, threshold: float, step: float) -> None:
    grid, values = RootGrid(offset=threshold**0.5, step=step), np.float32([log_prob])
    root, code = np.exp(values / 2)[0], grid.cells(values)
    assume(root >= grid.offset)
    for levels in (grid.midpoints(), grid.centroids(values)):
        level = levels[code][0] ** 0.5
        assert abs(level - root) <= step + 1e-6


def test_steps_follow_thresholds() -> None:
    assert matching_step(0) == 0.01
    assert matching_step(4e-4) == pytest.approx(0.012)
    assert all(RootGrid(offset=p**0.5, step=matching_step(p)).reaches for p in (1e-9, 1e-6, 1e-4, 0.01, 0.5))


@pytest.mark.parametrize(
    ("text", "specs"),
    [
        ("topk:k=64,hidden", [TopKSpec(k=64), HiddenSpec()]),
        ("topk:k=64,p=1e-4,hidden:max-kl=2e-3", [TopKSpec(k=64, p=1e-4), HiddenSpec(max_kl=2e-3)]),
        ("topk:k=64:p=1e-4", [TopKSpec(k=64, p=1e-4)]),
        (" hidden:step=0.01 , full:step=0.125 ", [HiddenSpec(step=0.01), FullVocabSpec(step=0.125)]),
        ("sampled,n=8,topk", [SampledSpec(n=8), TopKSpec()]),
    ],
)
def test_targets_as_they_are_written(text: str, specs: list[object]) -> None:
    assert parse_targets(text) == specs


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", "topk, hidden, full, sampled"),
        ("logits", "choose from topk, hidden"),
        ("topk:q=3", "choose from p, mass, k"),
        ("topk:k=many", "not a whole number"),
        ("topk:k=1.5", "not a whole number"),
        ("k=64", "names no kind"),
        ("topk,topk", "named twice"),
        ("topk:k=0", "1 to 32767"),
        ("topk:p=nan", "probability"),
        ("topk:mass=0", "probability above 0"),
        ("topk:max-kl=inf", "nats above 0: got inf"),
        ("hidden:max-kl=inf", "nats above 0: got inf"),
        ("hidden:step=inf", "root nats above 0: got inf"),
        ("full:step=inf", "1/1024 to 1 nat"),
        ("hidden:step=0.1:max-kl=1e-3", "both"),
        ("sampled:n=256", "1 to 255"),
    ],
)
def test_targets_that_make_no_sense(text: str, part: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_targets(text)
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)


@given(st.floats(0.3, 3), st.floats(-9, -2), st.floats(-4, 1))
def test_the_search_returns_something_measured_within_the_bound(
    power: float, log_goal: float, log_scale: float
) -> None:
    goal, scale, tried = 10.0**log_goal, 10.0**log_scale, []

    def attempt(setting: float) -> tuple[float, float]:
        tried.append(setting)
        return setting, scale * setting**power

    dial = Dial(start=0.01, lowest=1e-9, highest=10.0, exponent=1.0)
    if scale * dial.lowest**power > goal:
        with pytest.raises(UserError, match="at best"):
            coarsest_within(dial, goal, attempt, "it")
        return
    found = coarsest_within(dial, goal, attempt, "it")
    assert scale * found**power <= goal
    assert found == max(setting for setting in tried if scale * setting**power <= goal)
    assert len(tried) <= 8
