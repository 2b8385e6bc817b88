"""A grid's report: one table for the screen, the same in Markdown, JSON with everything, and a plot.

Guarantees: tables and plot are rendered from the report's JSON object and nothing else, so they cannot disagree.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from logitcache.errors import UserError
from trainer.runs import write_json, writing

_PHASES = {
    "teacher_decode": "teacher decode",
    "teacher_prefill": "teacher prefill",
    "student_rollout": "student rollout",
    "student_forward": "student forward",
    "student_backward": "student backward",
    "head_reprojection": "head re-projection",
}
COLOURS = ("#5b2a86", "#9a62c9", "#e07b39", "#2a6f97", "#61a5c2", "#8a8a8a")


def require_plotting() -> None:
    """Raise UserError, before any work, if no plot could be drawn."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError("a report with a plot", "matplotlib is not installed", "pip install 'logitcache[plots]'")


def write_report(report: Mapping[str, Any], out: Path) -> None:
    """Write report.png, report.md and, last, report.json. Raises UserError if they cannot be written."""
    with writing(out / "report.md"):
        draw(report, out / "report.png")
        (out / "report.md").write_text(markdown(report))
    write_json(out / "report.json", report)


def table(report: Mapping[str, Any]) -> str:
    """The grid for the screen."""
    return "\n".join([text_table(*cells_table(report)), "", *facts(report)])


def markdown(report: Mapping[str, Any]) -> str:
    """The report as Markdown: the grid, the FLOPs by phase, and what it was measured on."""
    sections = ["# Grid", markdown_table(*cells_table(report)), "## FLOPs by phase", markdown_table(*_flops(report))]
    measured_on = "\n".join(f"- {fact}" for fact in facts(report))
    sections += ["![held-out divergences and FLOPs](report.png)", "## Measured on", measured_on]
    return "\n\n".join(sections) + "\n"


def cells_table(report: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the grid: held-out values before and after, FLOPs, rates."""
    students = report["cells"][0]["flops"]["amortised_over_students"]
    header = ["prefix", "divergence", "forward KL", "reverse KL", "student entropy"]
    header += ["marginal", f"amortised/{students}", "tokens/s", "seconds"]
    rows = []
    for cell in report["cells"]:
        held_out, flops = cell["held_out"], cell["flops"]
        row = [cell["prefix"], cell["divergence"]]
        row += [_change(held_out[f"{name}_nats"]) for name in ("forward_kl", "reverse_kl", "student_entropy")]
        row += [flop_text(flops["marginal"]), flop_text(flops["amortised"])]
        rows.append([*row, f"{cell['tokens_per_s']:.0f}", f"{cell['seconds']:.1f}"])
    return header, rows


def _flops(report: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    header = ["prefix", "divergence", *_PHASES.values(), "evaluation"]
    rows = []
    for cell in report["cells"]:
        by_phase = cell["flops"]["by_phase"]
        rows.append(
            [cell["prefix"], cell["divergence"], *(flop_text(by_phase[name]) for name in [*_PHASES, "evaluation"])]
        )
    build = report["cache"]["flops"]
    built = {"teacher_decode": build.get("generate", 0), "teacher_prefill": build.get("score", 0)}
    rows.append(["cache", "(build)", *(flop_text(built.get(name, 0)) for name in [*_PHASES, "evaluation"])])
    return header, rows


def facts(report: Mapping[str, Any]) -> list[str]:
    """What the grid was measured on, a clause each."""
    cache, held_out = report["cache"], report["held_out"]
    return [
        f"KL and entropy: nats per token, exact over the full vocabulary, on {held_out['tokens']} held-out completion "
        f"tokens ({held_out['sequences']} sequences the teacher wrote); teacher entropy "
        f"{held_out['teacher_entropy_nats']:.3f}",
        f"cache: {cache['completion_tokens']} completion tokens by {cache['teacher']}, built with "
        f"{flop_text(sum(cache['flops'].values()))}; student: {report['student']['parameters'] / 1e6:.1f}M parameters",
        f"device: {report['device']}; commit {report['commit']}; {report['run_s']:.0f} s since it was last started",
    ]


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table for the screen."""
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    lines = [header, ["-" * width for width in widths], *rows]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _change(value: Mapping[str, float]) -> str:
    return f"{value['before']:.3f} -> {value['after']:.3f}"


def flop_text(flops: float) -> str:
    """FLOPs with the unit that fits."""
    for unit, size in (("EFLOP", 1e18), ("PFLOP", 1e15), ("TFLOP", 1e12), ("GFLOP", 1e9)):
        if flops >= 0.9995 * size:  # what would be rounded to 1e+03 of the unit below
            return f"{flops / size:.3g} {unit}"
    return "0" if flops == 0 else f"{flops / 1e6:.3g} MFLOP"


def draw(report: Mapping[str, Any], path: Path) -> None:
    """Held-out divergences before and after, and FLOPs by phase with the cell's share of the build, as a PNG."""
    figure = new_figure(12, 4.2)
    divergences, costs = figure.subplots(1, 2)
    _draw_divergences(divergences, report)
    _draw_flops(costs, report)
    figure.savefig(path, dpi=120)


def new_figure(width: float, height: float) -> Any:
    """An empty figure of so many inches, which needs no display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _labels(report: Mapping[str, Any]) -> list[str]:
    return [f"{cell['prefix']} prefix\n{cell['divergence']} KL" for cell in report["cells"]]


def _draw_divergences(axes: Any, report: Mapping[str, Any]) -> None:
    cells = report["cells"]
    for offset, (name, colour) in enumerate((("forward_kl", COLOURS[3]), ("reverse_kl", COLOURS[2]))):
        values = [cell["held_out"][f"{name}_nats"] for cell in cells]
        places = [place + 0.4 * offset - 0.2 for place in range(len(cells))]
        title = name.replace("_kl", " KL")
        axes.bar(places, [value["before"] for value in values], 0.36, color=colour, alpha=0.3, label=f"{title}, before")
        axes.bar(places, [value["after"] for value in values], 0.36, color=colour, label=f"{title}, after")
    axes.set_xticks(range(len(cells)), _labels(report))
    axes.set_ylabel("held-out nats per token")
    _legend_above(axes)


def _draw_flops(axes: Any, report: Mapping[str, Any]) -> None:
    cells = report["cells"]
    bottoms = [0.0] * len(cells)
    shares = [cell["flops"]["amortised"] - cell["flops"]["marginal"] for cell in cells]
    parts = [([cell["flops"]["by_phase"][key] for cell in cells], label) for key, label in _PHASES.items()]
    students = cells[0]["flops"]["amortised_over_students"]
    parts.append((shares, f"share of the build, 1/{students}"))
    for (values, label), colour in zip(parts, (*COLOURS, "#c9c9c9"), strict=True):
        if any(values):
            heights = [value / 1e12 for value in values]
            axes.bar(range(len(cells)), heights, 0.6, bottom=bottoms, color=colour, label=label)
            bottoms = [bottom + height for bottom, height in zip(bottoms, heights, strict=True)]
    axes.set_xticks(range(len(cells)), _labels(report))
    axes.set_ylabel("TFLOPs")
    axes.set_ylim(0, 1.05 * max(bottoms))
    _legend_above(axes)


def _legend_above(axes: Any) -> None:
    axes.legend(fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=4, frameon=False)
