"""One call to a teacher, on the server's side of the wire: sequences in, answers out.

Guarantees: what came is sequences, and as many as the limit on their answer allows, before any of them is scored.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

import pyarrow as pa

from logitcache.errors import UserError
from logitcache.records import MAX_TOKENS, Head, ScoredSequence, TokenSequence
from logitcache.scoring import FullVocabRequest, HiddenStateRequest, SampledRequest, TargetRequest, TopKRequest
from logitcache.service import wire
from logitcache.service.requests import MAX_SEQUENCES, malformed
from logitcache.service.teachers import Answer


def read_sequences(chunks: Iterable[Any], head: Head, want: TargetRequest, most_bytes: int) -> list[TokenSequence]:
    """The sequences of a call. Raises UserError unless they are some, whose answer is at most so large."""
    sequences: list[TokenSequence] = []
    per_row, tokens, answer_bytes = _bytes_per_row(want, head), 0, 0
    try:
        for chunk in chunks:
            for _, sequence in wire.decode_rows(chunk.data, None):
                assert isinstance(sequence, TokenSequence)
                sequences.append(sequence)
                tokens += len(sequence)
                answer_bytes += sequence.completion_tokens * per_row
            if answer_bytes > most_bytes or len(sequences) > MAX_SEQUENCES or tokens > MAX_TOKENS:
                found = f"{len(sequences):,} sequences or more, whose answer is larger than {most_bytes:,} bytes"
                raise UserError("scores in one call", found, "score fewer sequences at once")
    except (ValueError, LookupError, TypeError, AttributeError, pa.ArrowException) as error:
        raise malformed(f"it holds no sequences ({type(error).__name__})") from error
    if not sequences:
        raise malformed("it holds no sequences")
    return sequences


def send_answers(writer: Any, sequences: Sequence[TokenSequence], answers: Sequence[Answer]) -> int:
    """Send them in the schema of `do_get`, in messages whose metadata is `{"scored": [...]}`; the bytes sent."""
    schema, sent, start = wire.targets_schema(answers[0].targets), 0, 0
    items = [ScoredSequence(sequence=s, targets=a.targets) for s, a in zip(sequences, answers, strict=True)]
    writer.begin(schema)
    for batch in wire.in_messages(schema, range(len(items)), items):
        stop = start + batch.num_rows
        scored = {"scored": [answer.scored for answer in answers[start:stop]]}
        writer.write_with_metadata(batch, json.dumps(scored).encode())
        start, sent = stop, sent + batch.nbytes
    return sent


def _bytes_per_row(want: TargetRequest, head: Head) -> int:
    """The most that a target row takes."""
    vocab_size, width = head.weight.shape
    match want:
        case TopKRequest(max_k=kept) | SampledRequest(samples=kept):
            return 8 * min(kept, vocab_size) + 20
        case HiddenStateRequest():
            return width * 4
        case FullVocabRequest():
            return vocab_size * 4
