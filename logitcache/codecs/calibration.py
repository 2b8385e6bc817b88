"""From a spec to a codec: what has to be learnt of the teacher first, learnt from a sample of its states.

Guarantees: deterministic in (spec, head, sample). Fitting sees the first half of the sample, fidelity is
judged on the second, so no figure is measured on the rows it was tuned on.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from logitcache.errors import UserError


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
        """The first half (with 3 rows or fewer, all of it)."""
        return self._rows(0, len(self) // 2)

    @property
    def held_out(self) -> Calibration:
        """The second half."""
        return self._rows(len(self) // 2, len(self))

    def _rows(self, start: int, stop: int) -> Calibration:
        if stop - start < 2:
            return self
        return Calibration(hidden=self.hidden[start:stop], token_ids=self.token_ids[start:stop])
