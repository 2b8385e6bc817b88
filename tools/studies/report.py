"""docs/results.md and its plots, from the kept JSON of the studies alone.

    python -m tools.studies.report        render again, without running anything

Guarantees: every figure in the document is in `tools/studies/results`, but the two of how the start was chosen, which
are docs/log.md's; a verdict is `tools.studies.claims`'s rule.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from statistics import fmean
from typing import Any

from tools.studies.claims import CLAIMS, PREFIXES, Results, cell, verdict
from tools.studies.study import CORNERS, WINDOWS, Distilled, Rewarded, Run, Size, Window
from trainer.curriculum import Decision
from trainer.curves import Estimate
from trainer.report import COLOURS, flop_text, markdown_table, new_figure
from trainer.settings import Prefix

STUDIES = ("cells", "mixes", "curriculum", "grpo")
RESULTS = Path(__file__).parent / "results"
DOCS = Path(__file__).parents[2] / "docs"
_FIGURES = {"avg_at_8": "Avg@8", "pass_at_8": "Pass@8", "entropy_nats": "entropy, nats", "length_tokens": "tokens"}
_NAMES = {1.0: "forward", 0.0: "reverse"}


def read_results(folder: Path) -> tuple[Results, dict[str, Any]]:
    """All studies as one, and where they were run."""
    kept = [json.loads((folder / f"{study}.json").read_text()) for study in STUDIES]
    config = kept[0]["config"]
    size = Size(**{field.name: _frozen(config[field.name]) for field in fields(Size) if field.name in config})
    runs = {name: run for one in kept for name, run in one["figures"]["runs"].items()}
    return Results(size=size, start=kept[0]["figures"]["start"], runs=runs), kept[0]


def write_report(folder: Path, docs: Path) -> None:
    """`results.md`, `results_cells.png` and `results_grpo.png` into `docs`."""
    results, about = read_results(folder)
    windows = [cell(p, w, Window.LONG, 0) for p in PREFIXES for w in CORNERS]
    gated = Distilled(prefix=Prefix.STUDENT, forward_weight=0.0, window=Window.CURRICULUM, seed=0)
    _draw(results, [*windows, gated], docs / "results_cells.png")
    _draw(results, [Rewarded(start=one) for one in windows], docs / "results_grpo.png")
    (docs / "results.md").write_text(markdown(results, about))


def markdown(results: Results, about: dict[str, Any]) -> str:
    """The document."""
    return _DOCUMENT.format(
        goals=_goals(about),
        claims=_claims(results),
        start=_start(results),
        cells=_runs(results, [cell(p, w, window, 0) for window in WINDOWS for p in PREFIXES for w in CORNERS]),
        mixes=_runs(results, [cell(Prefix.STUDENT, weight, Window.LONG, 0) for weight in results.size.mixes]),
        curriculum=_runs(results, [cell(Prefix.STUDENT, 0.0, w, 0) for w in (Window.LONG, Window.CURRICULUM)]),
        floor=_floor(results.size.floor),
        windows=_reached(results),
        gate=gate_text(results),
        grpo=_runs(results, [Rewarded(start=cell(p, w, Window.LONG, 0)) for p in PREFIXES for w in CORNERS]),
        seeds=len(results.size.seeds),
        size=results.size,
        where=f"{about['device']}; commit {about['commit']}",
    )


_DOCUMENT = """# The laptop-scale study

What arXiv 2605.16826 claims, tried in a world small enough for two CPU cores. Written by `python -m tools.studies.grid`
from `tools/studies/results/*.json`, not by hand. {where}.

