"""Sums and maxima over the ranks that share a vocabulary.

Guarantees: without a shard nothing is communicated and no process group is needed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor

from kernels.types import VocabShard


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """The ranks a reduction runs over; `shard` None means this one alone."""

    shard: VocabShard | None

    def max_(self, value: Tensor) -> Tensor:
        """Elementwise maximum over ranks, in place."""
        if self.shard is not None:
            dist.all_reduce(value, op=dist.ReduceOp.MAX, group=self.shard.group)
        return value

    def sum_(self, value: Tensor) -> Tensor:
        """Elementwise sum over ranks, in place."""
        if self.shard is not None:
            dist.all_reduce(value, op=dist.ReduceOp.SUM, group=self.shard.group)
        return value
