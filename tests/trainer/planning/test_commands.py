"""`trainer plan` and `trainer advise` as commands: JSON, plots, errors in one line, and no weights anywhere."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from logitcache.console import run_command
from trainer.cli import app


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = run_command(app, list(words), after_interrupt="")
    said = capsys.readouterr()
    return code, said.out, said.err


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["plan", "--teacher", "no/such-model"], "no/such-model"),
        (["plan", "--budget", "5"], "one step costs"),
        (["plan", "--tiers", "hidden", "nothing"], "'nothing'"),
        (["advise", "answer", "--budget", "1e15"], "--budget 1e+15"),
        (["plan", "--budgets", "1e18", "inf"], "--budgets, at least 1 FLOP"),
        (["plan", "--budgets", "1e18", "1e18"], "--budgets, none twice"),
        (["plan", "--plot", "/nonexistent/x.png"], "--plot, in a directory that is there"),
        (["plan", "--plot", "x.xyz"], "--plot, a file that ends in .png"),
        (["advise", "long", "--window", "64"], "over 128 tokens"),
        (["advise", "answer", "--student-share", "0.5"], "leave it out"),
    ],
)
def test_bad_input_is_one_line(words: list[str], found: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, *words)
    assert code == 2
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert found in err


def test_a_plan_in_json_and_its_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plot = tmp_path / "plot.png"
    words = ["plan", "--teacher", "Qwen3-8B", "--problems", "100", "--tiers", "topk", "hidden", "--plot", str(plot)]
    code, out, _ = run(capsys, *words, "--json")
    assert code == 0
    assert [cell["tier"] for cell in json.loads(out)["cells"]] == ["topk", "hidden", None]
    assert plot.read_bytes().startswith(b"\x89PNG")
    code, out, _ = run(capsys, *words[:-2])
    assert code == 0
    assert "student prefixes" in out


def test_a_plot_that_cannot_be_written_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "plot.png").mkdir()
    code, out, err = run(capsys, "plan", "--plot", str(tmp_path / "plot.png"))
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "it cannot be written" in err


def test_advice_in_words_and_in_json(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "advise", "compute", "--have", "cache", "--cache", "runs/mine")
    assert code == 0
    code, told, _ = run(capsys, "advise", "compute", "--have", "cache", "--cache", "runs/mine", "--json")
    assert code == 0
    (command,) = json.loads(told)["commands"]
    assert command.startswith("trainer distill runs/mine ")
    assert out.splitlines()[-1] == command


@pytest.mark.parametrize("command", ["plan", "advise"])
def test_help_says_what_it_costs_and_gives_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, command, "--help")
    words = " ".join(out.split())
    assert code == 0
    assert "Costs" in words
    assert f"Example: trainer {command}" in words


def test_planning_loads_no_torch() -> None:
    code = "import sys, trainer.planning.advice, trainer.planning.report; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
