"""The report of a study at equal FLOPs, from made-up runs: what its tables say, and what they leave out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from trainer.budget_report import budgets_table, crossings_table, draw, facts, summary
from trainer.planning.study import Study, prefix_name

START = {"forward_kl_nats": 1.0, "student_entropy_nats": 2.0}


def run(share: float, seed: int, values: tuple[float, float], joules: float | None) -> dict[str, Any]:
    points = [
        {
            "flops": flops,
            "spent_flops": flops,
            "steps": 1,
            "seconds": 7200.0,
            "joules": joules,
            "forward_kl_nats": value,
        }
        for flops, value in zip((50, 100), values, strict=True)
    ]
    return {
        "prefix": prefix_name(share),
        "student_share": share,
        "divergence": "forward",
        "seed": seed,
        "points": points,
    }


def report(study: Study, values: dict[tuple[float, int], tuple[float, float]], joules: float | None) -> dict[str, Any]:
    runs = [run(*cell, found, joules) for cell, found in values.items()]
    return {
        "config": {"study": study.deciding, "questions": None},
        "cache": {"completion_tokens": 9, "teacher": "tiny"},
        "device": "none",
        "commit": "0",
        "start": START,
        **summary(runs, START, study, build_flops=0),
    }


@pytest.mark.parametrize(("joules", "price"), [(None, None), (30.0, None), (None, 0.5), (30.0, 0.5)])
def test_energy_and_money_are_shown_where_they_are_known(joules: float | None, price: float | None) -> None:
    study = Study(budgets=(100,), parts=2, seeds=(0,), price_per_hour=price)
    found = report(study, {(0.0, 0): (0.6, 0.4), (1.0, 0): (0.5, 0.3)}, joules)
    header, rows = budgets_table(found)
    shown = [dict(zip(header, row, strict=True)) for row in rows]
    assert [row["seconds"] for row in shown] == ["7200.0"] * 2
    assert [row.get("joules") for row in shown] == [None if joules is None else "30"] * 2
    assert [row.get("money") for row in shown] == [None if price is None else "1"] * 2


def test_one_seed_has_no_interval_and_says_so() -> None:
    values = {(0.0, 0): (0.6, 0.4), (1.0, 0): (0.5, 0.3)}
    (told, *_) = facts(report(Study(budgets=(100,), parts=2, seeds=(0,)), values, None))
    assert told == "One seed; KL in nats per held-out token"
    values |= {(0.0, 1): (0.6, 0.4), (1.0, 1): (0.5, 0.3)}
    (told, *_) = facts(report(Study(budgets=(100,), parts=2, seeds=(0, 1)), values, None))
    assert told.startswith("Means over 2 seeds, ±")


def test_seeds_that_do_not_cross_are_a_dash_or_none() -> None:
    study = Study(budgets=(100,), parts=2, seeds=(0, 1), students=1)
    apart = {(0.0, 0): (0.6, 0.4), (0.0, 1): (0.6, 0.4), (1.0, 0): (0.5, 0.3), (1.0, 1): (0.5, 0.3)}
    assert crossings_table(report(study, apart, None))[1][0][-2:] == ["none within the budget", "-"]
    _, rows = crossings_table(report(study, apart | {(1.0, 1): (0.5, 0.5)}, None))
    assert rows[0][-1].startswith("none; ")


def test_mixed_prefixes_are_a_cell_of_their_own(tmp_path: Path) -> None:
    study = Study(budgets=(100,), parts=2, seeds=(0,), student_shares=(0.0, 0.25, 1.0), students=2)
    values = {(share, 0): (0.6, 0.4) for share in study.student_shares}
    found = report(study, values, None)
    assert [curve["prefix"] for curve in found["curves"]] == ["teacher", "mixed-0.25", "student"]
    assert [row[2] for row in crossings_table(found)[1]][:1] == ["teacher forward and mixed-0.25 forward"]
    draw(found, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
