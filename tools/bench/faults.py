"""Builds that are killed: is the sealed cache the one that was never interrupted, byte for byte?

    python -m tools.bench.faults [--quick] [--json PATH]

Every build is a process of its own that is killed with SIGKILL at a random moment and run again, until it ends. The
processes are forked from one that has imported torch already, so that the moments fall on work and not on imports; the
teacher is a tiny Llama with random weights and the embedded teacher's tokenizer, so that a hundred kills take minutes.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import random
import signal
import tempfile
import time
from pathlib import Path

from logitcache.console import Progress
from logitcache.jobs import BuildRequest, build_cache
from logitcache.prompts import PromptStyle
from logitcache.scoring import Sampling
from tools.bench.result import at_least, keep, options
from tools.bench.tiny import tiny_teacher

KILLS_PER_BUILD = 4


def main() -> None:
    """Measure and keep."""
    chosen = options("faults", __doc__)
    kills, draw = 8 if chosen.quick else 100, random.Random(0)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        tiny_teacher(root / "teacher")
        started = time.perf_counter()
        _finish(root, "whole", chosen.data)
        uninterrupted_s = time.perf_counter() - started
        truth = _digest(root / "whole")
        killed = builds = identical = 0
        with Progress("kill", kills, "kills") as progress:
            while killed < kills:
                name = f"build-{builds}"
                for _ in range(min(KILLS_PER_BUILD, kills - killed)):
                    if _kill(root, name, chosen.data, draw.uniform(0, uninterrupted_s)):
                        killed += 1
                        progress.add()
                _finish(root, name, chosen.data)
                builds, identical = builds + 1, identical + (_digest(root / name) == truth)
    keep(
        chosen,
        config={"teacher": "random Llama, 2 layers, width 64", "kills_per_build": KILLS_PER_BUILD},
        figures={"kills": killed, "builds": builds, "identical_builds": identical, "uninterrupted_s": uninterrupted_s},
        goals=[
            at_least("kill -9 at random moments of a build", 100, killed, "kills"),
            at_least("resumed builds byte-identical to the uninterrupted one", 1.0, identical / builds, "of all"),
        ],
    )


def _build(root: Path, name: str, data: Path) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    build_cache(
        BuildRequest(problems=str(data / "deepscaler.parquet"), out=str(root / name), teacher=str(root / "teacher"),
                     limit=24, problems_per_unit=4, targets="topk:k=64,hidden"),
        sampling=Sampling(max_new_tokens=16),
        style=PromptStyle(),
    )  # fmt: skip


def _start(root: Path, name: str, data: Path) -> multiprocessing.context.ForkProcess:
    process = multiprocessing.get_context("fork").Process(target=_build, args=(root, name, data))
    process.start()
    return process


def _kill(root: Path, name: str, data: Path, after_s: float) -> bool:
    """Start a build and kill it; False if it was done before."""
    process = _start(root, name, data)
    process.join(after_s)
    process.kill()
    process.join()
    return process.exitcode == -signal.SIGKILL


def _finish(root: Path, name: str, data: Path) -> None:
    process = _start(root, name, data)
    process.join()
    if process.exitcode != 0:
        raise SystemExit(f"the build of {name} ended with exit code {process.exitcode}")


def _digest(cache: Path) -> str:
    digest = hashlib.sha256()
    for file in sorted(path for path in cache.rglob("*") if path.is_file()):
        digest.update(str(file.relative_to(cache)).encode() + file.read_bytes())
    return digest.hexdigest()


if __name__ == "__main__":
    main()
