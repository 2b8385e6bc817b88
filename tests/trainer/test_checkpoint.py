"""Checkpoints: a run goes on bit for bit, the last good one survives everything, and another run's is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from logitcache.errors import IdentityError, UserError
from tests.trainer.conftest import room
from trainer.batch import TeacherHead
from trainer.checkpoint import MODEL, OPTIMIZER, STATE, Checkpoints
from trainer.flops import FlopLedger
from trainer.loop import distill
from trainer.objectives import Objective
from trainer.prefixes import CachedPrefixes
from trainer.runs import MetricsLog, open_run
from trainer.settings import BatchPlan, Optimisation
from trainer.student import Student, load_student

TIMES = {"draw_s", "step_s"}


class Counter:
    """Another stateful part, as a curriculum will be one."""

    def __init__(self) -> None:
        self.count = 0

    def state(self) -> dict[str, Any]:
        return {"count": self.count}

    def restore(self, state: dict[str, Any]) -> None:
        self.count = state["count"]


class Stopped(Exception):
    pass


def train(
    tiny_dir: Path,
    reader: Any,
    head: TeacherHead,
    out: Path,
    *,
    stop_after: int | None = None,
    every: int = 2,
) -> tuple[Student, FlopLedger, Counter]:
    """Six steps of a student that is not its teacher, from wherever `out` stands."""
    student = load_student(tiny_dir, vocab_size=49_152, precision="float32")
    noise = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in student.parameters:
            parameter += 0.05 * torch.randn(parameter.shape, generator=noise)
    plan = BatchPlan(sequences=3, max_completion_tokens=16)
    ledger, counter = FlopLedger(), Counter()

    def on_step(line: dict[str, Any]) -> None:
        counter.count += 1
        if line["step"] == stop_after:
            raise Stopped

    out.mkdir(exist_ok=True)
    with MetricsLog(out / "metrics.jsonl") as metrics:
        distill(
            student=student,
            source=CachedPrefixes(
                reader=reader, indices=range(len(reader)), head=head, plan=plan, seed=3, device=torch.device("cpu")
            ),
            objective=Objective(forward_weight=0.5),
            optimisation=Optimisation(steps=6, learning_rate=3e-3, warmup_steps=2),
            ledger=ledger,
            metrics=metrics,
            checkpoints=Checkpoints(directory=out / "checkpoints", every=every),
            stateful={"counter": counter},
            on_step=on_step,
        )
    return student, ledger, counter


def lines(out: Path) -> list[dict[str, Any]]:
    read = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in TIMES} for line in read]


@pytest.mark.parametrize("stop_after", [0, 2, 3, 5])
def test_a_run_that_goes_on_is_the_run_that_never_stopped(
    stop_after: int, tiny_dir: Path, reader: Any, head: TeacherHead, tmp_path: Path
) -> None:
    whole, ledger, counter = train(tiny_dir, reader, head, tmp_path / "whole")
    with pytest.raises(Stopped):
        train(tiny_dir, reader, head, tmp_path / "cut", stop_after=stop_after)
    with (tmp_path / "cut" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "torn')
    again, again_ledger, again_counter = train(tiny_dir, reader, head, tmp_path / "cut")
    assert lines(tmp_path / "cut") == lines(tmp_path / "whole")
    assert len(lines(tmp_path / "cut")) == 6
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters, again.parameters, strict=True))
    assert again_ledger.rows == ledger.rows
    assert again_counter.count == counter.count == 6


def test_only_the_newest_stay(tiny_dir: Path, reader: Any, head: TeacherHead, tmp_path: Path) -> None:
    train(tiny_dir, reader, head, tmp_path, every=1)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-00000005", "step-00000006"]


def test_a_full_disk_leaves_the_last_good_one(tiny_dir: Path, reader: Any, head: TeacherHead, tmp_path: Path) -> None:
    whole, *_ = train(tiny_dir, reader, head, tmp_path / "whole")
    out = tmp_path / "full"
    with pytest.raises(Stopped):
        train(tiny_dir, reader, head, out, stop_after=2)
    with room(1 << 20), pytest.raises(UserError, match="the one of step 2 is good"):
        train(tiny_dir, reader, head, out)
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-00000002"]
    again, *_ = train(tiny_dir, reader, head, out)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters, again.parameters, strict=True))


@pytest.mark.parametrize("name", [MODEL, OPTIMIZER, STATE])
def test_a_damaged_checkpoint_is_one_line(
    name: str, tiny_dir: Path, reader: Any, head: TeacherHead, tmp_path: Path
) -> None:
    with pytest.raises(Stopped):
        train(tiny_dir, reader, head, tmp_path, stop_after=2)
    file = tmp_path / "checkpoints" / "step-00000002" / name
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match="it is damaged"):
        train(tiny_dir, reader, head, tmp_path)


def test_one_is_written_after_the_last_step(tiny_dir: Path, reader: Any, head: TeacherHead, tmp_path: Path) -> None:
    """Whatever the interval: what follows the steps can be killed too, and must not repeat them."""
    train(tiny_dir, reader, head, tmp_path, every=4)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-00000004", "step-00000006"]
    *_, counter = train(tiny_dir, reader, head, tmp_path, every=4)
    assert counter.count == len(lines(tmp_path)) == 6


def test_what_it_was_trained_from_is_kept_and_another_is_refused(tmp_path: Path) -> None:
    mine = {"cache_manifest": "aa", "student": {"name": "s", "fingerprint": "bb"}}
    model = torch.nn.Linear(2, 2)
    optimizer, parts = torch.optim.AdamW(model.parameters()), {"counter": Counter()}
    Checkpoints(directory=tmp_path, every=1, identity=mine).save(1, model, optimizer, parts)
    saved = model.weight.detach().clone()
    torch.nn.init.zeros_(model.weight)
    for other in ({**mine, "cache_manifest": "cc"}, {**mine, "student": {"name": "s", "fingerprint": "cc"}}, None):
        with pytest.raises(IdentityError, match="it is of another"):
            Checkpoints(directory=tmp_path, every=1, identity=other).restore(model, optimizer, parts)
    assert not model.weight.any()
    assert Checkpoints(directory=tmp_path, every=1, identity=mine).restore(model, optimizer, parts) == 1
    assert torch.equal(model.weight, saved)


def test_what_is_not_named_as_one_is_none(tmp_path: Path) -> None:
    for name in ("step-00000002", "step-00000004.bad", "step-new"):
        (tmp_path / name).mkdir()
    assert Checkpoints(directory=tmp_path, every=1).latest() == 2


def test_another_configuration_is_refused_and_named(tmp_path: Path) -> None:
    out = tmp_path / "run"
    config = {"cache_manifest": "a", "training": {"steps": 3, "seed": 0}, "commit": "x", "device": "cpu"}
    assert open_run(out, config) is False
    assert open_run(out, {**config, "commit": "y", "device": "gpu"}) is True
    with pytest.raises(UserError, match=r"training\.seed: 0 there, 1 asked"):
        open_run(out, {**config, "training": {"steps": 3, "seed": 1}})
    with pytest.raises(UserError, match='cache_manifest: "a" there, "b" asked'):
        open_run(out, {**config, "cache_manifest": "b"})
    (out / "config.json").write_text("{")
    with pytest.raises(UserError, match="damaged"):
        open_run(out, config)


@pytest.mark.parametrize("options", [{"every": 0}, {"every": 1, "keep": 0}])
def test_impossible_plans_are_refused(options: dict[str, int], tmp_path: Path) -> None:
    with pytest.raises(UserError):
        Checkpoints(directory=tmp_path, **options)
