"""How every engine of ours draws tokens: seeds, uniform numbers, and the inverse of a distribution.

Guarantees: a completion's randomness comes from (sampling seed, problem, sample number) alone, and step n of it uses
the n-th uniform number of its own stream, so engines that agree on the logits agree on the tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from logitcache.errors import UserError
from logitcache.scoring import Sampling


def seed_of(sampling: Sampling, problem_id: str, number: int) -> int:
    """The 63-bit seed of a problem's `number`-th completion."""
    key = hashlib.sha256(f"{sampling.seed}\n{problem_id}\n{number}".encode()).digest()
    return int.from_bytes(key[:8], "little") >> 1


def uniform_of(seed: int, steps: int) -> NDArray[np.float64]:
    """float64[steps] in [0, 1): one number for each token of a completion."""
    return np.random.default_rng(seed).random(steps)


def draw(
    scores_BV: Tensor, uniform_B: Sequence[float], sampling: Sampling, problems_B: Sequence[str] | None = None
) -> Tensor:
    """int64[B] tokens: temperature, then top-k, then nucleus, then the inverse of the cumulative distribution.

    Args:
        scores_BV: logits or log-probabilities, float32: a constant added to a row changes nothing.
        uniform_B: of each row's stream, in [0, 1).
        sampling: how to draw; temperature 0 takes the likeliest.
        problems_B: what each row answers, to name it in an error; None for the row's number alone.

    Raises:
        UserError: a row with a NaN, or whose largest score is infinite.
    """
    if sampling.temperature == 0:
        tokens_B1 = scores_BV.argmax(dim=-1, keepdim=True)
        _require_finite(scores_BV.gather(1, tokens_B1)[:, 0], problems_B)
        return tokens_B1[:, 0]
    kept = scores_BV.shape[1] if sampling.top_k is None else min(sampling.top_k, scores_BV.shape[1])
    values_BK, ids_BK = (scores_BV / sampling.temperature).topk(kept, dim=-1)
    _require_finite(values_BK[:, 0], problems_B)
    probs_BK = values_BK.softmax(dim=-1).double()
    before_BK = probs_BK.cumsum(dim=-1) - probs_BK
    probs_BK = torch.where(before_BK < sampling.top_p, probs_BK, 0.0)
    cumulative_BK = probs_BK.cumsum(dim=-1)
    points_B1 = torch.tensor(uniform_B, dtype=torch.float64, device=scores_BV.device)[:, None]
    choice_B1 = torch.searchsorted(cumulative_BK, points_B1 * cumulative_BK[:, -1:], right=True)
    last_B1 = (probs_BK > 0).sum(dim=-1, keepdim=True) - 1
    return ids_BK.gather(1, torch.minimum(choice_B1, last_B1))[:, 0]


def _require_finite(largest_B: Tensor, problems_B: Sequence[str] | None) -> None:
    """`argmax` and `topk` put a NaN above every number, so the largest score of a row speaks for all of it."""
    bad_B = ~torch.isfinite(largest_B)
    if bad_B.any():
        row = int(bad_B.nonzero()[0])
        asked = f"draw row {row}" if problems_B is None else f"a completion of problem {problems_B[row]}"
        mend = "run it in float32 (--dtype float32), or check the teacher's weights"
        raise UserError(asked, "the teacher's logits are not finite", mend)
