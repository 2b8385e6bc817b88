"""Which problems are held out: decided by a hash of the problem's id, so it never depends on order, run or machine."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from logitcache.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Split:
    """Indices into a cache, all samples of a problem on one side.

    Attributes:
        train: never evaluated on; held_out: never trained on, nor used as prompts.
    """

    train: tuple[int, ...]
    held_out: tuple[int, ...]


def is_held_out(problem_id: str, share: float) -> bool:
    """Whether a problem falls into the held-out `share` (0..1) of all problems."""
    digest = hashlib.sha256(f"held out\n{problem_id}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def split_by_problem(problem_ids: Sequence[str], share: float) -> Split:
    """Split the sequences of a cache, given the problem of each.

    Raises:
        UserError: one side would be empty.
    """
    held = [is_held_out(problem_id, share) for problem_id in problem_ids]
    train = tuple(index for index, out in enumerate(held) if not out)
    held_out = tuple(index for index, out in enumerate(held) if out)
    if not train or not held_out:
        found = f"{len(train)} sequences to train on and {len(held_out)} held out"
        raise UserError(f"a held-out share of {share:g}", found, "build the cache from more problems")
    return Split(train=train, held_out=held_out)
