"""What the service's streams hold: one row a sequence, the same columns for every kind of targets.

A row is `index`, the sequence (the columns of `samples.parquet`, and its tokens), then one list column for each array
of its targets: the fields of the decoded kind, or the arrays of the codec. Items that are vectors are fixed-size lists,
so any Arrow client reads the stream without this package. Bfloat16 travels as its uint16 bits.

Guarantees: the same numbers in and out; arrays out are read-only views of the received message; a message is valid
Arrow, of the columns that were expected, before a number of it is used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from logitcache.codecs.codec import Codec
from logitcache.records import (
    FinishReason,
    FullVocabTargets,
    HiddenStateTargets,
    Origin,
    SampledTargets,
    ScoredSequence,
    TeacherTargets,
    TokenSequence,
    TopKTargets,
)
from logitcache.service.undecoded import EncodedRows
from logitcache.store.samples import SCHEMA as SAMPLES
from logitcache.store.samples import offsets_of

MESSAGE_BYTES = 64 << 20
"""Where some sequences together are larger, each is a message of its own."""
SEQUENCES_AT_ONCE = 8
"""Sequences that a stream reads at a time, and sends as a message unless they are large."""
_TOKENS = pa.field("token_ids", pa.large_list(pa.int32()), nullable=False)
SEQUENCE_COLUMNS = (pa.field("index", pa.int64(), nullable=False), *SAMPLES, _TOKENS)
_DECODED: Mapping[str, type[TeacherTargets]] = {
    "full": FullVocabTargets,
    "hidden": HiddenStateTargets,
    "sampled": SampledTargets,
    "topk": TopKTargets,
}
Item = ScoredSequence | TokenSequence
Arrays = Mapping[str, NDArray[Any]]
Rebuild = Callable[[Arrays], TeacherTargets]
"""One sequence's targets from their arrays."""


def rows_schema(codec: Codec | None) -> pa.Schema:
    """The schema of what a reader with this codec reads; None for tokens alone."""
    if codec is None:
        return pa.schema(SEQUENCE_COLUMNS)
    nothing = {name: np.empty((0, *item.item_shape), item.dtype) for name, item in codec.layouts.items()}
    return targets_schema(codec.decode(nothing))


def targets_schema(targets: TeacherTargets | EncodedRows) -> pa.Schema:
    """The schema of sequences with targets like these."""
    columns = [pa.field(name, _list_of(values), nullable=False) for name, values in _arrays_of(targets).items()]
    return pa.schema([*SEQUENCE_COLUMNS, *columns])


def encode_rows(schema: pa.Schema, indices: Sequence[int], items: Sequence[Item]) -> Iterator[pa.RecordBatch]:
    """The messages of some sequences, in order."""
    batch = _encode(schema, indices, items)
    if batch.nbytes <= MESSAGE_BYTES or len(items) == 1:
        yield batch
        return
    for index, item in zip(indices, items, strict=True):
        yield _encode(schema, [index], [item])


def in_messages(schema: pa.Schema, indices: Sequence[int], items: Sequence[Item]) -> Iterator[pa.RecordBatch]:
    """The messages of any number of sequences, in order."""
    for start in range(0, len(items), SEQUENCES_AT_ONCE):
        some = slice(start, start + SEQUENCES_AT_ONCE)
        yield from encode_rows(schema, indices[some], items[some])


def decode_rows(batch: pa.RecordBatch, rebuild: Rebuild | None) -> list[tuple[int, Item]]:
    """Indices and sequences of a message, with targets where `rebuild` is given.

    Raises ValueError, KeyError, TypeError or UserError for a message that is not what `encode_rows` makes.
    """
    batch.validate(full=True)
    have = [batch.schema.field(name) for name in batch.schema.names[: len(SEQUENCE_COLUMNS)]]
    if have != list(SEQUENCE_COLUMNS) or any(
        column.null_count for column in batch.columns if column.type != pa.uint64()
    ):
        raise ValueError("its columns are not those of a sequence")
    sequences = _sequences(batch)
    indices = batch["index"].to_pylist()
    if rebuild is None:
        return list(zip(indices, sequences, strict=True))
    names = batch.schema.names[len(SEQUENCE_COLUMNS) :]
    split = {name: _split(batch[name]) for name in names}
    targets = [rebuild({name: split[name][b] for name in names}) for b in range(batch.num_rows)]
    scored = [ScoredSequence(sequence=s, targets=t) for s, t in zip(sequences, targets, strict=True)]
    return list(zip(indices, scored, strict=True))


