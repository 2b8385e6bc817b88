"""What every benchmark does alike: its options, its goals, and the JSON file it leaves.

Guarantees: a result names its device, versions, commit and configuration; every figure carries its unit in its key; a
goal says what was asked, what was measured, and whether it holds.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from trainer.provenance import commit, device_name, versions

RESULTS = Path(__file__).parent / "results"


def options(
    name: str, doc: str, more: Callable[[argparse.ArgumentParser], object] = lambda _: None
) -> argparse.Namespace:
    """`--quick`, `--json PATH` (default: the kept result, with `--quick` none), `--data DIR`; and what `more` adds."""
    parser = argparse.ArgumentParser(prog=f"python -m tools.bench.{name}", description=doc)
    parser.add_argument("--quick", action="store_true", help="a small size, to see that it runs; not kept")
    parser.add_argument("--json", type=Path, metavar="PATH", help=f"where the result goes (default: {name}.json)")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder of the real problem sets")
    more(parser)
    chosen = parser.parse_args()
    if chosen.json is None and not chosen.quick:
        chosen.json = RESULTS / f"{name}.json"
    return chosen


def at_most(what: str, bound: float, measured: float, unit: str) -> dict[str, Any]:
    """A goal that holds if `measured` is at most `bound`."""
    return {"what": what, "goal": f"at most {bound:g} {unit}", "measured": measured, "holds": measured <= bound}


def at_least(what: str, bound: float, measured: float, unit: str) -> dict[str, Any]:
    """A goal that holds if `measured` is at least `bound`."""
    return {"what": what, "goal": f"at least {bound:g} {unit}", "measured": measured, "holds": measured >= bound}


def keep(
    chosen: argparse.Namespace,
    *,
    config: Mapping[str, Any],
    figures: Mapping[str, Any],
    goals: Sequence[Mapping[str, Any]],
) -> None:
    """Print the goals, and write the result where the options say."""
    for goal in goals:
        verdict = "holds" if goal["holds"] else "NOT REACHED"
        print(f"{verdict:12}{goal['what']}: {goal['measured']:.4g}, goal {goal['goal']}")
    result = {
        "device": device_name(),
        "commit": commit(),
        "versions": versions(),
        "config": {**config, "quick": chosen.quick},
        "figures": dict(figures),
        "goals": list(goals),
    }
    if chosen.json is not None:
        chosen.json.parent.mkdir(parents=True, exist_ok=True)
        chosen.json.write_text(json.dumps(result, indent=2) + "\n")
        print(f"wrote {chosen.json}")
