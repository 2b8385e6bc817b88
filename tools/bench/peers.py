"""What other caches of teacher log-probabilities keep, written from their public descriptions, to compare with.

Guarantees: each format's `decode` gives back what its bytes hold (the tests round-trip them), and where a description
leaves a choice open, the choice that favours the peer is taken: planes are laid out for zstd, polynomials are fitted
in float64 and well conditioned. Containers (tar, Parquet), and what they add, are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numcodecs import zstd
from numpy.typing import NDArray

from logitcache.codecs.quantize import bf16_bits, bf16_values

_ZSTD_LEVEL = 3


@dataclass(frozen=True, kw_only=True, eq=False)
class TopTokens:
    """The k likeliest tokens of T rows, likeliest first: ids int32[T, k], log_probs float32[T, k] (nats)."""

    ids: NDArray[np.int32]
    log_probs: NDArray[np.float32]


def top_tokens(log_probs: NDArray[np.float32], k: int) -> TopTokens:
    """The k likeliest of float32[T, V]."""
    ids = np.argpartition(-log_probs, k - 1, axis=1)[:, :k]
    values = np.take_along_axis(log_probs, ids, axis=1)
    order = np.argsort(-values, axis=1, kind="stable")
    return TopTokens(
        ids=np.take_along_axis(ids, order, axis=1).astype(np.int32),
        log_probs=np.take_along_axis(values, order, axis=1),
    )


class Peer(Protocol):
    """A format: T rows to bytes and back."""

    @property
    def name(self) -> str: ...

    @property
    def k(self) -> int: ...

    def encode(self, top: TopTokens) -> bytes: ...

    def decode(self, data: bytes, rows: int) -> TopTokens: ...


def compressed_bytes(data: bytes) -> int:
    """Size after zstd, at the level that zstd itself defaults to."""
    return len(zstd.compress(data, _ZSTD_LEVEL))


@dataclass(frozen=True, kw_only=True)
class MegatronTopK:
    """Megatron-LM's teacher cache: top-k log-probabilities in bfloat16, ids as 16 bits and one more, zstd over all.

    Five bytes an entry before zstd; a vocabulary of more than 131,072 tokens cannot be saved.
    """

    k: int

    @property
    def name(self) -> str:
        return f"Megatron-LM top-{self.k} bf16"

    def encode(self, top: TopTokens) -> bytes:
        if top.ids.max(initial=0) >= 1 << 17:
            raise ValueError("a vocabulary of more than 131,072 tokens does not fit this format")
        low, high = (top.ids & 0xFFFF).astype("<u2"), (top.ids >> 16).astype("u1")
        return bf16_bits(top.log_probs).tobytes() + low.tobytes() + high.tobytes()

    def decode(self, data: bytes, rows: int) -> TopTokens:
        count, shape = rows * self.k, (rows, self.k)
        values, low, high = (
            np.frombuffer(data, dtype, count, offset * count) for dtype, offset in (("<u2", 0), ("<u2", 2), ("u1", 4))
        )
        ids = low.astype(np.int32) | (high.astype(np.int32) << 16)
        return TopTokens(ids=ids.reshape(shape), log_probs=bf16_values(values).reshape(shape))


@dataclass(frozen=True, kw_only=True)
class ResidualBin:
    """`elements` residuals at `bits` bits each, scaled by one float16."""

    bits: int
    elements: int


@dataclass(frozen=True, kw_only=True)
class DistillKit:
    """DistillKit's distribution quantisation, as its README configures it.

    Ids bit-packed; the first `exact_k` log-probabilities in bfloat16; the others as a polynomial in their rank, its
    coefficients in float32; then, where there are bins, what the polynomial leaves, quantised.
    """

    name: str
    vocab_size: int
    k: int
    exact_k: int
    terms: tuple[float, ...]
    bins: tuple[ResidualBin, ...] = ()

    def encode(self, top: TopTokens) -> bytes:
        rows = len(top.ids)
        rest = top.log_probs[:, self.exact_k :]
        coefficients = (rest.astype(np.float64) @ np.linalg.pinv(self._basis).T).astype("<f4")
        residual = rest - self._curve(coefficients)
        parts = [
            _packed(top.ids, self._id_bits),
            bf16_bits(top.log_probs[:, : self.exact_k]).view("u1").reshape(rows, -1),
            coefficients.view("u1").reshape(rows, -1),
        ]
        for start, bin_ in self._placed_bins:
            scale, codes = _quantised(residual[:, start : start + bin_.elements], bin_.bits)
            parts += [scale.view("u1").reshape(rows, -1), _packed(codes, bin_.bits)]
        return np.concatenate(parts, axis=1).tobytes()

    def decode(self, data: bytes, rows: int) -> TopTokens:
        take = _taker(np.frombuffer(data, "u1").reshape(rows, -1))
        ids = _unpacked(take(-(-self.k * self._id_bits // 8)), self._id_bits, self.k)
        exact = bf16_values(take(2 * self.exact_k).view("<u2"))
        rest = self._curve(take(4 * len(self.terms)).view("<f4"))
        for start, bin_ in self._placed_bins:
            scale = take(2).view("<f2").astype(np.float32)
            codes = _unpacked(take(-(-bin_.elements * bin_.bits // 8)), bin_.bits, bin_.elements)
            rest[:, start : start + bin_.elements] += (codes - (1 << (bin_.bits - 1))) * scale
        return TopTokens(ids=ids, log_probs=np.minimum(np.concatenate([exact, rest], axis=1), 0).astype(np.float32))

    @property
    def _id_bits(self) -> int:
        return max(1, (self.vocab_size - 1).bit_length())

    @property
    def _basis(self) -> NDArray[np.float64]:
        """float64[k - exact_k, terms]: powers of the rank, scaled to 0..1."""
        return np.linspace(0, 1, self.k - self.exact_k)[:, None] ** np.array(self.terms)

    @property
    def _placed_bins(self) -> Sequence[tuple[int, ResidualBin]]:
        starts = np.cumsum([0, *(bin_.elements for bin_ in self.bins)])
        return [(int(start), bin_) for start, bin_ in zip(starts, self.bins, strict=False)]

    def _curve(self, coefficients: NDArray[np.float32]) -> NDArray[np.float32]:
        return (coefficients.astype(np.float64) @ self._basis.T).astype(np.float32)


def peers(vocab_size: int) -> list[Peer]:
    """The formats that are compared with: Megatron-LM's at two sizes, three configurations of DistillKit."""
    polynomial = (0.0, 1.0, 2.0, 3.0, 4.0, 0.5)
    bins = (ResidualBin(bits=8, elements=16), ResidualBin(bits=4, elements=47))
    kit = "DistillKit"
    return [
        MegatronTopK(k=64),
        MegatronTopK(k=128),
        DistillKit(name=f"{kit} recommended k=128", vocab_size=vocab_size, k=128, exact_k=16, terms=polynomial),
        DistillKit(name=f"{kit} budget k=50", vocab_size=vocab_size, k=50, exact_k=1, terms=(0.0, 1.0, 0.5)),
        DistillKit(
            name=f"{kit} k=64, residual bins", vocab_size=vocab_size, k=64, exact_k=1, terms=(0, 1, 2, 0.5), bins=bins
        ),
    ]


