"""A small world: sequences and targets made from a seed, real codecs, an identity."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import fsspec
import numpy as np
import pytest

from logitcache.records import (
    FinishReason,
    Head,
    HiddenStateTargets,
    Origin,
    TokenSequence,
    TopKTargets,
    sample_id_of,
)
from logitcache.store import Reader, Store, create, open_cache, open_store
from tests.logitcache.store.plain_codecs import PlainHidden, PlainTopK, plain_codec

VOCAB, WIDTH = 97, 6
IDENTITY: dict[str, Any] = {
    "teacher": {"name": "table", "fingerprint": "t0", "vocab_size": VOCAB},
    "tokenizer": {"fingerprint": "tok0"},
}


@dataclass(frozen=True, kw_only=True)
class World:
    """Everything a cache is built from, as pure functions of a unit's number."""

    lengths: tuple[tuple[int, int], ...] = ((3, 5), (1, 0), (7, 40), (2, 1), (5, 900), (4, 2100))
    """Prompt and completion tokens of each sequence of a unit."""

    def unit(self, number: int) -> str:
        return f"{number:06d}"

    def sequences(self, number: int) -> list[TokenSequence]:
        rng = np.random.default_rng(number)
        made = []
        for b, (prompt, completion) in enumerate(self.lengths):
            ids = rng.integers(0, VOCAB, prompt + completion, dtype=np.int32)
            made.append(
                TokenSequence(
                    token_ids=ids,
                    prompt_tokens=prompt,
                    origin=Origin.TEACHER,
                    sample_id=sample_id_of(ids, prompt, "tok0"),
                    problem_id=f"p{number}-{b}",
                    finish_reason=FinishReason.STOP if b % 2 else FinishReason.LENGTH,
                    seed=None if b == 0 else number * 1000 + b,
                )
            )
        return made

    @property
    def head(self) -> Head:
        return Head(weight=np.random.default_rng(7).integers(0, 1 << 14, (VOCAB, WIDTH)).astype(np.uint16))

    @property
    def hidden(self) -> PlainHidden:
        return PlainHidden(head=self.head)

    @property
    def topk(self) -> PlainTopK:
        return PlainTopK(vocab_size=VOCAB)

    def hidden_targets(self, number: int) -> list[HiddenStateTargets]:
        rng = np.random.default_rng(number + 50)
        rows = [completion for _, completion in self.lengths]
        states = [rng.integers(0, 1 << 14, (n, WIDTH)).astype(np.uint16) for n in rows]
        return [HiddenStateTargets(hidden=item, head_fingerprint=self.head.fingerprint) for item in states]

    def topk_targets(self, number: int) -> list[TopKTargets]:
        rng = np.random.default_rng(number + 90)
        return [_topk(rng, completion) for _, completion in self.lengths]

    def facts(self, number: int) -> dict[str, Any]:
        return {"flops": {"score": 10.0 * (number + 1)}, "kl_nats": [0.01 * (number + 1), 0.02]}

    def write_unit(self, store: Store, number: int) -> None:
        """Commit a unit with both tiers."""
        unit = self.unit(number)
        store.write_sequences(unit, self.sequences(number), {"flops": {"generate": 100.0}})
        store.write_targets(unit, "hidden", self.hidden, self.hidden_targets(number), self.facts(number))
        store.write_targets(unit, "topk", self.topk, self.topk_targets(number), self.facts(number))

    def start(self, url: str, **options: Any) -> Store:
        """A cache with both tiers and no parts."""
        store = create(url, IDENTITY, codec_factory=plain_codec, **options)
        store.create_tier("hidden", self.hidden)
        store.create_tier("topk", self.topk)
        return store

    def build(self, url: str, units: int = 3, **options: Any) -> Store:
        """A sealed cache."""
        store = self.start(url, **options)
        for number in range(units):
            self.write_unit(store, number)
        store.seal(units=units)
        return store

    def open(self, url: str, **options: Any) -> Reader:
        """`open_cache` that knows the plain codecs."""
        return open_cache(url, **{"codec_factory": plain_codec, **options})

    def reopen(self, url: str, **options: Any) -> Store:
        """`open_store` that knows the plain codecs."""
        return open_store(url, codec_factory=plain_codec, **options)


def _topk(rng: np.random.Generator, rows: int) -> TopKTargets:
    counts = rng.integers(1, 9, rows)
    splits = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    ids = [np.sort(rng.choice(VOCAB, n, replace=False)) for n in counts]
    log_probs = [np.log(rng.dirichlet(np.ones(n + 1))[:n]) for n in counts]
    return TopKTargets(
        ids=np.concatenate([np.empty(0), *ids]).astype(np.int32),
        log_probs=np.concatenate([np.empty(0), *log_probs]).astype(np.float32),
        row_splits=splits,
        tail_log_mass=rng.uniform(-6, -1, rows).astype(np.float32),
        token_log_prob=rng.uniform(-5, 0, rows).astype(np.float32),
        entropy=rng.uniform(0, 3, rows).astype(np.float32),
    )


@pytest.fixture(autouse=True)
def unflushed(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests do not wait for the disk: nothing here loses power. the `flushes` fixture is for what is about flushing."""
    if "flushes" not in request.fixturenames:
        monkeypatch.setattr("os.fsync", lambda descriptor: None)


@pytest.fixture
def flushes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was flushed and renamed, in order."""
    events: list[str] = []
    replace, fsync = os.replace, os.fsync

    def record_fsync(descriptor: int) -> None:
        events.append(f"flush {os.readlink(f'/proc/self/fd/{descriptor}')}")
        fsync(descriptor)

    def record_replace(source: Any, target: Any) -> None:
        events.append(f"rename {source} {target}")
        replace(source, target)

    monkeypatch.setattr("os.fsync", record_fsync)
    monkeypatch.setattr("os.replace", record_replace)
    return events


@pytest.fixture
def world() -> World:
    return World()


@pytest.fixture(params=["local", "memory"])
def url(request: pytest.FixtureRequest, tmp_path: Any) -> Iterator[str]:
    """An empty place, on disk and in memory."""
    if request.param == "local":
        yield str(tmp_path / "cache")
        return
    path = f"memory://cache-{uuid.uuid4().hex}"
    yield path
    fs, root = fsspec.core.url_to_fs(path)
    if fs.exists(root):
        fs.rm(root, recursive=True)


@pytest.fixture
def objects_of() -> Callable[[str], dict[str, bytes]]:
    """Every object of a place, by name."""
    from logitcache.store.place import open_place

    def read(where: str) -> dict[str, bytes]:
        place = open_place(where)
        return {name: place.read(name) for name, _ in sorted(place.sizes(""))}

    return read
