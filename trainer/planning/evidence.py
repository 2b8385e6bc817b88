"""What this repository's own equal-FLOP study found of who should write, beside the paper's findings.

Guarantees: every figure is of `tools/studies/results/equal_flops_study.json`, of which `python -m tools.render` puts a
part beside this module. It is of arithmetic and of tiny models: a lead, and no more.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

from trainer.report import flop_text
from trainer.settings import Prefix

STUDY_RESULTS = "tools/studies/results/equal_flops_study.json"
"""Where the figures are from, in the repository."""
STUDY = "equal_flops.json"
"""Where they are here."""


def at_equal_flops(prefix: Prefix, divergence: str) -> str:
    """Both prefixes' Avg@k at the study's middle budget, and whether they speak for this one."""
    found = json.loads(files(__package__).joinpath(STUDY).read_text())
    budget = found["budgets"][len(found["budgets"]) // 2]
    scores = {each: budget["cells"][f"{each} {divergence}"] for each in (Prefix.TEACHER, Prefix.STUDENT)}
    told = ", ".join(f"{_estimate(score)} on {each} prefixes" for each, score in scores.items())
    best = max(scores, key=lambda each: float(scores[each]["mean"]))
    way = "the same way" if best is prefix else "the other way"
    measure = found["measure"].replace("avg_at_", "Avg@")
    return (
        f"here, at equal FLOPs: {measure} {told} ({divergence} KL, {flop_text(budget['flops'])}, without "
        f"the build; arithmetic, tiny models), which points {way}"
    )


def _estimate(value: Mapping[str, Any]) -> str:
    return f"{value['mean']:.3f} ± {value['high'] - value['mean']:.3f}"
