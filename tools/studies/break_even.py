"""From how many students, epochs or tokens on a cache pays: Qwen3-8B to 0.6B on 40,000 problems of 4,096 tokens.

    python -m tools.studies.break_even [--quick] [--json PATH]

Counted from configurations alone, as `trainer plan` does; nothing is run. A kept result comes with its plot,
`docs/break_even.png`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tools.bench.result import RESULTS, keep, options
from trainer.planning.advice import HIDDEN, TOPK
from trainer.planning.case import Case
from trainer.planning.plan import make_plan
from trainer.planning.report import draw_break_even

CASE = Case(student="Qwen3-0.6B", teacher="Qwen3-8B", problems=40_000, completion_tokens=4096)
PLOT = Path(__file__).parents[2] / "docs" / "break_even.png"


def plan() -> dict[str, Any]:
    """Of the documented example."""
    return make_plan(CASE, (TOPK, HIDDEN))


def main() -> None:
    """Compute and keep."""
    chosen = options("break_even", __doc__)
    found = plan()
    keep(chosen, config=found.pop("case"), figures=found, goals=[])
    if chosen.json == RESULTS / "break_even.json":
        draw_break_even(found, PLOT)


if __name__ == "__main__":
    main()
