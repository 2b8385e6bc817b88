"""What a model and a teacher say of a model's text, against the same in float64 from whole logits."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch

from logitcache.scorers.hf import HFEngine
from tests.trainer.conftest import VOCAB, random_sequence
from trainer.own_text import own_distributions


def test_every_figure_is_that_of_whole_distributions(teacher: HFEngine) -> None:
    model = copy.deepcopy(teacher.model)
    noise = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=noise)
    own = replace(teacher, model=model)
    sequences = [random_sequence(number, 2 + number % 3, 1 + 3 * number) for number in range(20)]
    stop_ids = [2, 17]
    found = own_distributions(own, sequences, stop_ids, torch.device("cpu"), teacher)

    def log_probs(of: Any, sequence: Any) -> torch.Tensor:
        ids = torch.from_numpy(sequence.token_ids).long()[None]
        with torch.no_grad():
            logits = of(ids).logits[0, sequence.prompt_tokens - 1 : -1, :VOCAB]
        return logits.double().log_softmax(dim=-1)

    for sequence, one in zip(sequences, found, strict=True):
        p, q = log_probs(teacher.model, sequence), log_probs(model, sequence)
        expected = {
            "entropy_nats": -(q.exp() * q).sum(-1),
            "eos_mass": q[:, stop_ids].exp().sum(-1),
            "forward_kl_nats": (p.exp() * (p - q)).sum(-1),
            "reverse_kl_nats": (q.exp() * (q - p)).sum(-1),
            "top1_share": (p.argmax(-1) == q.argmax(-1)).double(),
        }
        for name, value in expected.items():
            assert getattr(one, name) == pytest.approx(float(value.mean()), rel=1e-4), name
    assert min(one.forward_kl_nats or 0 for one in found) > 0
    assert any(one.top1_share not in (0, 1) for one in found)
    alone = own_distributions(own, sequences, stop_ids, torch.device("cpu"))
    assert [one.entropy_nats for one in alone] == [one.entropy_nats for one in found]
    assert {one.forward_kl_nats for one in alone} == {None}
