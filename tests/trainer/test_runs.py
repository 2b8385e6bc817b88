"""A run's files: whole or not at all, one line where they cannot be written, and one process at a time."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from logitcache.errors import UserError
from tests.trainer.conftest import room
from trainer.runs import MetricsLog, new_directory, new_run_dir, write_json


def test_a_full_disk_leaves_what_was_there(tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    write_json(file, {"a": 1})
    with room(10), pytest.raises(UserError, match=r"result\.json: it cannot be written .*; make room"):
        write_json(file, {"a": "longer than the disk has room for"})
    assert json.loads(file.read_text()) == {"a": 1}


def test_a_full_disk_leaves_no_directory(tmp_path: Path) -> None:
    with (
        room(10),
        pytest.raises(UserError, match=r"student: it cannot be written"),
        new_directory(tmp_path / "student") as it,
    ):
        (it / "weights").write_bytes(bytes(100))
    assert list(tmp_path.iterdir()) == []


def test_a_line_is_whole_or_an_error(tmp_path: Path) -> None:
    """A disk takes what it has room for and says how much that was, and no more, before it refuses."""
    with MetricsLog(tmp_path / "metrics.jsonl") as log:
        log.write({"step": 0})
        kept = log.state()
        with room(kept["bytes"] + 5), pytest.raises(UserError, match="make room"):
            log.write({"step": 1})
        log.restore(kept)
        log.write({"step": 1})
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"step": 0}, {"step": 1}]


def test_a_second_process_is_refused_until_the_first_is_gone(tmp_path: Path) -> None:
    hold = "import sys, pathlib; from trainer.runs import MetricsLog\n"
    hold += "log = MetricsLog(pathlib.Path(sys.argv[1])); print('open', flush=True); input()"
    file = tmp_path / "metrics.jsonl"
    command = [sys.executable, "-c", hold, str(file)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "open\n"
        with pytest.raises(UserError, match="another process does so now"):
            MetricsLog(file)
        other.kill()
    MetricsLog(file).__exit__(None, None, None)


def test_what_a_run_left_that_was_killed_at_its_start_is_in_nobodys_way(tmp_path: Path) -> None:
    (tmp_path / ".config.json.partial").write_text("{")
    assert new_run_dir(tmp_path) == tmp_path
