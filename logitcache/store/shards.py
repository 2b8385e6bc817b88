"""Zarr v3 sharded arrays, written and read without zarr-python (docs/format.md, section 4).

A packed array is cut along its first axis into shards, each one object; a shard holds its chunks in C order, without
gaps, then the index (offset and length of each chunk, CRC-32C at the end): the `sharding_indexed` codec. So a run of
rows is one byte range of one object, known from the chunks' lengths alone. zarr-python spends half a millisecond and
an index request on every slice; here a slice costs one read.

Guarantees: what is written opens in any Zarr v3 reader; a chunk is returned only if its bytes match the checksum in the
part's record; numbers are bounded against each other before anything is allocated.

Source: Zarr v3 core specification; codec `sharding_indexed` v1.0.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product
from typing import Any

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from logitcache.errors import UserError
from logitcache.store.chain import CRC_BYTES, Chain, chain_of
from logitcache.store.envelope import canonical

SHARD_BYTES = 1 << 30
"""Most bytes of numbers in one shard, before compression; a longer array has several."""
MAX_CHUNK_BYTES = 1 << 28
"""Largest chunk accepted, before compression."""
INDEX_ENTRY_BYTES = 16
_INDEX_CODECS = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]
_DTYPES = tuple(
    [f"{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)]
    + ["float16", "float32", "float64", "bool"]
)


@dataclass(frozen=True, kw_only=True)
class ArraySpec:
    """What an array is: everything its `zarr.json` says.

    Attributes:
        dtype: numpy and Zarr name of the element type; little-endian on disk.
        shape: the packed axis first.
        chunk_shape: an inner chunk, same number of axes.
        dimension_names: names for people and other readers.
        compression: see `ArrayLayout.compression`.
    """

    dtype: str
    shape: tuple[int, ...]
    chunk_shape: tuple[int, ...]
    dimension_names: tuple[str | None, ...]
    compression: tuple[Mapping[str, Any], ...] = field(default=(), hash=False)

    def __post_init__(self) -> None:
        cuts = self.chunk_shape
        fits = self.dtype in _DTYPES and len(self.shape) == len(cuts) == len(self.dimension_names) > 0
        fits = fits and all(0 <= size < 1 << 48 for size in self.shape) and all(0 < cut < 1 << 31 for cut in cuts)
        fits = fits and all(self.shape[1:])
        if not fits or math.prod(cuts) * np.dtype(self.dtype).itemsize > MAX_CHUNK_BYTES:
            found = f"{self.dtype}{list(self.shape)} in chunks of {list(cuts)}"
            raise UserError("an array that format version 1 can hold", found, "use a plain dtype and smaller chunks")

    @cached_property
    def chain(self) -> Chain:
        """The chunks' codec chain."""
        return chain_of(self.compression)

    @cached_property
    def item_chunks(self) -> tuple[int, ...]:
        """How many chunks lie along each axis after the first."""
        return tuple(-(-size // cut) for size, cut in zip(self.shape[1:], self.chunk_shape[1:], strict=True))

    @cached_property
    def chunks_per_row(self) -> int:
        """Chunks that together hold one chunk-length of whole rows; they are neighbours in C order."""
        return math.prod(self.item_chunks)

    @cached_property
    def chunk_rows(self) -> int:
        """Chunks along the packed axis, over all shards."""
        return -(-self.shape[0] // self.chunk_shape[0])

    @cached_property
    def shard_chunk_rows(self) -> int:
        """Chunks along the packed axis in a full shard."""
        row_bytes = self.chunks_per_row * math.prod(self.chunk_shape) * np.dtype(self.dtype).itemsize
        return max(1, min(self.chunk_rows, SHARD_BYTES // row_bytes))

    @property
    def shards(self) -> int:
        """How many objects the array has; none if it is empty."""
        return -(-self.chunk_rows // self.shard_chunk_rows)

    def shard_name(self, shard: int) -> str:
        """The object of a shard, relative to the array."""
        return "/".join(["c", str(shard), *("0" for _ in self.shape[1:])])

    def chunks_in(self, shard: int) -> int:
        """Chunks that hold data in a shard."""
        rows = min(self.shard_chunk_rows, self.chunk_rows - shard * self.shard_chunk_rows)
        return rows * self.chunks_per_row

    def metadata(self) -> bytes:
        """The array's `zarr.json`."""
        sharding = {
            "chunk_shape": list(self.chunk_shape),
            "codecs": list(self.chain.metadata),
            "index_codecs": _INDEX_CODECS,
            "index_location": "end",
        }
        items = [cut * count for cut, count in zip(self.chunk_shape[1:], self.item_chunks, strict=True)]
        shard_shape = [self.shard_chunk_rows * self.chunk_shape[0], *items]
        return canonical(
            {
                "zarr_format": 3,
                "node_type": "array",
                "shape": list(self.shape),
                "data_type": self.dtype,
                "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": shard_shape}},
                "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
                "fill_value": _fill_value(self.dtype),
                "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
                "dimension_names": list(self.dimension_names),
                "attributes": {},
            }
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class ChunkTable:
    """Where the chunks of one shard lie and what their bytes must sum to.

    Attributes:
        nbytes: uint32[n], stored length of each chunk with data, checksum included, in C order.
        crc32c: uint32[n], CRC-32C of each, without the four bytes that hold it.
    """

    nbytes: NDArray[np.uint32]
    crc32c: NDArray[np.uint32]

    @cached_property
    def starts(self) -> NDArray[np.int64]:
        """int64[n+1]: where each chunk begins in the object; chunks follow each other without gaps."""
        return np.concatenate([[0], np.cumsum(self.nbytes, dtype=np.int64)])


@dataclass(frozen=True, kw_only=True, eq=False)
class Shard:
    """One shard ready to be stored."""

    name: str
    data: bytes
    table: ChunkTable


def encode_shards(spec: ArraySpec, values: NDArray[Any]) -> Iterator[Shard]:
    """The shards of an array; `values` has the spec's shape and dtype."""
    for shard in range(spec.shards):
        first = shard * spec.shard_chunk_rows
        yield _encode_shard(spec, values, spec.shard_name(shard), range(first, first + spec.shard_chunk_rows))


def _encode_shard(spec: ArraySpec, values: NDArray[Any], name: str, chunk_rows: range) -> Shard:
    chunks: list[bytes] = []
    crcs: list[int] = []
    for place in product(chunk_rows, *(range(count) for count in spec.item_chunks)):
        if place[0] < spec.chunk_rows:
            stored, crc = spec.chain.encode(_chunk(spec, values, place))
            chunks.append(stored)
            crcs.append(crc)
    table = ChunkTable(nbytes=np.array([len(c) for c in chunks], "<u4"), crc32c=np.array(crcs, "<u4"))
    return Shard(name=name, data=b"".join([*chunks, index_of(spec, table)]), table=table)


def _chunk(spec: ArraySpec, values: NDArray[Any], place: Sequence[int]) -> NDArray[Any]:
    """A full chunk, zero where it reaches past the array's edge."""
    cuts = tuple(slice(i * cut, (i + 1) * cut) for i, cut in zip(place, spec.chunk_shape, strict=True))
    inside = values[cuts]
    if inside.shape == spec.chunk_shape:
        return np.ascontiguousarray(inside, _little(spec.dtype))
    chunk = np.zeros(spec.chunk_shape, _little(spec.dtype))
    chunk[tuple(slice(size) for size in inside.shape)] = inside
    return chunk


def index_of(spec: ArraySpec, table: ChunkTable) -> bytes:
    """The shard index of the sharding codec: (offset, nbytes) uint64 for every chunk of a full shard, then CRC-32C."""
    index = np.full((spec.shard_chunk_rows * spec.chunks_per_row, 2), np.uint64(2**64 - 1), "<u8")
    index[: len(table.nbytes), 0] = table.starts[:-1]
    index[: len(table.nbytes), 1] = table.nbytes
    data = index.tobytes()
    return data + google_crc32c.value(data).to_bytes(CRC_BYTES, "little")


def index_bytes(spec: ArraySpec) -> int:
    """Length of the index that ends every shard of an array."""
    return spec.shard_chunk_rows * spec.chunks_per_row * INDEX_ENTRY_BYTES + CRC_BYTES


def _fill_value(dtype: str) -> float | bool:
    if dtype == "bool":
        return False
    return 0.0 if dtype.startswith("float") else 0


def _little(dtype: str) -> np.dtype[Any]:
    return np.dtype(dtype).newbyteorder("<")
