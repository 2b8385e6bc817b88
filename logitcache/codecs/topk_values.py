"""The values of a top-k row: which cell of a root grid each probability is in, and what a row is worth.

Guarantees: exactly one entry a row has code 0, the likeliest (the first of equals); every other entry's code
names its cell, [offset + (code - 1) step, offset + code step) in root probability. A uniform step in root
probability costs every entry the same KL (step^2 / 6 nats, whatever its probability), which is why it is the
scale that hurts the gradient least. `offset` is the root of the threshold, where the entries crowd.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

MAX_CODE = 255
_DEFAULT_STEP = 0.01
_STEP_LIMITS = (0.003, 0.03)
_STEP_PER_ROOT_THRESHOLD = 0.6
_LIKELIEST_OTHER = 0.5**0.5


def matching_step(min_probability: float) -> float:
    """The step that goes with a threshold: where a bit buys as much KL in either.

    A finer step buys step^2 ln 2 / 3 nats a bit; a lower threshold p about 0.7 p / 12 nats a bit (an entry costs some
    12 bits, and the prior gives back a part of what it held). Slopes were measured equal at 0.5 to 0.75 times sqrt(p).
    """
    if min_probability == 0:
        return _DEFAULT_STEP
    return float(np.clip(_STEP_PER_ROOT_THRESHOLD * min_probability**0.5, *_STEP_LIMITS))


@dataclass(frozen=True, kw_only=True)
class RootGrid:
    """A grid uniform in root probability, from `offset` up, `step` wide; 255 cells."""

    offset: float
    step: float

    @property
    def reaches(self) -> bool:
        """Whether the last cell holds the most that a token that is not the likeliest can have."""
        return self.offset + MAX_CODE * self.step >= _LIKELIEST_OTHER

    def cells(self, log_probs: NDArray[np.float32]) -> NDArray[np.int64]:
        """int64[E], 1..255: the cell of each log-probability; those beyond either end are in the last one there."""
        root = np.exp(log_probs.astype(np.float64) / 2)
        return np.clip(np.floor((root - self.offset) / self.step) + 1, 1, MAX_CODE).astype(np.int64)

    def midpoints(self) -> NDArray[np.float32]:
        """float32[256]: the probability in the middle of each cell; [0] is 0 (the likeliest token has no cell)."""
        roots = self.offset + self.step * (np.arange(MAX_CODE + 1) - 0.5)
        roots[0] = 0
        return np.square(np.minimum(roots, 1)).astype(np.float32)

    def centroids(self, log_probs: NDArray[np.float32]) -> NDArray[np.float32]:
        """float32[256]: the mean probability of a sample's entries in each cell, the least forward KL a cell can have.

        A cell that the sample hardly visits keeps its middle (which counts as two entries).
        """
        code = self.cells(log_probs)
        counts = np.bincount(code, minlength=MAX_CODE + 1)
        sums = np.bincount(code, np.exp(log_probs.astype(np.float64)), MAX_CODE + 1)
        return ((sums + 2 * self.midpoints()) / (counts + 2)).astype(np.float32)


def likeliest(log_probs: NDArray[np.float32], splits: NDArray[np.int64], row: NDArray[np.int64]) -> NDArray[np.int64]:
    """int64[C]: the entry of each row's greatest log-probability, the first of equals; every row has an entry."""
    if len(splits) == 1:
        return np.empty(0, np.int64)
    greatest = np.maximum.reduceat(log_probs, splits[:-1])
    ties = np.flatnonzero(log_probs == greatest[row])
    return ties[np.diff(row[ties], prepend=-1) > 0]


@dataclass(frozen=True, kw_only=True, eq=False)
class HeadValues:
    """What the kept entries are worth.

    Attributes:
        log_probs: float32[E], nats.
        top: float32[C], the likeliest token's, nats.
        entropy: float32[C], what the kept entries alone add to the entropy, nats.
    """

    log_probs: NDArray[np.float32]
    top: NDArray[np.float32]
    entropy: NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Levels:
    """What each code is worth, and the terms that a row's sums are made of.

    Sums are differences of a running int64 sum, in units of 2^-52: exact for float32 terms of 4e-9 or more, and several
    times faster than a sum row by row.

    Attributes:
        probs: float32[256]; code 0, the likeliest token's, has none of its own.
    """

    probs: NDArray[np.float32]

    @cached_property
    def log_probs(self) -> NDArray[np.float32]:
        """float32[255], nats: of codes 1 to 255."""
        return np.log(self.probs[1:])

    @cached_property
    def units(self) -> NDArray[np.int64]:
        """int64[256]: the probabilities; 0 for code 0."""
        return _in_units(np.concatenate([np.zeros(1, np.float32), self.probs[1:]]))

    @cached_property
    def entropy_units(self) -> NDArray[np.int64]:
        """int64[256]: p log p; 0 for code 0."""
        return _in_units(np.concatenate([np.zeros(1, np.float32), self.probs[1:] * self.log_probs]))


_UNIT = 2.0**-52


def _in_units(values: NDArray[np.float32]) -> NDArray[np.int64]:
    return np.rint(values.astype(np.float64) / _UNIT).astype(np.int64)


def _row_sums(units: NDArray[np.int64], splits: NDArray[np.int64]) -> NDArray[np.float64]:
    """float64[C]: the sum of each row. A running sum that wraps round loses nothing, since a row's own fits."""
    return np.diff(np.add.accumulate(units)[splits[1:] - 1], prepend=0) * _UNIT


def head_values(
    code: NDArray[np.int64],
    splits: NDArray[np.int64],
    row: NDArray[np.int64],
    mass: NDArray[np.float64],
    levels: Levels,
) -> HeadValues:
    """Probabilities from cells: each row's add up to its mass, and code 0 takes what the others leave.

    Args:
        code: int64[E] of `RootGrid.cells`, 0 for the likeliest.
        splits: int64[C+1], entries of row c; none empty.
        row: int64[E], the row of each entry.
        mass: float64[C], the kept probability.
        levels: of the codes.
    """
    units = levels.units.take(code)
    others = _row_sums(units, splits)
    largest = np.maximum.reduceat(units, splits[:-1]) * _UNIT
    top = np.maximum(mass - others, largest)
    scale = mass / (top + others)
    log_top, log_scale = np.log(top), np.log(scale)
    # Code c has place c - 1; code 0 wraps round to the largest number, and gets the place of its row behind the levels.
    place = np.minimum(code.view(np.uint64) - np.uint64(1), row.view(np.uint64) + np.uint64(MAX_CODE))
    log_probs = np.concatenate([levels.log_probs, log_top.astype(np.float32)]).take(place.view(np.int64))
    shift = np.log(scale.astype(np.float32))  # of most rows nothing, exactly
    if shift.any():  # some row's likeliest was given more than the others leave
        log_probs += shift.take(row)
    log_top += log_scale
    plogp = _row_sums(levels.entropy_units.take(code), splits)
    entropy = -scale * (plogp + log_scale * others + top * log_top)
    top = np.minimum(log_top, 0)
    return HeadValues(log_probs=log_probs, top=top.astype(np.float32), entropy=entropy.astype(np.float32))
