"""`trainer equal-flops` end to end on a tiny teacher and a real cache: bad input, exact FLOPs, a kill, the report."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from logitcache.console import run_command
from tests.trainer.test_commands import SIZE, built, trainer
from tests.trainer.test_served import Served
from trainer.cli import app
from trainer.flops import FlopLedger

BUDGETS = (4 * 10**9, 8 * 10**9)
CLOCKS = {"seconds", "joules", "flops_per_second", "money"}


@pytest.fixture(scope="module")
def cache(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built(tmp_path_factory.mktemp("cache"), tiny_dir, "hidden,topk:k=8")


@pytest.fixture(scope="module")
def problems(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("problems") / "sums.jsonl"
    sums = [{"id": f"s{n}", "problem": f"What is {n} + 1?", "answer": str(n + 1)} for n in range(2)]
    file.write_text("".join(json.dumps(line) + "\n" for line in sums))
    return file


def command(cache: Path, model: Path, *more: str | Path) -> list[str]:
    words = ["equal-flops", cache, "--student", model, "--teacher", model, *SIZE[2:]]
    return [str(word) for word in (*words, "--seeds", "0", "1", "--parts", "2", *more)]


def whole(cache: Path, model: Path, problems: Path, out: Path) -> list[str]:
    more = (
        "--problems",
        problems,
        "--samples",
        "2",
        "--max-new-tokens",
        "4",
        "--mixes",
        "0.5",
        "--checkpoint-every",
        "1",
    )
    return command(cache, model, "--budgets", *(f"{budget:g}" for budget in BUDGETS), *more, "--out", out, "--json")


def run(words: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """In this process: exit code, standard output, standard error."""
    code = run_command(app, words, after_interrupt="")
    said = capsys.readouterr()
    return code, said.out, said.err


def without_clocks(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: without_clocks(item) for name, item in value.items() if name not in CLOCKS}
    return [without_clocks(item) for item in value] if isinstance(value, list) else value


@pytest.mark.parametrize(
    ("more", "found"),
    [
        (["--budgets", "1e8", "4e9"], "a step on teacher prefixes costs up to"),
        (["--budgets", "4e9", "--steps", "5"], "no --steps"),
        (["--budgets", "4e9", "--seed", "5"], "no --seed"),
        (["--budgets", "4e9", "--schedule", "cosine"], "leave it constant"),
        (["--budgets", "4e9", "4e9"], "--budgets, none twice"),
        (["--budgets", "4e9", "--mixes", "1.5"], "a forward weight of 0 to 1"),
        (["--budgets", "4e9", "--student-shares", "0.3"], "choose a share that makes 1 or more of either"),
        (["--budgets", "4e9", "--student-shares", "0.5", "--targets", "topk"], "topk targets, which no metric may mix"),
        (["--budgets", "4e9", "--student-shares", "1", "--cross-entropy-share", "0.5"], "no cell on teacher prefixes"),
        (["--budgets", "4e9", "--cross-entropy-share", "2"], "a cross-entropy share of 0 to 1"),
        (["--budgets", "4e9", "--checkpoint-every", "0"], "--checkpoint-every, at least 1"),
        (["--budgets", "4e9", "--plan", "--flops-per-second", "-5"], "--flops-per-second, above 0"),
        (["--budgets", "4e9", "--plan", "--flops-per-second", "nan"], "--flops-per-second, above 0"),
        (["--budgets", "4e9", "--problems", "nowhere.jsonl"], "nowhere.jsonl"),
    ],
)
def test_bad_input_is_one_line_before_any_work(
    more: list[str], found: str, cache: Path, tiny_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, said = run(command(cache, tiny_dir, *more, "--out", tmp_path / "out"), capsys)
    assert code == 2
    assert said.count("\n") == 1
    assert found in said
    assert not (tmp_path / "out").exists()


def test_answers_longer_than_the_context_are_refused_before_any_work(
    cache: Path, tiny_dir: Path, problems: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--budgets", "4e9", "--problems", problems, "--max-new-tokens", "1000000"]
    code, _, said = run(command(cache, tiny_dir, *more, "--out", tmp_path / "out"), capsys)
    assert (code, said.count("\n")) == (2, 1)
    assert "the model's context holds" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_served_teacher_scores_mixed_prefixes_as_one_on_this_machine_does(
    cache: Path, tiny_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    served = Served(str(cache), "--teacher", f"tiny={tiny_dir}", "--dtype", "float32")
    shares = ["--budgets", "4e9", "--student-shares", "0.5", "--seeds", "1", "--mixes", "0.5", "--parts", "1"]
    try:
        plans, reports = [], []
        for number, teacher in enumerate((str(tiny_dir), f"{served.location}#tiny")):
            words = ["equal-flops", cache, "--student", tiny_dir, "--teacher", teacher, *SIZE[2:], *shares]
            words += ["--out", tmp_path / str(number), "--json"]
            for more, kept in ((["--plan"], plans), ([], reports)):
                code, answered, said = run([*map(str, words), *more], capsys)
                assert code == 0, said
                kept.append(without_clocks(json.loads(answered)))
    finally:
        served.kill()
    assert plans[0] == plans[1]
    assert reports[0] == reports[1]
    (done,), (curve,) = reports[0]["runs"], reports[0]["curves"]
    assert (done["prefix"], done["student_share"]) == ("mixed-0.5", 0.5)
    assert min(done["flops"][phase] for phase in ("teacher_prefill", "student_rollout", "student_forward")) > 0
    assert curve["share_flops"] == -(-sum(reports[0]["cache"]["flops"].values()) // 10)
    (row,) = plans[0]["budgets"]
    assert (row["prefix"], row["tier"]) == ("mixed-0.5", "hidden")
    assert abs(row["steps"] - done["steps"]) <= 2
    assert "One seed; KL in nats" in (tmp_path / "0" / "equal_flops.md").read_text()


def test_no_place_is_an_error(cache: Path, tiny_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, said = run(command(cache, tiny_dir, "--budgets", "4e9"), capsys)
    assert (code, "give --out, or --plan" in said) == (2, True)


def test_a_student_whose_cost_is_not_known_is_an_error(
    cache: Path, tiny_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    student = shutil.copytree(tiny_dir, tmp_path / "student")
    config = json.loads((student / "config.json").read_text())
    (student / "config.json").write_text(json.dumps({**config, "model_type": "mistral"}))
    words = ["equal-flops", cache, "--student", student, "--teacher", tiny_dir, *SIZE[2:], "--budgets", "4e9"]
    code, _, said = run([*map(str, words), "--out", str(tmp_path / "out")], capsys)
    assert code == 2
    assert "model_type 'mistral' has no formula" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_two_runs_agree_on_every_flop_also_if_one_was_killed(
    cache: Path, tiny_dir: Path, problems: Path, tmp_path: Path
) -> None:
    killed = tmp_path / "killed"
    words = whole(cache, tiny_dir, problems, killed)
    process = subprocess.Popen([sys.executable, "-m", "trainer.cli", *words], stderr=subprocess.DEVNULL)
    under_way = killed / "runs" / "teacher-mixed-0.5-1" / "metrics.jsonl"
    while process.poll() is None and not (under_way.exists() and under_way.read_bytes().count(b"\n") >= 3):
        time.sleep(0.002)
    process.kill()
    process.wait()
    kept = (killed / "runs" / "teacher-mixed-0.5-0" / "result.json").stat().st_mtime_ns
    assert list(under_way.parent.glob("checkpoints/step-*"))
    outs = (killed, tmp_path / "whole")
    for out in outs:
        done = trainer(*whole(cache, tiny_dir, problems, out))
        assert done.returncode == 0, done.stderr
    assert (killed / "runs" / "teacher-mixed-0.5-0" / "result.json").stat().st_mtime_ns == kept
    assert list(killed.glob("runs/*/checkpoints")) == []
    one, other = (json.loads((out / "equal_flops.json").read_text()) for out in outs)
    assert without_clocks(one) == without_clocks(other)
    for ledger in sorted((killed / "runs").glob("*/ledger.json")):
        assert ledger.read_bytes() == (tmp_path / "whole" / ledger.relative_to(killed)).read_bytes()
    check_report(one, killed)
    priced = trainer(*whole(cache, tiny_dir, problems, killed), "--price-per-hour", "3600")
    assert priced.returncode == 0, priced.stderr
    told = json.loads(priced.stdout)
    assert without_clocks(told) == without_clocks(one) | {"price_per_hour": 3600}
    points = [point for curve in told["curves"] for point in curve["points"]]
    assert [point["money"] for point in points] == pytest.approx([point["seconds"] for point in points])
    assert "| money |" in (killed / "equal_flops.md").read_text()
    another = trainer(*whole(cache, tiny_dir, problems, killed), "--students", "3")
    assert another.returncode == 2
    assert "study.students: 10 there, 3 asked" in another.stderr


def check_report(report: dict[str, Any], out: Path) -> None:
    share = -(-sum(report["cache"]["flops"].values()) // 10)
    assert [(run["prefix"], run["divergence"], run["seed"]) for run in report["runs"]] == [
        (prefix, "mixed-0.5", seed) for prefix in ("teacher", "student") for seed in (0, 1)
    ]
    for run in report["runs"]:
        name = f"{run['prefix']}-{run['divergence']}-{run['seed']}"
        ledger = FlopLedger.from_json(json.loads((out / "runs" / name / "ledger.json").read_text())["rows"])
        assert ledger.marginal() == run["spent_flops"] <= BUDGETS[-1]
        parts = {2 * 10**9, *BUDGETS}
        left = {budget - share for budget in BUDGETS if budget > share} if run["prefix"] == "teacher" else set()
        assert [point["flops"] for point in run["points"]] == sorted(parts | left)
        assert all(point["spent_flops"] <= point["flops"] for point in run["points"])
        assert run["points"][-1]["steps"] == run["steps"] >= 1
        assert 0 <= run["points"][-1]["avg_at_2"] <= 1
    for curve in report["curves"]:
        runs = [r for r in report["runs"] if (r["prefix"], r["divergence"]) == (curve["prefix"], curve["divergence"])]
        assert curve["share_flops"] == (share if curve["prefix"] == "teacher" else 0)
        for number, point in enumerate(curve["points"]):
            values = [run["points"][number]["forward_kl_nats"] for run in runs]
            assert point["forward_kl_nats"]["mean"] == pytest.approx(sum(values) / 2)
            assert point["amortised_flops"] == point["flops"] + curve["share_flops"]
    assert len(report["crossings"]) == 3 * 2  # measures, marginal and amortised
    text = (out / "equal_flops.md").read_text()
    assert all(cell in text for cell in ("teacher mixed-0.5", "student mixed-0.5", "Avg@2", "amortised/10"))
    assert (out / "equal_flops.png").read_bytes().startswith(b"\x89PNG")


def test_a_plan_says_what_it_comes_to_and_leaves_nothing(
    cache: Path, tiny_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    words = command(cache, tiny_dir, "--budgets", "4e9", "8e9", "--plan", "--flops-per-second", "1e9", "--out", out)
    code, answered, said = run([*words, "--json"], capsys)
    assert code == 0, said
    plan = json.loads(answered)
    assert (plan["runs"], plan["flops"], plan["hours"]) == (8, 8 * BUDGETS[1], 8 * BUDGETS[1] / 1e9 / 3600)
    assert [row["budget"] for row in plan["budgets"]] == [BUDGETS[0]] * 2 + [BUDGETS[1]] * 2
    assert not out.exists()
    assert "8 runs" in run(words, capsys)[1]
