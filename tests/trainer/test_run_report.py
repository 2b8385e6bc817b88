"""A report of runs shows what their metrics say, also of a run that goes on, and keeps coarse numbers apart."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from logitcache.errors import UserError
from trainer.recipes.report import read_run, run_facts, run_report, runs_table


def line(step: int, **more: Any) -> dict[str, Any]:
    common = {"step": step, "completion_tokens": 100, "step_s": 0.5, "draw_s": 0.005, "flops": (step + 1) * 10**12}
    return {**common, "loss_nats": 2.0 / (step + 1), "student_entropy_nats": 1.5, **more}


def write(
    directory: Path, lines: list[dict[str, Any]], *, steps: int = 4, result: dict[str, Any] | None = None
) -> Path:
    directory.mkdir(parents=True)
    (directory / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    (directory / "config.json").write_text(json.dumps({"training": {"steps": steps}}))
    if result:
        (directory / "result.json").write_text(json.dumps(result))
    return directory


def exact(step: int) -> dict[str, Any]:
    return line(step, forward_kl_nats=2.0 / (step + 1), reverse_kl_nats=None if step else 3.0)


def inexact(step: int, ending: str) -> dict[str, Any]:
    return line(step, **{f"forward_kl_nats_{ending}": 1.0, f"reverse_kl_nats_{ending}": 0.5})


def test_no_metrics_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no metrics\.jsonl"):
        run_report([tmp_path], tmp_path / "report")
    (tmp_path / "metrics.jsonl").touch()
    with pytest.raises(UserError, match="none of them has finished a step"):
        run_report([tmp_path], tmp_path / "report")
    assert not (tmp_path / "report.md").exists()


@pytest.mark.parametrize("bad", ["{", "3", "null", "{}", '{"step": "x", "step_s": 1, "completion_tokens": 2}'])
def test_a_damaged_line_in_the_middle_is_named(bad: str, tmp_path: Path) -> None:
    run = write(tmp_path / "run", [exact(0), exact(1)])
    good = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text("\n".join([good[0], bad, good[1], ""]))
    with pytest.raises(UserError, match=r"line 2 of .*metrics\.jsonl"):
        read_run(run)


@pytest.mark.parametrize("rest", ['{"step": 2, "loss_na', "\x00\x00", '{"step": 2}'])
def test_a_run_going_on_is_shown_as_far_as_it_came(rest: str, tmp_path: Path) -> None:
    run = write(tmp_path / "run", [exact(0), exact(1)])
    with (run / "metrics.jsonl").open("a") as metrics:
        metrics.write(rest)
    log = read_run(run)
    assert [one["step"] for one in log.lines] == [0, 1]
    header, (cells,) = runs_table([run_facts(log)])
    row = dict(zip(header, cells, strict=True))
    assert row["steps"] == "2 of 4"
    assert (row["loss"], row["tokens/s"], row["data wait"], row["FLOPs"]) == ("1.5", "200", "1.0%", "2 TFLOP")
    assert row["reverse KL"] == "3"  # what is null stays out of the mean


def test_time_energy_and_money_stand_beside_flops(tmp_path: Path) -> None:
    log = read_run(write(tmp_path / "run", [exact(0), exact(1)], result={"joules": 1234.4}))
    facts = run_facts(log, price_per_hour=7200.0)
    assert facts["money"] == 2 * facts["seconds"] == 2 * sum(line["step_s"] for line in log.lines)
    header, (cells,) = runs_table([facts])
    assert dict(zip(header, cells, strict=True))["joules"] == "1234"
    assert "money" not in runs_table([run_facts(log)])[0]
    with pytest.raises(UserError, match="--price-per-hour, 0 or more"):
        run_report([tmp_path / "run"], tmp_path / "report", price_per_hour=-1.0)


@pytest.mark.parametrize("ending", ["coarse", "sampled"])
def test_inexact_and_exact_numbers_never_share_a_column(ending: str, tmp_path: Path) -> None:
    held_out = {"held_out": {"forward_kl_nats": {"before": 2.0, "after": 1.0}}}
    logs = [
        read_run(write(tmp_path / "exact", [exact(step) for step in range(4)], result=held_out)),
        read_run(write(tmp_path / "inexact", [inexact(step, ending) for step in range(4)])),
    ]
    header, rows = runs_table([run_facts(log) for log in logs])
    for title in ("loss", "forward KL", "reverse KL"):
        assert [row[header.index(title)] == "" for row in rows] == [False, True]
        assert [row[header.index(f"{title} ({ending})")] == "" for row in rows] == [True, False]
    assert rows[0][header.index("held-out forward KL")] == "2.000 -> 1.000"
    assert "window" not in header


def test_a_grid_stands_for_its_cells_and_both_files_are_written(tmp_path: Path) -> None:
    checked = {"window": 128, "own_entropy_nats": 1.2, "own_eos_mass": 0.01, "own_truncated_share": 0.5}
    lines = [{**exact(step), **(checked if step % 2 == 0 else {})} for step in range(4)]
    for cell in ("teacher-forward", "student-reverse"):
        write(tmp_path / "grid" / "cells" / cell, lines)
    alone = write(tmp_path / "alone", [inexact(0, "coarse")])
    report = run_report([tmp_path / "grid", alone], tmp_path / "report")
    assert [row["run"] for row in report["runs"]] == ["student-reverse", "teacher-forward", "alone"]
    markdown = (tmp_path / "report.md").read_text()
    assert "| student-reverse | 4 |" in markdown
    assert "![curves](report.png)" in markdown
    assert report["table"].splitlines()[0].startswith("run ")
    assert (tmp_path / "report.png").stat().st_size > 20_000
