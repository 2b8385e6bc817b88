"""A plan for the screen, and the break-even plot."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from logitcache.errors import UserError, require
from trainer.planning.costs import Instead
from trainer.planning.storage import PEAKED, PLAIN
from trainer.report import COLOURS, flop_text, new_figure, require_plotting, text_table
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
    sources = [f"{tier['tier']}: {tier['basis']}" for tier in plan["storage"]]
    sections += [text_table(*_storage(plan["storage"])), "\n".join(sources), text_table(*_break_even(plan))]
    sections.append(f"students: with {plan['break_even'][0]['epochs_per_student']:.3g} epochs each")
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


def _break_even(plan: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """What fits a screen: without the tokens, and without the epochs, which are alike."""
    return [*BREAK_EVEN_HEADER[:4], BREAK_EVEN_HEADER[6]], [[*row[:4], row[6]] for row in break_even_rows(plan)]


def _cells(cells: list[dict[str, Any]], case: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """A column for each cell: with a row for each the table would be wider than a screen."""
    rows = {"tier": [cell["tier"] or "live" for cell in cells]}
    for name in cells[0]["step"]:
        if any(cell["step"][name] for cell in cells):
            rows[name.replace("_", " ")] = [flop_text(cell["step"][name]) for cell in cells]
    rows["a step"] = [flop_text(cell["step_flops"]) for cell in cells]
    rows["steps"] = [_steps(cell) for cell in cells]
    rows["trajectories"] = [str(cell["trajectories"]) for cell in cells]
    rows["build"] = [flop_text(sum(cell["build"].values())) for cell in cells]
    rows["marginal"] = [flop_text(cell["marginal"]) for cell in cells]
    rows[f"amortised/{case['students']}"] = [flop_text(cell["amortised"]) for cell in cells]
    if case["flops_per_second"] is not None:
        rows["hours"] = [f"{cell['amortised_s'] / 3600:.3g}" for cell in cells]
    if case["price_per_hour"] is not None:
        rows["money"] = [f"{cell['amortised_money']:.2f}" for cell in cells]
    return ["prefix", *(cell["prefix"] for cell in cells)], [[name, *row] for name, row in rows.items()]


def _steps(cell: Mapping[str, Any]) -> str:
    steps, amortised = cell["steps"], cell["amortised_steps"]
    return str(steps) if amortised == steps else f"{steps} ({amortised})"


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
    header = ["tier", "bytes a token", "if the teacher is sure", "whole tier", "if sure"]
    return header, [
        [
            tier["tier"],
            *(_measured(tier["bytes_per_token"][name], "{:.3g}") for name in (PLAIN, PEAKED)),
            *(_measured(tier["bytes"][name], "{:.3g} GB", 1e9) for name in (PLAIN, PEAKED)),
        ]
        for tier in tiers
    ]


def _measured(value: float | None, form: str, unit: float = 1.0) -> str:
    return "not measured" if value is None else form.format(value / unit)


def require_plot(path: Path) -> None:
    """Raise UserError, before any work, unless a PNG could be drawn there."""
    require_plotting()
    require(path.suffix == ".png", "--plot, a file that ends in .png", path.name)
    require(path.parent.is_dir(), "--plot, in a directory that is there", str(path.parent), "make it")


def draw_break_even(plan: Mapping[str, Any], path: Path) -> None:
    """Each student's FLOPs against how many share the cache, for every tier, beside student prefixes, as a PNG.

    Raises:
        UserError: it cannot be written.
    """
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
    try:
        figure.savefig(path, dpi=120)
    except OSError as error:
        raise UserError(f"--plot {path}", f"it cannot be written ({error.strerror})", "choose another place") from error


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
        f"to build first: {flop_text(sum(cost['build'].values()))}; the tier: {total} ({size['basis']})",
        "",
        *facts["commands"],
    ]
    return "\n".join(lines)
