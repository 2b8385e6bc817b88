"""The rows of a teacher that codecs are fitted on, and how they are split where a fidelity is judged."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from logitcache.errors import UserError

JUDGED_ROWS = 1024
"""Most rows held out to judge a fidelity: each trial of a search passes over the vocabulary for them."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Calibration:
    """A sample of teacher-forced rows.

    Attributes:
        hidden: float32[n, D], states after the final norm.
        token_ids: int32[n], the token each row went on to predict.
    """

    hidden: NDArray[np.float32]
    token_ids: NDArray[np.int32]

    def __post_init__(self) -> None:
        if self.hidden.ndim != 2 or len(self.hidden) != len(self.token_ids) or len(self.hidden) < 2:
            found = f"{list(self.hidden.shape)} states and {len(self.token_ids)} ids"
            raise UserError("a calibration sample of 2 rows or more", found, "score a larger first unit")

    def __len__(self) -> int:
        return len(self.hidden)

    @property
    def fitting(self) -> Calibration:
        """The rows before `held_out`, to fit on where a fidelity is then judged (with 3 rows or fewer, all of them)."""
        return self._rows(0, len(self) - self._held)

    @property
    def held_out(self) -> Calibration:
        """The last rows: half of them, 1,024 at most."""
        return self._rows(len(self) - self._held, len(self))

    @property
    def _held(self) -> int:
        return min(JUDGED_ROWS, len(self) // 2)

    def _rows(self, start: int, stop: int) -> Calibration:
        if stop - start < 2:
            return self
        return Calibration(hidden=self.hidden[start:stop], token_ids=self.token_ids[start:stop])
