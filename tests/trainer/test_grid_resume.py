"""A grid that is killed and started again reports what one that never was reports."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.trainer.test_commands import SIZE, built, trainer

TIMES = {"run_s", "seconds", "tokens_per_s", "step_s", "draw_s"}


@pytest.fixture(scope="module")
def cache(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built(tmp_path_factory.mktemp("cache"), tiny_dir, "hidden")


def grid(cache: Path, model: Path, out: Path, *more: str) -> list[str]:
    options = ["--student", str(model), "--teacher", str(model), "--out", str(out), *SIZE[2:]]
    options += ["--steps", "24", "--checkpoint-every", "2"]  # enough that the kill finds the cell under way
    return ["grid", str(cache), *options, "--json", *more]


def without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: without_times(item) for name, item in value.items() if name not in TIMES}
    return [without_times(item) for item in value] if isinstance(value, list) else value


def metrics(cell: Path) -> list[Any]:
    return [without_times(json.loads(line)) for line in (cell / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_a_killed_grid_goes_on_to_the_same_report(cache: Path, tiny_dir: Path, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    done = trainer(*grid(cache, tiny_dir, whole))
    assert done.returncode == 0, done.stderr
    first = killed / "cells" / "teacher-forward" / "result.json"
    for cell in ("teacher-forward", "student-forward"):
        command = [sys.executable, "-m", "trainer.cli", *grid(cache, tiny_dir, killed)]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        log = killed / "cells" / cell / "metrics.jsonl"
        while process.poll() is None and not (log.exists() and log.read_bytes().count(b"\n") >= 3):
            time.sleep(0.002)
        process.kill()
        assert process.wait() == -signal.SIGKILL
        assert list((killed / "cells" / cell / "checkpoints").glob("step-*")) != []
    kept = first.stat().st_mtime_ns

    another = trainer(*grid(cache, tiny_dir, killed, "--seed", "1"))
    assert another.returncode == 2
    assert "training.seed: 0 there, 1 asked" in another.stderr

    done = trainer(*grid(cache, tiny_dir, killed))
    assert done.returncode == 0, done.stderr
    assert first.stat().st_mtime_ns == kept
    reports = [json.loads((out / "report.json").read_text()) for out in (whole, killed)]
    assert without_times(reports[0]) == without_times(reports[1])
    for one in (whole / "cells").iterdir():
        other = killed / "cells" / one.name
        assert metrics(one) == metrics(other), one.name
        assert (one / "ledger.json").read_bytes() == (other / "ledger.json").read_bytes()
    assert list(killed.glob("cells/*/checkpoints")) == []

    again = trainer(*grid(cache, tiny_dir, killed))
    assert json.loads(again.stdout) == reports[1]
    assert "is done already" in again.stderr
