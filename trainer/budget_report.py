"""What an equal-FLOP study found: curves over seeds and crossings, as JSON values, a table and a plot.

Guarantees: tables and plot are rendered from the report's JSON object and nothing else. Amortised, a student that is
trained from the cache starts with its share of the build; one that writes for itself starts with nothing.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

from trainer.curves import Curve, Estimate, crossings
from trainer.planning.study import Study
from trainer.report import COLOURS, flop_text, markdown_table, new_figure, text_table
from trainer.runs import write_json

JSON, MARKDOWN, PLOT = "equal_flops.json", "equal_flops.md", "equal_flops.png"
_COMPARED = ("forward_kl_nats", "reverse_kl_nats", "avg_at_")
"""Names, or their beginnings, of what curves are compared in."""
_USED = ("spent_flops", "steps", "seconds", "joules")
_STYLES = {"teacher": "-", "student": "--"}
"""Of lines, by prefix; of mixed ones dotted."""
Run = Mapping[str, Any]


def summary(runs: Sequence[Run], start: Mapping[str, Any], study: Study, build_flops: int) -> dict[str, Any]:
    """Curves of each cell, and where two of them cross.

    Args:
        runs: results of all runs.
        start: what the student was measured to be before its first step.
        study: see `Study`.
        build_flops: of the whole cache.
    """
    metrics = [name for name in start if name.startswith(_COMPARED)]
    cells: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        cells.setdefault((run["prefix"], run["divergence"]), []).append(run)
    curves = [_curve(group, study, build_flops) for group in cells.values()]
    found = []
    pairs = list(itertools.combinations(zip(cells.values(), curves, strict=True), 2))
    for metric, (one, other), axis in itertools.product(metrics, pairs, ("marginal", "amortised")):
        (runs_one, curve_one), (runs_other, curve_other) = one, other
        shares = [curve["share_flops"] if axis == "amortised" else 0 for curve in (curve_one, curve_other)]

        def crossed(*lines: Run, metric: str = metric, shares: Sequence[int] = shares) -> list[float]:
            return crossings(*(_line(one, share, metric, start) for one, share in zip(lines, shares, strict=True)))

        by_seed = [crossed(*pair) for pair in zip(runs_one, runs_other, strict=True)]
        facts = {"metric": metric, "axis": axis, "between": [_name(curve_one), _name(curve_other)]}
        found.append({**facts, "flops": crossed(curve_one, curve_other), "flops_by_seed": by_seed})
    return {"metrics": metrics, "build_flops": build_flops, "curves": curves, "crossings": found}


def _curve(runs: Sequence[Run], study: Study, build_flops: int) -> dict[str, Any]:
    """The points of one cell, over its seeds."""
    first = runs[0]
    share = study.share(first["student_share"], build_flops)
    points = []
    for lines in zip(*(run["points"] for run in runs), strict=True):
        measured = [name for name in lines[0] if name not in ("flops", *_USED) and lines[0][name] is not None]
        seconds, price = fmean(line["seconds"] for line in lines), study.price_per_hour
        joules = [line["joules"] for line in lines if line["joules"] is not None]
        points.append(
            {
                "flops": lines[0]["flops"],
                "amortised_flops": lines[0]["flops"] + share,
                "steps": [line["steps"] for line in lines],
                "seconds": seconds,
                "joules": fmean(joules) if joules else None,
                "money": None if price is None else seconds / 3600 * price,
                **{name: asdict(Estimate.of([line[name] for line in lines])) for name in measured},
            }
        )
    return {**{name: first[name] for name in ("prefix", "divergence")}, "share_flops": share, "points": points}


def _line(line: Run, share: int, metric: str, start: Mapping[str, Any]) -> Curve:
    """Of a run, or of the means of a curve; it begins where the student does, at its share of the build."""
    values = [point[metric] for point in line["points"]]
    means = [value["mean"] if isinstance(value, Mapping) else value for value in values]
    cost = [share, *(share + point["flops"] for point in line["points"])]
    return Curve(cost=cost, value=[start[metric], *means])


def _name(curve: Mapping[str, Any]) -> str:
    return f"{curve['prefix']} {curve['divergence']}"


def write_report(report: Mapping[str, Any], out: Path) -> None:
    """Write the plot, the Markdown and, last, the JSON."""
    draw(report, out / PLOT)
    sections = ["# Equal FLOPs", markdown_table(*budgets_table(report)), "## Where curves cross"]
    sections += [markdown_table(*crossings_table(report)), f"![quality over FLOPs]({PLOT})"]
    (out / MARKDOWN).write_text("\n\n".join([*sections, ". ".join(facts(report)) + "."]) + "\n")
    write_json(out / JSON, report)


def described(report: Mapping[str, Any]) -> str:
    """For the screen."""
    tables = [text_table(*budgets_table(report)), text_table(*crossings_table(report))]
    return "\n\n".join([*tables, "\n".join(facts(report))])


def budgets_table(report: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows: every budget and cell, marginal and amortised."""
    students = report["config"]["study"]["students"]
    metrics = report["metrics"]
    measured = [point for curve in report["curves"] for point in curve["points"]]
    forms = {"seconds": "{:.1f}", "joules": "{:.0f}", "money": "{:.4g}"}
    clocks = {name: form for name, form in forms.items() if any(point[name] is not None for point in measured)}
    header = ["budget", "cell", "steps", *map(_title, metrics), *clocks]
    header += [f"{_title(name)}, amortised/{students}" for name in metrics]
    rows = []
    for budget, curve in itertools.product(report["config"]["study"]["budgets"], report["curves"]):
        points = {point["flops"]: point for point in curve["points"]}
        point = points[budget]
        low, high = min(point["steps"]), max(point["steps"])
        steps = str(low) if low == high else f"{low} to {high}"
        row = [flop_text(budget), _name(curve), steps, *(_estimate(point[name]) for name in metrics)]
        row += ["unknown" if point[name] is None else form.format(point[name]) for name, form in clocks.items()]
        left = points.get(budget - curve["share_flops"])
        rows.append([*row, *("not built" if left is None else _estimate(left[name]) for name in metrics)])
    return header, rows


