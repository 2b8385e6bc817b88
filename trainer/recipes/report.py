"""`trainer report`: curves and a table of runs, from their metrics alone.

Guarantees: every figure is read from `metrics.jsonl` (and `config.json`, `result.json` where they are there); a run
that is still going on is shown as far as it has come; a value is in the column and the panel of its own name, so that
numbers from top-k targets (`..._coarse`) or samples (`..._sampled`) never share one with exact ones.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf
from pathlib import Path
from statistics import fmean, median
from typing import Any

from logitcache.errors import UserError, require
from trainer.report import COLOURS, flop_text, markdown_table, new_figure, require_plotting, text_table
from trainer.runs import writing

LAST_STEPS = 10
"""A run's value in the table is the mean over its last steps, of which there are at most this many."""

_PANELS = {
    "reward_mean": "reward",
    "no_signal_share": "share of groups",
    "loss": "nats per token",
    "forward_kl": "nats per token",
    "reverse_kl": "nats per token",
    "student_entropy": "nats per token",
    "reference_kl": "nats per token",
    "mean_length": "tokens",
    "truncated_share": "share",
    "clip_share": "share",
    "own_entropy": "nats per token",
    "window": "tokens",
    "own_mean_length": "tokens",
    "own_eos_mass": "share",
    "own_truncated_share": "share",
    "tokens_per_s": "completion tokens/s",
}
"""What is drawn where it is there, and its unit. `own_...` is measured on the student's own held-out completions."""
_IN_TABLE = ("reward_mean", "loss", "forward_kl", "reverse_kl", "student_entropy", "own_entropy")
_ENDINGS = ("", "_coarse", "_sampled")
"""Exact; of top-k targets; estimated from samples (`trainer.objectives`)."""
_MEASURED = tuple(base + ending for base in _IN_TABLE for ending in _ENDINGS)
_HELD_OUT = tuple(base + ending for base in ("forward_kl", "reverse_kl", "student_entropy") for ending in _ENDINGS)
_STYLES = ("-", "--", ":")


@dataclass(frozen=True, kw_only=True)
class RunLog:
    """What a run has written so far.

    Attributes:
        name: of its directory.
        lines: the numbers of each step, with `tokens_per_s` and under names without their `_nats`.
        steps: how many it is to have, where its configuration says so.
        result: the final one; None while it goes on.
    """

    name: str
    lines: list[dict[str, Any]]
    steps: int | None
    result: dict[str, Any] | None

    def series(self, name: str) -> list[tuple[int, float, float]]:
        """(step, FLOPs so far, value) of the steps that have it."""
        return [(line["step"], line["flops"], line[name]) for line in self.lines if name in line]


def run_report(runs: Sequence[Path], out: Path, *, price_per_hour: float | None = None) -> dict[str, Any]:
    """Write `OUT.md` and `OUT.png` of these runs, each the directory of one run or of a grid.

    Args:
        runs: their directories.
        out: without ending.
        price_per_hour: of the machine, for what a run's steps cost; any currency.

    Returns:
        `{"runs": the `run_facts` of each, "markdown": path, "plot": path, "table": for the screen}`.

    Raises:
        UserError: no metrics in a directory, a damaged line in the middle of a file, nothing to draw with, or
            nowhere to write.
    """
    require(price_per_hour is None or 0 <= price_per_hour < inf, "--price-per-hour, 0 or more", price_per_hour)
    require_plotting()
    logs = [read_run(directory) for run in runs for directory in _directories(run)]
    facts = [run_facts(log, price_per_hour) for log in logs]
    header, rows = runs_table(facts)
    plot, text = out.with_suffix(".png"), out.with_suffix(".md")
    note = f"Means over the last {LAST_STEPS} steps. Coarse: of top-k targets, lower bounds. Sampled: estimates."
    with writing(text):
        draw_curves(logs, plot)
        text.write_text(f"# Runs\n\n{markdown_table(header, rows)}\n\n{note}\n\n![curves]({plot.name})\n")
    return {
        "runs": facts,
        "markdown": str(text),
        "plot": str(plot),
        "table": text_table(header, rows),
    }


def read_run(directory: Path) -> RunLog:
    """Read a run's directory, finished or not; a last line that is not whole is one that is being written."""
    metrics = directory / "metrics.jsonl"
    try:
        raw = metrics.read_bytes()
    except OSError as error:
        found = f"no metrics.jsonl can be read there ({error.strerror})"
        raise UserError(f"a run in {directory}", found, "name the --out of `trainer distill` or `grid`") from error
    whole, _, _ = raw.rpartition(b"\n")
    lines = [_parse(text, number, metrics) for number, text in enumerate(whole.splitlines(), 1)]
    place = directory.resolve()
    configured = place.parent.parent if place.parent.name == "cells" else place
    config = _read_json(configured / "config.json") or {}
    return RunLog(
        name=place.name,
        lines=lines,
        steps=config.get("training", {}).get("steps"),
        result=_read_json(directory / "result.json"),
    )


def _directories(run: Path) -> list[Path]:
    """A grid's directory stands for those of its cells."""
    cells = sorted(metrics.parent for metrics in run.glob("cells/*/metrics.jsonl"))
    return [run] if (run / "metrics.jsonl").exists() or not cells else cells


