"""Tables in prose, rendered from the JSON that a benchmark or study wrote.

    python -m tools.render          rewrite the tables in README.md and docs/
    python -m tools.render --check  exit 1 if one differs from its file

`<!-- goals: NAME -->` to `<!-- end -->` holds the goals of tools/bench/results/NAME.json: what was asked, what was
measured, whether it holds, and on what. `<!-- demo -->` holds the grid of the kept report of `make demo`,
`<!-- paper -->` the FLOPs of the paper's steps, `<!-- break-even -->` from when on a cache pays,
`<!-- equal-flops: NAME -->` the budgets and crossings of tools/studies/results/NAME.json, `<!-- engine-kl -->` what
separates the engines.

`trainer/planning/tiers.json` and `equal_flops.json`, what planning needs of the codecs' figures and of the study at
equal FLOPs, are made anew and checked with them.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trainer.budget_report import budgets_table, crossings_table
from trainer.budget_report import facts as equal_flops_facts
from trainer.planning.evidence import STUDY, STUDY_RESULTS
from trainer.planning.report import BREAK_EVEN_HEADER, break_even_rows
from trainer.planning.storage import PEAKED, PLAIN, TIERS
from trainer.report import cells_table, facts, markdown_table

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "tools" / "bench" / "results"
STUDIES = ROOT / "tools" / "studies" / "results"
_BLOCK = re.compile(
    r"(<!-- (?P<kind>goals|demo|paper|break-even|equal-flops|engine-kl)(?:: (?P<name>[a-z0-9_]+))? -->\n)"
    r".*?(?P<end><!-- end -->)",
    re.DOTALL,
)


def render(path: Path) -> str:
    """A document's text with every table made anew."""

    def table(found: re.Match[str]) -> str:
        body = _TABLES[found["kind"]](path.parent, found["name"])
        return f"{found[1]}\n{body}\n\n{found['end']}"

    return _BLOCK.sub(table, path.read_text())