def crossings_table(report: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows: cells of one divergence and different prefixes. The JSON has every pair."""
    header = ["measure", "cost", "between", "crosses at", "by seed"]
    rows = []
    for found in report["crossings"]:
        (one, divergence), (other, other_divergence) = (name.split(" ") for name in found["between"])
        if divergence == other_divergence and one != other:
            by_seed = [_places(places) or "none" for places in found["flops_by_seed"]]
            seeds = "; ".join(by_seed) if any(found["flops_by_seed"]) else "-"
            row = [_title(found["metric"]), found["axis"], " and ".join(found["between"])]
            rows.append([*row, _places(found["flops"]) or "none within the budget", seeds])
    return header, rows


def _places(flops: Sequence[float]) -> str:
    return ", ".join(map(flop_text, flops))


def _title(metric: str) -> str:
    return metric.removesuffix("_nats").replace("_kl", " KL").replace("avg_at_", "Avg@")


def _estimate(value: Mapping[str, Any]) -> str:
    mean, high = value["mean"], value["high"]
    return f"{mean:.3f}" if high is None else f"{mean:.3f} ± {high - mean:.3f}"


def facts(report: Mapping[str, Any]) -> list[str]:
    """What was measured, a clause each."""
    study, cache = report["config"]["study"], report["cache"]
    start = ", ".join(f"{_title(name)} {report['start'][name]:.3f}" for name in report["metrics"])
    seeds = len(study["seeds"])
    over = f"Means over {seeds} seeds, ± half of their 95% interval (Student's t)" if seeds > 1 else "One seed"
    found = [
        f"{over}; KL in nats per held-out token",
        f"the student starts at {start}",
        f"amortised: {flop_text(report['build_flops'])} of the build over {study['students']} students",
        f"cache: {cache['completion_tokens']} completion tokens by {cache['teacher']}",
        f"device: {report['device']}; commit {report['commit']}",
    ]
    if (price := report.get("price_per_hour")) is not None:
        found.append(f"money at {price:g} an hour")
    if share := report["config"].get("cross_entropy_share"):
        found.insert(1, f"on teacher prefixes {share:g} of the loss is the cross-entropy of the text")
    if report["config"]["questions"] is not None:
        asked = report["config"]["questions"]
        found.insert(1, f"Avg@k on {asked['count']} problems of {asked['name']}, as a share of 1")
    return found


def draw(report: Mapping[str, Any], path: Path) -> None:
    """A panel for each measure and axis: a line for each cell, its interval shaded."""
    metrics = report["metrics"]
    figure = new_figure(5 * len(metrics), 7.5)
    panels = figure.subplots(2, len(metrics), squeeze=False)
    divergences = list(dict.fromkeys(curve["divergence"] for curve in report["curves"]))
    for row, axis in zip(panels, ("flops", "amortised_flops"), strict=True):
        for axes, metric in zip(row, metrics, strict=True):
            for curve in report["curves"]:
                colour = COLOURS[(0, 2, 4, 3, 1, 5)[divergences.index(curve["divergence"]) % len(COLOURS)]]
                _draw_curve(axes, curve, axis, metric, report["start"][metric], colour)
            of = "training" if axis == "flops" else "training and its share of the build"
            axes.set(xlabel=f"TFLOPs of {of}", ylabel=_title(metric) + (", nats a token" if "kl" in metric else ""))
    panels[0][0].legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=120)


def _draw_curve(axes: Any, curve: Mapping[str, Any], axis: str, metric: str, start: float, colour: str) -> None:
    share = curve["share_flops"] if axis == "amortised_flops" else 0
    cost = [share / 1e12, *(point[axis] / 1e12 for point in curve["points"])]
    values = [point[metric] for point in curve["points"]]
    style = _STYLES.get(curve["prefix"], ":")
    axes.plot(cost, [start, *(value["mean"] for value in values)], style, color=colour, label=_name(curve))
    if values[0]["low"] is not None:
        lows, highs = ([start, *(value[end] for value in values)] for end in ("low", "high"))
        axes.fill_between(cost, lows, highs, color=colour, alpha=0.12, linewidth=0)
