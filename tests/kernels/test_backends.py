"""Every backend against the float64 reference: values and gradients, at ugly sizes, for every kind of target."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import kernels
from kernels import KLOutput, LinearHead, chunked
from kernels.types import Targets
from tests.kernels.cases import (
    assert_outputs_close,
    generator,
    gradients,
    head,
    log_probs_of,
    relative_error,
    sampled,
    targets_of,
    top_k,
    trainable,
)

EXACT: dict[str, Callable[..., KLOutput]] = {
    "forward": kernels.forward_kl,
    "reverse": kernels.reverse_kl,
    "mixed": lambda *args, **options: kernels.mixed_kl(*args, forward_weight=0.3, **options),
}
COARSE: dict[str, Callable[..., KLOutput]] = {
    "forward": kernels.forward_kl_coarse,
    "reverse": kernels.reverse_kl_coarse,
    "mixed": lambda *args, **options: kernels.mixed_kl_coarse(*args, forward_weight=0.3, **options),
}
CASES = [(kind, name, EXACT[name]) for kind in ("hidden", "logits", "log_probs") for name in EXACT]
CASES += [("top_k", name, COARSE[name]) for name in COARSE] + [("sampled", "forward", kernels.forward_kl)]
IDS = [f"{kind}-{name}" for kind, name, _ in CASES]


def compare(
    loss: Callable[..., KLOutput],
    student: LinearHead,
    targets: Targets,
    backend: str,
    upstream: Tensor,
    **options: object,
) -> None:
    """Outputs within 2e-6 and gradients within 1e-5 of the reference, relative."""
    results = []
    for name in ("reference", backend):
        copy = trainable(student)
        out = loss(copy, targets, backend=name, **options)
        (out.loss * upstream.to(out.loss.dtype)).sum().backward()
        results.append((out, gradients(copy)))
    (truth, true_gradients), (got, got_gradients) = results
    assert_outputs_close(got, truth, 2e-6)
    assert got_gradients.keys() == true_gradients.keys()
    for name, value in true_gradients.items():
        assert relative_error(got_gradients[name], value) <= 1e-5, name


@pytest.mark.parametrize("backend", ["chunked", "native"])
@pytest.mark.parametrize(("kind", "name", "loss"), CASES, ids=IDS)
class TestAgainstReference:
    """Upstream gradients that differ by row everywhere, so that nothing hides behind a uniform one."""

    def test_bias_and_padding_of_different_sizes(self, kind: str, name: str, loss: Callable, backend: str) -> None:
        student, teacher = head(37, 301, 18, 1, bias=True, padding=19), head(37, 301, 26, 2, padding=3)
        compare(loss, student, targets_of(kind, teacher), backend, torch.rand(37, generator=generator()))

    def test_soft_cap_scale_and_uniform_upstream(self, kind: str, name: str, loss: Callable, backend: str) -> None:
        student = head(5, 33, 8, 3, soft_cap=4.0, scale=0.7, bias=True)
        compare(loss, student, targets_of(kind, head(5, 33, 6, 4)), backend, torch.full((5,), -0.25))

    def test_masked_rows(self, kind: str, name: str, loss: Callable, backend: str) -> None:
        mask = torch.rand(41, generator=generator(9)) > 0.4
        targets, upstream = targets_of(kind, head(41, 64, 10, 6)), torch.full((41,), 0.5)
        upstream[~mask] = torch.nan
        compare(loss, head(41, 64, 10, 5), targets, backend, upstream, row_mask=mask)

    def test_all_rows_masked(self, kind: str, name: str, loss: Callable, backend: str) -> None:
        student, mask = trainable(head(3, 7, 4, 7, bias=True)), torch.zeros(3, dtype=torch.bool)
        out = loss(student, targets_of(kind, head(3, 7, 4, 8)), backend=backend, row_mask=mask)
        out.loss.sum().backward()
        assert not out.loss.detach().any()
        assert all(not value.any() for value in gradients(student).values())

    def test_many_tiles(
        self, kind: str, name: str, loss: Callable, backend: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(chunked, "TILE_BYTES", 2 * 4 * 97 * 9)  # nine rows a tile, the last one shorter
        targets = targets_of(kind, head(29, 97, 12, 11))
        compare(loss, head(29, 97, 12, 10), targets, backend, torch.full((29,), 2.0))

    def test_token_weight_fuses_and_a_wrong_one_does_no_harm(
        self, kind: str, name: str, loss: Callable, backend: str
    ) -> None:
        weight, student = torch.rand(23, generator=generator(3)), head(23, 50, 12, 12)
        targets = targets_of(kind, head(23, 50, 12, 13))
        compare(loss, student, targets, backend, weight * 3, token_weight=weight)
        compare(loss, student, targets, backend, weight.flip(0), token_weight=weight)


@pytest.mark.parametrize("backend", ["chunked", "native"])
@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("kind", ["hidden", "logits", "log_probs"])
def test_temperature(backend: str, name: str, kind: str) -> None:
    """Both sides are divided, under the cap too, and no T^2 appears."""
    student, teacher = head(11, 40, 8, 20, soft_cap=5.0), head(11, 40, 8, 21)
    compare(EXACT[name], student, targets_of(kind, teacher), backend, torch.rand(11), temperature=1.7)


@pytest.mark.parametrize("backend", ["chunked", "native"])
def test_one_row_one_token_and_no_rows(backend: str) -> None:
    """The smallest shapes: a vocabulary of 1 has no divergence; no rows give empty outputs and zero gradients."""
    compare(kernels.mixed_kl, head(1, 1, 2, 0), head(1, 1, 2, 1), backend, torch.ones(1), forward_weight=0.5)
    student = trainable(head(0, 5, 2, 0))
    out = kernels.forward_kl(student, head(0, 5, 2, 1), backend=backend)  # type: ignore[arg-type]
    assert out.loss.shape == (0,)
    out.loss.sum().backward()
    assert student.weight.grad is not None
    assert not student.weight.grad.any()


@pytest.mark.parametrize("backend", ["chunked", "native"])
def test_frozen_parts_get_no_gradient_and_the_rest_is_unchanged(backend: str) -> None:
    """A frozen head, or frozen hidden states, change nothing for the other."""
    student, teacher = head(19, 60, 8, 1), head(19, 60, 8, 2)
    full = trainable(student)
    kernels.reverse_kl(full, teacher, backend=backend).loss.sum().backward()  # type: ignore[arg-type]
    for name in ("hidden", "weight"):
        part = replace(student, **{name: getattr(student, name).clone().requires_grad_()})
        kernels.reverse_kl(part, teacher, backend=backend).loss.sum().backward()  # type: ignore[arg-type]
        assert gradients(part).keys() == {name}
        torch.testing.assert_close(gradients(part)[name], gradients(full)[name], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("backend", ["chunked", "native"])
def test_tied_head_sums_both_uses(backend: str) -> None:
    """One parameter as embedding and head: autograd adds the two gradients."""
    ids = torch.tensor([1, 4, 4, 0])
    teacher, grads = head(4, 9, 6, 5), []
    for name in ("reference", backend):
        weight = head(4, 9, 6, 3).weight.clone().requires_grad_()
        student = LinearHead(hidden=weight[ids].tanh(), weight=weight)
        kernels.forward_kl(student, teacher, backend=name).loss.mean().backward()  # type: ignore[arg-type]
        grads.append(weight.grad)
    assert relative_error(grads[1], grads[0]) <= 1e-5


@pytest.mark.parametrize(("kind", "name", "loss"), CASES, ids=IDS)
def test_gradcheck(kind: str, name: str, loss: Callable) -> None:
    """Finite differences in float64, of the chunked backend and of the reference itself."""
    student, targets = head(4, 11, 3, 30, dtype=torch.float64, bias=True), targets_of(kind, head(4, 11, 3, 31))
    for backend in ("reference", "chunked"):

        def function(*inputs: Tensor) -> Tensor:
            parts = dict(zip(("hidden", "weight", "bias"), inputs, strict=True))
            return loss(replace(student, soft_cap=6.0, **parts), targets, backend=backend).loss  # noqa: B023

        leaves = [t.clone().requires_grad_() for t in (student.hidden, student.weight, student.bias) if t is not None]
        assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize("backend", ["chunked", "native"])
def test_backward_twice_is_the_same_twice(backend: str) -> None:
    """The sums of the first backward become its gradients; a second one computes its own."""
    student, teacher = trainable(head(7, 20, 4, 1)), head(7, 20, 4, 2)
    loss = kernels.forward_kl(student, teacher, backend=backend).loss.sum()  # type: ignore[arg-type]
    first = torch.autograd.grad(loss, student.weight, retain_graph=True)[0].clone()
    torch.testing.assert_close(torch.autograd.grad(loss, student.weight)[0], first, rtol=1e-6, atol=1e-7)


def test_a_weight_changed_before_backward_is_noticed() -> None:
    """An optimizer step between forward and backward is an error, as in plain autograd."""
    student = trainable(head(7, 20, 4, 1))
    loss = kernels.forward_kl(student, head(7, 20, 4, 2)).loss.sum()
    with torch.no_grad():
        student.weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_top_k_of_everything_is_exact_and_of_less_is_a_lower_bound() -> None:
    """With k = V the coarse divergences are the exact ones; with fewer ids they are below, in both directions."""
    student, teacher = head(16, 30, 8, 40), head(16, 30, 8, 41)
    exact = kernels.forward_kl(student, teacher)
    assert exact.reverse_kl is not None
    for k in (30, 12, 3, 1):
        coarse = kernels.forward_kl_coarse(student, top_k(log_probs_of(teacher), [k] * 16))
        assert coarse.reverse_kl is not None
        for got, bound in ((coarse.forward_kl, exact.forward_kl), (coarse.reverse_kl, exact.reverse_kl)):
            assert bool((got <= bound + 1e-5).all())
            if k == 30:
                torch.testing.assert_close(got, bound, rtol=1e-4, atol=1e-5)


def test_samples_are_unbiased_for_forward_kl() -> None:
    """The mean over many independent draws approaches the exact value: within 4 standard errors."""
    student, teacher = head(1, 12, 4, 50), head(1, 12, 4, 51)
    exact = kernels.forward_kl(student, teacher).loss.item()
    log_probs = log_probs_of(teacher)
    draws = torch.tensor([kernels.forward_kl(student, sampled(log_probs, 8, seed)).loss.item() for seed in range(400)])
    assert abs(draws.mean().item() - exact) <= 4 * draws.std().item() / 20


@pytest.mark.parametrize("backend", ["chunked", "native"])
def test_selected_log_probs_under_uneven_advantages(backend: str) -> None:
    """The policy-gradient case: per-row upstream gradients that no forward pass could have known."""
    ids, advantage = torch.tensor([3, 0, 8, 8, 1]), torch.tensor([1.0, -2.0, 0.0, 0.5, 3.0])
    grads = []
    for name in ("reference", backend):
        student = trainable(head(5, 9, 4, 60, soft_cap=3.0))
        out = kernels.selected_log_probs(student, ids, temperature=0.8, backend=name)  # type: ignore[arg-type]
        (out.log_probs * advantage.to(out.log_probs.dtype)).sum().backward()
        grads.append(gradients(student))
    for key, truth in grads[0].items():
        assert relative_error(grads[1][key], truth) <= 1e-5
