"""The served cache is the cache: every number, every window, every error, and no sample lost or twice."""

from __future__ import annotations

import itertools
import multiprocessing
import pickle
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest

from logitcache.errors import IdentityError, UserError
from logitcache.service.client import FlightReader
from logitcache.store import open_cache
from tests.logitcache.service.conftest import Service
from tests.logitcache.store.plain_codecs import CountingTopK, counting_codec
from tests.logitcache.store.test_store import WINDOWS, same_sequence, same_targets


def same(one: Any, other: Any) -> bool:
    return same_sequence(one.sequence, other.sequence) and same_targets(one.targets, other.targets)


@pytest.mark.parametrize("decoded", [False, True])
@pytest.mark.parametrize("tier", ["hidden", "topk"])
def test_what_is_read_is_what_a_local_reader_reads(service: Service, tier: str, decoded: bool) -> None:
    local, remote = service.local(tier), service.remote(tier, decoded=decoded)
    assert isinstance(remote, FlightReader)
    assert len(remote) == len(local)
    order = [*np.random.default_rng(0).permutation(len(local)).tolist(), 3, 3]
    for first, limit in [(0, None), *WINDOWS]:
        window = {"first_completion_token": first, "max_completion_tokens": limit}
        pairs = zip(local.read(order, **window), remote.read(order, **window), strict=True)
        assert all(same(one, other) for one, other in pairs)
    assert remote.read([]) == []
    assert (remote.head is None) == (local.head is None)
    if local.head is not None:
        assert remote.head.fingerprint == local.head.fingerprint


def test_facts_tokens_and_samples_are_the_same(service: Service) -> None:
    local, remote = service.local(None), service.remote(None)
    assert remote.manifest.digest == local.manifest.digest
    assert remote.manifest.to_json() == local.manifest.to_json()
    assert remote.identity == local.identity
    assert remote.tier is None
    assert remote.head is None
    everything = range(len(local))
    assert all(map(same_sequence, local.read_tokens(everything), remote.read_tokens(everything)))
    assert remote.samples() == local.samples()
    assert remote.samples(["problem_id"]).column_names == ["problem_id"]
    with_targets = service.remote("topk").read_tokens([4], max_completion_tokens=5)
    assert same_sequence(with_targets[0], local.read_tokens([4], max_completion_tokens=5)[0])


def test_wrong_requests_are_the_same_line(service: Service) -> None:
    reader = service.remote("hidden")
    with pytest.raises(UserError, match="indices of 18 sequences"):
        reader.read([18])
    with pytest.raises(UserError, match="indices of 18 sequences"):
        reader.read([-1])
    with pytest.raises(UserError, match="a window of target rows"):
        reader.read([0], first_completion_token=-1)
    with pytest.raises(UserError, match="targets=None"):
        service.remote(None).read([0])
    with pytest.raises(UserError, match=r"hidden \(hidden\), topk \(topk\)"):
        service.remote("full")
    with pytest.raises(IdentityError, match="the cache's is tok0"):
        open_cache(f"{service.location}/cache", targets=None, tokenizer="other")
    with pytest.raises(UserError, match="none of that name"):
        open_cache(f"{service.location}/nothing", targets=None)
    for url in ("grpc://", "grpc://host:1", "grpc://host:1/a/b", "grpc://u:p@host:1/a", "grpc://host:1/a?b=c"):
        with pytest.raises(UserError, match="grpc://HOST:PORT/NAME"):
            open_cache(url, targets=None)
    with pytest.raises(UserError, match="options of a server"):
        service.remote(None, secret="x")
    with pytest.raises(UserError, match="sealed"):
        open_cache(f"{service.location}/cache", targets=None, committed=True)


def test_it_pickles_and_serves_many_threads(service: Service) -> None:
    reader = pickle.loads(pickle.dumps(service.remote("hidden")))
    n = len(reader)
    alone = [item.targets.hidden for item in reader.read(range(n))]
    orders = [np.random.default_rng(seed).permutation(n) for seed in range(16)]
    with ThreadPoolExecutor(8) as pool:
        for order, items in zip(orders, pool.map(reader.read, orders), strict=True):
            assert all(np.array_equal(item.targets.hidden, alone[i]) for i, item in zip(order, items, strict=True))


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
