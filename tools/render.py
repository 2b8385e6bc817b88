"""Tables in prose, rendered from the JSON that a benchmark or study wrote.

    python -m tools.render          rewrite the tables in README.md and docs/
    python -m tools.render --check  exit 1 if one differs from its file

`<!-- goals: NAME -->` to `<!-- end -->` holds the goals of tools/bench/results/NAME.json: what was asked, what was
measured, whether it holds, and on what. `<!-- demo -->` holds the grid of the kept report of `make demo`,
`<!-- paper -->` the FLOPs of the paper's steps, `<!-- break-even -->` from when on a cache pays.
"""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

from trainer.planning.report import BREAK_EVEN_HEADER, break_even_rows
from trainer.report import cells_table, facts, markdown_table

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "tools" / "bench" / "results"
_BLOCK = re.compile(
    r"(<!-- (?:goals: (?P<name>[a-z_]+)|(?P<kind>demo|paper|break-even)) -->\n).*?(?P<end><!-- end -->)", re.DOTALL
)


def render(path: Path) -> str:
    """A document's text with every table made anew."""

    def table(found: re.Match[str]) -> str:
        name, kind = found["name"], found["kind"]
        body = _goals(name, path.parent) if kind is None else _TABLES[kind](path.parent)
        return f"{found[1]}\n{body}\n\n{found['end']}"

    return _BLOCK.sub(table, path.read_text())


def documents() -> list[Path]:
    """Files that may hold tables."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def _goals(name: str, folder: Path) -> str:
    result = _read(name)
    rows = [[goal["what"], str(goal["goal"]), _measured(goal)] for goal in result["goals"]]
    device = result["device"]
    where = device if isinstance(device, str) else ", ".join(f"{key} {value}" for key, value in device.items())
    source = f"{_link(name, folder)}: {where}; commit {result['commit']}."
    return f"{markdown_table(['what', 'goal', 'measured'], rows)}\n\n{source}"


def _demo(folder: Path) -> str:
    report = _read("demo")
    return f"{markdown_table(*cells_table(report))}\n\n{'. '.join(facts(report))}. {_link('demo', folder)}"


def _paper(folder: Path) -> str:
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
    return f"{markdown_table(header, rows)}\n\n{about}. {_link('paper_flops', folder)}"


def _break_even(folder: Path) -> str:
    result = _read("break_even")
    case = result["config"]
    about = f"{case['teacher']} to {case['student']}, {case['problems']} problems, {case['prompt_tokens']} + "
    about += f"{case['completion_tokens']} tokens, {case['sequences']} sequences a step"
    table = markdown_table(BREAK_EVEN_HEADER, break_even_rows(result["figures"]))
    return f"{table}\n\n{about}. {_link('break_even', folder)}"


_TABLES = {"demo": _demo, "paper": _paper, "break-even": _break_even}


def _measured(goal: dict[str, Any]) -> str:
    value = goal["measured"]
    shown = f"{value:.3g}" if isinstance(value, float) else str(value)
    return shown if goal["holds"] else f"**{shown}, not reached**"


def _read(name: str) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return result


def _link(name: str, folder: Path) -> str:
    return f"[{name}.json]({os.path.relpath(RESULTS / f'{name}.json', folder)})"


def main() -> int:
    """Rewrite, or with `--check` only compare."""
    stale = [path for path in documents() if path.read_text() != render(path)]
    if "--check" in sys.argv:
        for path in stale:
            print(f"{path.relative_to(ROOT)} differs from its results; run python -m tools.render", file=sys.stderr)
        return int(bool(stale))
    for path in stale:
        path.write_text(render(path))
    return 0


if __name__ == "__main__":
    sys.exit(main())
