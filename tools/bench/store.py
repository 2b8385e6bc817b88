"""How fast, how tight and how safe the store is: `python -m tools.bench.store [--quick] [--json PATH]`.

Rates are of one core, against one blosc record a sequence read with pread and decompressed, interleaved; medians are
compared. What a record holds decides what its rate is a limit of: the packed arrays that the store holds too (half the
bytes, and no targets yet), the same and then our codec's work, or the targets themselves. Requests are counted by the
server that answers them.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from logitcache.records import TopKTargets
from logitcache.store import Reader, open_cache
from logitcache.store.manifest import Manifest, RecordColumn, TierSummary
from logitcache.store.place import ByteRange, Source
from tools.bench import store_faults
from tools.bench.result import at_least, at_most, keep, options
from tools.bench.store_data import Made, Records, make, shuffled_batches, undecoded, write_cache, write_records
from tools.bench.store_remote import remote

PACKAGES = ("numcodecs", "google-crc32c", "pyarrow", "fsspec", "s3fs")
BATCH = 32
RATIOS = {
    "packed arrays, over records of packed arrays": "packed_over_limit",
    "targets, over records of packed arrays that are then decoded": "reader_over_limit_decoded",
    "targets, over records of targets": "reader_over_limit_targets",
    "targets, over records of packed arrays that stay packed": "reader_over_limit",
}


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much to measure."""

    tokens: dict[str, int]
    rounds: int
    faults: int
    parts: int
    remote_tokens: dict[str, int]


FULL = Size(
    tokens={"topk": 1_500_000, "hidden": 300_000},
    rounds=7,
    faults=1000,
    parts=100_000,
    remote_tokens={"topk": 400_000, "hidden": 150_000},
)
QUICK = Size(
    tokens={"topk": 150_000, "hidden": 60_000},
    rounds=3,
    faults=40,
    parts=10_000,
    remote_tokens={"topk": 100_000, "hidden": 50_000},
)


@dataclass(kw_only=True)
class Counting:
    """A source that counts what is asked of it."""

    source: Source
    nbytes: int = 0
    requests: int = 0
    names: set[str] = field(default_factory=set)

    @property
    def shown(self) -> str:
        """The source's."""
        return self.source.shown

    def read(self, name: str) -> bytes:
        """Passed on."""
        return self.source.read(name)

    def read_ranges(self, ranges: Sequence[ByteRange]) -> list[bytes]:
        """Counted and passed on."""
        self.nbytes += sum(item.stop - item.start for item in ranges)
        self.requests += len(ranges)
        return self.source.read_ranges(ranges)


Batches = Sequence[Sequence[int]]


def timed(action: Callable[[Batches], object], batches: Batches = ()) -> float:
    """Seconds of wall clock."""
    start = time.perf_counter()
    action(batches)
    return time.perf_counter() - start


def rates(made: Made, folder: Path, rounds: int) -> dict[str, Any]:
    """Million tokens a second of store and compressed limit: `packed` and `limit` up to the packed arrays; `reader`,
    `limit_decoded` and `limit_targets` up to targets.
    """
    cache = str(folder / "cache")
    write_cache(made, cache, per_part=64)
    objects = sum(path.is_file() for part in Path(cache).glob("*/**/record.json") for path in part.parent.rglob("*"))
    records = write_records(made, folder / "records")
    targets = write_records(made, folder / "targets", decoded=True)
    reader = open_cache(cache, targets=made.tier)
    reader.read(range(len(reader)))  # part indexes and page cache warm, on both sides
    for index in range(len(reader)):
        records.read(index), targets.read(index)
    packed = open_cache(cache, targets=made.tier, codec_factory=undecoded)
    packed.read(range(len(packed)))
    actions: dict[str, Callable[[Sequence[int]], object]] = {
        "limit": lambda batch: [records.read(index) for index in batch],
        "packed": packed.read,
        "limit_decoded": lambda batch: [_decoded(made, records, index) for index in batch],
        "limit_targets": lambda batch: [targets.read(index) for index in batch],
        "reader": reader.read,
    }
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    for seed in range(rounds):
        batches = shuffled_batches(len(reader), BATCH, seed)
        for name, action in actions.items():
            seconds[name].append(timed(partial(each, action), batches))
    found = {f"{name}_mtok_per_s": made.tokens / median(values) / 1e6 for name, values in seconds.items()}
    return {
        **found,
        "tokens": made.tokens,
        "packed_over_limit": found["packed_mtok_per_s"] / found["limit_mtok_per_s"],
        "reader_over_limit_decoded": found["reader_mtok_per_s"] / found["limit_decoded_mtok_per_s"],
        "reader_over_limit_targets": found["reader_mtok_per_s"] / found["limit_targets_mtok_per_s"],
        "reader_over_limit": found["reader_mtok_per_s"] / found["limit_mtok_per_s"],
        "read_amplification": amplification(reader),
        "objects_per_part_and_tier": objects / len(reader.manifest.units),
        "tokens_per_part": made.tokens / len(reader.manifest.units),
        "reader_mentries_per_s": found["reader_mtok_per_s"] * _entries(made) / made.tokens,
        "limit_bytes_per_token": int(records.offsets[-1]) / made.tokens,
        "store_bytes_per_token": stored_bytes(reader) / made.tokens,
    }