def to_ipc(batch: pa.RecordBatch) -> bytes:
    """A message as bytes to keep."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return sink.getvalue().to_pybytes()


def from_ipc(data: bytes) -> pa.RecordBatch:
    """The message that was kept."""
    return pa.ipc.open_stream(data).read_next_batch()


def rebuild_decoded(kind: str, head_fingerprint: str | None) -> Rebuild:
    """Targets of that kind from their fields; hidden states belong to the head with that fingerprint."""
    cls = _DECODED[kind]
    others = {"head_fingerprint": head_fingerprint} if cls is HiddenStateTargets else {}

    def rebuild(arrays: Arrays) -> TeacherTargets:
        splits = arrays.get("row_splits")
        if splits is not None and (not len(splits) or splits[0] != 0 or (np.diff(splits) < 0).any()):
            raise ValueError("its row splits are not ascending")
        return cls(**arrays, **others)  # type: ignore[arg-type]

    return rebuild


def rebuild_encoded(codec: Codec) -> Rebuild:
    """Targets from what the codec packed."""

    def rebuild(arrays: Arrays) -> TeacherTargets:
        have = {name: (values.dtype.name, values.shape[1:]) for name, values in arrays.items()}
        if have != {name: (item.dtype, item.item_shape) for name, item in codec.layouts.items()}:
            raise ValueError(f"its arrays are not those of a {codec.kind} codec")
        return codec.decode(arrays)

    return rebuild


def shared_schema(name: str, array: NDArray[Any]) -> pa.Schema:
    """The schema of a shared array: one column, a row for each item of the first axis."""
    return pa.schema([pa.field(name, _list_of(array).value_type, nullable=False)])


def encode_shared(schema: pa.Schema, array: NDArray[Any]) -> Iterator[pa.RecordBatch]:
    """A shared array in messages of bounded size."""
    rows = max(1, MESSAGE_BYTES // max(1, array[:1].nbytes))
    for start in range(0, max(1, len(array)), rows):
        yield pa.record_batch([_items(array[start : start + rows])], schema=schema)


def decode_shared(table: pa.Table) -> NDArray[Any]:
    """The array of a table that is valid. Raises ValueError or LookupError for one that is none of these."""
    return _numpy(table.column(0).combine_chunks())


def _encode(schema: pa.Schema, indices: Sequence[int], items: Sequence[Item]) -> pa.RecordBatch:
    sequences = [item.sequence if isinstance(item, ScoredSequence) else item for item in items]
    columns = [
        pa.array(indices, pa.int64()),
        *(pa.array([_plain(sequence, name) for sequence in sequences], kind) for name, kind in _SAMPLE_TYPES),
        _lists([sequence.token_ids for sequence in sequences]),
    ]
    arrays = [_arrays_of(item.targets) for item in items if isinstance(item, ScoredSequence)]
    columns += [_lists([part[name] for part in arrays]) for name in schema.names[len(SEQUENCE_COLUMNS) :]]
    return pa.record_batch(columns, schema=schema)


_SAMPLE_TYPES = tuple(zip(SAMPLES.names, SAMPLES.types, strict=True))


def _plain(sequence: TokenSequence, name: str) -> Any:
    value = getattr(sequence, name)
    return str(value) if isinstance(value, Origin | FinishReason) else value


def _sequences(batch: pa.RecordBatch) -> list[TokenSequence]:
    columns = {name: batch[name].to_pylist() for name in SAMPLES.names}
    made = []
    for b, token_ids in enumerate(_split(batch["token_ids"])):
        row = {name: values[b] for name, values in columns.items()}
        completion = row.pop("completion_tokens")
        row |= {"origin": Origin(row["origin"]), "finish_reason": FinishReason(row["finish_reason"])}
        sequence = TokenSequence(token_ids=token_ids, **row)
        if sequence.completion_tokens != completion:
            raise ValueError("its tokens are not as many as it says")
        made.append(sequence)
    return made


def _arrays_of(targets: TeacherTargets | EncodedRows) -> Arrays:
    """Their arrays by name: a decoded kind's fields, or what the codec packed."""
    if isinstance(targets, EncodedRows):
        return targets.arrays
    return {name: value for name, value in vars(targets).items() if isinstance(value, np.ndarray)}


def _list_of(array: NDArray[Any]) -> pa.DataType:
    """The column type of packed arrays with items like this one's."""
    item = pa.from_numpy_dtype(array.dtype)
    for size in reversed(array.shape[1:]):
        item = pa.list_(item, size)
    return pa.large_list(item)


def _lists(arrays: Sequence[NDArray[Any]]) -> pa.Array:
    """One list a sequence."""
    offsets = offsets_of(np.array([len(array) for array in arrays], np.int64))
    values = arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
    return pa.LargeListArray.from_arrays(pa.array(offsets), _items(values))


def _items(array: NDArray[Any]) -> pa.Array:
    """An array as Arrow values, without a copy where it is contiguous."""
    items = pa.array(np.ascontiguousarray(array).reshape(-1))
    for size in reversed(array.shape[1:]):
        items = pa.FixedSizeListArray.from_arrays(items, size)
    return items


def _split(column: Any) -> list[NDArray[Any]]:
    """Each row's array, as views."""
    offsets = column.offsets.to_numpy()
    values = _numpy(column.values)
    return [values[start:stop] for start, stop in pairwise(offsets)]


def _numpy(items: Any) -> NDArray[Any]:
    """Arrow values as an array, without a copy."""
    shape = []
    while pa.types.is_fixed_size_list(items.type):
        shape.append(items.type.list_size)
        items = items.flatten()
    if items.null_count:
        raise ValueError("a value is missing")
    return np.asarray(items.to_numpy(zero_copy_only=True)).reshape(-1, *shape)
