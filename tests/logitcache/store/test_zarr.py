"""Our arrays are Zarr v3 arrays: other readers see the same numbers, and we decode what they write."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorstore
import zarr
from numpy.typing import NDArray

from logitcache.errors import UserError
from logitcache.store import shards
from logitcache.store.shards import ArraySpec, encode_shards
from logitcache.store.stored_array import DamagedChunkError, StoredArray
from tests.logitcache.store.plain_codecs import shuffled

ZSTD = ({"name": "zstd", "configuration": {"level": 3, "checksum": False}},)
BITS = (
    {
        "name": "blosc",
        "configuration": {"typesize": 2, "cname": "zstd", "clevel": 1, "shuffle": "bitshuffle", "blocksize": 0},
    },
)
PCODEC = ({"name": "numcodecs.pcodec", "configuration": {"level": 8}},)
CASES = [
    ("int32", (5000,), (1024,), shuffled("int32")),
    ("int64", (1,), (4096,), shuffled("int64")),
    ("uint16", (700, 6), (256, 6), BITS),
    ("float32", (700, 5), (256, 2), ZSTD),
    ("uint8", (10, 3, 4), (4, 1, 3), ()),
    ("float16", (33,), (8,), shuffled("float16")),
    ("float64", (0,), (8,), ZSTD),
    ("uint16", (0, 4), (8, 2), ()),
    ("bool", (9,), (4,), ZSTD),
]


def spec_of(dtype: str, shape: tuple[int, ...], chunk: tuple[int, ...], compression: Any) -> ArraySpec:
    names = ("row", *(None for _ in shape[1:]))
    return ArraySpec(dtype=dtype, shape=shape, chunk_shape=chunk, dimension_names=names, compression=compression)


def values_of(spec: ArraySpec) -> NDArray[Any]:
    rng = np.random.default_rng(0)
    if spec.dtype == "bool":
        return rng.integers(0, 2, spec.shape).astype(bool)
    return rng.integers(0, 100, spec.shape).astype(spec.dtype)


def write(folder: Path, spec: ArraySpec, values: NDArray[Any]) -> StoredArray:
    made = list(encode_shards(spec, values))
    (folder / "zarr.json").write_bytes(spec.metadata())
    for shard in made:
        (folder / shard.name).parent.mkdir(parents=True, exist_ok=True)
        (folder / shard.name).write_bytes(shard.data)
    return StoredArray.of(str(folder), spec, made)


def by_zarr(folder: Path) -> NDArray[Any]:
    return np.asarray(zarr.open_array(folder, mode="r")[...])


def by_tensorstore(folder: Path) -> NDArray[Any]:
    driver = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(folder)}}
    return np.asarray(tensorstore.open(driver, read=True).result().read().result())


def by_zarrs(folder: Path) -> NDArray[Any]:
    """By the Rust implementation alone: `strict` is to fail where zarr-python would help out."""
    with zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline", "codec_pipeline.strict": True}):
        return by_zarr(folder)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("shard_bytes", [1 << 30, 3000])
def test_other_readers_open_our_arrays(tmp_path, case, shard_bytes, monkeypatch):
    monkeypatch.setattr(shards, "SHARD_BYTES", shard_bytes)
    spec = spec_of(*case)
    values = values_of(spec)
    stored = write(tmp_path, spec, values)
    assert (by_zarr(tmp_path) == values).all()
    assert by_zarr(tmp_path).dtype == values.dtype
    assert (by_tensorstore(tmp_path) == values).all()
    assert (by_zarrs(tmp_path) == values).all()
    check_slices(stored, values)


def test_pcodec_opens_in_zarr_python_and_zarrs(tmp_path):
    values = np.cumsum(np.random.default_rng(0).integers(-3, 4, (900, 4)), axis=0).astype(np.int32)
    spec = spec_of("int32", values.shape, (256, 1), PCODEC)
    stored = write(tmp_path, spec, values)
    for read in (by_zarr, by_zarrs):
        with pytest.warns(UserWarning, match="Numcodecs codecs"):
            assert (read(tmp_path) == values).all()
    check_slices(stored, values)


def check_slices(stored: StoredArray, values: NDArray[Any]) -> None:
    n = len(values)
    rng = np.random.default_rng(1)
    spans = [(0, n), (0, 0), (n, n), *(sorted(rng.integers(0, n + 1, 2).tolist()) for _ in range(20))]
    for first, stop in spans:
        data = [Path(item.name).read_bytes()[item.start : item.stop] for item in stored.ranges(first, stop)]
        got = stored.assemble(first, stop, data)
        assert got.dtype == values.dtype
        assert np.array_equal(got, values[first:stop])


@pytest.mark.parametrize("case", [case for case in CASES if 0 not in case[1]], ids=str)
def test_we_decode_what_zarr_python_writes(tmp_path, case):
    spec = spec_of(*case)
    values = (values_of(spec) + 1).astype(spec.dtype)  # no chunk of zeros: zarr-python leaves those out
    (tmp_path / "zarr.json").write_bytes(spec.metadata())
    zarr.open_array(tmp_path, mode="r+")[...] = values
    shard = (tmp_path / spec.shard_name(0)).read_bytes()
    index = np.frombuffer(shard[-shards.index_bytes(spec) : -4], "<u8").reshape(-1, 2).tolist()
    grid = product(range(spec.chunk_rows), *(range(n) for n in spec.item_chunks))
    for (offset, nbytes), place in zip(index, grid, strict=True):
        data = np.frombuffer(shard, np.uint8)[offset : offset + nbytes]
        out = np.empty(spec.chunk_shape, spec.dtype)
        spec.chain.decode(data, int.from_bytes(data[-4:].tobytes(), "little"), out)
        cuts = tuple(slice(i * cut, (i + 1) * cut) for i, cut in zip(place, spec.chunk_shape, strict=True))
        want = values[cuts]
        assert np.array_equal(out[tuple(slice(size) for size in want.shape)], want)


def test_metadata_says_what_the_specification_asks():
    metadata = json.loads(spec_of("uint16", (700, 6), (256, 3), BITS).metadata())
    assert metadata["chunk_grid"]["configuration"]["chunk_shape"] == [768, 6]
    (sharding,) = metadata["codecs"]
    assert sharding["configuration"]["chunk_shape"] == [256, 3]
    assert [codec["name"] for codec in sharding["configuration"]["codecs"]] == ["bytes", "blosc", "crc32c"]


def test_the_same_numbers_give_the_same_bytes():
    spec = spec_of("float32", (300_000,), (1 << 18,), shuffled("float32"))
    values = np.random.default_rng(0).normal(size=300_000).astype(np.float32)
    made = {b"".join(shard.data for shard in encode_shards(spec, values)) for _ in range(5)}
    assert len(made) == 1


@pytest.mark.parametrize("case", CASES[:6], ids=str)
def test_a_changed_byte_is_never_a_number(tmp_path, case):
    spec = spec_of(*case)
    stored = write(tmp_path, spec, values_of(spec))
    (whole,) = stored.ranges(0, spec.shape[0])
    data = Path(whole.name).read_bytes()[: whole.stop]
    rng = np.random.default_rng(0)
    for at in rng.integers(0, len(data), 50).tolist():
        broken = data[:at] + bytes([data[at] ^ 1 << int(rng.integers(8))]) + data[at + 1 :]
        with pytest.raises(DamagedChunkError, match="checksum"):
            stored.assemble(0, spec.shape[0], [broken])


@pytest.mark.parametrize(
    ("dtype", "shape", "chunk"),
    [("complex64", (3,), (3,)), ("int32", (-1,), (3,)), ("int32", (3,), (0,)), ("int32", (3, 0), (3, 1)),
     ("int32", (3,), (1 << 30,)), ("int32", (1 << 50,), (8,)), ("int32", (3, 3), (3,))],
)  # fmt: skip
def test_what_the_format_cannot_hold_is_refused(dtype, shape, chunk):
    with pytest.raises(UserError, match="format version 1 can hold"):
        spec_of(dtype, shape, chunk, ())


def test_an_unknown_compression_is_refused():
    with pytest.raises(UserError, match=r"got lz77.*use blosc, zstd"):
        spec_of("int32", (3,), (3,), ({"name": "lz77"},)).metadata()
