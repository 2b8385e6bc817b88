"""Caches to measure the store on, and the compressed limit: one blosc record a sequence.

The numbers are made up, their sizes are not: sequences of 512 to 4,096 tokens, a dozen kept tokens a row, gaps and
probabilities spread as a teacher's are. How well they compress is the codecs' benchmark's business.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numcodecs import blosc
from numpy.typing import NDArray

from logitcache.codecs import Codec, HiddenStateCodec, TopKCodec, codec_from_config, uniform_prior
from logitcache.codecs.topk_values import RootGrid
from logitcache.records import (
    FinishReason,
    Head,
    HiddenStateTargets,
    Origin,
    TeacherTargets,
    TokenSequence,
    TopKTargets,
)
from logitcache.scoring import TopKRequest
from logitcache.service import undecoded as service
from logitcache.store import Store, create

VOCAB, WIDTH, MOST_KEPT = 49_152, 576, 24
PROMPT_TOKENS = 96


@dataclass(frozen=True, kw_only=True)
class Made:
    """Sequences and their targets of one tier."""

    tier: str
    codec: Codec
    sequences: list[TokenSequence]
    targets: list[TeacherTargets]

    @property
    def tokens(self) -> int:
        """All tokens."""
        return sum(len(sequence) for sequence in self.sequences)


def make(tier: str, tokens: int, seed: int = 0) -> Made:
    """About that many tokens, with `topk` or `hidden` targets."""
    rng = np.random.default_rng(seed)
    sequences: list[TokenSequence] = []
    while sum(len(sequence) for sequence in sequences) < tokens:
        sequences.append(_sequence(rng, int(rng.integers(512, 4097)), f"{len(sequences):032x}"))
    head = Head(weight=rng.integers(0, 1 << 14, (256, WIDTH)).astype(np.uint16))
    codec: Codec = HiddenStateCodec(head=head)
    if tier == "topk":
        codec = _topk_codec()
        return Made(tier=tier, codec=codec, sequences=sequences, targets=[_topk(rng, s) for s in sequences])
    states = [_hidden(rng, sequence, head) for sequence in sequences]
    return Made(tier=tier, codec=codec, sequences=sequences, targets=list(states))


def _topk_codec() -> TopKCodec:
    """Probabilities of 1e-3 and more on a grid of roots, and chunks of about 1,024 rows."""
    request, step = TopKRequest(max_k=MOST_KEPT, min_probability=1e-3), 0.004
    levels = RootGrid(offset=request.min_probability**0.5, step=step).midpoints()
    return TopKCodec(prior=uniform_prior(VOCAB), request=request, step=step, levels=levels, entry_chunk=1 << 14)


def _sequence(rng: np.random.Generator, tokens: int, sample_id: str) -> TokenSequence:
    ids = np.minimum(rng.zipf(1.2, tokens), VOCAB - 1).astype(np.int32)
    return TokenSequence(
        token_ids=ids,
        prompt_tokens=PROMPT_TOKENS,
        origin=Origin.TEACHER,
        sample_id=sample_id,
        problem_id=sample_id[-6:],
        finish_reason=FinishReason.STOP,
    )


def _hidden(rng: np.random.Generator, sequence: TokenSequence, head: Head) -> HiddenStateTargets:
    states = rng.normal(0, 2, (sequence.completion_tokens, WIDTH)).astype(np.float32)
    bits = (states.view(np.uint32) >> 16).astype(np.uint16)
    return HiddenStateTargets(hidden=bits, head_fingerprint=head.fingerprint)


def _topk(rng: np.random.Generator, sequence: TokenSequence) -> TopKTargets:
    rows = sequence.completion_tokens
    counts = np.clip(rng.geometric(1 / 14, rows), 1, MOST_KEPT)
    splits = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    gaps = np.clip(rng.lognormal(4, 1.5, splits[-1]), 1, VOCAB // MOST_KEPT).astype(np.int64)
    ends = np.cumsum(gaps)
    before = np.concatenate([[0], ends])[splits[:-1]]
    ids = ends - np.repeat(before, counts) - 1
    weights = rng.exponential(size=splits[-1]) ** 3 + 1e-3
    sums = np.add.reduceat(weights, splits[:-1])
    tail = rng.uniform(-7, -3, rows)
    log_probs = np.log(weights / np.repeat(sums, counts)) + np.repeat(np.log1p(-np.exp(tail)), counts)
    return TopKTargets(
        ids=ids.astype(np.int32),
        log_probs=np.maximum(log_probs, np.log(1e-3)).astype(np.float32),
        row_splits=splits,
        tail_log_mass=tail.astype(np.float32),
        token_log_prob=rng.uniform(-5, 0, rows).astype(np.float32),
        entropy=rng.uniform(0, 3, rows).astype(np.float32),
    )


def write_cache(made: Made, url: str, *, per_part: int, storage_options: Mapping[str, Any] | None = None) -> Store:
    """A sealed cache of it."""
    store = create(url, {"tokenizer": {"fingerprint": "bench"}}, storage_options=storage_options)
    store.create_tier(made.tier, made.codec)
    for number, start in enumerate(range(0, len(made.sequences), per_part)):
        unit, some = f"{number:08d}", slice(start, start + per_part)
        store.write_sequences(unit, made.sequences[some])
        store.write_targets(unit, made.tier, made.codec, made.targets[some])
    store.seal()
    return store


def undecoded(config: dict[str, Any], shared: Mapping[str, NDArray[Any]]) -> Any:
    """A codec factory."""
    return service.undecoded(codec_from_config(config, shared))


@dataclass(frozen=True, kw_only=True)
class Records:
    """The compressed limit: a file of blosc records, each one sequence's tokens and arrays together."""

    descriptor: int
    offsets: NDArray[np.int64]
    shapes: list[list[tuple[str, np.dtype[Any], tuple[int, ...]]]] = field(repr=False)

    def read(self, index: int) -> dict[str, NDArray[Any]]:
        """Every array of a sequence: one pread, one decompression, views."""
        start, stop = self.offsets[index : index + 2].tolist()
        data = blosc.decompress(os.pread(self.descriptor, stop - start, start))
        found, at = {}, 0
        for name, dtype, shape in self.shapes[index]:
            count = int(np.prod(shape))
            found[name] = np.frombuffer(data, dtype, count, at).reshape(shape)
            at += count * dtype.itemsize
        return found


