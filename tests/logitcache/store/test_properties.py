"""Properties: any array, any cut, any order, any window comes back as it went in."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from logitcache.store.coalesce import read_coalesced
from logitcache.store.envelope import canonical, seal, unseal
from logitcache.store.manifest import Manifest, RecordColumn
from logitcache.store.place import ByteRange
from logitcache.store.shards import ArraySpec, encode_shards
from logitcache.store.stored_array import StoredArray, StoredObject
from tests.logitcache.store.conftest import World
from tests.logitcache.store.plain_codecs import counting_codec, shuffled

DTYPES = st.sampled_from(["int8", "uint16", "int32", "uint64", "float16", "float32", "float64", "bool"])


@st.composite
def arrays(draw: st.DrawFn) -> tuple[ArraySpec, np.ndarray]:
    """An array with a cut and a compression that format version 1 can hold."""
    dtype = draw(DTYPES)
    item = tuple(draw(st.lists(st.integers(1, 5), max_size=2)))
    shape = (draw(st.integers(0, 60)), *item)
    chunk = (draw(st.integers(1, 70)), *(draw(st.integers(1, size + 2)) for size in item))
    plain: tuple[Any, ...] = ()
    zstd = ({"name": "zstd", "configuration": {"level": 1, "checksum": True}},)
    compression = draw(st.sampled_from([plain, zstd, shuffled(dtype)]))
    spec = ArraySpec(
        dtype=dtype, shape=shape, chunk_shape=chunk, dimension_names=(None,) * len(shape), compression=compression
    )
    return spec, draw(hnp.arrays(dtype, shape))


@settings(max_examples=60, deadline=None)
@given(arrays(), st.data())
def test_any_rows_of_any_array(case: tuple[ArraySpec, np.ndarray], data: st.DataObject) -> None:
    spec, values = case
    shards = list(encode_shards(spec, values))
    stored = StoredArray.of("a", spec, shards)
    assert StoredArray.from_json("a", stored.to_json()).to_json() == stored.to_json()
    objects = {f"a/{shard.name}": shard.data for shard in shards}
    for i, shard in enumerate(shards):
        stored.check_shard(i, shard.data)
    stop = data.draw(st.integers(0, len(values)))
    first = data.draw(st.integers(0, stop))
    ranges = stored.ranges(first, stop)
    got = stored.assemble(first, stop, [objects[item.name][item.start : item.stop] for item in ranges])
    assert got.tobytes() == values[first:stop].tobytes()
    assert len(ranges) <= 1


@settings(max_examples=6, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(0, 700)), min_size=1, max_size=4),
    st.integers(0, 750),
    st.none() | st.integers(0, 750),
    st.randoms(use_true_random=False),
)
def test_any_window_of_any_sequences(lengths, first, limit, random):
    world = World(lengths=tuple(lengths))
    with tempfile.TemporaryDirectory() as folder:
        world.build(folder, units=2)
        order = list(range(2 * len(lengths)))
        random.shuffle(order)
        reader = world.open(folder, targets="topk", codec_factory=counting_codec)
        items = reader.read(order, first_completion_token=first, max_completion_tokens=limit)
        for i, item in zip(order, items, strict=True):
            targets = world.topk_targets(i // len(lengths))[i % len(lengths)]
            rows = len(targets)
            stop = rows if limit is None else min(rows, first + limit)
            start = min(first, stop)
            splits = targets.row_splits
            assert item.targets.ids.tolist() == targets.ids[splits[start] : splits[stop]].tolist()
            assert item.targets.log_probs.tobytes() == targets.log_probs[splits[start] : splits[stop]].tobytes()
            assert item.targets.entropy.tobytes() == targets.entropy[start:stop].tobytes()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@given(JSON)
def test_envelopes_return_what_they_were_given(value: Any) -> None:
    assert canonical(unseal(seal(value)).body) == canonical(value)


@given(st.lists(st.tuples(st.integers(0, 1 << 30), st.integers(0, 1 << 30), st.integers(0, 1 << 30)), max_size=20))
def test_manifests_return_what_they_were_given(rows: list[tuple[int, int, int]]) -> None:
    counts = np.sort(np.array(rows, np.int64).reshape(-1, 3), axis=1)
    records = RecordColumn.of([StoredObject.of(str(i).encode()) for i in range(len(rows))])
    manifest = Manifest(
        identity="x",
        units=tuple(f"{i:05d}" for i in range(len(rows))),
        sequences=counts[:, 0].copy(),
        completion_tokens=counts[:, 1].copy(),
        tokens=counts[:, 2].copy(),
        records=records,
        tiers={},
        flops={"generate": 2 * 10**18 + 1},
    )
    again = Manifest.from_sealed(unseal(manifest.data()))
    assert again.to_json() == manifest.to_json()
    assert again.starts.tolist() == manifest.starts.tolist()


@given(st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 40), st.integers(0, 40)), max_size=12))
def test_coalesced_reads_return_each_range_and_no_run_touches_another(wanted: list[tuple[str, int, int]]) -> None:
    objects = {"a": bytes(range(40)), "b": bytes(range(100, 140))}
    ranges = [ByteRange(name, min(one, other), max(one, other)) for name, one, other in wanted]
    asked: list[ByteRange] = []

    def read(runs: Sequence[ByteRange]) -> list[bytes]:
        asked.extend(runs)
        return [objects[run.name][run.start : run.stop] for run in runs]

    assert read_coalesced(ranges, read) == [objects[r.name][r.start : r.stop] for r in ranges]
    assert all(one.name != other.name or one.stop < other.start for one, other in pairwise(sorted(asked)))