def _packed(values: NDArray[np.int32], bits: int) -> NDArray[np.uint8]:
    """uint8[T, ceil(n * bits / 8)] of nonnegative int32[T, n], lowest bit first."""
    planes = (values[:, :, None] >> np.arange(bits)) & 1
    return np.packbits(planes.reshape(len(values), -1).astype(np.uint8), axis=1, bitorder="little")


def _unpacked(data: NDArray[np.uint8], bits: int, count: int) -> NDArray[np.int32]:
    planes = np.unpackbits(data, axis=1, count=bits * count, bitorder="little").reshape(len(data), count, bits)
    return (planes.astype(np.int32) << np.arange(bits)).sum(axis=2, dtype=np.int32)


def _quantised(residual: NDArray[np.float32], bits: int) -> tuple[NDArray[np.float16], NDArray[np.int32]]:
    """A float16 scale a row, and codes 0..2^bits - 1 around the middle."""
    half = 1 << (bits - 1)
    scale = (np.abs(residual).max(axis=1, keepdims=True) / (half - 1)).astype("<f2")
    steps = residual / np.maximum(scale.astype(np.float32), 1e-12)
    return scale, (np.clip(np.rint(steps), -half, half - 1) + half).astype(np.int32)


def _taker(rows: NDArray[np.uint8]) -> Callable[[int], NDArray[np.uint8]]:
    """Takes the next columns, contiguous."""
    position = 0

    def take(columns: int) -> NDArray[np.uint8]:
        nonlocal position
        position += columns
        return np.ascontiguousarray(rows[:, position - columns : position])

    return take
