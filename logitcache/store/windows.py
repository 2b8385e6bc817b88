"""Windows of a sequence's target rows: what to read for them, and how to cut what was read.

A window starts at `first` completion tokens and holds at most `limit`; the tokens before it become its prefix.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from numpy.typing import NDArray

from logitcache.codecs.codec import Axis, Codec, CountsEntries
from logitcache.errors import UserError
from logitcache.records import FullVocabTargets, HiddenStateTargets, SampledTargets, TeacherTargets, TopKTargets
from logitcache.store.fetch import Rows, fetch_rows
from logitcache.store.layout import damaged
from logitcache.store.part_index import PartIndex
from logitcache.store.place import Source


@dataclass(frozen=True, kw_only=True)
class Window:
    """Which target rows of a sequence to read: `first` onwards, at most `limit` (None: all)."""

    first: int = 0
    limit: int | None = None

    def __post_init__(self) -> None:
        if self.first < 0 or (self.limit is not None and self.limit < 0):
            raise UserError("a window of target rows", f"got {self.first}, {self.limit}", "give counts of 0 or more")

    def stop(self, rows: int) -> int:
        """Where it ends in a sequence of that many rows."""
        return rows if self.limit is None else min(rows, self.first + self.limit)


@dataclass(frozen=True, kw_only=True)
class Axes:
    """A codec's arrays by what their first axis counts, and whether it can count entries from rows alone."""

    rows: tuple[str, ...]
    entries: tuple[str, ...]
    counts: bool

    @classmethod
    def of(cls, codec: Codec) -> Axes:
        """Those of a codec."""
        axes = {name: item.axis for name, item in codec.layouts.items()}
        return cls(
            rows=tuple(name for name, axis in axes.items() if axis is Axis.ROW),
            entries=tuple(name for name, axis in axes.items() if axis is Axis.ENTRY),
            counts=isinstance(codec, CountsEntries),
        )

    def count_first(self, selection: Selection) -> bool:
        """Whether the entries to read are known only once the rows are."""
        return self.counts and bool(self.entries) and not selection.whole


@dataclass(frozen=True, kw_only=True)
class Selection:
    """The rows first:stop of one sequence of a part, `rows` in all."""

    index: PartIndex
    b: int
    first: int
    stop: int
    rows: int

    @classmethod
    def of(cls, index: PartIndex, b: int, window: Window) -> Selection:
        """What the window selects of sequence b."""
        rows = int(index.samples.row_offsets[b + 1] - index.samples.row_offsets[b])
        stop = window.stop(rows)
        return cls(index=index, b=b, first=min(window.first, stop), stop=stop, rows=rows)

    @property
    def prefix_tokens(self) -> int:
        """Tokens before the first selected row's target."""
        return int(self.index.samples.prompt_tokens[self.b]) + self.first

    @property
    def tokens(self) -> Rows:
        """The tokens to read: prefix and window."""
        start = int(self.index.samples.offsets[self.b])
        return Rows(self.index.token_ids, start, start + self.prefix_tokens + self.stop - self.first)

    def row_arrays(self, axes: Axes, first: int) -> dict[str, Rows]:
        """The row arrays from row `first` to the window's end."""
        start = int(self.index.samples.row_offsets[self.b])
        return {name: Rows(self.index.targets[name], start + first, start + self.stop) for name in axes.rows}

    def entry_arrays(self, axes: Axes, first: int, stop: int) -> dict[str, Rows]:
        """The entry arrays, entries first:stop of the sequence's own."""
        assert self.index.entry_offsets is not None
        start = int(self.index.entry_offsets[self.b])
        return {name: Rows(self.index.targets[name], start + first, start + stop) for name in axes.entries}

    @property
    def whole(self) -> bool:
        """Whether that is every row."""
        return self.first == 0 and self.stop == self.rows

    @property
    def entries(self) -> int:
        """Entries of the whole sequence; 0 without an entry axis."""
        if self.index.entry_offsets is None:
            return 0
        return int(self.index.entry_offsets[self.b + 1] - self.index.entry_offsets[self.b])


def read_targets(source: Source, codec: Codec, selections: Sequence[Selection]) -> list[TeacherTargets]:
    """The targets of the selected rows. One round of requests; two where entries must be counted first.

    Raises DamagedError.
    """
    axes = Axes.of(codec)
    arrays = fetch_named(source, [_first_round(axes, selection) for selection in selections])
    counted = [i for i, selection in enumerate(selections) if axes.count_first(selection)]
    if counted and isinstance(codec, CountsEntries):
        ranges = [_entry_range(source, codec, arrays[i], selections[i]) for i in counted]
        later = [selections[i].entry_arrays(axes, *span) for i, span in zip(counted, ranges, strict=True)]
        for i, entries in zip(counted, fetch_named(source, later), strict=True):
            arrays[i] = {name: rows[selections[i].first :] for name, rows in arrays[i].items()} | entries
    return [_decoded(codec, *pair) for pair in zip(selections, arrays, strict=True)]


def fetch_named(source: Source, wanted: Sequence[Mapping[str, Rows]]) -> list[dict[str, NDArray[Any]]]:
    """Rows by name, for many sequences, in one call to the source."""
    found = iter(fetch_rows(source, [rows for names in wanted for rows in names.values()]))
    return [{name: next(found) for name in names} for names in wanted]


def _first_round(axes: Axes, selection: Selection) -> dict[str, Rows]:
    if not axes.entries:
        return selection.row_arrays(axes, selection.first)
    if axes.count_first(selection):
        return selection.row_arrays(axes, 0)
    whole = replace(selection, first=0, stop=selection.rows)
    return whole.row_arrays(axes, 0) | whole.entry_arrays(axes, 0, whole.entries)


def _decoded(codec: Codec, selection: Selection, arrays: Mapping[str, NDArray[Any]]) -> TeacherTargets:
    targets = codec.decode(arrays)
    if len(targets) == selection.stop - selection.first:
        return targets
    return slice_rows(targets, selection.first, selection.stop)


def _entry_range(
    source: Source, codec: CountsEntries, arrays: Mapping[str, NDArray[Any]], selection: Selection
) -> tuple[int, int]:
    """Which entries belong to the selected rows, from the row arrays of rows 0:stop."""
    counts = codec.entries_per_row(arrays)
    if counts.shape != (selection.stop,) or (counts < 0).any() or counts.sum() > selection.entries:
        group = next(iter(selection.index.targets.values())).path.rpartition("/")[0]
        raise damaged(source.shown, group, "its rows count more entries than there are")
    return int(counts[: selection.first].sum()), int(counts.sum())


def slice_rows(targets: TeacherTargets, first: int, stop: int) -> TeacherTargets:
    """Rows first:stop of some targets."""
    rows = slice(first, stop)
    match targets:
        case HiddenStateTargets():
            return HiddenStateTargets(hidden=targets.hidden[rows], head_fingerprint=targets.head_fingerprint)
        case FullVocabTargets():
            return FullVocabTargets(log_probs=targets.log_probs[rows])
        case TopKTargets() | SampledTargets():
            splits = targets.row_splits[first : stop + 1]
            entries = slice(int(splits[0]), int(splits[-1]))
            cut = {name: value[entries if name in _PER_ENTRY else rows] for name, value in vars(targets).items()}
            return type(targets)(**{**cut, "row_splits": splits - splits[0]})


_PER_ENTRY = ("ids", "log_probs", "counts")
"""Fields of sparse targets that have one number a kept entry; the others have one a row."""
