"""How fast, lean and exact the kernels are on this CPU: `python -m tools.bench.kernels [--quick] [--json PATH]`.

Everything that is compared is interleaved in one process, in another order each round, and compared by medians; peak
memory is taken in a process of its own for each figure. The floor is the matrix products alone, by torch, over all rows
at once. Liger's chunked losses run too where Python finds them (`pip install --no-deps --target DIR liger-kernel`, then
`PYTHONPATH=DIR`); the result says whether they did.
"""

from __future__ import annotations

import importlib.util
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from statistics import median
from typing import Any

import torch

import kernels
from kernels import TopKTargets
from tools.bench.kernels_goals import goals
from tools.bench.kernels_precision import precision
from tools.bench.kernels_subjects import DTYPES, FORWARD_WEIGHT, SUBJECTS, Floor, Shape, Work
from tools.bench.result import keep, options

KEPT = 64


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much to measure."""

    time: Shape
    memory: Shape
    many_rows: int
    precision: Shape
    rounds: int


FULL = Size(
    time=Shape(rows=512, vocab=151_936, student_width=1024, teacher_width=2560),
    memory=Shape(rows=1024, vocab=151_936, student_width=1024, teacher_width=2560),
    many_rows=8192,
    precision=Shape(rows=64, vocab=32_768, student_width=1024, teacher_width=1024),
    rounds=4,
)
QUICK = Size(
    time=Shape(rows=256, vocab=16_384, student_width=512, teacher_width=1024),
    memory=Shape(rows=512, vocab=16_384, student_width=128, teacher_width=256),
    many_rows=2048,
    precision=Shape(rows=16, vocab=4096, student_width=256, teacher_width=256),
    rounds=3,
)


def interleaved_s(actions: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median wall seconds of each action, all of them run in every round; a first round warms up and is not counted.

    Each round shuffles them: what an action pays for fresh memory depends on what ran before it.
    """
    names = list(actions)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds + 1):
        for name in random.Random(number).sample(names, len(names)):
            started = time.perf_counter()
            actions[name]()
            if number:
                seconds[name].append(time.perf_counter() - started)
        print(f"  round {number} of {rounds}", file=sys.stderr)
    return {name: median(values) for name, values in seconds.items()}


def _step(subject: str, work: Work, objective: str) -> None:
    SUBJECTS[subject](work, objective)
    work.take_gradients()


def exact(size: Size, dtype: str, with_liger: bool) -> dict[str, Any]:
    """Forward plus backward against the floor and the peers."""
    work = Work.random(size.time, DTYPES[dtype])
    frozen = replace(work, student_weight=work.student_weight.detach())
    actions: dict[str, Callable[[], object]] = {"floor": Floor(work), "floor_frozen_head": Floor(frozen)}
    for objective in FORWARD_WEIGHT:
        actions[f"native_{objective}"] = partial(_step, "native", work, objective)
    actions["native_frozen_head_forward"] = partial(_step, "native", frozen, "forward")
    if dtype == "bf16":  # as under autocast
        master = replace(work, student_weight=work.student_weight.detach().float().requires_grad_())
        actions["native_fp32_master_weight_forward"] = partial(_step, "native", master, "forward")
    for peer in ("plain", "liger") if with_liger else ("plain",):
        for objective in ("forward", "reverse"):
            actions[f"{peer}_{objective}"] = partial(_step, peer, work, objective)
    seconds = interleaved_s(actions, size.rounds)
    floor = {name: seconds["floor_frozen_head" if "frozen" in name else "floor"] for name in seconds}
    return {
        "seconds_s": seconds,
        "over_floor_ratio": {name: seconds[name] / floor[name] for name in seconds if not name.startswith("floor")},
    }


def sparse(size: Size, dtype: str) -> dict[str, Any]:
    """The top-k losses against cross-entropy by the same code."""
    student, _ = Work.random(size.time, DTYPES[dtype]).heads
    rows, generator = size.time.rows, torch.Generator().manual_seed(1)
    ids = torch.stack([torch.randperm(size.time.vocab, generator=generator)[:KEPT].sort().values for _ in range(rows)])
    log_probs = torch.randn(rows, KEPT, generator=generator).log_softmax(1) + torch.tensor(0.95).log()
    targets = TopKTargets(
        ids=ids.flatten().int(),
        log_probs=log_probs.flatten(),
        row_splits=torch.arange(rows + 1) * KEPT,
        tail_log_mass=torch.full((rows,), 0.05).log(),
        entropy=torch.ones(rows),
    )

    def run(loss: Callable[[], torch.Tensor]) -> None:
        loss().sum().backward()
        student.hidden.grad = student.weight.grad = None

    ones = torch.ones(rows)
    actions: dict[str, Callable[[], object]] = {
        "cross_entropy": lambda: run(
            lambda: -kernels.selected_log_probs(student, ids[:, 0], token_weight=ones).log_probs
        ),
        "top_k_forward": lambda: run(lambda: kernels.forward_kl_coarse(student, targets).loss),
        "top_k_reverse": lambda: run(lambda: kernels.reverse_kl_coarse(student, targets).loss),
    }
    seconds = interleaved_s(actions, size.rounds)
    return {
        "kept_per_row": KEPT,
        "seconds_s": seconds,
        "over_cross_entropy_ratio": {name: s / seconds["cross_entropy"] for name, s in seconds.items()},
    }


def memory(size: Size, dtype: str, with_liger: bool) -> dict[str, Any]:
    """Peak bytes beyond the gradients of forward plus backward, each in a process of its own."""

    def peak(subject: str, shape: Shape) -> int:
        command = [sys.executable, "-m", "tools.bench.kernels_memory", subject, dtype, "forward"]
        sizes = [str(value) for value in asdict(shape).values()]
        environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "PYTHONPATH": os.pathsep.join(sys.path)}
        done = subprocess.run([*command, *sizes], check=True, capture_output=True, text=True, env=environment)
        return int(done.stdout)

    subjects = ("native", "chunked", "plain", "liger") if with_liger else ("native", "chunked", "plain")
    return {
        "rows": size.memory.rows,
        "peak_extra_bytes": {subject: peak(subject, size.memory) for subject in subjects},
        "many_rows": size.many_rows,
        "native_many_rows_peak_extra_bytes": peak("native", replace(size.memory, rows=size.many_rows)),
    }


def liger_version(with_liger: bool) -> str:
    """As installed, or that it is not."""
    try:
        return version("liger-kernel") if with_liger else "absent"
    except PackageNotFoundError:
        return "unknown"


def measure(size: Size, with_liger: bool) -> dict[str, Any]:
    """Every figure."""
    found: dict[str, Any] = {"exact": {}, "sparse": {}, "memory": {}}
    for dtype in DTYPES:
        print(f"speed, {dtype}", file=sys.stderr)
        found["exact"][dtype] = exact(size, dtype, with_liger)
        found["sparse"][dtype] = sparse(size, dtype)
        print(f"memory, {dtype}", file=sys.stderr)
        found["memory"][dtype] = memory(size, dtype, with_liger)
    print("precision", file=sys.stderr)
    found["precision"] = precision(size.precision, with_liger)
    return found


def main() -> None:
    """Measure and keep."""
    chosen = options("kernels", __doc__ or "")
    with_liger = importlib.util.find_spec("liger_kernel") is not None
    size = QUICK if chosen.quick else FULL
    found = measure(size, with_liger)
    keep(chosen, config={**asdict(size), "liger-kernel": liger_version(with_liger)}, figures=found, goals=goals(found))


if __name__ == "__main__":
    main()
