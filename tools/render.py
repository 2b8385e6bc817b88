"""Tables in prose, rendered from the JSON that a benchmark or study wrote.

    python -m tools.render          rewrite the tables in README.md and docs/
    python -m tools.render --check  exit 1 if one differs from its file

A table stands between `<!-- goals: NAME -->` and `<!-- end -->`, where NAME is a file of tools/bench/results. Its rows
are that file's goals: what was asked, what was measured, whether it holds, and on what.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "tools" / "bench" / "results"
_BLOCK = re.compile(r"(<!-- goals: ([a-z-]+)((?: [a-z0-9_]+)*) -->\n).*?(<!-- end -->)", re.DOTALL)


def render(text: str) -> str:
    """The text with every table made anew."""
    return _BLOCK.sub(lambda found: f"{found[1]}{_table(found[2])}{found[4]}", text)


def documents() -> list[Path]:
    """Files that may hold tables."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def _table(name: str) -> str:
    path = RESULTS / f"{name}.json"
    result = json.loads(path.read_text())
    rows = [f"| {goal['what']} | {goal['goal']} | {_measured(goal)} |" for goal in result["goals"]]
    source = f"[{name}.json](tools/bench/results/{name}.json)"
    device, commit = result["device"], str(result["commit"])[:12]
    lines = ["| what | goal | measured |", "|---|---|---|", *rows, "", f"{source}: {_device(device)}, commit {commit}."]
    return "\n".join(lines) + "\n\n"


def _measured(goal: dict[str, Any]) -> str:
    value = goal["measured"]
    shown = f"{value:.3g}" if isinstance(value, float) else str(value)
    return shown if goal["holds"] else f"**{shown}, not reached**"


def _device(device: Any) -> str:
    return device if isinstance(device, str) else ", ".join(str(value) for value in device.values())


def main() -> int:
    """Rewrite, or with `--check` only compare."""
    stale = [path for path in documents() if path.read_text() != render(path.read_text())]
    if "--check" in sys.argv:
        for path in stale:
            print(f"{path.relative_to(ROOT)} differs from its results; run python -m tools.render", file=sys.stderr)
        return int(bool(stale))
    for path in stale:
        path.write_text(render(path.read_text()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
