"""An array as a part's record knows it: its shards' digests and every chunk's length and checksum.

With this a reader needs neither `zarr.json` nor a shard's index: a run of rows is one byte range of each shard it
touches, and a chunk that is not the recorded one, however whole it looks, is refused.

Guarantees: a record is consistent in itself once parsed (counts, lengths, sizes); parsing allocates no more than the
record is long.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise, product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from logitcache.errors import UserError
from logitcache.store.chain import CRC_BYTES, check_crc
from logitcache.store.place import ByteRange
from logitcache.store.shards import ArraySpec, ChunkTable, Shard, index_bytes, index_of


class DamagedChunkError(ValueError):
    """A chunk's bytes are not the recorded ones: object name, then why."""


@dataclass(frozen=True, kw_only=True)
class StoredObject:
    """What an object's bytes must be: length and SHA-256 (hex)."""

    size: int
    sha256: str

    @classmethod
    def of(cls, data: bytes) -> StoredObject:
        """The object that `data` makes."""
        return cls(size=len(data), sha256=hashlib.sha256(data).hexdigest())

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> StoredObject:
        """Raises ValueError unless it is a size and a digest."""
        size, sha256 = value["size"], value["sha256"]
        if not isinstance(size, int) or not 0 <= size < 1 << 48 or len(bytes.fromhex(sha256)) != 32:
            raise ValueError(f"no size and SHA-256: {size!r}, {sha256!r}")
        return cls(size=size, sha256=sha256)

    def to_json(self) -> dict[str, Any]:
        """As it stands in a record."""
        return {"size": self.size, "sha256": self.sha256}

    def matches(self, data: bytes) -> bool:
        """Whether these are the bytes."""
        return len(data) == self.size and hashlib.sha256(data).hexdigest() == self.sha256