def write_records(made: Made, path: Path, *, decoded: bool = False) -> Records:
    """One record a sequence, at the store's level and shuffle, of the arrays that `write_cache` stores; with `decoded`,
    of the numbers that they decode to.
    """
    sizes, shapes = [0], []
    with path.open("wb") as file:
        for sequence, targets in zip(made.sequences, made.targets, strict=True):
            arrays = dict(made.codec.encode([targets]).arrays)
            if decoded:
                arrays = {k: v for k, v in vars(made.codec.decode(arrays)).items() if isinstance(v, np.ndarray)}
            arrays = {"token_ids": sequence.token_ids, **arrays}
            shapes.append([(name, value.dtype, value.shape) for name, value in arrays.items()])
            data = np.frombuffer(b"".join(value.tobytes() for value in arrays.values()), np.uint8)
            record = blosc.compress(data, b"zstd", 5, blosc.SHUFFLE, 0, 4 if decoded else _typesize(made.codec))
            file.write(record)
            sizes.append(len(record))
    return Records(descriptor=os.open(path, os.O_RDONLY), offsets=np.cumsum(sizes), shapes=shapes)


def _typesize(codec: Codec) -> int:
    return min(np.dtype(item.dtype).itemsize for item in codec.layouts.values())


def shuffled_batches(count: int, size: int, seed: int) -> list[Sequence[int]]:
    """An epoch in random order."""
    order = np.random.default_rng(seed).permutation(count).tolist()
    return [order[start : start + size] for start in range(0, count, size)]
