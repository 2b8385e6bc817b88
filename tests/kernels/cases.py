"""Random heads and targets for the kernels' tests, all from one seeded generator."""

from __future__ import annotations

from dataclasses import fields, replace

import torch
from torch import Tensor

from kernels import DenseTargets, KLOutput, LinearHead, SampledTargets, TopKTargets
from kernels.types import Targets


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def head(
    rows: int,
    vocab: int,
    width: int,
    seed: int,
    dtype: torch.dtype = torch.float32,
    bias: bool = False,
    padding: int = 0,
    **options: object,
) -> LinearHead:
    """Logits of standard deviation about 3; padding rows of the weight hold large garbage."""
    g = generator(seed)
    weight = torch.randn(vocab + padding, width, generator=g, dtype=torch.float64) * 3 / width**0.5
    weight[vocab:] = 50.0
    return LinearHead(
        hidden=torch.randn(rows, width, generator=g, dtype=torch.float64).to(dtype),
        weight=weight.to(dtype),
        bias=torch.randn(vocab + padding, generator=g, dtype=torch.float64).to(dtype) if bias else None,
        vocab_size=vocab if padding else None,
        **options,  # type: ignore[arg-type]
    )


def log_probs_of(teacher: LinearHead) -> Tensor:
    logits = teacher.hidden.double() @ teacher.weight[: teacher.width].double().T
    bias = 0 if teacher.bias is None else teacher.bias[: teacher.width].double()
    return (logits + bias).log_softmax(1)


def top_k(log_probs: Tensor, ks: list[int]) -> TopKTargets:
    """Top-k of each row, k varying by row."""
    ids, kept, tails = [], [], []
    for row, k in zip(log_probs, ks, strict=True):
        chosen = row.topk(k).indices.sort().values
        rest = torch.ones(len(row), dtype=torch.bool)
        rest[chosen] = False
        ids.append(chosen)
        kept.append(row[chosen])
        tails.append(row[rest].logsumexp(0).clamp_max(0) if rest.any() else torch.tensor(-torch.inf))
    return TopKTargets(
        ids=torch.cat(ids).int(),
        log_probs=torch.cat(kept).float().clamp_max(0),
        row_splits=torch.tensor([0, *ks]).cumsum(0),
        tail_log_mass=torch.stack(tails).float(),
        entropy=torch.special.entr(log_probs.exp()).sum(1).float(),
    )


def sampled(log_probs: Tensor, draws: int, seed: int = 0) -> SampledTargets:
    drawn = torch.multinomial(log_probs.exp(), draws, replacement=True, generator=generator(seed))
    unique = [row.unique(return_counts=True) for row in drawn]
    return SampledTargets(
        ids=torch.cat([ids for ids, _ in unique]),
        counts=torch.cat([counts for _, counts in unique]).int(),
        row_splits=torch.tensor([0, *(len(ids) for ids, _ in unique)]).cumsum(0),
        entropy=torch.special.entr(log_probs.exp()).sum(1).float(),
    )


def targets_of(kind: str, teacher: LinearHead, seed: int = 0) -> Targets:
    log_probs = log_probs_of(teacher)
    match kind:
        case "hidden":
            return teacher
        case "logits":
            return DenseTargets(logits=log_probs.to(teacher.hidden.dtype) + 2)
        case "log_probs":
            return DenseTargets(log_probs=log_probs.to(teacher.hidden.dtype))
        case "top_k":
            ks = [1 + (7 * t) % min(teacher.width, 20) for t in range(teacher.rows)]
            return top_k(log_probs, ks)
        case "sampled":
            return sampled(log_probs, 12, seed)
    raise ValueError(kind)


def trainable(h: LinearHead) -> LinearHead:
    """A copy whose tensors are leaves that require gradients."""
    leaf = lambda value: None if value is None else value.detach().clone().requires_grad_()  # noqa: E731
    return replace(h, hidden=leaf(h.hidden), weight=leaf(h.weight), bias=leaf(h.bias))


def gradients(h: LinearHead) -> dict[str, Tensor]:
    tensors = {"hidden": h.hidden, "weight": h.weight, "bias": h.bias}
    return {name: value.grad for name, value in tensors.items() if value is not None and value.grad is not None}


def relative_error(value: Tensor, truth: Tensor) -> float:
    """Norm of the difference over norm of the truth."""
    scale = float(truth.double().norm())
    return float((value.double() - truth.double()).norm()) / (scale if scale else 1.0)


def assert_outputs_close(got: KLOutput, truth: KLOutput, tolerance: float) -> None:
    for field in fields(KLOutput):
        one, other = getattr(got, field.name), getattr(truth, field.name)
        assert (one is None) == (other is None), field.name
        if one is not None:
            assert relative_error(one.detach(), other.detach()) <= tolerance, field.name
