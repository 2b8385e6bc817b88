"""Tables and plot say what the report's JSON says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from trainer.report import markdown, table, write_report

PHASES = (
    "teacher_decode", "teacher_prefill", "student_rollout", "student_forward", "student_backward",
    "head_reprojection", "evaluation",
)  # fmt: skip


def cell(prefix: str, divergence: str, marginal: int) -> dict[str, Any]:
    names = ("forward_kl_nats", "reverse_kl_nats", "student_entropy_nats", "teacher_entropy_nats")
    by_phase = dict.fromkeys(PHASES, 0) | {"student_forward": marginal}
    return {
        "prefix": prefix,
        "divergence": divergence,
        "held_out": {name: {"before": 2.5, "after": 1.25} for name in names},
        "flops": {
            "by_phase": by_phase,
            "marginal": marginal,
            "amortised": marginal + 10**12,
            "amortised_over_students": 10,
        },
        "tokens_per_s": 123.4,
        "seconds": 5.06,
    }


@pytest.fixture
def report() -> dict[str, Any]:
    return {
        "run_s": 61.0,
        "device": "a processor, 2 threads",
        "commit": None,
        "cache": {"completion_tokens": 640, "teacher": "A", "flops": {"generate": 8e12, "score": 2e12}},
        "student": {"parameters": 71_000_000},
        "held_out": {"sequences": 3, "tokens": 96, "teacher_entropy_nats": 1.5},
        "cells": [cell("teacher", "forward", 3 * 10**12), cell("student", "reverse", 4_500_000)],
    }


def test_the_table_shows_each_cell(report: dict[str, Any]) -> None:
    lines = table(report).splitlines()
    assert lines[0].split()[:2] == ["prefix", "divergence"]
    assert lines[2].split()[:2] == ["teacher", "forward"]
    assert "2.500 -> 1.250" in lines[2]
    assert "3 TFLOP" in lines[2]
    assert "4 TFLOP" in lines[2]
    assert "4.5 MFLOP" in lines[3]
    assert "123" in lines[2]
    assert any("96 held-out completion tokens" in line for line in lines)


def test_the_build_has_a_row_of_its_own(report: dict[str, Any]) -> None:
    (row,) = [line for line in markdown(report).splitlines() if line.startswith("| cache |")]
    assert row.split(" | ")[2:4] == ["8 TFLOP", "2 TFLOP"]


def test_all_three_files_are_written(report: dict[str, Any], tmp_path: Path) -> None:
    write_report(report, tmp_path)
    assert json.loads((tmp_path / "report.json").read_text()) == report
    assert (tmp_path / "report.md").read_text() == markdown(report)
    assert (tmp_path / "report.png").stat().st_size > 5000
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.json", "report.md", "report.png"]