def documents() -> list[Path]:
    """Files that may hold tables."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def _goals(folder: Path, name: str) -> str:
    if not _file(name).exists():
        return f"No result is kept: `python -m tools.bench.{name}` makes one."
    result = _read(name)
    rows = [[goal["what"], str(goal["goal"]), _measured(goal)] for goal in result["goals"]]
    device = result["device"]
    where = device if isinstance(device, str) else ", ".join(f"{key} {value}" for key, value in device.items())
    source = f"{_link(_file(name), folder)}: {where}; commit {result['commit']}."
    return f"{markdown_table(['what', 'goal', 'measured'], rows)}\n\n{source}"


def _demo(folder: Path, _: None) -> str:
    report = _read("demo")
    return f"{markdown_table(*cells_table(report))}\n\n{'. '.join(facts(report))}. {_link(_file('demo'), folder)}"


def _paper(folder: Path, _: None) -> str:
    result = _read("paper_flops")
    header = ["teacher", "tokens"]
    for convention in ("paper", "ledger"):
        header += [f"{convention}: cached", f"{convention}: live", "ratio"]
    rows = []
    for step in result["figures"]["steps"]:
        row = [step["teacher"], str(step["completion_tokens"])]
        for convention in ("paper_tflops", "ledger_tflops"):
            cached, live = step[convention]["cached"], step[convention]["live"]
            row += [f"{cached:.4g}", f"{live:.4g}", f"{live / cached:.2f}"]
        rows.append(row)
    config = result["config"]
    about = f"TFLOPs a step: {config['student']}, {config['batch']} sequences, {config['prompt_tokens']} prompt tokens"
    return f"{markdown_table(header, rows)}\n\n{about}. {_link(_file('paper_flops'), folder)}"


def _break_even(folder: Path, _: None) -> str:
    result = _read("break_even")
    case = result["config"]
    about = f"{case['teacher']} to {case['student']}, {case['problems']} problems, {case['prompt_tokens']} + "
    about += f"{case['completion_tokens']} tokens, {case['sequences']} sequences a step"
    table = markdown_table(BREAK_EVEN_HEADER, break_even_rows(result["figures"]))
    return f"{table}\n\n{about}. {_link(_file('break_even'), folder)}"


def _equal_flops(folder: Path, name: str) -> str:
    file = STUDIES / f"{name}.json"
    if not file.exists():
        return (
            f"No result is kept: `python -m tools.studies.equal_flops {name.removeprefix('equal_flops_')}` makes one."
        )
    report = json.loads(file.read_text())
    parts = [markdown_table(*budgets_table(report)), f"![quality over FLOPs]({name}.png)"]
    parts += [
        markdown_table(*crossings_table(report)),
        f"{'. '.join(equal_flops_facts(report))}. {_link(file, folder)}",
    ]
    return "\n\n".join(parts)


def _engine_kl(folder: Path, _: None) -> str:
    result = _read("engines")
    header = ["from", "to", "KL, nats", "99th percentile", "reverse"]
    rows = []
    for pair, kl in result["figures"]["kl_nats"].items():
        ends = [end.replace("_", " ") for end in pair.split("_to_")]
        rows.append([*ends, *(f"{kl[name]:.3g}" for name in ("mean", "p99", "reverse_mean"))])
    about = f"{result['config']['teacher']}, {result['figures']['compared_tokens']} tokens"
    return f"{markdown_table(header, rows)}\n\n{about}. {_link(_file('engines'), folder)}"


_TABLES: dict[str, Callable[[Path, Any], str]] = {
    "goals": _goals,
    "demo": _demo,
    "paper": _paper,
    "break-even": _break_even,
    "equal-flops": _equal_flops,
    "engine-kl": _engine_kl,
}


def tiers() -> str:
    """Of the codecs' figures, what planning needs: our own tiers, their bytes and their gradients' errors."""
    result = _read("codecs")
    errors = (f"student_{direction}_gradient_relative_error" for direction in ("forward", "reverse"))
    wanted = ("bytes_per_token", "kept_once_bytes", *errors)
    figures = {
        distribution: {
            tier: {name: found[name] for name in wanted}
            for tier, found in result["figures"][distribution].items()
            if isinstance(found, dict) and "kept_once_bytes" in found  # a peer's format keeps nothing once
        }
        for distribution in (PLAIN, PEAKED)
    }
    config = {name: result["config"][name] for name in ("teacher", "width", "vocab_size")}
    return json.dumps({"commit": result["commit"], "config": config, "figures": figures}, indent=2) + "\n"


def study() -> str:
    """Of the study at equal FLOPs, what advice needs: each cell's answers at every budget."""
    report = json.loads((ROOT / STUDY_RESULTS).read_text())
    (measure,) = (name for name in report["metrics"] if name.startswith("avg_at_"))
    budgets = [
        {
            "flops": budget,
            "cells": {
                f"{curve['prefix']} {curve['divergence']}": point[measure]
                for curve in report["curves"]
                for point in curve["points"]
                if point["flops"] == budget
            },
        }
        for budget in report["config"]["study"]["budgets"]
    ]
    return json.dumps({"commit": report["commit"], "measure": measure, "budgets": budgets}, indent=2) + "\n"


def _measured(goal: dict[str, Any]) -> str:
    value = goal["measured"]
    shown = f"{value:.3g}" if isinstance(value, float) else str(value)
    return shown if goal["holds"] else f"**{shown}, not reached**"


def _read(name: str) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(_file(name).read_text())
    return result


def _file(name: str) -> Path:
    return RESULTS / f"{name}.json"


def _link(file: Path, folder: Path) -> str:
    return f"[{file.name}]({os.path.relpath(file, folder)})"


def rendered() -> dict[Path, str]:
    """What every file that is rendered should hold."""
    planning = ROOT / "trainer" / "planning"
    packaged = {planning / TIERS: tiers(), planning / STUDY: study()}
    return {**{path: render(path) for path in documents()}, **packaged}


def main() -> int:
    """Rewrite, or with `--check` only compare."""
    stale = {path: text for path, text in rendered().items() if not path.exists() or path.read_text() != text}
    if "--check" in sys.argv:
        for path in stale:
            print(f"{path.relative_to(ROOT)} differs from its results; run python -m tools.render", file=sys.stderr)
        return int(bool(stale))
    for path, text in stale.items():
        path.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
