from __future__ import annotations

import pytest

from tools.studies.paper_flops import PAPER_TFLOPS, steps


def test_both_figures_of_the_paper_follow_from_the_configurations() -> None:
    step = steps()[0]
    assert (step["teacher"], step["completion_tokens"]) == ("4B", 128)
    ours = step["paper_tflops"]
    assert ours == pytest.approx(PAPER_TFLOPS, rel=0.02)
    assert ours["live"] / ours["cached"] == pytest.approx(83.98 / 23.19, rel=0.01)


def test_a_student_prefix_costs_more_in_either_convention() -> None:
    for step in steps():
        for convention in ("paper_tflops", "ledger_tflops"):
            assert step[convention]["live"] > 2 * step[convention]["cached"]
