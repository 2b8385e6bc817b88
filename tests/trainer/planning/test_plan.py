"""Plans: bad input is an error in one line, budgets are kept to, and what was not measured is not made up."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from logitcache.errors import UserError
from trainer.planning.case import Case, Have
from trainer.planning.evidence import STUDY
from trainer.planning.models import QWEN3, hub_name, model_shape
from trainer.planning.plan import cell_cost, make_plan
from trainer.planning.report import draw_break_even, plan_text
from trainer.planning.storage import MEASUREMENTS, PEAKED, PLAIN, storage
from trainer.planning.storage import TIERS as TIERS_FILE
from trainer.settings import Prefix

MOE = QWEN3["Qwen3-4B"] | {
    "model_type": "qwen3_moe", "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 768,
}  # fmt: skip
TIERS = ("topk:p=5e-4", "hidden:max-kl=2e-3")


@pytest.mark.parametrize(
    ("config", "found"),
    [
        (None, "no such directory"),
        ("[1]", "no JSON object"),
        ("{", "cannot be read"),
        (json.dumps({"model_type": "mamba"}), "has no formula"),
        (json.dumps({"model_type": "llama", "hidden_size": 64}), "whose num_attention_heads is None"),
        (json.dumps({**QWEN3["Qwen3-4B"], "hidden_size": None}), "whose hidden_size is None"),
        (json.dumps({**QWEN3["Qwen3-4B"], "num_attention_heads": 0}), "whose num_attention_heads is 0"),
        (json.dumps({**QWEN3["Qwen3-4B"], "num_hidden_layers": 0}), "whose num_hidden_layers is 0"),
        (json.dumps({**QWEN3["Qwen3-4B"], "vocab_size": "many"}), "whose vocab_size is 'many'"),
        (json.dumps({**QWEN3["Qwen3-4B"], "head_dim": 2.5}), "whose head_dim is 2.5"),
        (json.dumps({**MOE, "decoder_sparse_step": 0}), "whose decoder_sparse_step is 0"),
        (json.dumps({**MOE, "num_experts_per_tok": -1}), "whose num_experts_per_tok is -1"),
    ],
)
def test_a_model_that_is_not_known_is_an_error(config: str | None, found: str, tmp_path: Path) -> None:
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(UserError, match=found):
        model_shape(str(tmp_path / "nowhere" if config is None else tmp_path))


@pytest.mark.parametrize("name", ["Qwen3-5B", "no/such-model-anywhere", "a b//c"])
def test_a_name_that_leads_nowhere_is_an_error(name: str) -> None:
    with pytest.raises(UserError, match="none in the hub's cache"):
        model_shape(name)


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"students": 0}, "--students, at least 1"),
        ({"window": 0}, "--window, at least 1"),
        ({"budget": 0.0}, "--budget, above 0"),
        ({"budget": math.nan}, "--budget, above 0"),
        ({"flops_per_second": -1.0}, "--flops-per-second, above 0"),
        ({"price_per_hour": 2.0}, "no hours follow"),
        ({"budget": 1e18, "steps": 3}, "each decides the other"),
        ({"student_share": 0.3}, "--student-share, a whole part of 32"),
        ({"student_share": 1.0}, "--student-share, a whole part of 32"),
    ],
)
def test_a_case_that_makes_no_sense_is_an_error(options: dict[str, Any], found: str) -> None:
    with pytest.raises(UserError, match=found):
        Case(**options)


def test_a_budget_too_small_for_one_step_is_an_error() -> None:
    with pytest.raises(UserError, match="one step costs"):
        make_plan(Case(budget=1e12), TIERS)
    cached, *_, live = make_plan(Case(budget=1e15), TIERS)["cells"]
    assert cached["steps"] == 1
    assert live["steps"] == 0


@pytest.mark.parametrize("tiers", [(), ("topk,hidden",), ("states",)])
def test_tiers_are_named_one_by_one(tiers: tuple[str, ...]) -> None:
    with pytest.raises(UserError):
        make_plan(Case(), tiers)


@pytest.mark.parametrize(
    ("size", "billions"), [("0.6B", 0.44), ("1.7B", 1.4), ("4B", 3.6), ("8B", 6.95), ("14B", 13.2), ("32B", 31.2)]
)
def test_known_shapes_have_the_published_number_of_parameters(size: str, billions: float) -> None:
    """Without embeddings, as each model's card says."""
    shape = model_shape(f"Qwen/Qwen3-{size}-Base")
    assert (shape.parameters - shape.hidden * shape.vocab) / 1e9 == pytest.approx(billions, rel=0.02)


def test_names_are_what_commands_need(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [hub_name(name) for name in ("Qwen3-4B", "Qwen/Qwen3-4B-Base", "runs/student")] == [
        "Qwen/Qwen3-4B",
        "Qwen/Qwen3-4B-Base",
        "runs/student",
    ]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "Qwen3-4B").mkdir()
    (tmp_path / "Qwen3-4B" / "config.json").write_text(json.dumps(QWEN3["Qwen3-0.6B"]))
    assert model_shape("Qwen3-4B") == model_shape("Qwen/Qwen3-0.6B")
    assert hub_name("Qwen3-4B") == "Qwen3-4B"


