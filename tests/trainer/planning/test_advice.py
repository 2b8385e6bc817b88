"""Advice: what it chooses follows from its rules, every ground has a source, every command can be run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from logitcache.cli import app as logitcache_app
from logitcache.errors import UserError
from trainer.cli import app as trainer_app
from trainer.planning.advice import COUNT, PAPER, Advice, advice_facts, advise
from trainer.planning.case import Aim, Case, Have
from trainer.planning.costs import build_cost
from trainer.planning.evidence import STUDY_RESULTS, at_equal_flops
from trainer.planning.plan import cache_text, models
from trainer.planning.report import advice_text
from trainer.settings import Prefix

APPS = {"logitcache": logitcache_app, "trainer": trainer_app}
ROOT = Path(__file__).parents[3]


def advised(aim: Aim, case: Case) -> Advice:
    return advise(aim, case, cache="runs/a cache", problems="deepscaler.parquet")


def test_long_completions_that_are_short_are_an_error() -> None:
    with pytest.raises(UserError, match="over 128 tokens"):
        advised(Aim.LONG, Case(window=128))


def test_a_budget_that_does_not_pay_for_a_step_is_an_error() -> None:
    with pytest.raises(UserError, match="one step on student prefixes costs"):
        advised(Aim.ANSWER, Case(budget=1e15))
    with pytest.raises(UserError, match="the share of the build"):
        advised(Aim.COMPUTE, Case(budget=1e15))
    assert advised(Aim.COMPUTE, Case(budget=1e15, have=Have.CACHE)).cost.amortised_steps == 1


def test_under_a_budget_what_must_be_built_first_counts_for_both_prefixes() -> None:
    advice = advised(Aim.RL, Case(completion_tokens=128, budget=1.8e17))
    assert advice.prefix is Prefix.TEACHER
    assert "1839 steps from the cache, 5" in advice.reasons[2].why
    for aim in (Aim.RL, Aim.ANSWER):
        for completion_tokens in (128, 1024):
            case = Case(completion_tokens=completion_tokens, budget=1e18, students=2)
            cost = advised(aim, case).cost
            assert cost.amortised_steps * cost.step_flops + sum(cost.build.values()) / 2 <= case.budget


def test_what_must_be_built_is_what_the_command_builds() -> None:
    """With the text there, all of it is scored; without, a student that writes needs short completions alone."""
    pair, steps = models(Case()), {"steps": 10}
    scored, built = (advised(Aim.ANSWER, Case(have=have, **steps)) for have in (Have.TEXT, Have.NOTHING))
    assert scored.prefix is built.prefix is Prefix.STUDENT
    whole = cache_text(Case())
    assert scored.cost.build == build_cost(pair.teacher, whole, kind="hidden", have=Have.TEXT)
    assert built.cost.build == build_cost(pair.teacher, whole.within(128), kind="hidden")
    assert scored.commands[0][:2] == ("logitcache", "score")
    assert built.commands[0][-2:] == ("--max-new-tokens", "128")


@pytest.mark.parametrize(("prefix", "way"), [(Prefix.TEACHER, "the same way"), (Prefix.STUDENT, "the other way")])
def test_the_study_at_equal_flops_is_quoted_as_it_is_kept(prefix: Prefix, way: str) -> None:
    curves = json.loads((ROOT / STUDY_RESULTS).read_text())["curves"]
    (curve,) = (one for one in curves if (one["prefix"], one["divergence"]) == ("student", "reverse"))
    (score,) = (point["avg_at_4"] for point in curve["points"] if point["flops"] == 15 * 10**11)
    told = at_equal_flops(prefix, "reverse")
    assert f"{score['mean']:.3f} ± {score['high'] - score['mean']:.3f} on student prefixes" in told
    assert "Avg@4" in told
    assert told.endswith(way)


@pytest.mark.parametrize(
    ("aim", "case", "prefix", "forward_weight", "kind", "windows"),
    [
        (Aim.ANSWER, Case(), Prefix.STUDENT, 0.0, "hidden", 6),
        (Aim.ANSWER, Case(completion_tokens=128, have=Have.CACHE), Prefix.TEACHER, 0.0, "hidden", 1),
        (Aim.LONG, Case(window=1000), Prefix.STUDENT, 0.0, "hidden", 4),
        (Aim.RL, Case(), Prefix.STUDENT, 1.0, "hidden", 1),
        (Aim.RL, Case(completion_tokens=128, have=Have.CACHE), Prefix.TEACHER, 1.0, "topk", 1),
        (Aim.COMPUTE, Case(have=Have.CACHE), Prefix.TEACHER, 0.0, "hidden", 1),
        (Aim.COMPUTE, Case(students=100), Prefix.TEACHER, 0.0, "hidden", 1),
        (Aim.COMPUTE, Case(students=1), Prefix.STUDENT, 0.0, "hidden", 6),
        (Aim.COMPUTE, Case(students=1, budget=1e19), Prefix.TEACHER, 0.0, "hidden", 1),
    ],
)
def test_what_is_chosen(aim: Aim, case: Case, prefix: Prefix, forward_weight: float, kind: str, windows: int) -> None:
    advice = advised(aim, case)
    assert (advice.prefix, advice.forward_weight, advice.tier.split(":")[0]) == (prefix, forward_weight, kind)
    assert len(advice.windows) == windows
    assert advice.windows[-1] == min(case.window or case.completion_tokens, case.completion_tokens)


@pytest.mark.parametrize("have", Have)
@pytest.mark.parametrize("completion_tokens", [128, 4096])
@pytest.mark.parametrize("aim", Aim)
def test_every_command_is_one_and_every_ground_has_a_source(aim: Aim, completion_tokens: int, have: Have) -> None:
    case = Case(completion_tokens=completion_tokens, have=have, students=3)
    if aim is Aim.LONG and completion_tokens == 128:
        return
    advice = advised(aim, case)
    assert len(advice.commands) == (1 if have is Have.CACHE else 2)
    for program, *words in advice.commands:
        command, bound, _ = APPS[program].parse_args(words, exit_on_error=False, print_error=False)
        assert command.__name__ == words[0]
        assert "runs/a cache" in bound.args or bound.arguments["request"].out == "runs/a cache"
    _, bound, _ = trainer_app.parse_args(advice.commands[-1][1:], exit_on_error=False, print_error=False)
    assert bound.arguments["prefix"] == advice.prefix
    assert bound.arguments["training"].steps == advice.cost.amortised_steps
    if len(advice.windows) > 1:
        assert bound.arguments["curriculum"] == advice.windows
    else:
        assert bound.arguments["training"].window == advice.windows[0]
    for reason in advice.reasons:
        assert reason.source in (PAPER, COUNT) or (ROOT / reason.source).is_file()
    facts = json.loads(json.dumps(advice_facts(advice, case)))
    assert facts["commands"][-1] in advice_text(facts)
    assert facts["amortised"] >= facts["marginal"]
