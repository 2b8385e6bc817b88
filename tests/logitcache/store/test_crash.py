"""A writer that dies at any moment: readers see the last commit and nothing else; the build goes on from there."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from logitcache.errors import UserError
from logitcache.store import Store, verify
from logitcache.store.local import LocalPlace
from tests.logitcache.store.conftest import World

SMALL = World(lengths=((3, 5), (1, 0), (7, 40)))


class Killed(BaseException):
    """What a writer does not survive."""


@dataclass(frozen=True, kw_only=True)
class DyingPlace(LocalPlace):
    """Dies before its n-th object appears, leaving a torn temporary file behind, as a killed process does."""

    left: list[int] = field(default_factory=list)

    def write(self, objects: Mapping[str, bytes]) -> None:
        for name, data in objects.items():
            if not self.left[0]:
                self._temporary(data[: len(data) // 2])
                raise Killed
            self.left[0] -= 1
            super().write({name: data})

    def create(self, name: str, data: bytes) -> bool:
        if not self.left[0]:
            self._temporary(data[: len(data) // 2])
            raise Killed
        self.left[0] -= 1
        return super().create(name, data)


def build(store: Store) -> None:
    """What a build does, from wherever it was."""
    committed = store.committed()
    for tier, codec in (("hidden", SMALL.hidden), ("topk", SMALL.topk)):
        store.create_tier(tier, codec)
    for number in range(2):
        unit = SMALL.unit(number)
        if unit not in committed.sequences:
            store.write_sequences(unit, SMALL.sequences(number), {"flops": {"generate": 100.0}})
        if unit not in committed.targets.get("hidden", ()):
            store.write_targets(unit, "hidden", SMALL.hidden, SMALL.hidden_targets(number), SMALL.facts(number))
        if unit not in committed.targets.get("topk", ()):
            store.write_targets(unit, "topk", SMALL.topk, SMALL.topk_targets(number), SMALL.facts(number))
    store.seal(units=2)


def check_reader(where: str) -> None:
    """Whatever can be opened is whole and true."""
    for tier in ("hidden", "topk"):
        try:
            reader = SMALL.open(where, targets=tier, committed=True)
        except UserError:
            continue
        for i, item in enumerate(reader.read(range(len(reader)))):
            number, b = divmod(i, len(SMALL.lengths))
            assert np.array_equal(item.sequence.token_ids, SMALL.sequences(number)[b].token_ids)
            if tier == "hidden":
                assert np.array_equal(item.targets.hidden, SMALL.hidden_targets(number)[b].hidden)


def test_killed_at_each_write(tmp_path, objects_of):
    build(SMALL.start(str(tmp_path / "whole")))
    want = objects_of(str(tmp_path / "whole"))
    for n in range(len(want) + 1):
        where = str(tmp_path / f"killed-{n}")
        store = SMALL.start(where)
        dying = replace(store, place=DyingPlace(root=where, left=[n]))
        died = False
        try:
            build(dying)
        except Killed:
            died = True
            with pytest.raises(UserError, match="not sealed"):
                SMALL.open(where, targets=None)
        check_reader(where)
        build(SMALL.start(where))
        assert objects_of(where) == want
        assert verify(where, deep=True).sound
        if not died:
            return
    pytest.fail("it never outlived its writes")


SCRIPT = """
import sys
from tests.logitcache.store import test_crash as t
t.build(t.SMALL.start(sys.argv[1]))
"""


@pytest.mark.slow
def test_kill_9_at_random_moments(tmp_path, objects_of):
    build(SMALL.start(str(tmp_path / "whole")))
    want = objects_of(str(tmp_path / "whole"))
    where = str(tmp_path / "killed")
    rng = np.random.default_rng(0)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    for _ in range(4):
        worker = subprocess.Popen([sys.executable, "-c", SCRIPT, where], env=environment)
        waiting: Any = None
        deadline = time.monotonic() + 20
        while waiting is None and not (Path(where) / "identity.json").exists() and time.monotonic() < deadline:
            waiting = worker.poll()
        time.sleep(float(rng.uniform(0, 0.1)))
        worker.send_signal(signal.SIGKILL)
        worker.wait()
        check_reader(where)
    build(SMALL.start(where))
    assert objects_of(where) == want
