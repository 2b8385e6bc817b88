"""A student that has its targets from a server learns exactly what one does that has them from a disk, or a teacher."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from logitcache.codecs import HiddenStateCodec
from logitcache.console import run_command
from logitcache.records import Head, ScoredSequence
from logitcache.scorers.hf import HFEngine
from logitcache.scoring import TopKRequest
from logitcache.service.scorer import open_scorer
from logitcache.store import create, open_cache
from tests.trainer.conftest import random_sequence
from tests.trainer.test_commands import SIZE, built
from tests.trainer.test_loop import lines, train
from trainer.batch import TeacherHead
from trainer.cli import app
from trainer.flops import FlopLedger, Phase
from trainer.student import load_student

IDENTITY = {"teacher": {"name": "tiny"}, "tokenizer": {"fingerprint": "tests"}}


@pytest.fixture
def cache(scored: list[ScoredSequence], teacher: HFEngine, tmp_path: Path) -> str:
    """The teacher's hidden states, as bfloat16, with their head."""
    place, codec = str(tmp_path / "cache"), HiddenStateCodec(head=Head(weight=teacher.head.weight))
    store = create(place, IDENTITY)
    store.create_tier("hidden", codec)
    store.write_sequences("0", [item.sequence for item in scored])
    store.write_targets("0", "hidden", codec, [item.targets for item in scored])
    store.seal()
    return place


class Served:
    """`logitcache serve` in a process that can be killed and started again at its address."""

    def __init__(self, *arguments: str) -> None:
        self.arguments, self.port = arguments, 0
        self.start()

    def start(self) -> None:
        options = ["--port", str(self.port), "--json"]
        command = [sys.executable, "-m", "logitcache.cli", "serve", *self.arguments, *options]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        assert self.process.stdout is not None
        self.location = json.loads(self.process.stdout.readline())["location"]
        self.port = int(self.location.rpartition(":")[2])

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()


def losses(reader: Any, head: TeacherHead, tiny_dir: Path, directory: Path) -> list[Any]:
    student = load_student(tiny_dir, vocab_size=head.weight.shape[0], precision="float32")
    train(student, reader, head, directory, steps=4, forward_weight=0.5)
    return [(line["loss_nats"], line["grad_norm"]) for line in lines(directory)]


def test_losses_are_bit_identical_through_a_kill(cache: str, head: TeacherHead, tiny_dir: Path, tmp_path: Path) -> None:
    wanted = losses(open_cache(cache, targets="hidden"), head, tiny_dir, tmp_path / "local")
    assert len(set(wanted)) == 4
    served = Served(cache)
    try:
        for decoded in (False, True):
            options = {"decoded": decoded}
            reader = open_cache(f"{served.location}/cache", targets="hidden", storage_options=options)
            assert reader.head is not None
            assert reader.head.fingerprint == head.fingerprint
            assert losses(reader, head, tiny_dir, tmp_path / f"served-{decoded}") == wanted
        served.kill()
        again = threading.Thread(target=lambda: (time.sleep(0.5), served.start()))
        again.start()
        assert losses(reader, head, tiny_dir, tmp_path / "killed") == wanted
        again.join()
    finally:
        served.kill()


def test_the_trainer_reads_a_served_cache_as_one_on_a_disk(
    tiny_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = built(tmp_path, tiny_dir, "hidden")
    served, kept = Served(str(place)), tmp_path / "kept"
    monkeypatch.setenv("LOGITCACHE_DISK_CACHE", str(kept))
    try:
        for name, url in (("local", place), ("served", f"{served.location}/cache")):
            assert not kept.exists()
            command = ["distill", url, "--student", tiny_dir, "--out", tmp_path / name, *SIZE]
            assert run_command(app, [str(word) for word in command], after_interrupt="") == 0
    finally:
        served.kill()
    found = [
        [line["loss_nats"] for line in lines(tmp_path / name) if "loss_nats" in line] for name in ("local", "served")
    ]
    assert found[0] == found[1]
    assert len(found[0]) == 6
    assert any(path.is_file() for path in kept.rglob("*"))


@pytest.mark.slow
def test_a_served_teacher_gives_the_losses_of_one_in_the_process(tiny_dir: Path, tmp_path: Path) -> None:
    """And a second student with the same text pays for no scoring: it is read."""
    place = built(tmp_path, tiny_dir, "hidden")
    teacher = f"tiny={tiny_dir}"
    served = Served(str(place), "--teacher", teacher, "--dtype", "float32", "--scores", str(tmp_path / "scores"))
    try:
        teachers = {"local": str(tiny_dir), "served": f"{served.location}#tiny", "kept": f"{served.location}#tiny"}
        for name, by in teachers.items():
            options = ["--prefix", "student", "--teacher", by, "--out", tmp_path / name, *SIZE[2:], "--steps", "2"]
            command = ["distill", place, "--student", tiny_dir, *options]
            assert run_command(app, [str(word) for word in command], after_interrupt="") == 0
        steps = [lines(tmp_path / name) for name in teachers]
        found = [[(line["loss_nats"], line["grad_norm"]) for line in some if "loss_nats" in line] for some in steps]
        assert len(found[0]) == 2
        assert found[0] == found[1] == found[2]
        ledgers = [json.loads((tmp_path / name / "ledger.json").read_text())["rows"] for name in teachers]
        paid = [FlopLedger.from_json(rows).by_phase()[Phase.TEACHER_PREFILL] for rows in ledgers]
        assert paid[0] == paid[1] > 0
        assert paid[2] == 0
        for rows in ledgers:
            restored = FlopLedger()
            restored.restore(FlopLedger.from_json(rows).state())
            assert restored.to_json() == rows
        asked = [[(row["hits"], row["misses"]) for row in rows if "hits" in row] for rows in ledgers]
        assert asked[0] == asked[1] == [(0, 4), (0, 4)]
        assert asked[2] == [(4, 0), (4, 0)]
        scorer = open_scorer(teachers["served"])
        texts = [random_sequence(number, 2, 5) for number in range(3)]
        before = scorer.score(texts, [TopKRequest(max_k=5)])
        served.kill()
        again = threading.Thread(target=served.start)
        again.start()
        after = scorer.score_counted(texts, [TopKRequest(max_k=5)])
        again.join()
        assert after.passes == [0, 0, 0]
        for (one,), (other,) in zip(before, after.targets, strict=True):
            assert all(np.array_equal(value, vars(other)[name]) for name, value in vars(one).items())
    finally:
        served.kill()