@given(
    budget=st.floats(1e16, 1e21), students=st.integers(1, 50), prefix=st.sampled_from([Prefix.TEACHER, Prefix.STUDENT])
)
def test_a_budget_is_spent_and_not_exceeded(budget: float, students: int, prefix: Prefix) -> None:
    case = Case(budget=budget, students=students, problems=500, completion_tokens=512)
    cell = cell_cost(case, prefix, TIERS[1] if prefix is Prefix.TEACHER else None)
    assert cell.steps * cell.step_flops <= budget < (cell.steps + 1) * cell.step_flops * (1 + 1e-12)
    if cell.amortised_steps:
        assert cell.amortised(students) <= budget < cell.amortised(students) + cell.step_flops * (1 + 1e-12)
    assert cell.amortised_steps <= cell.steps


def test_a_window_shortens_the_step_and_not_the_build() -> None:
    whole, short = (cell_cost(Case(window=window), Prefix.TEACHER, "hidden") for window in (None, 128))
    assert short.build == whole.build
    assert short.step_flops < whole.step_flops / 10


def test_time_and_money_follow_from_stated_rates_only() -> None:
    bare, timed = make_plan(Case(), TIERS), make_plan(Case(flops_per_second=4e14, price_per_hour=3.0), TIERS)
    assert all(cell["amortised_s"] is None and cell["amortised_money"] is None for cell in bare["cells"])
    for cell in timed["cells"]:
        assert cell["amortised_s"] == pytest.approx(cell["amortised"] / 4e14)
        assert cell["amortised_money"] == pytest.approx(cell["amortised"] / 4e14 / 3600 * 3)


def test_bytes_are_the_measured_ones_and_only_states_are_scaled() -> None:
    figures = json.loads((Path(__file__).parents[3] / MEASUREMENTS).read_text())["figures"]
    teacher = model_shape("Qwen3-8B")
    states, sparse = storage(teacher, "hidden:max-kl=2e-3"), storage(teacher, "topk:p=0.0005")
    kept = figures[PLAIN]["hidden:max-kl=2e-3"]["bytes_per_token"]
    assert states.bytes_per_token[PLAIN] == pytest.approx(kept * 4096 / 576)
    assert sparse.bytes_per_token == {name: figures[name]["topk:p=5e-4"]["bytes_per_token"] for name in (PLAIN, PEAKED)}
    assert "scaled by width" in states.basis
    assert "not scaled" in sparse.basis


def test_what_was_not_measured_is_said_to_be_so() -> None:
    plan = make_plan(Case(), ["topk:p=0.01234"])
    assert plan["storage"][0]["bytes"] == {PLAIN: None, PEAKED: None}
    assert "not measured" in plan_text(plan)
    assert storage(model_shape("Qwen3-8B"), "full").basis == "not measured"


def test_the_figures_come_with_the_package(tmp_path: Path) -> None:
    """A wheel has the packages alone: no benchmarks beside them."""
    root = Path(__file__).parents[3]
    for package in ("trainer", "logitcache", "kernels"):
        (tmp_path / package).symlink_to(root / package)
    code = "from trainer.planning.storage import measured; print(measured('plain', 'hidden')['bytes_per_token'])\n"
    code += "from trainer.planning.evidence import at_equal_flops; at_equal_flops('teacher', 'reverse')"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert float(done.stdout) > 0
    patterns = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    assert {TIERS_FILE, STUDY} <= set(patterns["trainer.planning"])


def test_mixed_prefixes_cost_a_step_of_either_kind() -> None:
    (cached, mixed, live) = make_plan(Case(student_share=0.25), ["hidden"])["cells"]
    for phase, flops in mixed["step"].items():
        assert flops == pytest.approx(0.75 * cached["step"][phase] + 0.25 * live["step"][phase], rel=1e-12)
    assert mixed["build"] == cached["build"]
    with pytest.raises(UserError, match="--student-share, with hidden or full"):
        make_plan(Case(student_share=0.25), ["topk"])


def test_several_budgets_say_what_each_pays_for() -> None:
    case = Case(teacher="Qwen3-8B", students=10, problems=320, flops_per_second=1e14)
    with pytest.raises(UserError, match="a step on student prefixes costs up to"):
        make_plan(case, TIERS, [10**15, 10**19])
    plan = make_plan(case, TIERS, [10**18, 10**19])
    assert [(row["prefix"], row["budget"]) for row in plan["budgets"]] == [
        (prefix, budget) for budget in (10**18, 10**19) for prefix in ("teacher", "teacher", "student")
    ]
    for row in plan["budgets"]:
        (alone,) = [
            cell
            for cell in make_plan(replace(case, budget=row["budget"]), TIERS)["cells"]
            if (cell["prefix"], cell["tier"]) == (row["prefix"], row["tier"])
        ]
        assert (row["steps"], row["amortised_steps"]) == (alone["steps"], alone["amortised_steps"])
        assert row["epochs"] == row["steps"] / 10
        assert row["run_s"] == alone["marginal"] / 1e14
    assert "after the share of the build" in plan_text(plan)


def test_a_plan_can_be_kept_read_and_drawn(tmp_path: Path) -> None:
    case = Case(teacher="Qwen3-8B", have=Have.NOTHING, students=10, flops_per_second=4e14, price_per_hour=3.0)
    plan = make_plan(case, TIERS)
    again = json.loads(json.dumps(plan))
    assert plan_text(again) == plan_text(plan)
    assert all(tier in plan_text(plan) for tier in TIERS)
    draw_break_even(again, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
