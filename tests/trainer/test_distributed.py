"""Two ranks over gloo take the steps of one process: real processes, started by torchrun or spawned."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist

from logitcache.errors import UserError
from logitcache.records import ScoredSequence
from logitcache.scorers.hf import HFEngine
from logitcache.scoring import TopKRequest
from tests.trainer.conftest import VOCAB, ListReader
from tests.trainer.test_commands import SIZE, built, of_steps, trainer
from trainer.batch import TeacherHead
from trainer.distributed import ALONE, Ranks, is_left_alone, joined
from trainer.flops import FlopLedger
from trainer.loop import distill
from trainer.objectives import Objective
from trainer.prefixes import CachedPrefixes
from trainer.runs import MetricsLog
from trainer.settings import BatchPlan, Lora, Optimisation, Weighting
from trainer.student import load_student

CPU = torch.device("cpu")
REASONS = (UserError("read part 7", "it is damaged", "rebuild it"), MemoryError())
CASES: dict[str, dict[str, Any]] = {
    "top-k": {"objective": Objective(forward_weight=1.0)},
    # Five sequences one at a time: one rank has a micro-batch more than the other.
    "ragged, by sequence": {
        "objective": Objective(forward_weight=0.3),
        "plan": BatchPlan(sequences=5, max_completion_tokens=16, micro_batch_tokens=1),
        "weighting": Weighting.SEQUENCE,
        "student": {"gradient_checkpointing": True},
    },
    "text too, adapters": {
        "objective": Objective(forward_weight=0.0, cross_entropy_share=0.3),
        "student": {"lora": Lora(rank=4, alpha=8)},
    },
}


def train(case: str, model_dir: Path, scored: list[ScoredSequence], head: TeacherHead, out: Path, ranks: Ranks) -> None:
    """Three steps; leaves `metrics.jsonl`, `ledger.json` and `student/` in `out`."""
    options = CASES[case]
    student = load_student(model_dir, vocab_size=VOCAB, precision="float32", **options.get("student", {}))
    noise = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in student.parameters:
            parameter += 0.05 * torch.randn(parameter.shape, generator=noise)
    student = student.sharded(ranks)
    plan = options.get("plan", BatchPlan(sequences=4, max_completion_tokens=16))
    source = CachedPrefixes(
        reader=ListReader(scored), indices=range(len(scored)), head=head, plan=plan, seed=3, device=CPU, ranks=ranks
    )
    mine = out if ranks.first else out / "other-rank"
    mine.mkdir(parents=True, exist_ok=True)
    ledger = FlopLedger()
    with MetricsLog(mine / "metrics.jsonl") as metrics:
        distill(
            student=student,
            source=source,
            objective=options["objective"],
            optimisation=Optimisation(steps=3, learning_rate=1e-3, warmup_steps=2),
            ledger=ledger,
            metrics=metrics,
            weighting=options.get("weighting", Weighting.TOKEN),
        )
    (mine / "ledger.json").write_text(json.dumps({str(phase): flops for phase, flops in ledger.by_phase().items()}))
    student.save(out / "student")


def rank_main(rank: int, init: str, arguments: tuple[Any, ...], out: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=init, rank=rank, world_size=2)
    for case in CASES:
        model_dir, by_kind, head = arguments
        train(case, model_dir, by_kind[case == "top-k"], head, out / case / "two", Ranks(rank=rank, size=2))
    impatient = dist.new_group(timeout=timedelta(milliseconds=100))
    if rank == 0:
        with pytest.raises(RuntimeError) as waited:
            dist.all_reduce(torch.zeros(1), group=impatient)
        assert is_left_alone(waited.value), waited.value
    dist.barrier()
    dist.destroy_process_group()


def failing_rank(rank: int, ports: Sequence[int], out: Path) -> None:
    """Rank 1 raises each of `REASONS` in turn; leaves what rank 0 then says."""
    as_torchrun = {"TORCHELASTIC_RUN_ID": "tests", "RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    for number, (port, reason) in enumerate(zip(ports, REASONS, strict=True)):
        os.environ.update(as_torchrun | {"MASTER_PORT": str(port)})
        try:
            with joined() as ranks:
                if rank == 1:
                    raise reason
                ranks.gathered(torch.zeros(1))
        except (UserError, MemoryError) as error:
            if rank == 0:
                (out / f"said-{number}").write_text(str(error))
        dist.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_take_the_steps_of_one(
    tiny_dir: Path, teacher: HFEngine, scored: list[ScoredSequence], head: TeacherHead, tmp_path: Path
) -> None:
    """Losses, gradient norms, FLOPs and saved weights."""
    request = TopKRequest(max_k=16)
    kept = teacher.score([one.sequence for one in scored], [request])
    top_k = [replace(one, targets=targets) for one, (targets,) in zip(scored, kept, strict=True)]
    by_kind = [scored, top_k]
    arguments = (tiny_dir, by_kind, head)
    torch.multiprocessing.spawn(rank_main, args=(f"file://{tmp_path}/init", arguments, tmp_path), nprocs=2)
    for case in CASES:
        one, two = tmp_path / case / "one", tmp_path / case / "two"
        train(case, tiny_dir, by_kind[case == "top-k"], head, one, ALONE)
        same_to_rounding(of_steps(one), of_steps(two))
        same_to_rounding(of_steps(two), of_steps(two / "other-rank"))
        ledgers = [json.loads((place / "ledger.json").read_text()) for place in (one, two, two / "other-rank")]
        assert ledgers[0] == ledgers[1] == ledgers[2]
        same_weights(one / "student", two / "student")


@pytest.mark.slow
def test_the_other_ranks_end_with_a_failed_ones_reason(tmp_path: Path) -> None:
    with socket.socket() as one, socket.socket() as two:
        ports = []
        for free in (one, two):
            free.bind(("127.0.0.1", 0))
            ports.append(free.getsockname()[1])
    torch.multiprocessing.spawn(failing_rank, args=(ports, tmp_path), nprocs=2)
    said = [(tmp_path / f"said-{number}").read_text() for number in range(2)]
    assert "another rank has ended (rank 1: read part 7: it is damaged; rebuild it)" in said[0]
    assert "another rank has ended (rank 1: MemoryError)" in said[1]


def same_to_rounding(one: list[dict[str, Any]], two: list[dict[str, Any]]) -> None:
    assert len(one) > 0
    for mine, theirs in zip(one, two, strict=True):
        exact = {name for name, value in mine.items() if not isinstance(value, float)}
        assert {name: mine[name] for name in exact} == {name: theirs[name] for name in exact}
        assert theirs == pytest.approx(mine, rel=1e-4)


def same_weights(one: Path, two: Path) -> None:
    """Both load. Adam's first steps are signs of gradients, so few elements may differ: those without a gradient."""
    from transformers import AutoModelForCausalLM

    mine, theirs = (AutoModelForCausalLM.from_pretrained(place).state_dict() for place in (one, two))
    assert mine.keys() == theirs.keys()
    assert all(float(((mine[name] - theirs[name]).abs() > 1e-4).float().mean()) < 1e-3 for name in mine)


