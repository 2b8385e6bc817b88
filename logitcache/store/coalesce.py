"""Byte ranges that touch or overlap become one request, and no byte more is read for it.

Sequences that are neighbours in a part share the chunk at their border, so a batch from few parts asks for less.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from logitcache.store.place import ByteRange


def read_coalesced(ranges: Sequence[ByteRange], read: Callable[[Sequence[ByteRange]], Sequence[bytes]]) -> list[bytes]:
    """What `read` returns for these ranges, asked for in as few as hold them."""
    order = sorted(range(len(ranges)), key=lambda i: ranges[i])
    runs: list[ByteRange] = []
    home: dict[int, int] = {}
    for i in order:
        item = ranges[i]
        if runs and runs[-1].name == item.name and item.start <= runs[-1].stop:
            runs[-1] = runs[-1]._replace(stop=max(runs[-1].stop, item.stop))
        else:
            runs.append(item)
        home[i] = len(runs) - 1
    data = read(runs)
    found = []
    for i, item in enumerate(ranges):
        whole, start = data[home[i]], runs[home[i]].start
        found.append(whole if len(whole) == item.stop - item.start else whole[item.start - start : item.stop - start])
    return found
