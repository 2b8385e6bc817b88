"""The main job end to end, by the same commands a user types: build a cache, cut a student, train the grid.

    python -m tools.demo.run --teacher embedded --problems tools/demo/problems.jsonl --out runs/demo

`make demo` runs it. A demo that was interrupted goes on: a sealed cache and a finished student are not made again.
"""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from cyclopts import App

from logitcache.console import note, run_command
from logitcache.errors import UserError
from logitcache.identity import resolve_model

app = App(name="demo", help=__doc__.splitlines()[0], version_flags=[])


class Size(StrEnum):
    """How much of it."""

    DEFAULT = "default"
    SMALL = "small"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Problems, window in completion tokens, steps, sequences a step."""

    problems: int
    window: int
    steps: int
    sequences: int


LAYERS_KEPT = 2 / 3
"""Of the teacher's: a student that is cut much shorter is too broken to be taught on its own text (docs/log.md)."""

PLANS = {
    Size.DEFAULT: Plan(problems=96, window=32, steps=10, sequences=8),
    Size.SMALL: Plan(problems=32, window=24, steps=3, sequences=8),
}


@app.default
def demo(
    *,
    teacher: str = "embedded",
    problems: str = "tools/demo/problems.jsonl",
    out: Path = Path("runs/demo"),
    size: Size = Size.DEFAULT,
) -> int:
    """Build a cache, cut a student out of the teacher, train the four cells, report.

    Args:
        teacher: a transformers model id or directory; `embedded` is SmolLM2-135M-Instruct.
        problems: a problem set, as `logitcache build` takes it.
        out: where cache, student and report go.
        size: default, or small for a quick look.
    """
    plan, started = PLANS[size], time.monotonic()
    cache, student, model = out / "cache", out / "student", shlex.quote(teacher)
    build = f"--limit {plan.problems} --max-new-tokens {plan.window} --problems-per-unit 32"
    _run(f"logitcache.cli build --teacher {model} --problems {shlex.quote(problems)} --out {cache} {build}")
    if not student.exists():
        _run(f"trainer.cli prune {model} --cache {cache} --out {student} --layers {_layers(teacher)}")
    _clear_unfinished(out)
    train = f"--steps {plan.steps} --sequences {plan.sequences} --window {plan.window}"
    _run(f"trainer.cli grid {cache} --student {student} --teacher {model} --out {out} {train}")
    note(f"done in {time.monotonic() - started:.0f} s: see {out}/report.md and {out}/report.png")
    return 0


def _layers(teacher: str) -> int:
    config = json.loads((resolve_model(teacher) / "config.json").read_text())
    return round(LAYERS_KEPT * config["num_hidden_layers"])


def _run(command: str) -> None:
    """Run one of our commands as its own process, so that what the cache spares is really not there."""
    program, _, rest = command.partition(".cli")
    note(f"$ {program}{rest}")
    if code := subprocess.run([sys.executable, "-m", *shlex.split(command)], check=False).returncode:
        raise SystemExit(code)


def _clear_unfinished(out: Path) -> None:
    """A grid is not resumed: remove what an earlier one left, and nothing else."""
    known = {"cache", "student", "cells", "config.json", "report.json", "report.md", "report.png"}
    if strange := sorted(path.name for path in out.iterdir() if path.name not in known):
        raise UserError(f"a demo in {out}", f"found {strange[0]} there", "choose another OUT")
    shutil.rmtree(out / "cells", ignore_errors=True)
    for name in ("config.json", "report.json", "report.md", "report.png"):
        (out / name).unlink(missing_ok=True)


if __name__ == "__main__":
    raise SystemExit(run_command(app, after_interrupt="run it again to go on"))