def _parse(text: bytes, number: int, metrics: Path) -> dict[str, Any]:
    try:
        line = json.loads(text)
        numbers = {name.replace("_nats", ""): value for name, value in line.items() if isinstance(value, int | float)}
        numbers["tokens_per_s"] = numbers["completion_tokens"] / numbers["step_s"]
        for ending in _ENDINGS[1:]:
            if any(name.endswith(ending) for name in numbers) and "loss" in numbers:
                numbers[f"loss{ending}"] = numbers.pop("loss")
        return {"flops": 0, "draw_s": 0.0, **numbers, "step": int(numbers["step"])}
    except (ValueError, KeyError, AttributeError, ZeroDivisionError) as error:
        what = f"line {number} of {metrics}"
        raise UserError(what, f"it is no step's metrics ({error!r})", "remove the line, or the run") from error


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def run_facts(log: RunLog, price_per_hour: float | None = None) -> dict[str, Any]:
    """What a run has come to, in numbers.

    Returns:
        Steps, done and `steps_planned`; `last_steps`, means over the newest ones; `window`, tokens; `held_out`, before
        and after; `tokens_per_s`, the median; `data_wait_share` of the time; `flops`; `seconds` of
        its steps, `joules` of a finished run on a machine that counts them, `money`. None for what is not known.
    """
    held_out = (log.result or {}).get("held_out") or {}
    values = {name: [value for _, _, value in log.series(name)] for name in [*_MEASURED, "window", "tokens_per_s"]}
    seconds = sum(line["step_s"] for line in log.lines)
    return {
        "run": log.name,
        "steps": len(log.lines),
        "steps_planned": None if log.result is not None else log.steps,
        "last_steps": {_key(name): fmean(values[name][-LAST_STEPS:]) for name in _MEASURED if values[name]},
        "window": values["window"][-1] if values["window"] else None,
        "held_out": {_key(name): held_out[_key(name)] for name in _HELD_OUT if held_out.get(_key(name))},
        "tokens_per_s": median(values["tokens_per_s"]) if log.lines else None,
        "data_wait_share": sum(line["draw_s"] for line in log.lines) / seconds if seconds else None,
        "flops": log.lines[-1]["flops"] if log.lines else None,
        "seconds": seconds,
        "joules": (log.result or {}).get("joules"),
        "money": None if price_per_hour is None else seconds / 3600 * price_per_hour,
    }


def runs_table(runs: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Header and a row for each run's facts; a column that no run has anything for is left out."""
    columns = {"run": [run["run"] for run in runs], "steps": [_steps(run) for run in runs]}
    for name in _MEASURED:
        columns[_title(name)] = [_shown(run["last_steps"].get(_key(name)), "{:.4g}") for run in runs]
    columns["window"] = [_shown(run["window"], "{:.0f}") for run in runs]
    for name in _HELD_OUT:
        columns[f"held-out {_title(name)}"] = [_change(run["held_out"].get(_key(name))) for run in runs]
    columns["tokens/s"] = [_shown(run["tokens_per_s"], "{:.0f}") for run in runs]
    columns["data wait"] = [_shown(run["data_wait_share"], "{:.1%}") for run in runs]
    columns["FLOPs"] = ["" if run["flops"] is None else flop_text(run["flops"]) for run in runs]
    columns["seconds"] = [_shown(run["seconds"], "{:.1f}") for run in runs]
    columns["joules"] = [_shown(run["joules"], "{:.0f}") for run in runs]
    columns["money"] = [_shown(run["money"], "{:.4g}") for run in runs]
    kept = {title: cells for title, cells in columns.items() if any(cells)}
    return list(kept), [list(row) for row in zip(*kept.values(), strict=True)]


def _title(name: str) -> str:
    base, ending = _parts(name)
    words = base.replace("_kl", " KL").replace("own_", "own-text ").replace("_", " ")
    return f"{words} ({ending[1:]})" if ending else words


def _key(name: str) -> str:
    """With its unit, as metrics and results have it."""
    base, ending = _parts(name)
    return f"{base}_nats{ending}" if _PANELS[base].startswith("nats") else name


def _parts(name: str) -> tuple[str, str]:
    ending = next((ending for ending in _ENDINGS[1:] if name.endswith(ending)), "")
    return name.removesuffix(ending), ending


def _steps(run: Mapping[str, Any]) -> str:
    done, planned = run["steps"], run["steps_planned"]
    return str(done) if planned in (None, done) else f"{done} of {planned}"


def _shown(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def _change(value: Mapping[str, float] | None) -> str:
    return f"{value['before']:.3f} -> {value['after']:.3f}" if value else ""


def draw_curves(logs: Sequence[RunLog], path: Path) -> None:
    """A row of panels for each quantity that some run has, against steps and against FLOPs, as a PNG."""
    names = [name for base in _PANELS for name in map(base.__add__, _ENDINGS) if any(log.series(name) for log in logs)]
    if not names:
        raise UserError("curves of these runs", "none of them has finished a step", "wait for the first")
    figure = new_figure(11, 2.4 * len(names))
    for axes, name in zip(figure.subplots(len(names), 2, squeeze=False), names, strict=True):
        for number, log in enumerate(logs):
            steps, flops, values = zip(*log.series(name), strict=True) if log.series(name) else ((), (), ())
            style = _STYLES[number // len(COLOURS) % len(_STYLES)]
            how = {"color": COLOURS[number % len(COLOURS)], "linestyle": style, "label": log.name, "marker": "."}
            axes[0].plot(steps, values, **how)
            axes[1].plot([flop / 1e12 for flop in flops], values, **how)
        axes[0].set_title(_title(name), loc="left", fontsize=9)
        axes[0].set_ylabel(_PANELS[_parts(name)[0]], fontsize=8)
    axes[0].set_xlabel("steps")
    axes[1].set_xlabel("TFLOPs")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)