@dataclass(frozen=True, kw_only=True, eq=False)
class StoredArray:
    """One array of a committed part.

    Attributes:
        path: the array's node in the hierarchy.
        spec: what it is.
        objects: its shards, in order.
        tables: their chunks, in the same order.
    """

    path: str
    spec: ArraySpec
    objects: tuple[StoredObject, ...]
    tables: tuple[ChunkTable, ...]

    @classmethod
    def of(cls, path: str, spec: ArraySpec, shards: Sequence[Shard]) -> StoredArray:
        """What to record of freshly encoded shards."""
        objects = tuple(StoredObject.of(shard.data) for shard in shards)
        return cls(path=path, spec=spec, objects=objects, tables=tuple(shard.table for shard in shards))

    @cached_property
    def names(self) -> list[str]:
        """The objects of the shards."""
        return [f"{self.path}/{self.spec.shard_name(i)}" for i in range(len(self.objects))]

    @property
    def memory_bytes(self) -> int:
        """About what this takes in memory."""
        return 600 + sum(400 + 16 * len(table.nbytes) for table in self.tables)

    def ranges(self, first: int, stop: int) -> list[ByteRange]:
        """The byte ranges that hold rows first:stop, one for each shard they touch."""
        return [
            ByteRange(self.names[shard], int(table.starts[chunks.start]), int(table.starts[chunks.stop]))
            for shard, table, chunks in self._touched(first, stop)
        ]

    def assemble(self, first: int, stop: int, data: Sequence[bytes]) -> NDArray[Any]:
        """Rows first:stop from the bytes of their `ranges`: array[stop - first, *item], little-endian.

        Raises DamagedChunkError if a chunk is not the recorded one.
        """
        spec, cut = self.spec, self.spec.chunk_shape[0]
        start = first // cut
        chunk_rows = (-(-stop // cut) - start) if stop > first else 0
        items = tuple(size * count for size, count in zip(spec.chunk_shape[1:], spec.item_chunks, strict=True))
        out = np.empty((chunk_rows, cut, *items), np.dtype(spec.dtype).newbyteorder("<"))
        slots = self._slots(out)
        for (shard, table, chunks), blob in zip(self._touched(first, stop), data, strict=True):
            self._decode_run(self.names[shard], table, chunks, np.frombuffer(blob, np.uint8), slots)
        rows = out.reshape(chunk_rows * cut, *items)
        return rows[(slice(first - start * cut, stop - start * cut), *(slice(size) for size in spec.shape[1:]))]

    def _decode_run(
        self, name: str, table: ChunkTable, chunks: range, data: NDArray[np.uint8], slots: Iterator[NDArray[Any]]
    ) -> None:
        bounds = (table.starts[chunks.start : chunks.stop + 1] - table.starts[chunks.start]).tolist()
        crcs = table.crc32c[chunks.start : chunks.stop].tolist()
        chain = self.spec.chain
        for (begin, end), crc, slot in zip(pairwise(bounds), crcs, slots, strict=False):
            target = slot if slot.flags.c_contiguous else np.empty(self.spec.chunk_shape, slot.dtype)
            try:
                chain.decode(data[begin:end], crc, target)
            except ValueError as error:
                raise DamagedChunkError(name, str(error)) from error
            if target is not slot:
                slot[...] = target

    def _slots(self, out: NDArray[Any]) -> Iterator[NDArray[Any]]:
        """The chunks of `out` in C order, as views."""
        if self.spec.chunks_per_row == 1:
            return iter(out)
        cuts, counts = self.spec.chunk_shape[1:], self.spec.item_chunks
        steps = [[slice(i * cut, (i + 1) * cut) for i in range(n)] for cut, n in zip(cuts, counts, strict=True)]
        items = [(slice(None), *place) for place in product(*steps)]
        return (row[item] for row in out for item in items)

    def _touched(self, first: int, stop: int) -> Iterator[tuple[int, ChunkTable, range]]:
        """Shards that rows first:stop touch, and which of their chunks."""
        if stop <= first:
            return
        cut, wide, per_row = self.spec.chunk_shape[0], self.spec.shard_chunk_rows, self.spec.chunks_per_row
        begin, end = first // cut, -(-stop // cut)
        for shard in range(begin // wide, -(-end // wide)):
            low, high = max(begin, shard * wide) - shard * wide, min(end, (shard + 1) * wide) - shard * wide
            yield shard, self.tables[shard], range(low * per_row, high * per_row)

    def check_shard(self, shard: int, data: bytes) -> None:
        """Raise ValueError unless a whole shard's index and every chunk's checksum are the recorded ones."""
        table = self.tables[shard]
        if data[int(table.starts[-1]) :] != index_of(self.spec, table):
            raise ValueError("its index is not the recorded one")
        whole = np.frombuffer(data, np.uint8)
        for (begin, end), crc in zip(pairwise(table.starts.tolist()), table.crc32c.tolist(), strict=True):
            check_crc(whole[begin:end], crc)

    def to_json(self) -> dict[str, Any]:
        """As it stands in a record."""
        spec = self.spec
        return {
            "dtype": spec.dtype,
            "shape": list(spec.shape),
            "chunk_shape": list(spec.chunk_shape),
            "dimension_names": list(spec.dimension_names),
            "compression": [dict(codec) for codec in spec.compression],
            "shards": [
                {**item.to_json(), "chunk_nbytes": pack(table.nbytes), "chunk_crc32c": pack(table.crc32c)}
                for item, table in zip(self.objects, self.tables, strict=True)
            ],
        }

    @classmethod
    def from_json(cls, path: str, value: Mapping[str, Any]) -> StoredArray:
        """Raises ValueError unless its numbers agree with each other."""
        try:
            spec = ArraySpec(
                dtype=value["dtype"],
                shape=tuple(value["shape"]),
                chunk_shape=tuple(value["chunk_shape"]),
                dimension_names=tuple(value["dimension_names"]),
                compression=tuple(value["compression"]),
            )
            spec.chain  # noqa: B018 (an unknown compression is found now, not at the first read)
        except (UserError, TypeError) as error:
            raise ValueError(f"{path}: {error}") from error
        objects = tuple(StoredObject.from_json(item) for item in value["shards"])
        tables = tuple(
            ChunkTable(nbytes=unpack(item["chunk_nbytes"], "<u4"), crc32c=unpack(item["chunk_crc32c"], "<u4"))
            for item in value["shards"]
        )
        array = cls(path=path, spec=spec, objects=objects, tables=tables)
        array._check()
        return array

    def _check(self) -> None:
        if len(self.objects) != self.spec.shards:
            raise ValueError(f"{self.path}: {len(self.objects)} shards recorded, its shape makes {self.spec.shards}")
        for i, (item, table) in enumerate(zip(self.objects, self.tables, strict=True)):
            chunks = self.spec.chunks_in(i)
            if not len(table.nbytes) == len(table.crc32c) == chunks:
                raise ValueError(f"{self.path}: {len(table.nbytes)} chunks recorded, its shape makes {chunks}")
            whole = int(table.starts[-1]) + index_bytes(self.spec)
            if whole != item.size or int(table.nbytes.min()) <= CRC_BYTES:
                raise ValueError(f"{self.path}: a shard of {item.size} bytes whose chunks make {whole}")


def pack(values: NDArray[Any]) -> str:
    """Base64 of an array's little-endian bytes."""
    return base64.b64encode(values.astype(values.dtype.newbyteorder("<"), copy=False).tobytes()).decode("ascii")


def unpack(text: str, dtype: str) -> NDArray[Any]:
    """The array that `pack` made. Raises ValueError for anything else."""
    return np.frombuffer(base64.b64decode(text, validate=True), dtype)
