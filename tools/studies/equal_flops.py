"""Equal-FLOP runs of the four cells and two mixes, three budgets and three seeds each, by the commands a user types.

    python -m tools.studies.equal_flops smollm2 [--out runs/equal] [--data ../shared/data] [--quick]
    python -m tools.studies.equal_flops study   [--out runs/equal] [--quick]

`smollm2`: real DeepScaleR, SmolLM2-135M and a student of 20 of its layers, measured in KL. `study`: the world of
`tools.studies.world`, whose accuracy means something. Either is 18 runs; killed, the same command goes on. A whole one
is kept as tools/studies/results/equal_flops_NAME.json and docs/equal_flops_NAME.png, and `python -m tools.render` puts
it into docs/equal_flops.md; --quick is one seed at a small budget, and is not kept.
"""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
from enum import StrEnum
from pathlib import Path

from cyclopts import App

from logitcache.console import note, run_command
from trainer.budget_report import JSON, PLOT

ROOT = Path(__file__).parents[2]
RESULTS, DOCS, MODELS = ROOT / "tools" / "studies" / "results", ROOT / "docs", ROOT / "tools" / "studies" / "models"
EVERY_RUN = "--mixes 1 0 0.5 --parts 2"
SMOLLM2 = "--window 32 --sequences 4 --held-out-sequences 16"
WORLD = "--instruction '' --max-new-tokens 96"

app = App(name="equal_flops", help=__doc__.splitlines()[0], version_flags=[])


class Name(StrEnum):
    """Which one."""

    SMOLLM2 = "smollm2"
    STUDY = "study"


@app.default
def main(
    name: Name, /, *, out: Path = Path("runs/equal"), data: Path = Path("../shared/data"), quick: bool = False
) -> int:
    """Build a cache, do the runs, and keep the report.

    Args:
        name: which one.
        out: where cache, student and runs go.
        data: folder of the real problem sets.
        quick: one seed at a small budget, to see that it runs; not kept.
    """
    place = out / (f"{name}-quick" if quick else name)
    for product, command in _commands(name, place, shlex.quote(str(data)), quick):
        if not product.exists():
            note(f"$ {command}")
            program, *words = shlex.split(command)
            module = "tools.studies.world" if program == "world" else f"{program}.cli"
            if code := subprocess.run([sys.executable, "-m", module, *words], check=False).returncode:
                return code
    if not quick:
        RESULTS.mkdir(exist_ok=True)
        shutil.copy(place / "runs" / JSON, RESULTS / f"equal_flops_{name}.json")
        shutil.copy(place / "runs" / PLOT, DOCS / f"equal_flops_{name}.png")
    return 0


def _commands(name: Name, place: Path, data: str, quick: bool) -> list[tuple[Path, str]]:
    """What each makes, and how."""
    cache, student, report = place / "cache", place / "student", place / "runs" / JSON
    runs = f"--seeds {'0' if quick else '0 1 2'} {EVERY_RUN} --out {place / 'runs'}"
    match name:
        case Name.SMOLLM2:
            size = f"--limit {64 if quick else 192} --max-new-tokens 32 --problems-per-unit 32 --targets hidden"
            budgets = "1e12" if quick else "2e12 4e12 8e12"
            equal = f"--student {student} --teacher embedded --budgets {budgets} {SMOLLM2} {runs}"
            return [
                (
                    cache / "manifest.json",
                    f"logitcache build --teacher embedded --problems {data}/deepscaler.parquet {size} --out {cache}",
                ),
                (student, f"trainer prune embedded --cache {cache} --layers 20 --out {student}"),
                (report, f"trainer equal-flops {cache} {equal}"),
            ]
        case Name.STUDY:
            problems, teacher = place / "world", MODELS / "teacher"
            size = f"--problems-per-unit 512 --limit {512 if quick else 4096} --targets full --dtype float32 {WORLD}"
            budgets = "1e11" if quick else "7.5e11 1.5e12 3e12"
            training = "--window 96 --sequences 32 --learning-rate 5e-4 --precision float32"
            answers = f"--problems {problems}/easy.jsonl --limit {20 if quick else 100} --samples 4 {WORLD}"
            equal = (
                f"--student {MODELS / 'student'} --teacher {teacher} --budgets {budgets} {training} {answers} {runs}"
            )
            return [
                (problems, f"world --out {problems}"),
                (
                    cache / "manifest.json",
                    f"logitcache build --teacher {teacher} --problems {problems}/train.jsonl {size} --out {cache}",
                ),
                (report, f"trainer equal-flops {cache} {equal}"),
            ]


if __name__ == "__main__":
    raise SystemExit(run_command(app, after_interrupt="run it again to go on"))