The world (`tools/studies/world.py`): sums of two-digit numbers, three terms (easy) or five (hard), worked step by step;
each step is written in one of two styles, by a coin. The teacher is a Qwen3 of 3.2 million parameters; the student has
0.6 million and was stopped early in its training. Every figure is a mean over easy and hard, unless it says which, over
{size.exam} held-out problems of each with 8 answers, and over seeds ({seeds}). A range is a 95% interval over seeds
(Student's t). Sampling is the paper's: temperature 1, top-p 0.95.

{goals}

The start was chosen: students end near 50% whatever they start from; from a later checkpoint (31%) the best cell gained
21 points, short of the goal ([log.md](log.md)).

## Claim by claim

A claim agrees if the interval of the stated difference lies above 0, does not if it lies below, else it cannot be told.
The paper's numbers are of other models and problems: their sign is what is compared.

{claims}

What this cannot show: 16 tokens are half an easy answer here, and a sliver of one in the paper; the teacher is five
times the student, not seven to thirteen; few seeds make wide intervals, which say nothing of other worlds.

## Before

{start}

## The four cells

{size.steps} steps of {size.sequences} sequences, on windows of 16 (short) and 96 (long) completion tokens. FLOPs are
marginal: of training, rollouts and live scoring, without the cache's build and without measuring.

{cells}

![the four cells on long windows, and the curriculum](results_cells.png)

## Mixes

Forward weight, on student prefixes and long windows.

{mixes}

## The curriculum

On student prefixes with reverse KL: ladder 16, 32, 64, 96, a check every {size.check_every} steps. The floor is
{floor}. {gate}

{curriculum}

{windows}

## GRPO

{size.grpo_steps} steps of {size.grpo_prompts} problems with {size.grpo_group} answers each, rewarded by exact match,
from each cell on long windows. Its answers are drawn with top-p {size.grpo_top_p:g}.

{grpo}

![GRPO from the four cells](results_grpo.png)

## At equal FLOPs

The four cells and two mixes, each trained until a budget is spent; [equal_flops.md](equal_flops.md) has the figures,
and says what is equal. In this world:

![quality over FLOPs in this world](equal_flops_study.png)

On DeepScaleR, with SmolLM2 and its pruned student:

![quality over FLOPs on DeepScaleR](equal_flops_smollm2.png)
"""


def _goals(about: dict[str, Any]) -> str:
    gain, *others = about["goals"]
    lines = [_goal(gain, " from this start"), *(_goal(goal) for goal in others)]
    return "\n\n".join(lines)


def _goal(goal: dict[str, Any], how: str = "") -> str:
    reached = f"reached{how}" if goal["holds"] else "**not reached**"
    return f"Goal: {goal['what']}: {goal['goal']}; measured {goal['measured']:.3g}, {reached}."


def _claims(results: Results) -> str:
    rows = []
    for claim in CLAIMS:
        found = claim.estimate(results)
        rows.append([claim.words, claim.paper, f"{_estimate(found)} {claim.unit}", verdict(found)])
    return markdown_table(["claim", "the paper", "difference here", "verdict"], rows)


def _estimate(found: Estimate) -> str:
    return f"{found.mean:+.3g}" + ("" if found.low is None else f" ({found.low:+.3g} to {found.high:+.3g})")


def _start(results: Results) -> str:
    rows = [
        [model, level, *(_shown(name, figures[name]) for name in _FIGURES), f"{figures['truncated_share']:.1%}"]
        for model, levels in results.start.items()
        for level, figures in levels.items()
    ]
    return markdown_table(["", "level", *_FIGURES.values(), "truncated"], rows)


def _runs(results: Results, firsts: Sequence[Run]) -> str:
    """A row for each run, mean over seeds."""
    header = [
        "prefix",
        "forward weight",
        "window",
        "easy Avg@8",
        "hard Avg@8",
        *_FIGURES.values(),
        "truncated",
        "FLOPs",
    ]
    return markdown_table(header, [_row(results, list(_seeds(results, first))) for first in firsts])


def _row(results: Results, runs: Sequence[Run]) -> list[str]:
    start = runs[0].start if isinstance(runs[0], Rewarded) else runs[0]
    ends = [results.runs[run.name]["points"][-1] for run in runs]
    by_level = [f"{fmean(end[level]['avg_at_8'] for end in ends):.1%}" for level in ("easy", "hard")]
    means = [_shown(name, fmean(results.final(run, name) for run in runs)) for name in _FIGURES]
    truncated = fmean(results.final(run, "truncated_share") for run in runs)
    flops = flop_text(fmean(end["flops"] for end in ends))
    return [
        str(start.prefix),
        f"{start.forward_weight:g}",
        str(start.window),
        *by_level,
        *means,
        f"{truncated:.1%}",
        flops,
    ]


def _floor(floor: str) -> str:
    return f"{floor} of the entropy before the first step" if floor.endswith("%") else f"{floor} nats"


def gate_text(results: Results) -> str:
    """What the floor did, if anything."""
    closed, lowest, ramp = [], math.inf, 0
    gated = cell(Prefix.STUDENT, 0.0, Window.CURRICULUM, 0)
    for run in _seeds(results, gated):
        checks = results.runs[run.name]["checks"]
        below = [one for one in checks if one["decision"] in (Decision.HOLD, Decision.FREEZE)]
        raised = [one["step"] for one in checks if one["decision"] == Decision.RAISE]
        if below:
            seed = run.name.rpartition("-")[2]
            closed.append(f"at {below[0]['window']} tokens from step {below[0]['step']} on (seed {seed})")
        lowest = min(lowest, *(one["own_entropy_nats"] for one in checks))
        ramp = max(ramp, *raised, 0)
    if not closed:
        found = f"It was never met: the lowest entropy at a check was {lowest:.3f} nats."
        return f"{found} These rows are of a ramp of {ramp} steps, and say nothing of gating."
    return f"It held the window {'; '.join(closed)}."


def _reached(results: Results) -> str:
    """Which windows the curriculum went through, of each seed."""
    gated = cell(Prefix.STUDENT, 0.0, Window.CURRICULUM, 0)
    lines = []
    for run in _seeds(results, gated):
        checks = results.runs[run.name]["checks"]
        shown = ", ".join(f"{one['step']}: {one['window']} ({one['decision']})" for one in checks)
        lines.append(f"- seed {run.name.rpartition('-')[2]}, windows by step: {shown}")
    return "\n".join(lines)


def _seeds(results: Results, first: Run) -> Iterable[Run]:
    """The same run from each seed."""
    for seed in results.size.seeds:
        yield first.with_seed(seed)


def _shown(figure: str, value: float) -> str:
    return {"entropy_nats": f"{value:.4f}", "length_tokens": f"{value:.1f}"}.get(figure, f"{value:.1%}")


def _draw(results: Results, firsts: Sequence[Run], path: Path) -> None:
    """Four figures over steps: means over seeds, and what lies between the least and the largest."""
    figure = new_figure(12, 3.2)
    for axes, (name, title) in zip(figure.subplots(1, 4), _FIGURES.items(), strict=True):
        for first, colour in zip(firsts, COLOURS, strict=False):
            curves = [results.curve(run, name, "step") for run in _seeds(results, first)]
            values = list(zip(*(values for _, values in curves), strict=True))
            steps = curves[0][0]
            axes.plot(steps, [fmean(value) for value in values], color=colour, label=_label(first))
            axes.fill_between(steps, [min(v) for v in values], [max(v) for v in values], color=colour, alpha=0.15)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("steps")
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(firsts), frameon=False, fontsize=8)
    figure.savefig(path, dpi=80)


def _label(run: Run) -> str:
    start = run.start if isinstance(run, Rewarded) else run
    gated = ", curriculum" if start.window is Window.CURRICULUM else ""
    return f"{start.prefix} prefix, {_NAMES[start.forward_weight]}{gated}"


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


if __name__ == "__main__":
    write_report(RESULTS, DOCS)
