"""The wire: what goes in comes out, for every kind of targets, decoded and not; and a bad message is no data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from logitcache.codecs import FullVocabCodec, HiddenStateCodec, SampledCodec
from logitcache.codecs.codec import Codec
from logitcache.records import (
    FinishReason,
    FullVocabTargets,
    Head,
    HiddenStateTargets,
    Origin,
    SampledTargets,
    ScoredSequence,
    TeacherTargets,
    TokenSequence,
)
from logitcache.scoring import SampledRequest
from logitcache.service import wire
from logitcache.service.undecoded import undecoded
from tests.logitcache.store.plain_codecs import CountingTopK

VOCAB, WIDTH = 97, 6
ROWS = (3, 0, 7)


def head() -> Head:
    return Head(weight=np.random.default_rng(1).integers(0, 1 << 14, (VOCAB, WIDTH)).astype(np.uint16))


def hidden(rng: np.random.Generator, rows: int) -> TeacherTargets:
    states = rng.integers(0, 1 << 14, (rows, WIDTH)).astype(np.uint16)
    return HiddenStateTargets(hidden=states, head_fingerprint=head().fingerprint)


def full(rng: np.random.Generator, rows: int) -> TeacherTargets:
    return FullVocabTargets(log_probs=np.log(rng.dirichlet(np.ones(VOCAB), rows)).astype(np.float32))


def sampled(rng: np.random.Generator, rows: int) -> TeacherTargets:
    distinct = rng.integers(1, 5, rows)
    ids = [np.sort(rng.choice(VOCAB, n, replace=False)) for n in distinct]
    return SampledTargets(
        ids=np.concatenate([np.empty(0), *ids]).astype(np.int32),
        counts=rng.integers(1, 9, distinct.sum()).astype(np.int32),
        row_splits=np.concatenate([[0], np.cumsum(distinct)]).astype(np.int64),
        token_log_prob=rng.uniform(-5, 0, rows).astype(np.float32),
        entropy=rng.uniform(0, 3, rows).astype(np.float32),
    )


def topk(rng: np.random.Generator, rows: int) -> TeacherTargets:
    from tests.logitcache.store.conftest import _topk

    return _topk(rng, rows)


CASES: dict[str, tuple[Codec, Callable[[np.random.Generator, int], TeacherTargets]]] = {
    "hidden": (HiddenStateCodec(head=head()), hidden),
    "full": (FullVocabCodec(vocab_size=VOCAB, step=0.01), full),
    "sampled": (
        SampledCodec(token_of_rank=np.arange(VOCAB, dtype=np.uint32), request=SampledRequest(samples=50)),
        sampled,
    ),
    "topk": (CountingTopK(vocab_size=VOCAB), topk),
}


def sequence(number: int, rows: int) -> TokenSequence:
    return TokenSequence(
        token_ids=np.arange(2 + rows, dtype=np.int32),
        prompt_tokens=2,
        origin=Origin.TEACHER,
        sample_id=f"{number:032x}",
        problem_id=f"päh {number}",
        finish_reason=FinishReason.STOP,
        seed=None if number == 0 else 2**64 - number,
    )


def same(one: Any, other: Any) -> bool:
    return type(one) is type(other) and all(np.array_equal(a, vars(other)[name]) for name, a in vars(one).items())


@pytest.mark.parametrize("kind", CASES)
@pytest.mark.parametrize("encoded", [False, True])
@pytest.mark.parametrize("apart", [False, True])
def test_what_goes_in_comes_out(kind: str, encoded: bool, apart: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    codec, make = CASES[kind]
    arrays = [codec.encode([make(np.random.default_rng(n), n)]).arrays for n in ROWS]
    sent = undecoded(codec) if encoded else codec
    items = [ScoredSequence(sequence=sequence(b, n), targets=sent.decode(arrays[b])) for b, n in enumerate(ROWS)]
    rebuild = wire.rebuild_encoded(codec) if encoded else wire.rebuild_decoded(kind, head().fingerprint)
    if apart:
        monkeypatch.setattr(wire, "MESSAGE_BYTES", 1)
    batches = list(wire.encode_rows(wire.rows_schema(sent), [7, 5, 5], items))
    assert len(batches) == (3 if apart else 1)
    got = [row for batch in batches for row in wire.decode_rows(over_the_wire(batch), rebuild)]
    assert [index for index, _ in got] == [7, 5, 5]
    for b, (_, item) in enumerate(got):
        assert isinstance(item, ScoredSequence)
        assert same(item.sequence, items[b].sequence)
        assert same(item.targets, codec.decode(arrays[b]))


def over_the_wire(batch: pa.RecordBatch) -> pa.RecordBatch:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return pa.ipc.open_stream(sink.getvalue()).read_next_batch()


def test_numbers_are_views_of_the_message() -> None:
    codec, make = CASES["hidden"]
    item = ScoredSequence(sequence=sequence(1, 5), targets=make(np.random.default_rng(0), 5))
    (batch,) = wire.encode_rows(wire.rows_schema(codec), [0], [item])
    ((_, got),) = wire.decode_rows(batch, wire.rebuild_decoded("hidden", head().fingerprint))
    assert isinstance(got, ScoredSequence)
    assert isinstance(got.targets, HiddenStateTargets)
    assert not got.targets.hidden.flags.owndata
    assert not got.targets.hidden.flags.writeable


def test_tokens_alone() -> None:
    items = [sequence(b, n) for b, n in enumerate(ROWS)]
    (batch,) = wire.encode_rows(wire.rows_schema(None), [0, 1, 2], items)
    assert all(same(one, two) for one, (_, two) in zip(items, wire.decode_rows(batch, None), strict=True))


@pytest.mark.parametrize(
    "array", [head().weight, np.arange(5, dtype=np.float32), np.empty((0, 3), np.int16), np.ones((4, 3, 2), np.uint8)]
)
def test_shared_arrays(array: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "MESSAGE_BYTES", 40)
    schema = wire.shared_schema("a", array)
    got = wire.decode_shared(pa.Table.from_batches(wire.encode_shared(schema, array), schema))
    assert got.dtype == array.dtype
    assert np.array_equal(got, array)
    assert got.shape == array.shape


def damaged(batch: pa.RecordBatch, name: str, column: pa.Array) -> pa.RecordBatch:
    return batch.set_column(batch.schema.get_field_index(name), pa.field(name, column.type, nullable=False), column)


def lists(offsets: list[int], values: Any) -> pa.Array:
    """A list whose offsets are not checked: they are put there once it is made."""
    memory = np.array([0, len(values)])
    buffers = [None, pa.py_buffer(memory)]
    column = pa.Array.from_buffers(pa.large_list(pa.int32()), 1, buffers, children=[pa.array(values)])
    memory[:] = offsets
    return column


@pytest.mark.parametrize(
    ("name", "column"),
    [
        ("origin", pa.array(["nobody"])),
        ("prompt_tokens", pa.array([0], pa.int32())),
        ("completion_tokens", pa.array([1], pa.int32())),
        ("token_ids", pa.array([[1, None, 3, 4, 5]], pa.large_list(pa.int32()))),
        ("token_ids", lists([0, 500], np.arange(5, dtype=np.int32))),
        ("token_ids", lists([4, 0], np.arange(5, dtype=np.int32))),
        ("ids", pa.array([[0.5]], pa.large_list(pa.float64()))),
        ("row_splits", pa.array([[0, 9, 1, 3]], pa.large_list(pa.int64()))),
        ("row_splits", pa.array([[]], pa.large_list(pa.int64()))),
        ("entropy", pa.array([[0.0]], pa.large_list(pa.float32()))),
    ],
)
def test_a_bad_message_is_no_data(name: str, column: pa.Array) -> None:
    codec, make = CASES["topk"]
    item = ScoredSequence(sequence=sequence(1, 3), targets=make(np.random.default_rng(0), 3))
    (batch,) = wire.encode_rows(wire.rows_schema(codec), [0], [item])
    wire.decode_rows(batch, wire.rebuild_decoded("topk", None))
    from logitcache.service.client import NOT_WHAT_WAS_ASKED

    with pytest.raises(NOT_WHAT_WAS_ASKED):
        wire.decode_rows(damaged(batch, name, column), wire.rebuild_decoded("topk", None))
