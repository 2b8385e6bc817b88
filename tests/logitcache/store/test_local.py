"""A local place: durable before visible, whole or absent, clear about what it cannot do."""

from __future__ import annotations

import os
import re
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from logitcache.errors import UserError
from logitcache.store.local import LocalPlace
from logitcache.store.place import ByteRange
from tests.logitcache.store.test_crash import SMALL, build


def test_a_file_is_flushed_before_it_is_renamed_and_its_folder_after(tmp_path, flushes):
    place = LocalPlace(root=str(tmp_path))
    place.write({"a/b": b"1", "c": b"2"})
    renames = [i for i, event in enumerate(flushes) if event.startswith("rename")]
    assert len(renames) == 2
    for i in renames:
        _, temporary, target = flushes[i].split(" ")
        assert flushes.index(f"flush {temporary}") < i
        assert f"flush {Path(target).parent}" in flushes[i:]
    assert (tmp_path / "a/b").read_bytes() == b"1"


def test_create_never_replaces(tmp_path):
    place = LocalPlace(root=str(tmp_path))
    assert place.create("x", b"first")
    assert not place.create("x", b"second")
    assert place.read("x") == b"first"
    assert [name for name, _ in place.sizes(".partial")] == []


def test_a_disk_that_takes_no_more_is_an_error_and_leaves_nothing(tmp_path):
    """The kernel itself refuses: a limit on file size fails a write half-way, as a full disk does."""
    place = LocalPlace(root=str(tmp_path))
    place.write({"x": b"old"})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(UserError, match=r"File too large; make it writable or free some space"):
            place.write({"x": bytes(5000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert place.read("x") == b"old"
    assert dict(place.sizes("")) == {"x": 3}
    place.write({"x": bytes(5000)})
    assert place.read("x") == bytes(5000)


READ_ONLY = """
import os, sys
from tests.logitcache.store.test_crash import SMALL, build
where = sys.argv[1]
build(SMALL.start(where + "-warm"))  # imports what the other user may not even read
if os.getuid() == 0:
    os.setuid(65534)
print(len(SMALL.open(where, targets="hidden", committed=True).read([0, 1, 2])))
for url in (where, where + "/new"):
    try:
        build(SMALL.start(url))
    except Exception as error:
        print(type(error).__name__, error)
"""


def test_a_folder_that_may_only_be_read_is_read_and_its_build_is_one_line(objects_of):
    with tempfile.TemporaryDirectory() as top:  # pytest's own folders are closed to other users
        os.chmod(top, 0o755)
        where = f"{top}/cache"
        SMALL.write_unit(SMALL.start(where), 0)
        before = objects_of(where)
        for folder, _, _ in os.walk(where):
            os.chmod(folder, 0o555)
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3]), "PYTHONDONTWRITEBYTECODE": "1"}
        done = subprocess.run(
            [sys.executable, "-c", READ_ONLY, where], env=environment, capture_output=True, text=True, check=False
        )
        for folder, _, _ in os.walk(where):
            os.chmod(folder, 0o755)
        count, *errors = done.stdout.splitlines()
        assert (count, len(errors)) == ("3", 2), done.stderr
        for error, name in zip(errors, ("sequences/000001", "identity.json"), strict=True):
            assert re.match(rf"UserError write {name}.*Permission denied.*make it writable", error), error
        assert objects_of(where) == before


def test_ranges_are_exact_or_an_error(tmp_path):
    place = LocalPlace(root=str(tmp_path))
    place.write({"x": b"0123456789"})
    assert place.read_ranges([ByteRange("x", 2, 5), ByteRange("x", 0, 0)]) == [b"234", b""]
    with pytest.raises(EOFError):
        place.read_ranges([ByteRange("x", 8, 1 << 60)])
    with pytest.raises(FileNotFoundError, match=r"^y$"):
        place.read_ranges([ByteRange("y", 0, 1)])


def test_delete_and_sizes(tmp_path):
    place = LocalPlace(root=str(tmp_path))
    place.write({"a/b/c": b"1", "a/d": b"22"})
    assert dict(place.sizes("a")) == {"a/b/c": 1, "a/d": 2}
    assert dict(place.sizes("a/d")) == {"a/d": 2}
    place.delete("a/b")
    place.delete("not there")
    place.delete("not/there/either")
    assert dict(place.sizes("")) == {"a/d": 2}


WORKER = """
import sys
from tests.logitcache.store.test_crash import SMALL, build
for _ in range(int(sys.argv[2])):
    build(SMALL.start(sys.argv[1]))
print("done")
"""


def test_two_builds_at_once_leave_each_others_temporary_files_alone(tmp_path, objects_of):
    """Each seals again and again while the other writes; what a killed third one left is removed all the same."""
    where = str(tmp_path / "cache")
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    (tmp_path / "cache/.partial").mkdir(parents=True)
    (tmp_path / "cache/.partial/0123abcd").write_bytes(b"torn")
    workers = [
        subprocess.Popen([sys.executable, "-c", WORKER, where, "25"], env=environment, stdout=-1, stderr=-1, text=True)
        for _ in range(2)
    ]
    for worker in workers:
        said, errors = worker.communicate(timeout=120)
        assert said == "done\n", errors
    build(SMALL.start(str(tmp_path / "alone")))
    assert objects_of(where) == objects_of(str(tmp_path / "alone"))


def test_a_live_writers_temporary_file_is_kept_until_it_is_done(tmp_path):
    place = LocalPlace(root=str(tmp_path))
    with place._writing():
        theirs = place._temporary(b"half")
        place.write({"x": b"1"})
        assert place.create("y", b"2")
        assert theirs.exists()
    assert not theirs.exists()  # left behind: whoever is alone removes it
