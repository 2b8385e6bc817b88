"""The loader: one order whoever reads it, exact positions, shards that add up, errors that reach the consumer."""

from __future__ import annotations

import threading
import time
from typing import Any

import numpy as np
import pytest

from logitcache.errors import DamagedError, UserError
from logitcache.loader import Batches, Prefetch, ShuffledOrder
from logitcache.records import HiddenStateTargets, ScoredSequence
from tests.logitcache.store.test_golden import GOLDEN, TINY


@pytest.fixture
def reader() -> Any:
    return TINY.open(str(GOLDEN), targets="hidden")


def ids(batch: list[ScoredSequence]) -> list[str]:
    return [item.sequence.sample_id for item in batch]


def test_an_order_visits_everything_once_an_epoch() -> None:
    order = ShuffledOrder(count=7, seed=0)
    epochs = [order.at(range(7 * epoch, 7 * epoch + 7)).tolist() for epoch in range(3)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert order.at(range(5, 16)).tolist() == [*epochs[0], *epochs[1], *epochs[2]][5:16]
    assert ShuffledOrder(count=7, seed=1).at(range(7)).tolist() != epochs[0]
    assert ShuffledOrder(count=7, seed=0).at([9, 2]).tolist() == [epochs[1][2], epochs[0][2]]


@pytest.mark.parametrize(
    "options", [{"rank": 2, "ranks": 2}, {"ranks": 4, "rank": 3}, {"indices": []}, {"seed": -1}, {"sequences": 0}]
)
def test_impossible_batches_are_refused(reader: Any, options: dict[str, Any]) -> None:
    with pytest.raises(UserError):
        Batches(**{"reader": reader, "sequences": 3, "seed": 0, **options})


def test_the_ranks_together_read_what_one_process_reads(reader: Any) -> None:
    whole = Batches(reader=reader, sequences=5, seed=3)
    shards = [Batches(reader=reader, sequences=5, seed=3, rank=rank, ranks=2) for rank in range(2)]
    for number in range(4):
        expected, parts = whole.sequence_indices(number), [shard.sequence_indices(number) for shard in shards]
        assert [parts[place % 2][place // 2] for place in range(5)] == expected


def test_a_window_is_read_and_nothing_around_it(reader: Any) -> None:
    batches = Batches(reader=reader, sequences=2, seed=0, first_completion_token=1, max_completion_tokens=2)
    whole = {item.sequence.sample_id: item for item in reader.read(range(len(reader)))}
    for item in batches[0]:
        full = whole[item.sequence.sample_id].targets
        assert isinstance(item.targets, HiddenStateTargets)
        assert isinstance(full, HiddenStateTargets)
        assert np.array_equal(item.targets.hidden, full.hidden[1:3])


def test_threads_change_no_order_and_stay_within_the_depth() -> None:
    started: list[int] = []

    def fetch(number: int) -> int:
        started.append(number)
        time.sleep(0.002 * (number * 7 % 5))
        return number

    with Prefetch(fetch, start=4, depth=3, threads=3) as ahead:
        for expected in range(4, 24):
            assert next(ahead) == expected
            assert max(started) <= expected + 3


def test_what_a_read_raised_is_raised_in_its_turn() -> None:
    def fetch(number: int) -> int:
        if number == 2:
            raise DamagedError("chunk 2", "bad", "repair")
        return number

    with Prefetch(fetch, depth=4, threads=2) as ahead:
        assert [next(ahead), next(ahead)] == [0, 1]
        with pytest.raises(DamagedError, match="chunk 2"):
            next(ahead)


def test_closing_leaves_no_thread() -> None:
    before = threading.active_count()
    ahead = Prefetch(lambda number: number, depth=2, threads=2)
    next(ahead)
    ahead.close()
    assert threading.active_count() == before
    with pytest.raises(StopIteration):
        next(ahead)


def test_reading_hides_behind_the_work() -> None:
    """A read as long as half the work costs the consumer nothing but the first."""

    def fetch(number: int) -> int:
        time.sleep(0.02)
        return number

    waited = 0.0
    with Prefetch(fetch) as ahead:
        next(ahead)
        for _ in range(10):
            time.sleep(0.04)
            started = time.perf_counter()
            next(ahead)
            waited += time.perf_counter() - started
    assert waited < 0.1


@pytest.mark.parametrize("context", ["spawn", "fork"])
def test_worker_processes_of_torch_keep_order_and_position(context: str, reader: Any) -> None:
    from torch.utils.data import DataLoader

    batches = Batches(reader=reader, sequences=2, seed=1)
    expected = [ids(batches[number]) for number in range(3, 7)]
    loader = DataLoader(
        batches,  # type: ignore[arg-type]
        batch_size=None,
        sampler=range(3, 7),
        num_workers=2,
        collate_fn=list,
        multiprocessing_context=context,
    )
    assert [ids(batch) for batch in loader] == expected
