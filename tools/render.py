"""Tables in prose, rendered from the JSON that a benchmark or study wrote.

    python -m tools.render          rewrite the tables in README.md and docs/
    python -m tools.render --check  exit 1 if one differs from its file

`<!-- goals: NAME -->` to `<!-- end -->` holds the goals of tools/bench/results/NAME.json: what was asked, what was
measured, whether it holds, and on what. `<!-- demo -->` holds the grid of the kept report of `make demo`.
"""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

from trainer.report import cells_table, facts, markdown_table

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "tools" / "bench" / "results"
_BLOCK = re.compile(r"(<!-- (?:goals: (?P<name>[a-z]+)|demo) -->\n).*?(<!-- end -->)", re.DOTALL)


def render(path: Path) -> str:
    """A document's text with every table made anew."""

    def table(found: re.Match[str]) -> str:
        name = found["name"]
        body = _demo(path.parent) if name is None else _goals(name, path.parent)
        return f"{found[1]}\n{body}\n\n{found[3]}"

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
