"""Targets that stay as a codec packed them, so that a client decodes them and the wire carries less.

A local reader with such a codec reads everything but the last step: windows, checks and batching are its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from logitcache.codecs.codec import ArrayLayout, Axis, Codec, CountsEntries
from logitcache.errors import UserError
from logitcache.records import Head
from logitcache.service.refusals import Refusal


@dataclass(frozen=True, kw_only=True, eq=False)
class EncodedRows:
    """One sequence's targets as packed arrays; stands where decoded targets would."""

    arrays: Mapping[str, NDArray[Any]]
    rows: int

    def __len__(self) -> int:
        return self.rows


@dataclass(frozen=True, kw_only=True, eq=False)
class Undecoded:
    """A codec to read with, whose `decode` leaves the arrays as they are."""

    codec: Codec

    @property
    def layouts(self) -> Mapping[str, ArrayLayout]:
        """The codec's own."""
        return self.codec.layouts

    @property
    def head(self) -> Head | None:
        """The codec's own."""
        return self.codec.head

    def decode(self, arrays: Mapping[str, NDArray[Any]]) -> EncodedRows:
        """The arrays of one window."""
        row_array = next(name for name, item in self.codec.layouts.items() if item.axis is Axis.ROW)
        return EncodedRows(arrays=dict(arrays), rows=len(arrays[row_array]))


@dataclass(frozen=True, kw_only=True, eq=False)
class UndecodedEntries(Undecoded):
    """The same of a codec that counts entries, by which the store cuts windows before it decodes."""

    def entries_per_row(self, arrays: Mapping[str, NDArray[Any]]) -> NDArray[np.int64]:
        """See `CountsEntries`."""
        return cast(CountsEntries, self.codec).entries_per_row(arrays)


def undecoded(codec: Codec) -> Codec:
    """A codec to read packed arrays with. Raises Refusal where only decoding could cut a window."""
    if isinstance(codec, CountsEntries):
        return cast(Codec, UndecodedEntries(codec=codec))
    if any(item.axis is Axis.ENTRY for item in codec.layouts.values()):
        found = "their codec cannot count entries"
        raise Refusal(UserError(f"encoded {codec.kind} targets", found, "open it with decoded=True"))
    return cast(Codec, Undecoded(codec=codec))
