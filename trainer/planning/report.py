"""A plan for the screen, and the break-even plot."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer.planning.costs import Instead
from trainer.planning.storage import PEAKED, PLAIN
from trainer.report import COLOURS, flop_text, new_figure, text_table
from trainer.settings import Prefix

BREAK_EVEN_HEADER = ["tier", "there already", "instead of", "students x epochs", "tokens", "epochs each", "students"]


def plan_text(plan: Mapping[str, Any]) -> str:
    """All tables of a plan."""
    budget = plan["case"]["budget"] is not None
    sections = [text_table(*_cells(plan["cells"], plan["case"]))]
    if budget:
        sections.append(f"steps: what {flop_text(plan['case']['budget'])} pay for; after the share of the build in ()")
    if plan["budgets"]:
        sections.append(text_table(*_budgets(plan["budgets"])))
    sections += [text_table(*_storage(plan["storage"])), text_table(BREAK_EVEN_HEADER, break_even_rows(plan))]
    return "\n\n".join(sections)


def study_text(plan: Mapping[str, Any]) -> str:
    """What an equal-FLOP study will come to."""
    points = ", ".join(f"{len(points)} on {prefix} prefixes" for prefix, points in plan["measured_at"].items())
    lines = [f"{plan['runs']} runs, {flop_text(plan['flops'])} of training in all; points measured in each: {points}"]
    if plan["hours"] is not None:
        lines.append(f"{plan['hours']:.3g} hours without measuring")
    if plan["money"] is not None:
        lines.append(f"{plan['money']:.2f} in money")
    return "\n".join([text_table(*_budgets(plan["budgets"])), "", *lines])


def break_even_rows(plan: Mapping[str, Any]) -> list[list[str]]:
    """A row for each comparison: from how many passes, tokens and students on building pays."""
    return [
        [
            point["tier"],
            point["have"],
            point["instead"],
            f"{point['passes']:.3g}",
            f"{point['trained_tokens']:.3g}",
            f"{point['epochs_per_student']:.3g}",
            str(point["students"]),
        ]
        for point in plan["break_even"]
    ]


def _cells(cells: list[dict[str, Any]], case: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    phases = [name for name in cells[0]["step"] if any(cell["step"][name] for cell in cells)]
    timed, priced = case["flops_per_second"] is not None, case["price_per_hour"] is not None
    header = ["prefix", "tier", *(name.replace("_", " ") for name in phases), "a step", "steps", "trajectories"]
    header += ["build", "marginal", f"amortised/{case['students']}", *["hours"] * timed, *["money"] * priced]
    rows = []
    for cell in cells:
        steps = str(cell["steps"])
        if cell["amortised_steps"] != cell["steps"]:
            steps += f" ({cell['amortised_steps']})"
        row = [cell["prefix"], cell["tier"] or "live", *(flop_text(cell["step"][name]) for name in phases)]
        row += [flop_text(cell["step_flops"]), steps, str(cell["trajectories"])]
        row += [flop_text(flops) for flops in (sum(cell["build"].values()), cell["marginal"], cell["amortised"])]
        row += [f"{cell['amortised_s'] / 3600:.3g}"] if timed else []
        rows.append([*row, f"{cell['amortised_money']:.2f}"] if priced else row)
    return header, rows


def _budgets(rows: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    header = ["budget", "prefix", "tier", "steps", "after the share of the build", "epochs"]
    table = []
    for row in rows:
        steps = [str(row["steps"]), str(row["amortised_steps"]), f"{row['epochs']:.3g}"]
        table.append([flop_text(row["budget"]), row["prefix"], row["tier"] or "live", *steps])
    if rows[0]["run_s"] is not None:
        header.append("hours")
        table = [[*cells, f"{row['run_s'] / 3600:.3g}"] for cells, row in zip(table, rows, strict=True)]
    return header, table


def _storage(tiers: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    header = ["tier", "bytes a token", "if the teacher is sure", "whole tier", "if sure", "from"]
    return header, [
        [
            tier["tier"],
            *(_measured(tier["bytes_per_token"][name], "{:.3g}") for name in (PLAIN, PEAKED)),
            *(_measured(tier["bytes"][name], "{:.3g} GB", 1e9) for name in (PLAIN, PEAKED)),
            tier["basis"],
        ]
        for tier in tiers
    ]


def _measured(value: float | None, form: str, unit: float = 1.0) -> str:
    return "not measured" if value is None else form.format(value / unit)


def draw_break_even(plan: Mapping[str, Any], path: Path) -> None:
    """Each student's FLOPs against how many share the cache, for every tier, beside student prefixes, as a PNG."""
    cached, live = [cell for cell in plan["cells"] if cell["prefix"] == Prefix.TEACHER], plan["cells"][-1]
    points = [p for p in plan["break_even"] if p["have"] == "nothing" and p["instead"] == Instead.STUDENT_PREFIX]
    most = max(30, 4 * max(point["students"] for point in points))
    counts = sorted({round(most ** (place / 60)) for place in range(61)})
    figure = new_figure(7, 4.2)
    axes = figure.subplots()
    for cell, colour in zip(cached, (COLOURS[0], COLOURS[2], COLOURS[4], COLOURS[1]), strict=False):
        build = sum(cell["build"].values())
        costs = [cell["steps"] * cell["step_flops"] + build / count for count in counts]
        axes.plot(counts, costs, color=colour, label=f"from a cache: {cell['tier']}")
    axes.axhline(live["marginal"], color=COLOURS[3], label="on student prefixes")
    axes.set(xscale="log", yscale="log", xlabel="students that share the cache", ylabel="FLOPs a student, amortised")
    axes.legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=120)


def advice_text(facts: Mapping[str, Any]) -> str:
    """An advice: what, why, what it costs, and the commands."""
    weight = facts["forward_weight"]
    divergence = {0.0: "reverse KL", 1.0: "forward KL"}.get(weight, f"a mix with forward weight {weight:g}")
    windows = " -> ".join(map(str, facts["windows"]))
    lines = [f"{facts['prefix']} prefixes, {divergence}, tier {facts['tier']}, window {windows}", ""]
    lines += [f"- {reason['why']} [{reason['source']}]" for reason in facts["reasons"]]
    cost, size = facts["cost"], facts["storage"]
    total = _measured(size["bytes"][PLAIN], "{:.3g} GB", 1e9)
    steps = f"{cost['amortised_steps']} steps, {facts['trajectories']} trajectories"
    marginal, amortised = (flop_text(facts[name]) for name in ("marginal", "amortised"))
    most = "at most " * (len(facts["windows"]) > 1)
    lines += [
        "",
        f"{steps}: {most}{marginal} marginal, {most}{amortised} amortised over {facts['students']}",
        f"to build first: {flop_text(sum(facts['build'].values()))}; the tier: {total} ({size['basis']})",
        "",
        *facts["commands"],
    ]
    return "\n".join(lines)