def each(action: Callable[[Sequence[int]], object], batches: Batches) -> None:
    """One batch after another, each dropped before the next, as training drops them."""
    for batch in batches:
        action(batch)


def _decoded(made: Made, records: Records, index: int) -> object:
    arrays = records.read(index)
    del arrays["token_ids"]
    return made.codec.decode(arrays)


def _entries(made: Made) -> int:
    """Kept tokens of all rows; 0 for states."""
    return sum(len(item.ids) for item in made.targets if isinstance(item, TopKTargets))


def stored_bytes(reader: Reader) -> int:
    """Bytes of the chunks of every array that the reader reads."""
    total = 0
    for part in range(len(reader.manifest.units)):
        index = reader._lazily("parts", reader._part_cache).get([part])[part]
        for array in (index.token_ids, *index.targets.values()):
            total += sum(int(table.starts[-1]) for table in array.tables)
    return total


def amplification(reader: Reader) -> float:
    """Bytes read in a shuffled epoch over bytes stored, part indexes warm."""
    counting = Counting(source=reader.source)
    epoch = Reader(source=counting, manifest=reader.manifest, identity=reader.identity, tier=reader.tier)
    epoch.samples()
    for _ in range(2):
        counting.nbytes = 0
        for batch in shuffled_batches(len(epoch), BATCH, 0):
            epoch.read(batch)
    return counting.nbytes / stored_bytes(reader)


def opening(parts: int, folder: Path) -> dict[str, Any]:
    """Seconds to open a cache of that many parts with two tiers, and bytes of its manifest."""
    made = make("topk", 5_000)
    store = write_cache(made, str(folder / "many"), per_part=64)
    rng = np.random.default_rng(0)
    records = [
        RecordColumn(size=rng.integers(1, 9999, parts, np.uint32), sha256=rng.integers(0, 255, (parts, 32), np.uint8))
        for _ in range(3)
    ]
    old = open_cache(str(folder / "many"), targets="topk").manifest
    tiers = {
        name: TierSummary(
            kind="topk", digest="0" * 64, nbytes=1, shared_nbytes=1, rows=parts * 300, kl_nats=None, records=column
        )
        for name, column in zip(("hidden", "topk"), records[1:], strict=True)
    }
    manifest = Manifest(
        identity=old.identity,
        units=tuple(f"{number:08d}" for number in range(parts)),
        sequences=np.full(parts, 3),
        tokens=np.full(parts, 400),
        completion_tokens=np.full(parts, 300),
        records=records[0],
        tiers=tiers,
        flops={},
    )
    data = manifest.data()
    store.place.write({"manifest.json": data})
    seconds = median(timed(lambda _: len(open_cache(str(folder / "many"), targets="topk"))) for _ in range(3))
    return {"parts": parts, "open_s": seconds, "manifest_bytes": len(data)}


def goals(found: dict[str, Any]) -> list[dict[str, Any]]:
    """What the project asks of its store, and what was measured."""
    listed: list[dict[str, Any]] = []
    for tier, rate in found["rates"].items():
        listed += [at_least(f"{tier}: {what}", 0.25, rate[name], "of it") for what, name in RATIOS.items()]
        listed.append(at_most(f"{tier}: bytes read over bytes asked for", 1.8, rate["read_amplification"], "times"))
    for tier, epoch in found["s3"].items():
        slower = epoch["epoch_with_20ms_s"] / epoch["epoch_s"]
        listed.append(
            at_most(f"{tier}: requests a sequence, 20 ms away", 3, epoch["requests_per_sequence"], "requests")
        )
        listed.append(at_most(f"{tier}: a shuffled epoch 20 ms away over one near", 1.25, slower, "times"))
    faults, opened = found["faults"], found["opening"]
    listed.append(at_most("damages that became data", 0, faults["false_data"], "damages"))
    listed.append(at_least("damages detected", faults["damages"], faults["detected"], "damages"))
    listed.append(at_least("damages mended to the same bytes", faults["damages"], faults["mended"], "damages"))
    listed.append(at_most(f"time to open {opened['parts']:,} parts", 5, opened["open_s"], "s"))
    return listed


@contextmanager
def one_core() -> Iterator[None]:
    """Within it, this process has one core."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def measure(size: Size) -> dict[str, Any]:
    """Every figure."""
    found: dict[str, Any] = {"rates": {}, "s3": {}}
    with tempfile.TemporaryDirectory() as name:
        for tier, tokens in size.tokens.items():
            print(f"rates, {tier}", file=sys.stderr)
            (Path(name) / tier).mkdir()
            with one_core():
                found["rates"][tier] = rates(make(tier, tokens), Path(name) / tier, size.rounds)
        print("opening", file=sys.stderr)
        found["opening"] = opening(size.parts, Path(name))
        print("faults", file=sys.stderr)
        found["faults"] = store_faults.run(size.faults, Path(name) / "faults")
    for tier, tokens in size.remote_tokens.items():
        print(f"s3, {tier}", file=sys.stderr)
        found["s3"][tier] = remote(tier, tokens)
    return found


def main() -> None:
    """Measure and keep."""
    chosen = options("store", __doc__)
    size = QUICK if chosen.quick else FULL
    found = measure(size)
    config = {**vars(size), "batch": BATCH, "cores_of_rates": 1, "packages": {name: version(name) for name in PACKAGES}}
    keep(chosen, config=config, figures=found, goals=goals(found))


if __name__ == "__main__":
    main()
