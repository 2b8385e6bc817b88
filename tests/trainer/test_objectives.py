"""Which divergence a kind of target gives, which it does not, and where the division happens."""

from __future__ import annotations

import pytest
import torch

import kernels
from kernels import DenseTargets, LinearHead, SampledTargets, TopKTargets
from logitcache.errors import UserError
from trainer.batch import Batch
from trainer.objectives import Objective, step_mean, token_mean
from trainer.settings import Weighting


@pytest.fixture
def student() -> LinearHead:
    draw = torch.Generator().manual_seed(0)
    return LinearHead(hidden=torch.randn(5, 8, generator=draw), weight=torch.randn(11, 8, generator=draw))


@pytest.fixture
def log_probs() -> torch.Tensor:
    return torch.randn(5, 11, generator=torch.Generator().manual_seed(1)).log_softmax(-1)


def entropy(log_probs: torch.Tensor) -> torch.Tensor:
    return -(log_probs.exp() * log_probs).sum(-1)


def top_k(log_probs: torch.Tensor, k: int) -> TopKTargets:
    ids = log_probs.topk(k).indices.sort().values
    kept = log_probs.gather(1, ids)
    return TopKTargets(
        ids=ids.flatten(),
        log_probs=kept.flatten(),
        row_splits=torch.arange(len(log_probs) + 1) * k,
        tail_log_mass=torch.log1p(-kept.exp().sum(-1)),
        entropy=entropy(log_probs),
    )


@pytest.mark.parametrize("forward_weight", [0.0, 0.3, 1.0])
def test_the_mix_is_linear(forward_weight: float, student: LinearHead, log_probs: torch.Tensor) -> None:
    out = Objective(forward_weight=forward_weight)(student, DenseTargets(log_probs=log_probs))
    assert out.reverse_kl is not None
    expected = forward_weight * out.forward_kl + (1 - forward_weight) * out.reverse_kl
    assert torch.allclose(out.loss, expected, rtol=1e-5)
    q = (student.hidden @ student.weight.T).log_softmax(-1)
    assert torch.allclose(out.forward_kl, (log_probs.exp() * (log_probs - q)).sum(-1), rtol=1e-4)
    assert torch.allclose(out.reverse_kl, (q.exp() * (q - log_probs)).sum(-1), rtol=1e-4)


@pytest.mark.parametrize("forward_weight", [0.0, 1.0])
def test_top_k_targets_give_the_coarse_divergence(
    forward_weight: float, student: LinearHead, log_probs: torch.Tensor
) -> None:
    exact = Objective(forward_weight=forward_weight)(student, DenseTargets(log_probs=log_probs)).loss
    coarse = Objective(forward_weight=forward_weight)(student, top_k(log_probs, 3)).loss
    assert (coarse <= exact + 1e-5).all()
    assert (coarse < exact - 1e-3).any()


def test_sampled_targets_give_forward_and_refuse_reverse(student: LinearHead, log_probs: torch.Tensor) -> None:
    drawn = SampledTargets(
        ids=log_probs.argmax(-1), counts=torch.ones(5), row_splits=torch.arange(6), entropy=entropy(log_probs)
    )
    assert Objective(forward_weight=1.0)(student, drawn).reverse_kl is None
    with pytest.raises(UserError, match="sampled targets, which say nothing of it"):
        Objective(forward_weight=0.5)(student, drawn)


@pytest.mark.parametrize("options", [{"forward_weight": 1.5}, {"forward_weight": 0.5, "temperature": 0.0}])
def test_impossible_objectives_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(UserError):
        Objective(**options)


def test_temperature_and_backend_reach_the_kernel(student: LinearHead, log_probs: torch.Tensor) -> None:
    targets = DenseTargets(log_probs=log_probs)
    mine = Objective(forward_weight=0.0, temperature=2.0, backend="reference")(student, targets)
    plain = kernels.reverse_kl(student, targets, temperature=2.0, backend="reference")
    assert torch.equal(mine.loss, plain.loss)
    assert mine.loss.dtype is plain.loss.dtype


def test_the_mean_is_over_the_tokens_of_the_step() -> None:
    loss = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    parts = token_mean(loss[:2], 5) + token_mean(loss[2:], 5)
    assert float(parts) == pytest.approx(3.0)


def test_weighting_by_hand() -> None:
    """Two sequences in one micro-batch (completions of 1 and 3 tokens), one of 2 tokens in another."""

    def batch(lengths: tuple[int, ...], rows: list[int]) -> Batch:
        ids = torch.zeros(sum(lengths), dtype=torch.long)
        none = DenseTargets(log_probs=torch.zeros(len(rows), 2))
        return Batch(
            input_ids=ids, position_ids=ids, sequence_lengths=lengths, rows=torch.tensor(rows), targets=none,
            sample_ids=("",) * len(lengths),
        )  # fmt: skip

    step = [batch((3, 4), [2, 4, 5, 6]), batch((5,), [3, 4])]
    losses = [torch.tensor([6.0, 1.0, 2.0, 6.0]), torch.tensor([2.0, 4.0])]
    for weighting, mean in ((Weighting.TOKEN, 21 / 6), (Weighting.SEQUENCE, (6 + 3 + 3) / 3)):
        parts = [step_mean(loss, one, step, weighting) for loss, one in zip(losses, step, strict=True)]
        assert float(sum(parts)) == pytest.approx(mean)
