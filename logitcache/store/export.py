"""A cache as one Parquet file, for tools that know nothing of it.

Guarantees: one row a sequence, in index order; targets decoded, number for number what `Reader.read` returns; the file
appears whole or not at all. Memory is bounded by `SEQUENCES_AT_ONCE` sequences.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from logitcache.codecs import codec_from_config
from logitcache.errors import UserError
from logitcache.records import (
    FullVocabTargets,
    HiddenStateTargets,
    SampledTargets,
    ScoredSequence,
    TeacherTargets,
    TokenSequence,
    TopKTargets,
)
from logitcache.store.opening import open_cache
from logitcache.store.place import open_place, redact, write_failed
from logitcache.store.reader import Reader
from logitcache.store.samples import offsets_of
from logitcache.store.tiers import CodecFactory

SEQUENCES_AT_ONCE = 64


def export_parquet(
    url: str,
    tier: str | None,
    out: str,
    *,
    storage_options: Mapping[str, Any] | None = None,
    codec_factory: CodecFactory = codec_from_config,
    progress: Callable[[int, int], None] | None = None,
) -> int:
    """Write a sealed cache's sequences, and a tier's targets, to one Parquet file; how many sequences it holds.

    Columns: those of `Reader.samples`, `token_ids`, and by kind
        top-k: ids, log_probs (a list for each row), tail_log_mass, token_log_prob, entropy
        hidden: hidden (a list of rows, each of D numbers; uint16 is bfloat16 bits)
        full: log_probs (a list of rows, each of V numbers)
        sampled: ids, counts (a list for each row), token_log_prob, entropy

    Args:
        url: of the cache.
        tier: as `open_cache`; None for tokens alone.
        out: path or URL of the file.
        storage_options: for fsspec, for both.
        codec_factory: as `open_cache`.
        progress: told sequences done and sequences in all.

    Raises:
        UserError: what `open_cache` raises, an empty cache, or a file that cannot be written.
    """
    reader = open_cache(url, targets=tier, storage_options=storage_options, codec_factory=codec_factory)
    if not len(reader):
        raise UserError(f"export {url}", "it holds no sequences", "export a cache that has some")
    parent, _, name = out.rpartition("/")
    try:
        with tempfile.TemporaryDirectory(dir=_folder_of(out)) as folder:
            file = Path(folder) / "export.parquet"
            _write(reader, file, progress)
            if "://" in out:
                open_place(parent, storage_options).write({name: file.read_bytes()})
            else:
                file.replace(out)
    except OSError as error:
        raise write_failed(redact(parent) or ".", name, error) from error
    return len(reader)


def _folder_of(out: str) -> Path | None:
    """Beside a local file, so that it can be renamed into place; anywhere for a remote one."""
    if "://" in out:
        return None
    if Path(out).is_dir():
        raise UserError(f"export to {out}", "it is a folder", "name a file in it")
    folder = Path(out).absolute().parent
    if not folder.is_dir():
        raise UserError(f"export to {out}", f"there is no folder {folder}", "make it, or name another")
    return folder


def _write(reader: Reader, file: Path, progress: Callable[[int, int], None] | None) -> None:
    with ExitStack() as stack:
        writer: Any = None
        for start in range(0, len(reader), SEQUENCES_AT_ONCE):
            indices = range(start, min(start + SEQUENCES_AT_ONCE, len(reader)))
            table = _tokens(reader.read_tokens(indices)) if reader.tier is None else _scored(reader.read(indices))
            writer = writer or stack.enter_context(pq.ParquetWriter(file, table.schema, compression="zstd"))
            writer.write_table(table)
            if progress is not None:
                progress(indices.stop, len(reader))


def _scored(items: Sequence[ScoredSequence]) -> Any:
    table = _tokens([item.sequence for item in items])
    columns = _columns([item.targets for item in items])
    for name, column in columns.items():
        table = table.append_column(name, column)
    return table


def _tokens(sequences: Sequence[TokenSequence]) -> Any:
    plain = {
        "sample_id": pa.array([s.sample_id for s in sequences]),
        "problem_id": pa.array([s.problem_id for s in sequences]),
        "origin": pa.array([str(s.origin) for s in sequences]),
        "finish_reason": pa.array([str(s.finish_reason) for s in sequences]),
        "seed": pa.array([s.seed for s in sequences], pa.uint64()),
        "prompt_tokens": pa.array([s.prompt_tokens for s in sequences], pa.int32()),
        "token_ids": _lists([s.token_ids for s in sequences]),
    }
    return pa.table(plain)


def _columns(targets: Sequence[TeacherTargets]) -> dict[str, Any]:
    entries: tuple[str, ...]
    rows: tuple[str, ...]
    match targets[0]:
        case HiddenStateTargets():
            return {"hidden": _wide(targets, "hidden")}
        case FullVocabTargets():
            return {"log_probs": _wide(targets, "log_probs")}
        case TopKTargets():
            entries, rows = ("ids", "log_probs"), ("tail_log_mass", "token_log_prob", "entropy")
        case SampledTargets():
            entries, rows = ("ids", "counts"), ("token_log_prob", "entropy")
    nested = {name: _nested(targets, name) for name in entries}
    return nested | {name: _lists([getattr(item, name) for item in targets]) for name in rows}


def _lists(values: Sequence[NDArray[Any]]) -> Any:
    """One list a sequence."""
    return pa.LargeListArray.from_arrays(offsets_of(np.array([len(v) for v in values])), np.concatenate(values))


def _wide(targets: Sequence[Any], name: str) -> Any:
    """One list of fixed-size rows a sequence."""
    values = [getattr(item, name) for item in targets]
    rows = pa.FixedSizeListArray.from_arrays(np.concatenate(values).reshape(-1), values[0].shape[1])
    return pa.LargeListArray.from_arrays(offsets_of(np.array([len(v) for v in values])), rows)


def _nested(targets: Sequence[Any], name: str) -> Any:
    """One list of rows, each a list of its entries, a sequence."""
    counts = np.concatenate([np.diff(item.row_splits) for item in targets])
    entries = np.concatenate([getattr(item, name) for item in targets])
    rows = pa.LargeListArray.from_arrays(offsets_of(counts), entries)
    return pa.LargeListArray.from_arrays(offsets_of(np.array([len(item) for item in targets])), rows)
