"""The inner codec chain of a chunk: numbers to bytes, compressed, with a CRC-32C behind them.

The bytes are those that a Zarr v3 reader makes of `bytes`(little) + compression + `crc32c`, or of an array-to-bytes
codec (`numcodecs.pcodec`) + `crc32c`. Guarantees: the same numbers give the same bytes on every run; a decoded chunk
has the declared size before anything is allocated for it. An unknown compression is an error, not a guess.

Source: Zarr v3 core specification; codecs `bytes`, `blosc`, `zstd`, `crc32c` v1.0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import google_crc32c
import numcodecs
import numpy as np
from numcodecs import blosc, zstd
from numpy.typing import NDArray

from logitcache.errors import UserError

# Threaded blosc writes a chunk's blocks in the order they finish: bytes would differ from run to run, and it holds a
# process-wide lock. zarr-python turns threads off for the same reasons when it is imported.
blosc.use_threads = False

CRC_BYTES = 4
_BLOSC_HEADER_BYTES = 16
_SHUFFLE = {"noshuffle": blosc.NOSHUFFLE, "shuffle": blosc.SHUFFLE, "bitshuffle": blosc.BITSHUFFLE}
_BYTES = {"name": "bytes", "configuration": {"endian": "little"}}

Buffer = NDArray[np.uint8]


class Compressor(Protocol):
    """One chunk's numbers, C order and little-endian, to bytes and back."""

    def compress(self, chunk: NDArray[Any]) -> bytes: ...

    def decompress(self, data: Buffer, out: NDArray[Any]) -> None:
        """Fill `out`, which is contiguous. Raises ValueError if the bytes do not hold exactly that."""
        ...


@dataclass(frozen=True, kw_only=True)
class Plain:
    """No compression."""

    def compress(self, chunk: NDArray[Any]) -> bytes:
        return chunk.tobytes()

    def decompress(self, data: Buffer, out: NDArray[Any]) -> None:
        _exactly(out.nbytes, data.nbytes)
        out.reshape(-1).view(np.uint8)[:] = data


@dataclass(frozen=True, kw_only=True)
class Blosc:
    """Blosc 1: shuffle and a compressor."""

    cname: str
    clevel: int
    shuffle: str
    typesize: int
    blocksize: int

    def compress(self, chunk: NDArray[Any]) -> bytes:
        flat = chunk.reshape(-1).view(np.uint8)
        shuffle = _SHUFFLE[self.shuffle]
        return blosc.compress(flat, self.cname.encode(), self.clevel, shuffle, self.blocksize, self.typesize)

    def decompress(self, data: Buffer, out: NDArray[Any]) -> None:
        if data.nbytes < _BLOSC_HEADER_BYTES:
            raise ValueError("shorter than a blosc header")
        nbytes, _, cbytes = np.frombuffer(data, "<u4", 3, 4).tolist()
        _exactly(out.nbytes, nbytes)
        _exactly(data.nbytes, cbytes)
        blosc.decompress(data, out)


@dataclass(frozen=True, kw_only=True)
class Zstd:
    """A Zstandard frame."""

    level: int
    checksum: bool

    def compress(self, chunk: NDArray[Any]) -> bytes:
        return zstd.compress(chunk, self.level, self.checksum)

    def decompress(self, data: Buffer, out: NDArray[Any]) -> None:
        try:
            got = zstd.decompress(data, out)
        except RuntimeError as error:
            raise ValueError(str(error)) from error
        _exactly(out.nbytes, got.nbytes if isinstance(got, np.ndarray) else len(got))


@dataclass(frozen=True, kw_only=True)
class Pcodec:
    """PCodec: numbers to bytes without a `bytes` step (numcodecs' `pcodec`)."""

    configuration: Mapping[str, Any]

    def compress(self, chunk: NDArray[Any]) -> bytes:
        return bytes(self._codec.encode(chunk))

    def decompress(self, data: Buffer, out: NDArray[Any]) -> None:
        got = np.asarray(self._codec.decode(data)).reshape(-1)
        _exactly(out.nbytes, got.nbytes)
        out.reshape(-1)[:] = got.view(out.dtype)

    @cached_property
    def _codec(self) -> Any:
        return numcodecs.get_codec({"id": "pcodec", **self.configuration})


@dataclass(frozen=True, kw_only=True, eq=False)
class Chain:
    """The whole chain of one array's chunks.

    Attributes:
        metadata: the Zarr v3 metadata of the chain, as it stands under the sharding codec's `codecs`.
        compressor: what stands between the numbers and the checksum.
    """

    metadata: tuple[Mapping[str, Any], ...]
    compressor: Compressor

    def encode(self, chunk: NDArray[Any]) -> tuple[bytes, int]:
        """A chunk's stored bytes, checksum included, and that CRC-32C."""
        payload = self.compressor.compress(chunk)
        crc = google_crc32c.value(payload)
        return payload + crc.to_bytes(CRC_BYTES, "little"), crc

    def decode(self, data: Buffer, crc: int, out: NDArray[Any]) -> None:
        """Fill `out` from stored bytes whose CRC-32C must be `crc`. Raises ValueError otherwise."""
        payload = check_crc(data, crc)
        try:
            self.compressor.decompress(payload, out)
        except (RuntimeError, TypeError) as error:
            raise ValueError(str(error)) from error


def chain_of(compression: tuple[Mapping[str, Any], ...]) -> Chain:
    """The chain for an `ArrayLayout.compression`. Raises UserError for codecs that are not in format version 1."""
    compressor: Compressor
    match compression:
        case ():
            compressor = Plain()
        case ({"name": "blosc", "configuration": dict() as configuration},):
            compressor = Blosc(**configuration)
        case ({"name": "zstd", "configuration": {"level": int(level), "checksum": bool(checksum)}},):
            compressor = Zstd(level=level, checksum=checksum)
        case ({"name": "numcodecs.pcodec", "configuration": dict() as configuration},):
            compressor = Pcodec(configuration=configuration)
        case _:
            names = ", ".join(str(codec.get("name")) for codec in compression)
            raise UserError("a compression of format version 1", f"got {names}", "use blosc, zstd or numcodecs.pcodec")
    head = () if isinstance(compressor, Pcodec) else (_BYTES,)
    return Chain(metadata=(*head, *compression, {"name": "crc32c"}), compressor=compressor)


def check_crc(data: Buffer, crc: int) -> Buffer:
    """A stored chunk without its checksum. Raises ValueError unless that, its bytes and `crc` agree."""
    payload = data[:-CRC_BYTES]
    stored = int.from_bytes(data[-CRC_BYTES:].tobytes(), "little")
    if not google_crc32c.value(payload) == crc == stored:
        raise ValueError("its checksum does not match")
    return payload


def _exactly(want: int, have: int) -> None:
    if want != have:
        raise ValueError(f"{want} bytes expected, {have} found")
