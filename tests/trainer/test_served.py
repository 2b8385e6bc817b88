"""A student that reads its targets from a server learns exactly what one does that reads them from disk."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from logitcache.codecs import HiddenStateCodec
from logitcache.records import Head, ScoredSequence
from logitcache.scorers.hf import HFEngine
from logitcache.store import create, open_cache
from tests.trainer.test_loop import lines, train
from trainer.batch import TeacherHead
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

    def __init__(self, cache: str) -> None:
        self.cache, self.port = cache, 0
        self.start()

    def start(self) -> None:
        command = [sys.executable, "-m", "logitcache.cli", "serve", self.cache, "--port", str(self.port), "--json"]
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
