"""The rows of a teacher that codecs are fitted on, and how they are split where a fidelity is judged.

Rows of one sequence are alike. So whole sequences are held out, from all over the sample, and the uncertainty of a mean
is taken from how sequences differ.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from logitcache.codecs.dense import spread
from logitcache.errors import UserError

JUDGED_ROWS = 1024
"""Most rows that judge a fidelity: each trial of a search passes over the vocabulary for them."""
HELD_OUT_SHARE = 4
"""One in so many sequences is held out."""
STANDARD_ERRORS = 2.0
"""Above the mean: 95% one-sided where seven sequences judge (Student's t), 97.5% where many do."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Calibration:
    """A sample of teacher-forced rows.

    Attributes:
        hidden: float32[n, D], states after the final norm.
        token_ids: int32[n], the token each row went on to predict.
        sequence: int64[n], ascending: the number of the sequence that each row is of.
    """

    hidden: NDArray[np.float32]
    token_ids: NDArray[np.int32]
    sequence: NDArray[np.int64]

    def __post_init__(self) -> None:
        same = len(self.hidden) == len(self.token_ids) == len(self.sequence) >= 2
        if self.hidden.ndim != 2 or not same or (np.diff(self.sequence) < 0).any():
            found = f"{list(self.hidden.shape)} states and {len(self.token_ids)} ids"
            raise UserError("a calibration sample of 2 rows or more", found, "score a larger first unit")

    def __len__(self) -> int:
        return len(self.hidden)

    @property
    def fitting(self) -> Calibration:
        """The rows of the sequences that are not held out."""
        return self.rows(np.flatnonzero(~self._is_held_out))

    @property
    def held_out(self) -> Calibration:
        """Rows of every fourth sequence, evenly spread, 1,024 at most; of a single sequence the last quarter."""
        return self.rows(spread(np.flatnonzero(self._is_held_out), JUDGED_ROWS))

    @property
    def _is_held_out(self) -> NDArray[np.bool_]:
        number = np.unique(self.sequence, return_inverse=True)[1]
        if number[-1] == 0:
            return np.arange(len(self)) >= len(self) - max(1, len(self) // HELD_OUT_SHARE)
        return number % HELD_OUT_SHARE == 1

    def rows(self, chosen: slice | NDArray[np.int64]) -> Calibration:
        """Some of the rows; a single one twice, since a sample has two or more."""
        if isinstance(chosen, np.ndarray) and len(chosen) == 1:
            chosen = np.repeat(chosen, 2)
        return Calibration(hidden=self.hidden[chosen], token_ids=self.token_ids[chosen], sequence=self.sequence[chosen])


def upper_bound(values: NDArray[np.float64], sequence: NDArray[np.int64]) -> float:
    """What the mean over new sequences is hardly above: the mean of `values` plus two standard errors.

    The error is that of a ratio of sums over sequences (Cochran, Sampling Techniques, chapter 6): rows of a sequence
    count as one draw. Where there is a single sequence its rows count as draws, which is too sure.

    Args:
        values: float64[n].
        sequence: int64[n], the sequence of each.
    """
    clusters = np.unique(sequence, return_inverse=True)[1]
    if clusters[-1] == 0:
        clusters = np.arange(len(values))
    count, mean = clusters[-1] + 1, values.mean()
    residuals = np.bincount(clusters, values - mean)
    error = np.sqrt(np.square(residuals).sum() * count / (count - 1)) / len(values)
    return float(mean + STANDARD_ERRORS * error)
