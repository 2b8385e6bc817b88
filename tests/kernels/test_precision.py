"""bfloat16 inputs: no worse than plain torch in the same precision, near the teacher above all (where peers fail)."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import kernels
from kernels import LinearHead, chunked
from tests.kernels.cases import generator, gradients, head, relative_error, trainable

WEIGHTS = {"forward": 1.0, "reverse": 0.0, "mixed": 0.5}


def plain(student: LinearHead, teacher: LinearHead, forward_weight: float) -> Tensor:
    """What one writes without this package: bfloat16 logits, then float32 log-softmax."""
    log_q = (student.hidden @ student.weight.T).float().log_softmax(1)
    log_p = (teacher.hidden @ teacher.weight.T).float().log_softmax(1).detach()
    forward = (log_p.exp() * (log_p - log_q)).sum(1)
    reverse = (log_q.exp() * (log_q - log_p)).sum(1)
    return forward_weight * forward + (1 - forward_weight) * reverse


def errors(student: LinearHead, teacher: LinearHead, forward_weight: float, backend: str) -> dict[str, float]:
    """Relative errors of loss and gradients, against float64, of one way to compute them."""

    def run(name: str) -> dict[str, Tensor]:
        copy = trainable(student)
        if name == "plain":
            loss = plain(copy, teacher, forward_weight)
        else:
            loss = kernels.mixed_kl(copy, teacher, forward_weight=forward_weight, backend=name).loss  # type: ignore[arg-type]
        loss.mean().backward()
        return {"loss": loss.detach(), **gradients(copy)}

    truth, got = run("reference"), run(backend)
    return {key: relative_error(got[key], truth[key]) for key in truth}


@pytest.mark.parametrize("forward_weight", WEIGHTS.values(), ids=WEIGHTS)
@pytest.mark.parametrize("backend", ["chunked", "native"])
@pytest.mark.parametrize("distance", [0.01, 0.03, 0.3, None], ids=["kl1e-4", "kl1e-3", "kl1e-1", "far"])
def test_no_worse_than_plain_torch(distance: float | None, backend: str, forward_weight: float) -> None:
    """Student and teacher share the head; the student's states are the teacher's, nudged (None: unrelated)."""
    teacher = head(96, 2003, 64, 1, dtype=torch.bfloat16)
    nudge = torch.randn(teacher.hidden.shape, generator=generator(5))
    hidden = nudge if distance is None else teacher.hidden.float() + distance * nudge
    student = replace(teacher, hidden=hidden.bfloat16())
    ours = errors(student, teacher, forward_weight, backend)
    theirs = errors(student, teacher, forward_weight, "plain")
    for key in ours:
        assert ours[key] <= 1.05 * theirs[key] + 1e-6, (key, ours[key], theirs[key])


@pytest.mark.parametrize("backend", ["chunked", "native"])
def test_small_divergences_keep_their_digits(backend: str) -> None:
    """KL of 1e-4 nats from bfloat16 inputs: three digits, because logits are never rounded."""
    teacher = head(64, 5003, 64, 1, dtype=torch.bfloat16)
    hidden = teacher.hidden.float() + 0.01 * torch.randn(teacher.hidden.shape, generator=generator(5))
    student = replace(teacher, hidden=hidden.bfloat16())
    truth = kernels.forward_kl(student, teacher, backend="reference")
    assert 1e-5 < truth.loss.mean().item() < 1e-2
    got = kernels.forward_kl(student, teacher, backend=backend)  # type: ignore[arg-type]
    assert relative_error(got.forward_kl, truth.forward_kl) <= 1e-3
    assert got.reverse_kl is not None
    assert truth.reverse_kl is not None
    assert relative_error(got.reverse_kl, truth.reverse_kl) <= 1e-3


@pytest.mark.parametrize("backend", ["chunked", "native"])
def test_many_tiles_are_no_worse_than_one(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The head's gradient is rounded to bfloat16 once, not once a tile; rows of a width that is no whole panel."""
    student, teacher = (head(256, 301, 38, seed, dtype=torch.bfloat16) for seed in (1, 2))
    one = errors(student, teacher, 1.0, backend)
    monkeypatch.setattr(chunked, "TILE_BYTES", 2 * 4 * 301 * 2)  # two rows a tile
    assert errors(student, teacher, 1.0, backend)["weight"] <= 1.02 * one["weight"]


@pytest.mark.parametrize("backend", ["chunked", "native"])
def test_a_column_of_outliers_costs_its_neighbours_nothing(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One dimension of the states is 512 times the others, as in real models: the others' gradients are as exact."""
    monkeypatch.setattr(chunked, "TILE_BYTES", 2 * 4 * 301 * 4)  # four rows a tile
    student, teacher = (head(64, 301, 38, seed, dtype=torch.bfloat16) for seed in (1, 2))
    loud = torch.ones(38).index_fill_(0, torch.tensor(7), 512)
    stretched = replace(student, hidden=student.hidden * loud.bfloat16(), weight=student.weight / loud.bfloat16())
    quiet = loud == 1
    found = []
    for one in (student, stretched):
        grads = []
        for name in ("reference", backend):
            copy = trainable(one)
            kernels.forward_kl(copy, teacher, backend=name).loss.mean().backward()  # type: ignore[arg-type]
            grads.append(gradients(copy)["weight"][:, quiet])
        found.append(relative_error(grads[1], grads[0]))
    assert found[1] <= 1.05 * found[0] + 1e-6


@pytest.mark.parametrize("backend", ["chunked", "native"])
def test_masked_rows(backend: str) -> None:
    """Rows that are not computed get no gradient; the others get theirs."""
    student, teacher, grads = head(9, 40, 38, 1, dtype=torch.bfloat16), head(9, 40, 38, 2, dtype=torch.bfloat16), []
    for name in ("reference", backend):
        copy = trainable(student)
        out = kernels.forward_kl(copy, teacher, backend=name, row_mask=torch.arange(9) % 4 != 1)  # type: ignore[arg-type]
        out.loss.mean().backward()
        grads.append(gradients(copy))
    assert not grads[1]["hidden"][1::4].any()
    for key, truth in grads[0].items():
        assert relative_error(grads[1][key], truth) <= 8e-3, key


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("backend", ["chunked", "native"])
def test_what_is_not_finite_stays_so(backend: str, bad: float) -> None:
    """A state that overflowed must show in the head's gradient, or a training loop cannot skip the step."""
    student, teacher = (head(5, 40, 38, seed, dtype=torch.bfloat16) for seed in (1, 2))
    student.hidden[3, 4] = bad
    copy = trainable(student)
    kernels.forward_kl(copy, teacher, backend=backend).loss.mean().backward()  # type: ignore[arg-type]
    assert not gradients(copy)["weight"].isfinite().any()


@pytest.mark.parametrize("backend", ["chunked", "native"])
def test_float32_master_weights_under_bfloat16_states(backend: str) -> None:
    """As under autocast: products in bfloat16, the head's gradient in float32."""
    student = head(33, 301, 32, 1)
    student = trainable(replace(student, hidden=student.hidden.bfloat16()))
    teacher = head(33, 301, 32, 2, dtype=torch.bfloat16)
    kernels.forward_kl(student, teacher, backend=backend).loss.mean().backward()  # type: ignore[arg-type]
    rounded = trainable(replace(student, weight=student.weight.bfloat16()))
    kernels.forward_kl(rounded, teacher, backend="reference").loss.mean().backward()
    assert student.weight.grad is not None
    assert rounded.weight.grad is not None
    assert student.weight.grad.dtype == torch.float32
    assert relative_error(student.weight.grad, rounded.weight.grad) <= 5e-3
