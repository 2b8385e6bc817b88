"""From states to targets: the arithmetic of the head, and tails that float32 probabilities cannot hold."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from logitcache.records import FinishReason, Origin, TokenSequence, TopKTargets
from logitcache.scorers.select import TorchHead, targets_of
from logitcache.scoring import TopKRequest


def sequence(rows: int) -> TokenSequence:
    return TokenSequence(
        token_ids=np.arange(rows + 1, dtype=np.int32),
        prompt_tokens=1,
        origin=Origin.CORPUS,
        sample_id="s",
        problem_id="p",
        finish_reason=FinishReason.GIVEN,
    )


def top_k(head: TorchHead, hidden_CD: torch.Tensor, max_k: int) -> TopKTargets:
    (targets,) = targets_of(sequence(len(hidden_CD)), hidden_CD, head, "h", [TopKRequest(max_k=max_k)], 4)
    assert isinstance(targets, TopKTargets)
    return targets


def test_a_peaked_row_keeps_as_many_entries_as_any_other() -> None:
    """Its float32 probabilities sum to one after a few entries, and the rest still count."""
    head = TorchHead(weight=torch.arange(100.0)[:, None], bias=None, soft_cap=None, scale=1.0)
    assert top_k(head, torch.tensor([[5.0]]), 9).ids.tolist() == list(range(91, 100))


@pytest.mark.parametrize("kept", [1, 9])
def test_a_tail_below_what_float32_holds_is_still_exact(kept: int) -> None:
    head = TorchHead(weight=torch.arange(100.0)[:, None], bias=None, soft_cap=None, scale=1.0)
    targets = top_k(head, torch.tensor([[20.0], [0.1]]), kept)
    for tail, state in zip(targets.tail_log_mass, (20.0, 0.1), strict=True):
        exact = torch.log_softmax(state * torch.arange(100.0, dtype=torch.float64), dim=-1)
        assert math.isclose(tail, exact[: 100 - kept].logsumexp(dim=-1), rel_tol=1e-5)


def test_all_kept_leaves_no_tail_and_an_impossible_token_has_no_entropy() -> None:
    bias = torch.tensor([0.0, 0.0, -torch.inf])
    head = TorchHead(weight=torch.zeros(3, 2), bias=bias, soft_cap=None, scale=1.0)
    targets = top_k(head, torch.zeros(2, 2), 3)
    assert targets.ids.tolist() == [0, 1, 0, 1]
    assert np.isneginf(targets.tail_log_mass).all()
    assert targets.entropy == pytest.approx(math.log(2))


@pytest.mark.parametrize("rows", [1, 130])
def test_logits_of_bfloat16_values_are_as_good_as_float32_ones(rows: int) -> None:
    before = torch.backends.mkldnn.matmul.fp32_precision
    random = torch.Generator().manual_seed(0)
    weight, hidden = (torch.randn(n, 576, generator=random).bfloat16() for n in (1000, rows))
    head = TorchHead(weight=weight, bias=torch.ones(1000), soft_cap=50.0, scale=0.5)
    exact = 50 * torch.tanh((hidden.double() @ weight.double().T + 1) * 0.5 / 50)
    assert (head.logits(hidden) - exact).abs().max() < 5e-5  # logits of tens; rounding the products would cost 0.1
    assert torch.backends.mkldnn.matmul.fp32_precision == before
