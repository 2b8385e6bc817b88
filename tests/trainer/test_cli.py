"""What the `trainer` command says of what it is given, on a real cache of a tiny teacher."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from logitcache.console import run_command
from logitcache.errors import UserError
from logitcache.jobs import BuildRequest, build_cache
from logitcache.prompts import PromptStyle
from logitcache.scoring import Sampling
from trainer.benchmarks import load_benchmark
from trainer.cli import app
from trainer.runs import open_run


def run(capsys: pytest.CaptureFixture[str], *words: str | Path) -> tuple[int, str, str]:
    capsys.readouterr()
    code = run_command(app, [str(word) for word in words], after_interrupt="")
    said = capsys.readouterr()
    return code, said.out, said.err


def test_reverse_kl_from_top_k_is_trained_with_a_warning(
    tiny_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    problems = tmp_path / "problems.jsonl"
    problems.write_text("".join(json.dumps({"problem": f"What is {n} + {n}?"}) + "\n" for n in range(12)))
    places = {"problems": str(problems), "out": str(tmp_path / "cache"), "teacher": str(tiny_dir)}
    request = BuildRequest(**places, targets="topk:k=8", dtype="float32")
    build_cache(request, sampling=Sampling(max_new_tokens=8), style=PromptStyle())
    small = ["--steps", "1", "--warmup-steps", "1", "--sequences", "2", "--window", "8", "--held-out-share", "0.4"]
    words = ["distill", tmp_path / "cache", "--student", tiny_dir, *small, "--json", "--out"]
    code, said, err = run(capsys, *words, tmp_path / "run", "--forward-weight", "0")
    assert code == 0, err
    assert json.loads(said)["out"] == str(tmp_path / "run")
    assert "warning: reverse KL of top-k targets" in err
    code, _, err = run(capsys, *words, problems, "--forward-weight", "1")  # as far as its --out, which is a file
    assert code == 2
    assert "targets: tier topk" in err
    assert "warning" not in err


def test_advice_for_models_of_other_vocabularies_is_given_with_a_warning(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, "advise", "rl", "--student", "embedded", "--teacher", "Qwen/Qwen3-4B")
    assert code == 0
    assert err.startswith("warning: the student's head has 49,152 rows, the teacher's 151,936; ")
    assert run(capsys, "advise", "rl", "--student", "Qwen3-0.6B", "--teacher", "Qwen3-4B")[2] == ""


@pytest.mark.parametrize("options", [[], ["--budget", "1e18", "--student-share", "0.5", "--budgets", "1e18", "2e19"]])
def test_a_plan_fits_a_screen(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    said = run(capsys, "plan", *options, "--flops-per-second", "4e14", "--price-per-hour", "2")[1]
    assert max(len(line) for line in said.splitlines()) <= 100
    assert "teacher decode" not in said  # nothing is decoded in a step


def test_every_difference_from_the_run_that_is_there_is_named(tmp_path: Path) -> None:
    config = {"cache_manifest": "a", "training": {"seed": 0, "learning_rate": 0.1}}
    open_run(tmp_path / "run", config)
    with pytest.raises(UserError) as refused:
        open_run(tmp_path / "run", {"cache_manifest": "b", "training": {"seed": 1, "learning_rate": 0.2}})
    for found in ('cache_manifest: "a" there, "b" asked,', "0.1 there, 0.2 asked (--learning-rate)", "(--seed)"):
        assert found in str(refused.value)


def test_a_file_where_a_run_should_go_is_called_one(tmp_path: Path) -> None:
    (tmp_path / "x.txt").touch()
    with pytest.raises(UserError, match="it is a file"):
        open_run(tmp_path / "x.txt", {})


def test_a_set_without_any_answers_is_told_from_one_with_gaps(tmp_path: Path) -> None:
    rows = [{"id": name, "problem": f"{name}?", "answer": ""} for name in "ab"]
    (tmp_path / "set.json").write_text(json.dumps(rows))
    with pytest.raises(UserError, match="no problem has one; give each its own in a column `answer`"):
        load_benchmark(str(tmp_path / "set.json"))
    (tmp_path / "set.json").write_text(json.dumps([{**rows[0], "answer": "1"}, rows[1]]))
    with pytest.raises(UserError, match="missing for 1"):
        load_benchmark(str(tmp_path / "set.json"))


@pytest.fixture
def a_run(tmp_path: Path) -> Path:
    """Two steps of four."""
    line = {"step": 0, "completion_tokens": 100, "step_s": 0.5, "draw_s": 0.005, "flops": 7, "loss_nats_coarse": 2.0}
    directory = tmp_path / "run"
    directory.mkdir()
    (directory / "metrics.jsonl").write_text("".join(json.dumps({**line, "step": step}) + "\n" for step in range(2)))
    (directory / "config.json").write_text(json.dumps({"training": {"steps": 4}}))
    return directory


def test_a_report_in_json_holds_numbers_with_their_units(
    a_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, said, _ = run(capsys, "report", a_run, "--out", tmp_path / "compared", "--json")
    assert code == 0
    (found,) = json.loads(said)["runs"]
    assert (found["steps"], found["steps_planned"], found["flops"]) == (2, 4, 7)
    assert found["last_steps"] == {"loss_nats_coarse": 2.0}
    assert (found["tokens_per_s"], found["data_wait_share"], found["window"]) == (200.0, 0.01, None)


def test_a_report_where_nothing_can_be_written_is_one_line(
    a_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, said, err = run(capsys, "report", a_run, "--out", tmp_path / "nowhere" / "compared")
    assert (code, said) == (2, "")
    assert err.startswith("error: ")
    assert "compared.md: it cannot be written" in err
