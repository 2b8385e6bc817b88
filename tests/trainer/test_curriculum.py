"""The ladder: never raised below the floor, never lowered, and resumed exactly."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from logitcache.errors import UserError
from trainer.curriculum import AbsoluteFloor, Curriculum, CurriculumPlan, Decision, RelativeFloor, parse_floor

START, RAISE, TOP, HOLD, FREEZE = Decision.START, Decision.RAISE, Decision.TOP, Decision.HOLD, Decision.FREEZE


@pytest.mark.parametrize(
    "options",
    [
        {"lengths": ()},
        {"lengths": (0, 4)},
        {"lengths": (8, 8)},
        {"lengths": (8, 4)},
        {"check_every": 0},
        {"patience": 0},
    ],
)
def test_impossible_plans_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UserError):
        CurriculumPlan(**options)


@pytest.mark.parametrize("word", ["", "low", "-1", "nan", "5 nats", "%", "1e999"])
def test_words_that_are_no_floor_are_refused(word: str) -> None:
    with pytest.raises(UserError, match="floor"):
        parse_floor(word)


def test_floors_are_nats_or_a_share_of_the_start() -> None:
    assert parse_floor("0.3") == AbsoluteFloor(nats=0.3)
    assert parse_floor("50%") == RelativeFloor(share=0.5)
    assert [str(parse_floor(word)) for word in ("0.3", "50%", "12.5%")] == ["0.3", "50%", "12.5%"]


def decisions(plan: CurriculumPlan, entropies: list[float]) -> tuple[Curriculum, list[Decision]]:
    curriculum = Curriculum(plan)
    return curriculum, [curriculum.observe(step, entropy) for step, entropy in enumerate(entropies)]


def test_the_paper_s_rule() -> None:
    """Raised while at or above half the start, frozen for good at the first check below."""
    curriculum, made = decisions(CurriculumPlan(), [2.0, 1.5, 1.0, 0.999, 5.0])
    assert made == [START, RAISE, RAISE, FREEZE, FREEZE]
    assert (curriculum.window, curriculum.frozen, curriculum.floor_nats) == (512, True, 1.0)


def test_patience_holds_before_it_freezes() -> None:
    plan = CurriculumPlan(lengths=(4, 8), floor=AbsoluteFloor(nats=1.0), patience=2)
    assert decisions(plan, [9, 0, 2, 2, 0, 0, 2])[1] == [START, HOLD, RAISE, TOP, HOLD, FREEZE, FREEZE]


def test_without_patience_a_window_only_holds() -> None:
    plan = CurriculumPlan(lengths=(4, 8), floor=AbsoluteFloor(nats=1.0), patience=None)
    assert decisions(plan, [9, 0, 0, 0, 2])[1] == [START, HOLD, HOLD, HOLD, RAISE]


def test_checks_are_due_every_so_many_steps_and_once() -> None:
    curriculum = Curriculum(CurriculumPlan(check_every=10))
    assert [step for step in range(25) if curriculum.due(step)] == [0, 10, 20]
    curriculum.observe(10, 1.0)
    resumed = Curriculum(curriculum.plan)
    resumed.restore(curriculum.state())
    assert not resumed.due(10)
    with pytest.raises(ValueError, match="expected one after 10"):
        resumed.observe(10, 1.0)


@pytest.mark.parametrize("entropy", [float("nan"), float("inf"), -0.1])
def test_what_is_no_entropy_is_refused(entropy: float) -> None:
    with pytest.raises(ValueError, match="entropy_nats"):
        Curriculum(CurriculumPlan()).observe(0, entropy)


def test_a_ladder_that_lacks_the_rung_is_refused() -> None:
    curriculum, _ = decisions(CurriculumPlan(), [2.0, 2.0, 2.0])
    with pytest.raises(UserError, match="rung"):
        Curriculum(CurriculumPlan(lengths=(128, 256))).restore(curriculum.state())


plans = st.builds(
    CurriculumPlan,
    lengths=st.lists(st.integers(1, 5000), min_size=1, max_size=7, unique=True).map(lambda some: tuple(sorted(some))),
    floor=st.builds(AbsoluteFloor, nats=st.floats(0, 4)) | st.builds(RelativeFloor, share=st.floats(0, 2)),
    patience=st.none() | st.integers(1, 3),
)
entropy_runs = st.lists(st.floats(0, 6), min_size=1, max_size=20)


@given(plans, entropy_runs)
def test_the_window_rises_only_at_or_above_the_floor(plan: CurriculumPlan, entropies: list[float]) -> None:
    curriculum = Curriculum(plan)
    froze = False
    for step, entropy in enumerate(entropies):
        rung = plan.lengths.index(curriculum.window)
        decision = curriculum.observe(step, entropy)
        risen = plan.lengths.index(curriculum.window) - rung
        assert risen == (decision is RAISE)
        assert curriculum.floor_nats is not None
        if risen:
            assert entropy >= curriculum.floor_nats
            assert not froze
        assert decision is FREEZE or not froze
        froze = curriculum.frozen


@given(plans, entropy_runs, st.data())
def test_a_restored_curriculum_goes_on_exactly(plan: CurriculumPlan, entropies: list[float], data: Any) -> None:
    cut = data.draw(st.integers(0, len(entropies)))
    whole, expected = decisions(plan, entropies)
    first, made = decisions(plan, entropies[:cut])
    second = Curriculum(plan)
    second.restore(json.loads(json.dumps(first.state())))
    made += [second.observe(step, entropies[step]) for step in range(cut, len(entropies))]
    assert made == expected
    assert second.state() == whole.state()
