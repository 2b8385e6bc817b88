"""A teacher of whom only some ids of each row are known: all rows' entries in one list, and where each row starts.

Guarantees: a value that exists has ascending distinct ids in each row, probabilities that are probabilities, and one
device. Letters: T rows, E kept entries of all rows together.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.validate import FLOATS, INTEGERS, require, require_one_device, require_tensor

MASS_TOLERANCE = 1e-2
"""How far kept plus tail mass may exceed 1: bfloat16 log-probabilities overshoot by up to 2^-8 times their size."""


def row_of_entry(row_splits: Tensor) -> Tensor:
    """int64[E]: the row that each kept entry belongs to."""
    rows = torch.arange(len(row_splits) - 1, device=row_splits.device)
    return torch.repeat_interleave(rows, row_splits.diff())


def _require_ragged(name: str, ids: Tensor, row_splits: Tensor) -> None:
    require_tensor(f"{name}.ids", ids, INTEGERS, (None,))
    require_tensor(f"{name}.row_splits", row_splits, INTEGERS, (None,))
    require(len(row_splits) >= 1, f"{name}.row_splits length", len(row_splits), "T + 1, at least 1")
    first, last = int(row_splits[0]), int(row_splits[-1])
    require(first == 0 and last == len(ids), f"{name}.row_splits ends", f"{first} and {last}", f"0 and {len(ids)}")
    if not len(ids):
        return
    require(bool((row_splits.diff() >= 0).all()), f"{name}.row_splits", "a decreasing step", "ascending offsets")
    require(int(ids.min()) >= 0, f"{name}.ids minimum", int(ids.min()), "0 or more")
    falls = ids[1:] <= ids[:-1]
    inner = row_splits[(row_splits > 0) & (row_splits < len(ids))].long()
    falls[inner - 1] = False
    require(not bool(falls.any()), f"{name}.ids", "repeated or descending ids in a row", "ascending within a row")


@dataclass(frozen=True, kw_only=True, eq=False)
class TopKTargets:
    """A teacher's likeliest tokens at temperature 1, raw, and the mass left over (k may vary by row).

    Attributes:
        ids: int[E], ascending within a row.
        log_probs: float[E], nats, never renormalised.
        row_splits: int[T+1]; row t keeps entries row_splits[t]:row_splits[t+1].
        tail_log_mass: float[T], log of the mass outside the kept ids, nats; -inf if none.
        entropy: float[T], entropy of the teacher's full distribution, nats; reported as it is.

    Raises:
        ValueError: shapes that do not fit, log-probabilities above 0, kept plus tail mass above 1.
    """

    ids: Tensor
    log_probs: Tensor
    row_splits: Tensor
    tail_log_mass: Tensor
    entropy: Tensor

    def __post_init__(self) -> None:
        _require_ragged("TopKTargets", self.ids, self.row_splits)
        require_tensor("TopKTargets.log_probs", self.log_probs, FLOATS, (len(self.ids),))
        require_tensor("TopKTargets.tail_log_mass", self.tail_log_mass, FLOATS, (self.rows,))
        require_tensor("TopKTargets.entropy", self.entropy, FLOATS, (self.rows,))
        require_one_device("TopKTargets", self.ids, self.log_probs, self.row_splits, self.tail_log_mass, self.entropy)
        for name in ("log_probs", "tail_log_mass"):
            value: Tensor = getattr(self, name)
            highest = float(value.max()) if len(value) else 0.0
            require(highest <= 0, f"TopKTargets.{name} maximum", highest, "at most 0")
        heaviest = float(self.mass().max()) if self.rows else 0.0
        require(heaviest <= 1 + MASS_TOLERANCE, "TopKTargets kept plus tail mass", heaviest, "at most 1")

    @property
    def rows(self) -> int:
        """T."""
        return len(self.row_splits) - 1

    def mass(self) -> Tensor:
        """float64[T]: kept plus tail mass of each row, 1 up to the rounding of what was stored."""
        kept = torch.zeros(self.rows, dtype=torch.float64, device=self.ids.device)
        kept.index_add_(0, row_of_entry(self.row_splits), self.log_probs.double().exp())
        return kept + self.tail_log_mass.double().exp()


@dataclass(frozen=True, kw_only=True, eq=False)
class SampledTargets:
    """Ids drawn from a teacher at temperature 1 with their counts: unbiased for forward KL, and for nothing else.

    Attributes:
        ids: int[E], distinct, ascending within a row.
        counts: int or float[E], how often each was drawn, above 0.
        row_splits: int[T+1].
        entropy: float[T], entropy of the teacher's full distribution, nats.

    Raises:
        ValueError: shapes that do not fit, a count of 0 or less, a row without a draw.
    """

    ids: Tensor
    counts: Tensor
    row_splits: Tensor
    entropy: Tensor

    def __post_init__(self) -> None:
        _require_ragged("SampledTargets", self.ids, self.row_splits)
        require_tensor("SampledTargets.counts", self.counts, INTEGERS + FLOATS, (len(self.ids),))
        require_tensor("SampledTargets.entropy", self.entropy, FLOATS, (self.rows,))
        require_one_device("SampledTargets", self.ids, self.counts, self.row_splits, self.entropy)
        if self.rows:
            fewest = int(self.row_splits.diff().min())
            require(fewest >= 1, "SampledTargets draws in a row", fewest, "1 or more")
            require(float(self.counts.min()) > 0, "SampledTargets.counts minimum", float(self.counts.min()), "above 0")

    @property
    def rows(self) -> int:
        """T."""
        return len(self.row_splits) - 1
