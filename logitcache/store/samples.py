"""The small table beside the tokens: one row a sequence, in Parquet.

Guarantees: columns and types are fixed by format version 1 (docs/format.md, section 5); the same sequences give the
same bytes with the same pyarrow. Token counts are checked before anyone adds them up.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from logitcache.errors import UserError
from logitcache.records import MAX_TOKENS, FinishReason, Origin, TokenSequence

SCHEMA = pa.schema(
    [
        pa.field("sample_id", pa.string(), nullable=False),
        pa.field("problem_id", pa.string(), nullable=False),
        pa.field("prompt_tokens", pa.int32(), nullable=False),
        pa.field("completion_tokens", pa.int32(), nullable=False),
        pa.field("origin", pa.string(), nullable=False),
        pa.field("finish_reason", pa.string(), nullable=False),
        pa.field("seed", pa.uint64(), nullable=True),
    ]
)


def encode_samples(sequences: Sequence[TokenSequence]) -> bytes:
    """`samples.parquet` of a part. Raises UserError for a seed that is not 0 to 2**64 - 1."""
    rows: list[dict[str, Any]] = [
        {
            "sample_id": sequence.sample_id,
            "problem_id": sequence.problem_id,
            "prompt_tokens": sequence.prompt_tokens,
            "completion_tokens": sequence.completion_tokens,
            "origin": str(sequence.origin),
            "finish_reason": str(sequence.finish_reason),
            "seed": sequence.seed,
        }
        for sequence in sequences
    ]
    try:
        table = pa.Table.from_pylist(rows, SCHEMA)
    except (pa.ArrowException, OverflowError) as error:
        raise UserError("sequences to store", str(error), "give seeds from 0 to 2**64 - 1 and plain ids") from error
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd", store_schema=False)
    return sink.getvalue()


@dataclass(frozen=True, kw_only=True, eq=False)
class Samples:
    """A part's table, and where each sequence's tokens and target rows lie on the packed axes."""

    table: Any

    @classmethod
    def decode(cls, data: bytes) -> Samples:
        """Raises ValueError unless it is such a table."""
        try:
            table = pq.read_table(pa.BufferReader(data), use_threads=False).combine_chunks()
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"not a Parquet table: {error}") from error
        if table.schema.names != SCHEMA.names or table.schema.types != SCHEMA.types:
            raise ValueError("its columns are not those of format version 1")
        samples = cls(table=table)
        samples._check()
        return samples

    def _check(self) -> None:
        required = [name for name in self.table.column_names if name != "seed"]
        prompt, completion = self._counts("prompt_tokens"), self._counts("completion_tokens")
        nulls = any(self.table[name].null_count for name in required)
        if nulls or bool(((prompt < 1) | (completion < 0) | (prompt + completion > MAX_TOKENS)).any()):
            raise ValueError(f"a sequence without 1 to {MAX_TOKENS} tokens, or an empty field")

    def __len__(self) -> int:
        return int(self.table.num_rows)

    @cached_property
    def prompt_tokens(self) -> NDArray[np.int64]:
        """int64[B]."""
        return self._counts("prompt_tokens")

    @cached_property
    def offsets(self) -> NDArray[np.int64]:
        """int64[B+1]: sequence b is tokens offsets[b]:offsets[b+1]."""
        return offsets_of(self.prompt_tokens + self._counts("completion_tokens"))

    @cached_property
    def row_offsets(self) -> NDArray[np.int64]:
        """int64[B+1]: the target rows of sequence b."""
        return offsets_of(self._counts("completion_tokens"))

    @property
    def memory_bytes(self) -> int:
        """About what this takes in memory."""
        return int(self.table.nbytes) + 24 * len(self) + 1000

    def sequence(self, b: int, token_ids: NDArray[np.int32], prompt_tokens: int) -> TokenSequence:
        """Sequence b, or the window of it that `token_ids` is, of which `prompt_tokens` are prefix."""
        row = {name: self.table[name][b].as_py() for name in ("sample_id", "problem_id", "seed")}
        whole = len(token_ids) == int(self.offsets[b + 1] - self.offsets[b])
        finish = FinishReason(self.table["finish_reason"][b].as_py()) if whole else FinishReason.LENGTH
        return TokenSequence(
            token_ids=token_ids,
            prompt_tokens=prompt_tokens,
            origin=Origin(self.table["origin"][b].as_py()),
            finish_reason=finish,
            **row,
        )

    def _counts(self, name: str) -> NDArray[np.int64]:
        return self.table[name].to_numpy().astype(np.int64)


def offsets_of(lengths: NDArray[np.integer[Any]]) -> NDArray[np.int64]:
    """int64[B+1] from B lengths."""
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
