"""The laptop-scale study: the four cells, mixes, the curriculum and GRPO in a world of sums, from cache to report.

    python -m tools.studies.grid --out runs/study            about 30 minutes on two quiet cores
    python -m tools.studies.grid --out runs/quick --quick    minutes; its report goes into --out and shows nothing

Guarantees: two processes at a time, a thread each; a study that was killed goes on, and no run that is done is done
again; another configuration in the same place is refused. The full study keeps its figures in `tools/studies/results`,
one JSON a study, with the time it took over all restarts, and writes docs/results.md and its plots from them alone.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

from cyclopts import App

from logitcache.console import Progress, note, run_command
from logitcache.errors import UserError, require
from logitcache.identity import weights_fingerprint
from logitcache.jobs import BuildRequest, build_cache
from tools.bench.result import at_least, at_most, keep
from tools.studies.claims import Results
from tools.studies.measuring import ANSWERED, STYLE, Exam
from tools.studies.report import DOCS, RESULTS, STUDIES, write_report
from tools.studies.run import CACHE, PROBLEMS, measured
from tools.studies.study import SIZES, Distilled, Run, Size, cells, curricula, mixes, policies, stages
from tools.studies.teacher import MODELS
from tools.studies.world import training_sums, write_problems
from trainer.provenance import commit, device_name, versions
from trainer.report import require_plotting
from trainer.runs import open_run, write_json

GAIN = 0.3
"""Avg@8 that the best cell must gain, as a share of 1."""
MINUTES = 90
"""That the study may take on two cores."""
_KEPT_EVERY_S = 10.0

app = App(name="grid", help=__doc__.splitlines()[0], version_flags=[])


@app.default
def grid(*, out: Path = Path("runs/study"), quick: bool = False, processes: int = 2) -> int:
    """Run what is missing, and report.

    Args:
        out: where runs go; the same command goes on there.
        quick: a small size, to see that everything works.
        processes: runs at a time.
    """
    require_plotting()
    require(processes >= 1, "--processes, at least 1", processes)
    name = "quick" if quick else "full"
    size = SIZES[name]
    models = {model: weights_fingerprint(MODELS / model) for model in ("teacher", "student")}
    where = {"versions": versions(), "device": device_name(), "commit": commit()}
    open_run(out, {"command": "study", "size": asdict(size), "models": models, **where})
    clock = Clock(out / "elapsed.json")
    _prepare(out, size)
    for stage in stages(size):
        _run_all(stage, out, name, processes, clock)
    results, docs = (out / "results", out) if quick else (RESULTS, DOCS)
    config = {**asdict(size), "models": models, "processes": processes}
    _collect(out, size, Namespace(quick=quick, json=results), config, clock.keep())
    write_report(results, docs)
    note(f"done: see {docs / 'results.md'}")
    return 0


class Clock:
    """Seconds of work on a study, of one invocation after another, kept in a file."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._before = float(json.loads(file.read_text())["elapsed_s"]) if file.exists() else 0.0
        self._started = time.monotonic()

    def keep(self) -> float:
        """What it has come to. Of an invocation that is killed, what was kept last counts."""
        elapsed_s = self._before + time.monotonic() - self._started
        write_json(self._file, {"elapsed_s": elapsed_s})
        return elapsed_s


def _prepare(out: Path, size: Size) -> None:
    """Problems, the teacher's cache, and what both models can do before any run."""
    write_problems(out / PROBLEMS, training_sums(size.problems))
    request = BuildRequest(
        problems=str(out / PROBLEMS),
        out=str(out / CACHE),
        teacher=str(MODELS / "teacher"),
        targets="full",
        dtype="float32",
        problems_per_unit=512,
    )
    build_cache(request, sampling=ANSWERED, style=STYLE)
    if not (out / "start.json").exists():
        exam = Exam(problems=size.exam)
        write_json(out / "start.json", {name: measured(MODELS / name, exam) for name in ("student", "teacher")})


def _run_all(stage: Sequence[Run], out: Path, size: str, processes: int, clock: Clock) -> None:
    """Each in a process of its own, so that one thread is one thread and a kill loses one run."""
    missing = [run for run in stage if not (out / "runs" / f"{run.name}.json").exists()]
    (out / "logs").mkdir(exist_ok=True)

    def run_one(run: Run) -> None:
        command = [sys.executable, "-m", "tools.studies.run", "--out", str(out), "--name", run.name, "--size", size]
        log = out / "logs" / f"{run.name}.txt"
        with log.open("w") as file:
            code = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=_one_thread(), check=False)
        if code.returncode:
            found = (log.read_text().splitlines() or ["no word"])[-1]
            raise UserError(f"run {run.name}", found, f"see {log}; the same command goes on")
        progress.add()

    with Progress("study", len(stage), "runs") as progress, ThreadPoolExecutor(processes) as pool:
        progress.add(len(stage) - len(missing))
        pending = {pool.submit(run_one, run) for run in missing}
        try:
            while pending:
                done, pending = wait(pending, timeout=_KEPT_EVERY_S, return_when=FIRST_COMPLETED)
                clock.keep()
                for future in done:
                    future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _one_thread() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}


def _collect(out: Path, size: Size, chosen: Namespace, config: dict[str, Any], elapsed_s: float) -> None:
    """One JSON a study, from the runs', in the folder `chosen.json`."""
    start = json.loads((out / "start.json").read_text())
    parts: dict[str, Sequence[Run]] = {
        "cells": cells(size),
        "mixes": mixes(size),
        "curriculum": curricula(size),
        "grpo": policies(size),
    }
    assert tuple(parts) == STUDIES
    for study, members in parts.items():
        runs = {run.name: json.loads((out / "runs" / f"{run.name}.json").read_text()) for run in members}
        figures: dict[str, Any] = {"start": start, "runs": runs}
        goals = []
        if study == "cells":
            figures["elapsed_s"] = elapsed_s
            goals = [best_cell(size, start, runs), at_most("the whole study", MINUTES, elapsed_s / 60, "minutes")]
        place = Namespace(quick=chosen.quick, json=chosen.json / f"{study}.json")
        keep(place, config=config, figures=figures, goals=goals)


def best_cell(size: Size, start: dict[str, Any], runs: dict[str, Any]) -> dict[str, Any]:
    """The goal of the study: what the best cell gains over the start, mean over its seeds.

    It is chosen on one half of the exam and judged on the other: the best of eight is partly luck.
    """
    found = Results(size=size, start=start, runs=runs)
    members: dict[str, list[Distilled]] = {}
    for run in cells(size):
        members.setdefault(f"{run.prefix}-{run.forward_weight:g}-{run.window}", []).append(run)

    def mean_of(cell: str, figure: str) -> float:
        return fmean(found.final(run, figure) for run in members[cell])

    best = max(members, key=lambda cell: mean_of(cell, "avg_at_8_even"))
    gained = mean_of(best, "avg_at_8_odd") - found.before("avg_at_8_odd")
    what = f"best cell ({best}, chosen on half of the problems): Avg@8 gained over the start on the other half"
    return at_least(what, GAIN, gained, "(1 is all)")


if __name__ == "__main__":
    raise SystemExit(run_command(app, after_interrupt="run it again to go on"))
