"""The seam between a teacher's targets and the numbers a store keeps.

A codec turns targets into a few packed arrays of plain integers or floats and back. What is special
about it lies in the numbers; the bytes are left to the Zarr codecs named in each `ArrayLayout`, so any
Zarr reader opens the arrays without this package.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from logitcache.records import Head, TeacherTargets
from logitcache.scoring import TargetRequest


class Axis(StrEnum):
    """What the first axis of a packed array counts, over all sequences of a part one after another."""

    ROW = "row"
    ENTRY = "entry"


@dataclass(frozen=True, kw_only=True)
class ArrayLayout:
    """How one packed array is cut and compressed.

    Attributes:
        axis: what the first axis counts.
        dtype: numpy dtype name of the elements (little-endian on disk).
        chunk_shape: an inner chunk; its first number cuts the packed axis, the rest cut (or equal) the item shape.
        item_shape: shape after the packed axis; () for a vector.
        compression: Zarr v3 codec metadata put between `bytes` (or, for an array-to-bytes codec such as
            `numcodecs.pcodec`, in its place) and `crc32c`; the store appends the checksum itself.
    """

    axis: Axis
    dtype: str
    chunk_shape: tuple[int, ...]
    item_shape: tuple[int, ...] = ()
    compression: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True, kw_only=True, eq=False)
class Encoded:
    """What `encode` returns for B sequences: packed arrays by name, and entries_per_sequence int64[B] (zeros where the
    codec has no entry axis).
    """

    arrays: Mapping[str, NDArray[Any]]
    entries_per_sequence: NDArray[np.int64]


class Codec(Protocol):
    """Targets to arrays and back. Implementations are frozen dataclasses built by `logitcache.codecs`."""

    @property
    def kind(self) -> str:
        """`topk`, `hidden`, ...: the name a tier is asked for by."""
        ...

    @property
    def request(self) -> TargetRequest:
        """What a scorer must be asked for."""
        ...

    @property
    def layouts(self) -> Mapping[str, ArrayLayout]:
        """The packed arrays, in the order they are written."""
        ...

    @property
    def config(self) -> dict[str, Any]:
        """JSON that, with `shared`, rebuilds this codec."""
        ...

    @property
    def shared(self) -> Mapping[str, NDArray[Any]]:
        """Arrays kept once per tier: a vocabulary prior, a transform, a head."""
        ...

    @property
    def head(self) -> Head | None:
        """The head that decoded hidden states belong to (a transform already folded in); None for other kinds."""
        ...

    def encode(self, targets: Sequence[TeacherTargets]) -> Encoded:
        """Pack the targets of B sequences. Raises UserError on non-finite values or ids beyond the vocabulary."""
        ...

    def decode(self, arrays: Mapping[str, NDArray[Any]]) -> TeacherTargets:
        """Unpack the rows of one sequence, or of a run of whole rows; arrays may be read-only views."""
        ...


@runtime_checkable
class CountsEntries(Protocol):
    """A codec with an entry axis that can say, from row arrays alone, how many entries each row has.

    With it a window of rows is read without the entries of the others; without it they are read and dropped.
    """

    def entries_per_row(self, arrays: Mapping[str, NDArray[Any]]) -> NDArray[np.int64]:
        """int64[R] for R rows, from the arrays whose axis is ROW."""
        ...
