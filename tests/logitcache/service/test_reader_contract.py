"""What every reader of a cache owes, wherever the cache lies: one suite for all of them."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from logitcache.errors import IdentityError, UserError
from logitcache.store import DiskCache, open_cache
from tests.logitcache.readers import assert_serves_many_threads
from tests.logitcache.service.conftest import Service
from tests.logitcache.store.conftest import World
from tests.logitcache.store.plain_codecs import counting_codec
from tests.logitcache.store.test_store import WINDOWS, check_window, same_sequence, same_targets

Open = Callable[..., Any]
UNITS = 3


@pytest.fixture(params=["disk", "memory", "packed", "decoded", "kept"])
def opened(
    request: pytest.FixtureRequest, world: World, place: str, service: Service, tmp_path: Path, monkeypatch: Any
) -> Open:
    """`open_cache` of the same cache: on disk, in an object store, from a server in each way, and kept by a client."""
    kind, url, options = request.param, place, {}
    if kind == "memory":
        monkeypatch.setattr("os.fsync", lambda descriptor: None)
        url = f"memory://contract-{tmp_path.name}"
        world.build(url, units=UNITS)
    elif kind != "disk":
        url = f"{service.location}/cache"
        options["storage_options"] = {"decoded": kind == "decoded", "patience_s": 5.0}
    if kind == "kept":
        options["disk_cache"] = DiskCache(folder=str(tmp_path), max_bytes=8 << 20)
    return lambda targets, **more: open_cache(url, targets=targets, codec_factory=counting_codec, **options, **more)


@pytest.fixture
def sequences(world: World) -> list[Any]:
    return [sequence for unit in range(UNITS) for sequence in world.sequences(unit)]


@pytest.fixture
def targets(world: World) -> dict[str, list[Any]]:
    hidden = [item for unit in range(UNITS) for item in world.hidden_targets(unit)]
    topk = [item for unit in range(UNITS) for item in world.topk_targets(unit)]
    return {"hidden": hidden, "topk": [world.topk.decode(world.topk.encode([item]).arrays) for item in topk]}


@pytest.mark.parametrize("tier", ["hidden", "topk"])
def test_what_was_written_is_read_in_any_order_and_twice(
    opened: Open, tier: str, sequences: list[Any], targets: dict[str, list[Any]], world: World
) -> None:
    reader = opened(tier, tokenizer="tok0")
    assert len(reader) == len(sequences)
    order = [*np.random.default_rng(0).permutation(len(reader)).tolist(), 3, 3]
    for _ in range(2):  # what is kept the first time is read the second
        for index, item in zip(order, reader.read(order), strict=True):
            assert same_sequence(item.sequence, sequences[index])
            assert same_targets(item.targets, targets[tier][index])
    assert reader.read([]) == []
    assert reader.tier == tier
    assert (reader.head and reader.head.fingerprint) == (world.head.fingerprint if tier == "hidden" else None)


@pytest.mark.parametrize("tier", ["hidden", "topk"])
def test_a_window_is_that_slice_of_the_whole(opened: Open, tier: str) -> None:
    reader = opened(tier)
    everything = range(len(reader))
    whole = reader.read(everything)
    for first, limit in WINDOWS:
        window = {"first_completion_token": first, "max_completion_tokens": limit}
        cut = reader.read(everything, **window)
        for full, part, tokens in zip(whole, cut, reader.read_tokens(everything, **window), strict=True):
            check_window(full, part, first, limit)
            assert same_sequence(part.sequence, tokens)


def test_tokens_and_samples_need_no_targets(opened: Open, sequences: list[Any]) -> None:
    reader = opened(None)
    assert all(map(same_sequence, reader.read_tokens(range(len(reader))), sequences))
    samples = reader.samples()
    assert samples["sample_id"].to_pylist() == [sequence.sample_id for sequence in sequences]
    assert samples["seed"].to_pylist() == [sequence.seed for sequence in sequences]
    assert reader.samples(["problem_id"]).column_names == ["problem_id"]
    assert reader.tier is None
    assert reader.head is None


def test_it_says_what_it_holds(opened: Open, service: Service) -> None:
    reader, local = opened(None), service.local(None)
    assert reader.manifest.digest == local.manifest.digest
    assert reader.manifest.to_json() == local.manifest.to_json()
    assert reader.identity == local.identity


def test_wrong_requests_are_one_line(opened: Open) -> None:
    reader = opened("hidden")
    for indices in ([18], [-1], [0, 18]):
        with pytest.raises(UserError, match="indices of 18 sequences"):
            reader.read(indices)
    for window in ({"first_completion_token": -1}, {"max_completion_tokens": -1}):
        with pytest.raises(UserError, match="a window of target rows"):
            reader.read([0], **window)
    with pytest.raises(UserError, match="targets=None"):
        opened(None).read([0])
    with pytest.raises(UserError, match=r"hidden \(hidden\), topk \(topk\)"):
        opened("full")
    with pytest.raises(IdentityError, match="the cache's is tok0"):
        opened(None, tokenizer="other")


def test_it_pickles_and_serves_many_threads(opened: Open) -> None:
    assert_serves_many_threads(pickle.loads(pickle.dumps(opened("hidden"))))
