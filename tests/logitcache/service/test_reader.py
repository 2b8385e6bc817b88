"""A client through what happens to a server: none there, killed, another content; no sample is lost or comes twice."""

from __future__ import annotations

import itertools
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest

from logitcache.errors import IdentityError, UserError
from logitcache.store import open_cache
from tests.logitcache.service.conftest import Service
from tests.logitcache.store.plain_codecs import CountingTopK, counting_codec
from tests.logitcache.store.test_store import same_sequence, same_targets


def same(one: Any, other: Any) -> bool:
    return same_sequence(one.sequence, other.sequence) and same_targets(one.targets, other.targets)


def test_what_no_server_can_open_is_one_line(service: Service) -> None:
    with pytest.raises(UserError, match="none of that name"):
        open_cache(f"{service.location}/nothing", targets=None)
    for url in ("grpc://", "grpc://host:1", "grpc://host:1/a/b", "grpc://u:p@host:1/a", "grpc://host:1/a?b=c"):
        with pytest.raises(UserError, match="grpc://HOST:PORT/NAME"):
            open_cache(url, targets=None)
    with pytest.raises(UserError, match="options of a server"):
        service.remote(None, secret="x")
    for options in (
        {"patience_s": "x"},
        {"patience_s": None},
        {"timeout_s": 0.0},
        {"timeout_s": float("nan")},
        {"token": 3},
        {"tls_roots": 3},
        {"decoded": 1},
    ):
        with pytest.raises(UserError, match=f"the option {next(iter(options))}"):
            service.remote(None, **options)
    with pytest.raises(UserError, match="sealed"):
        open_cache(f"{service.location}/cache", targets=None, committed=True)


def read_in_a_fork(reader: Any) -> str | None:
    """What a forked child of a process that has read says when it reads."""
    reader.read_tokens([0])
    ours, theirs = multiprocessing.Pipe()

    def read() -> None:
        try:
            reader.read_tokens([0])
        except UserError as error:
            theirs.send(str(error))

    child = multiprocessing.get_context("fork").Process(target=read)
    child.start()
    said = ours.recv() if ours.poll(10) else None
    child.kill()
    return said


def test_another_process_reads_and_a_fork_is_told_why_not(spawn: Any, free_port: int) -> None:
    spawn()
    reader = open_cache(f"grpc://127.0.0.1:{free_port}/cache", targets="topk", codec_factory=counting_codec)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        assert len(pool.submit(reader.read, [4]).result()[0].targets) == 900
        assert "'spawn'" in str(pool.submit(read_in_a_fork, reader).result())


def test_no_server_is_one_line_in_time(free_port: int) -> None:
    started = time.monotonic()
    with pytest.raises(UserError, match=r"no answer for 1 s .*start the server"):
        open_cache(f"grpc://127.0.0.1:{free_port}/cache", targets=None, storage_options={"patience_s": 1.0})
    assert time.monotonic() - started < 10


@dataclass(frozen=True, kw_only=True, eq=False)
class KillsAsItDecodes(CountingTopK):
    """A client's codec that kills the server, and starts it again, at every 250th sequence."""

    restart: Callable[[], None]
    decoded: Iterator[int] = field(default_factory=lambda: itertools.count(1))

    def decode(self, arrays: Any) -> Any:
        if next(self.decoded) % 250 == 0:
            self.restart()
        return super().decode(arrays)


def test_a_killed_server_loses_and_repeats_nothing(place: str, free_port: int, spawn: Any) -> None:
    """Killed with SIGKILL in the middle of a stream, four times: every sample comes once, in order."""
    processes = [spawn()]

    def restart() -> None:
        processes[-1].kill()
        processes[-1].wait()
        processes.append(spawn())

    def codec(config: Any, shared: Any) -> Any:
        return KillsAsItDecodes(vocab_size=config["vocab_size"], restart=restart)

    local = open_cache(place, targets="topk", codec_factory=counting_codec)
    remote = open_cache(f"grpc://127.0.0.1:{free_port}/cache", targets="topk", codec_factory=codec)
    order = np.random.default_rng(5).integers(0, len(local), 1200).tolist()
    got = remote.read(order)
    assert len(processes) == 5
    known = local.read(range(len(local)))
    assert len(got) == len(order)
    assert all(same(known[index], item) for index, item in zip(order, got, strict=True))
    for process in processes:
        process.terminate()
    rows = [[line for line in p.communicate()[1].splitlines() if "sent" in line and "Rows" in line] for p in processes]
    assert [len(lines) for lines in rows[:3]] == [0, 0, 0]  # killed before they had sent what they were asked for
    assert len(rows[-2]) + len(rows[-1]) >= 1


def test_what_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tenacity", None)
    for name in ("opening", "client", "connection"):
        monkeypatch.delitem(sys.modules, f"logitcache.service.{name}")
    with pytest.raises(UserError, match=r"tenacity.*pip install"):
        open_cache("grpc://127.0.0.1:1/cache", targets=None)


def test_a_server_with_another_content_is_refused(world: Any, tmp_path: Any, start: Any, service: Service) -> None:
    reader = service.remote("topk")
    other = replace(reader, manifest=replace(reader.manifest, digest="0" * 64))
    with pytest.raises(IdentityError, match="open it again"):
        other.read([0])
