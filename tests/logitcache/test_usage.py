"""Seconds and joules: laps add up, counters wrap, and no counter is no number."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from logitcache.usage import Stopwatch


def set_counters(powercap: Path, *microjoules: int) -> None:
    for number, value in enumerate(microjoules):
        for zone in (f"intel-rapl:{number}", f"intel-rapl:{number}:0"):  # a package, and its cores, counted in it
            (powercap / zone).mkdir(exist_ok=True)
            (powercap / zone / "energy_uj").write_text(f"{value}\n")
            (powercap / zone / "max_energy_range_uj").write_text("10000000\n")


def test_without_counters_there_are_no_joules(tmp_path: Path) -> None:
    watch = Stopwatch(powercap=tmp_path)
    watch.lap()
    watch.lap()
    assert watch.seconds > 0
    assert watch.joules is None


def test_a_counter_that_cannot_be_read_is_none(tmp_path: Path) -> None:
    set_counters(tmp_path, 5)
    (tmp_path / "intel-rapl:0" / "energy_uj").write_text("?")
    watch = Stopwatch(powercap=tmp_path)
    watch.lap()
    watch.lap()
    assert watch.joules is None


def test_laps_add_up_and_what_is_skipped_does_not(tmp_path: Path) -> None:
    watch = Stopwatch(powercap=tmp_path)
    set_counters(tmp_path, 1_000_000, 9_000_000)
    watch.lap()
    assert watch.state() == {"seconds": 0.0, "joules": None}
    set_counters(tmp_path, 3_000_000, 500_000)  # the second one wrapped: 1 J to its end at 10 J, and 0.5 J
    watch.lap()
    assert watch.joules == pytest.approx(2 + 1.5)
    set_counters(tmp_path, 8_000_000, 900_000)
    time.sleep(0.05)
    watch.skip()
    assert watch.seconds < 0.05
    set_counters(tmp_path, 8_250_000, 900_000)
    watch.lap()
    assert watch.joules == pytest.approx(3.75)


def test_a_restored_one_goes_on(tmp_path: Path) -> None:
    set_counters(tmp_path, 1_000_000)
    watch = Stopwatch(powercap=tmp_path)
    watch.restore(json.loads('{"seconds": 7.0, "joules": 2.5}'))
    watch.lap()  # what passed while nothing ran is not its own
    set_counters(tmp_path, 2_000_000)
    watch.lap()
    assert watch.joules == pytest.approx(3.5)
    assert 7 < watch.seconds < 8
