"""Reads a cache: sequences and what the teacher said of them, in any order, by any number of threads.

Guarantees: the same index gives the same values, always; every byte is checked against what was committed before it
becomes a number; memory is bounded by `index_memory_bytes` and the batch asked for. A reader pickles as its
arguments and opens its place anew in the process that uses it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from logitcache.codecs import codec_from_config
from logitcache.codecs.codec import Codec
from logitcache.errors import UserError
from logitcache.pickling import as_arguments
from logitcache.records import Head, ScoredSequence, TokenSequence
from logitcache.store import layout
from logitcache.store.fetch import fetch_rows
from logitcache.store.manifest import Manifest
from logitcache.store.part_index import PartCache, PartLoader
from logitcache.store.place import Source
from logitcache.store.samples import SCHEMA
from logitcache.store.tiers import CodecFactory, read_tier
from logitcache.store.windows import Selection, Window, read_targets

INDEX_MEMORY_BYTES = 256 << 20
"""Part indexes kept in memory by default: those of a few billion tokens."""
PARTS_AT_ONCE = 256
"""Parts whose records are read together where all are wanted."""
_Made = TypeVar("_Made")


def checked_indices(indices: Sequence[int], count: int) -> NDArray[np.int64]:
    """int64[N]: indices of `count` sequences. Raises UserError for one out of range."""
    wanted = np.asarray(indices, np.int64).reshape(-1)
    if wanted.size and (wanted.min() < 0 or wanted.max() >= count):
        raise UserError(f"indices of {count} sequences", f"{wanted.min()} to {wanted.max()}", "give 0 to len - 1")
    return wanted


@dataclass(frozen=True, kw_only=True, eq=False)
class Reader:
    """A consistent set of parts, with one tier's targets or none; see `open_cache`.

    Attributes:
        source: where the cache lies.
        manifest: what it holds; `manifest.digest` names that content.
        identity: of the build.
        tier: the tier that is read; None for tokens alone.
    """

    source: Source
    manifest: Manifest
    identity: Mapping[str, Any]
    tier: str | None
    codec_factory: CodecFactory = codec_from_config
    index_memory_bytes: int = INDEX_MEMORY_BYTES
    _made: dict[str, Any] = field(default_factory=dict, init=False, repr=False)
    _lock: threading.RLock = field(default_factory=threading.RLock, init=False, repr=False)

    def __len__(self) -> int:
        return int(self.manifest.starts[-1])

    def __reduce__(self) -> tuple[Any, ...]:
        return as_arguments(self)

    @property
    def codec(self) -> Codec | None:
        """The tier's codec, read on first use; None for tokens alone. Raises DamagedError."""
        return self._lazily("codec", self._read_codec)

    @property
    def head(self) -> Head | None:
        """The head that this tier's hidden states belong to; None for other kinds."""
        return None if self.codec is None else self.codec.head

    def read(
        self, indices: Sequence[int], *, first_completion_token: int = 0, max_completion_tokens: int | None = None
    ) -> list[ScoredSequence]:
        """Sequences with the tier's targets, in the order asked for.

        Args:
            indices: 0 to len - 1; one may come twice.
            first_completion_token: where the window of target rows starts; the tokens before it become the prefix.
            max_completion_tokens: rows of the window; None for all that follow. A sequence that the window cuts short
                comes back cut, with finish reason LENGTH and the sample id of the whole.

        Raises:
            DamagedError: stored bytes are not what was committed.
            UserError: an index out of range, or a reader that was opened with `targets=None`.
        """
        codec = self.codec
        if codec is None:
            raise UserError("targets", "this reader was opened with targets=None", "use read_tokens, or name a tier")
        selections = self._select(indices, Window(first=first_completion_token, limit=max_completion_tokens))
        targets = read_targets(self.source, codec, selections)
        sequences = self._sequences(selections)
        return [ScoredSequence(sequence=s, targets=t) for s, t in zip(sequences, targets, strict=True)]

    def read_tokens(
        self, indices: Sequence[int], *, first_completion_token: int = 0, max_completion_tokens: int | None = None
    ) -> list[TokenSequence]:
        """Sequences alone; arguments and errors as `read`."""
        return self._sequences(self._select(indices, Window(first=first_completion_token, limit=max_completion_tokens)))

    def samples(self, columns: Sequence[str] | None = None) -> Any:
        """The `pyarrow.Table` of all sequences, in index order, without reading tokens.

        Columns: sample_id, problem_id, prompt_tokens, completion_tokens, origin, finish_reason, seed.
        """
        tables = [SCHEMA.empty_table()]
        for start in range(0, len(self.manifest.units), PARTS_AT_ONCE):
            parts = range(start, min(start + PARTS_AT_ONCE, len(self.manifest.units)))
            tables += [index.samples.table for index in self._loader(tokens_only=True).load(parts)]
        table = pa.concat_tables(tables)
        return table if columns is None else table.select(list(columns))

    def _sequences(self, selections: Sequence[Selection]) -> list[TokenSequence]:
        tokens = fetch_rows(self.source, [selection.tokens for selection in selections])
        return [
            selection.index.samples.sequence(selection.b, ids, selection.prefix_tokens)
            for selection, ids in zip(selections, tokens, strict=True)
        ]

    def _select(self, indices: Sequence[int], window: Window) -> list[Selection]:
        wanted = checked_indices(indices, len(self))
        starts = self.manifest.starts
        parts = np.searchsorted(starts, wanted, side="right") - 1
        found_parts = self._lazily("parts", self._part_cache).get(parts.tolist())
        within = (wanted - starts[parts]).tolist()
        return [Selection.of(found_parts[p], b, window) for p, b in zip(parts.tolist(), within, strict=True)]

    def _part_cache(self) -> PartCache:
        return PartCache(self._loader(tokens_only=False), self.index_memory_bytes)

    def _loader(self, *, tokens_only: bool) -> PartLoader:
        tier, codec = (None, None) if tokens_only else (self.tier, self.codec)
        return PartLoader(source=self.source, manifest=self.manifest, tier=tier, codec=codec)

    def _read_codec(self) -> Codec | None:
        if self.tier is None:
            return None
        tier = read_tier(self.source, self.tier)
        name, summary = layout.tier_record(self.tier), self.manifest.tiers[self.tier]
        if tier is None:
            raise layout.damaged(self.source.shown, name, "it is missing")
        if tier.digest != summary.digest:
            raise layout.damaged(self.source.shown, name, "its digest is not the manifest's")
        return tier.codec(self.source, self.codec_factory)

    def _lazily(self, name: str, make: Callable[[], _Made]) -> _Made:
        """A value made once, on first use, whichever thread comes first."""
        with self._lock:
            if name not in self._made:
                self._made[name] = make()
            return cast(_Made, self._made[name])