@pytest.mark.slow
def test_torchrun_trains_and_a_killed_rank_leaves_a_run_that_goes_on(tiny_dir: Path, tmp_path: Path) -> None:
    cache, out = built(tmp_path, tiny_dir, "hidden"), tmp_path / "two"
    options = ["distill", str(cache), "--student", str(tiny_dir), *SIZE, "--checkpoint-every", "1"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "trainer.cli"]
    launch += [*options, "--out", str(out)]
    one = trainer(*options, "--out", tmp_path / "one", "--json")
    assert one.returncode == 0, one.stderr
    running = subprocess.Popen(launch, stderr=subprocess.PIPE, text=True)
    while running.poll() is None and not list((out / "checkpoints").glob("step-*")):
        time.sleep(0.002)
    ranks = [child for child in psutil.Process(running.pid).children() if "trainer.cli" in child.cmdline()]
    assert len(ranks) == 2
    ranks[1].send_signal(signal.SIGKILL)
    said = running.communicate(timeout=120)[1]
    assert running.returncode != 0
    assert not (out / "result.json").exists()
    assert "Signal 9" in said  # of torchrun's report
    alone = trainer(*options, "--out", out)
    assert "ranks: 2 there, 1 asked" in alone.stderr
    again = subprocess.run([*launch, "--json"], capture_output=True, text=True, timeout=120, check=False)
    assert again.returncode == 0, again.stderr
    assert again.stderr.count("going on after step ") == 1
    same_to_rounding(of_steps(tmp_path / "one"), of_steps(out))
    expected, result = json.loads(one.stdout), json.loads(again.stdout)  # one answer, by the first rank
    assert result["flops"] == expected["flops"]
    for name, change in expected["held_out"].items():
        assert result["held_out"][name] == pytest.approx(change, rel=1e-4)
    same_weights(tmp_path / "one" / "student", out / "student")
