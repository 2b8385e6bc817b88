"""Which divergence a kind of target gives, which it does not, and where the division happens."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import kernels
from kernels import DenseTargets, LinearHead, SampledTargets, TopKTargets
from logitcache.errors import UserError
from trainer.batch import Batch
from trainer.objectives import Objective, StepSize, step_mean, token_mean
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


@pytest.mark.parametrize(
    "options",
    [
        {"forward_weight": 1.5},
        {"forward_weight": 0.5, "temperature": 0.0},
        {"forward_weight": 1.0, "cross_entropy_share": 1.5},
        {"forward_weight": 1.0, "cross_entropy_share": float("nan")},
    ],
)
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
            next_ids=torch.tensor(rows), sample_ids=("",) * len(lengths),
        )  # fmt: skip

    step = [batch((3, 4), [2, 4, 5, 6]), batch((5,), [3, 4])]
    losses = [torch.tensor([6.0, 1.0, 2.0, 6.0]), torch.tensor([2.0, 4.0])]
    for weighting, mean in ((Weighting.TOKEN, 21 / 6), (Weighting.SEQUENCE, (6 + 3 + 3) / 3)):
        parts = [step_mean(loss, one, StepSize.of(step), weighting) for loss, one in zip(losses, step, strict=True)]
        assert float(sum(parts)) == pytest.approx(mean)


@pytest.mark.parametrize("share", [0.25, 1.0])
@pytest.mark.parametrize("kind", ["hidden", "top-k"])
def test_the_cross_entropy_share_equals_plain_double_precision(
    kind: str, share: float, student: LinearHead, log_probs: torch.Tensor
) -> None:
    """Losses and gradients, with a padded head and rows that weigh differently, against the formula in float64."""
    next_ids, upstream = torch.tensor([3, 0, 10, 7, 3]), torch.linspace(0.5, 2.0, 5).double()
    draw = torch.Generator().manual_seed(2)
    weight = torch.cat([student.weight, torch.randn(2, 8, generator=draw)])
    teacher = LinearHead(hidden=torch.randn(5, 6, generator=draw), weight=torch.randn(11, 6, generator=draw))
    ids = torch.arange(5)
    batch = Batch(
        input_ids=ids, position_ids=ids, sequence_lengths=(5,), rows=ids, next_ids=next_ids, sample_ids=("",),
        targets=teacher if kind == "hidden" else top_k(log_probs, 4),
    )  # fmt: skip
    objective = Objective(forward_weight=0.3, cross_entropy_share=share)
    hidden, learned = student.hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    loss_R, sums = objective.over(LinearHead(hidden=hidden, weight=learned, vocab_size=11), batch)
    (loss_R * upstream.float()).sum().backward()

    exact_hidden, exact_weight = student.hidden.double().requires_grad_(), weight.double().requires_grad_()
    q = (exact_hidden @ exact_weight[:11].T).log_softmax(-1)
    text = -q.gather(1, next_ids[:, None])[:, 0]
    if kind == "hidden":
        p = (teacher.hidden.double() @ teacher.weight.double().T).log_softmax(-1)
    else:
        kept = log_probs.topk(4).indices
        p, q = coarse(log_probs.double(), kept), coarse(q, kept)
    forward, reverse = (p.exp() * (p - q)).sum(-1), (q.exp() * (q - p)).sum(-1)
    expected = share * text + (1 - share) * (0.3 * forward + 0.7 * reverse)
    (expected * upstream).sum().backward()
    assert torch.allclose(loss_R.double(), expected, rtol=1e-5)
    for mine, exact in ((hidden.grad, exact_hidden.grad), (learned.grad, exact_weight.grad)):
        assert mine is not None
        assert exact is not None
        assert float((mine - exact).norm() / exact.norm()) < 1e-5
    named = dict(zip(objective.names(batch.targets), sums.tolist(), strict=True))
    assert named["loss_nats"] == pytest.approx(float(expected.detach().sum()), rel=1e-5)
    assert named["cross_entropy_nats"] == pytest.approx(float(text.detach().sum()), rel=1e-5)
    ending = "" if kind == "hidden" else "_coarse"
    known = share < 1  # plain fine-tuning does not look at the teacher
    assert (named[f"forward_kl_nats{ending}"] == pytest.approx(float(forward.detach().sum()), rel=1e-4)) is known
    assert named["student_entropy_nats"] > 0


def coarse(log_probs: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """The log-probabilities of k kept ids and of everything else."""
    outside = torch.ones_like(log_probs, dtype=torch.bool).scatter(1, kept, False)
    return torch.cat([log_probs.gather(1, kept), log_probs.where(outside, -torch.inf).logsumexp(-1)[:, None]], dim=1)


def test_without_a_share_the_divergence_alone_is_computed(student: LinearHead, log_probs: torch.Tensor) -> None:
    ids = torch.arange(5)
    batch = Batch(
        input_ids=ids, position_ids=ids, sequence_lengths=(5,), rows=ids, next_ids=ids, sample_ids=("",),
        targets=DenseTargets(log_probs=log_probs),
    )  # fmt: skip
    objective = Objective(forward_weight=0.3)
    loss_R, sums = objective.over(student, replace(batch, next_ids=ids + 1000))  # which would be out of range
    assert torch.equal(loss_R, objective(student, batch.targets).loss)
    assert len(sums) == len(objective.names(batch.targets)) == 5
