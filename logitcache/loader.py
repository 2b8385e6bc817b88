"""Random batches of a cache: a seeded order without state, shards for ranks, reading ahead.

Guarantees: batch `n` is a pure function of (seed, count, batch size, n), so a position is one integer and every restart
is exact; the ranks' shards of a batch together are the batch that one process would read; neither threads nor worker
processes change the order. Memory is bounded by the batches ahead and one permutation: 8 bytes a sequence, so 800 MB
for 1e8 of them. The permutation is numpy's, which a new version of numpy may draw differently.

`Batches` is also a map-style data set of torch, whose position is the sampler's:

    DataLoader(batches, batch_size=None, sampler=range(position, stop), num_workers=2, collate_fn=list)
"""

from __future__ import annotations

import copy
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from logitcache.errors import require
from logitcache.records import ScoredSequence

Item = TypeVar("Item")


class SequenceReader(Protocol):
    """What a loader needs of a cache; `logitcache.open_cache` returns one."""

    def __len__(self) -> int: ...

    def read(
        self, indices: Sequence[int], *, first_completion_token: int = 0, max_completion_tokens: int | None = None
    ) -> list[ScoredSequence]:
        """Sequences with their targets, cut to the window."""
        ...


@dataclass(frozen=True, kw_only=True, eq=False)
class ShuffledOrder:
    """Numbers 0..count-1, in another random order each epoch; position p lies in epoch p // count."""

    count: int
    seed: int
    _epochs: dict[int, NDArray[np.int64]] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        require(self.count >= 1, "an order of at least 1 sequence", self.count, "read from a cache that holds some")
        require(self.seed >= 0, "a seed of 0 or more", self.seed)

    def at(self, positions: Sequence[int] | NDArray[np.int64]) -> NDArray[np.int64]:
        """int64[N]: the numbers at these positions, which may lie in any epochs."""
        epochs, places = np.divmod(np.asarray(positions, np.int64), self.count)
        taken = np.empty_like(places)
        for epoch in np.unique(epochs).tolist():
            within = epochs == epoch
            taken[within] = self._permutation(epoch)[places[within]]
        return taken

    def _permutation(self, epoch: int) -> NDArray[np.int64]:
        order = self._epochs.get(epoch)
        if order is None:
            order = np.random.default_rng([self.seed, epoch]).permutation(self.count)
            self._epochs.clear()  # one is kept: threads at an epoch's end may draw one twice, and get the same
            self._epochs[epoch] = order
        return order


@dataclass(frozen=True, kw_only=True, eq=False)
class Batches:
    """Batch 0, 1, ... of a cache, without end; this rank's shard of each. Thread-safe; pickles with its reader.

    Attributes:
        reader: the cache.
        indices: which of its sequences; None for all.
        sequences: of a batch, over all ranks.
        seed: of the order, 0 or more.
        first_completion_token: where each sequence's window starts.
        max_completion_tokens: of a window; None for the rest of the sequence.
        rank: of `ranks`; it takes every `ranks`-th sequence of a batch.
    """

    reader: SequenceReader
    indices: Sequence[int] | None = None
    sequences: int
    seed: int
    first_completion_token: int = 0
    max_completion_tokens: int | None = None
    rank: int = 0
    ranks: int = 1
    _order: ShuffledOrder = field(init=False, repr=False)
    _own: dict[int, SequenceReader] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        require(0 <= self.rank < self.ranks, f"a rank of {self.ranks}", self.rank)
        require(self.sequences >= self.ranks, f"batches for {self.ranks} ranks", f"{self.sequences} sequences")
        count = len(self.reader) if self.indices is None else len(self.indices)
        object.__setattr__(self, "_order", ShuffledOrder(count=count, seed=self.seed))
        self._own[os.getpid()] = self.reader

    def __getitem__(self, number: int) -> list[ScoredSequence]:
        """Batch `number`, of it the sequences of this rank. Raises what the reader raises."""
        return self._reader().read(
            self.sequence_indices(number),
            first_completion_token=self.first_completion_token,
            max_completion_tokens=self.max_completion_tokens,
        )

    def sequence_indices(self, number: int) -> list[int]:
        """The cache's indices of this rank's part of batch `number`."""
        if number < 0:
            raise IndexError(f"batch {number}: batches are counted from 0")
        start = number * self.sequences
        places = self._order.at(np.arange(start + self.rank, start + self.sequences, self.ranks)).tolist()
        return places if self.indices is None else [self.indices[place] for place in places]

    def _reader(self) -> SequenceReader:
        """The reader of this process: a forked child cannot use connections and locks that its parent opened."""
        reader = self._own.get(os.getpid())
        if reader is None:
            reader = self._own.setdefault(os.getpid(), copy.deepcopy(self.reader))
        return reader


class Prefetch(AbstractContextManager["Prefetch[Item]"], Iterator[Item], Generic[Item]):
    """`fetch(start)`, `fetch(start + 1)`, ... in order, made ahead by threads.

    What a `fetch` raised is raised when its turn comes, as it was. At most `depth` results wait.

    Args:
        fetch: thread-safe.
        start: the first position.
        depth: positions ahead of the consumer, at least 1.
        threads: that fetch at once.
    """

    def __init__(self, fetch: Callable[[int], Item], *, start: int = 0, depth: int = 2, threads: int = 1) -> None:
        require(depth >= 1 and threads >= 1, "a depth and threads of at least 1", f"{depth} and {threads}")
        self._fetch, self._next = fetch, start
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="prefetch")
        self._ahead: deque[Future[Item]] = deque()
        for _ in range(depth):
            self._submit()

    def __next__(self) -> Item:
        if not self._ahead:
            raise StopIteration
        item = self._ahead.popleft().result()
        self._submit()
        return item

    def close(self) -> None:
        """Drop what is ahead, and return once no thread runs. Afterwards there is nothing more to iterate over."""
        for future in self._ahead:
            future.cancel()
        self._ahead.clear()
        self._threads.shutdown(cancel_futures=True)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _submit(self) -> None:
        self._ahead.append(self._threads.submit(self._fetch, self._next))
        self._next += 1
