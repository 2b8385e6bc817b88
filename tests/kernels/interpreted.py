"""The Triton kernels under Triton's interpreter, against float64: run by `test_triton.py` in a process of its own.

TRITON_INTERPRET=1 must be set before Triton is first imported, and would change every other test of the process.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

import kernels
from kernels import KLOutput
from tests.kernels.cases import gradients, head, relative_error, targets_of, trainable

assert os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # 0 * inf, chosen away

SHAPES = {"smaller than a block": (3, 5, 4), "one block and a bit": (5, 2049, 8), "three blocks": (2, 4097, 6)}
LOSSES: dict[str, Callable[..., KLOutput]] = {
    "forward hidden": kernels.forward_kl,
    "reverse hidden": kernels.reverse_kl,
    "mixed hidden": lambda *args, **options: kernels.mixed_kl(*args, forward_weight=0.3, **options),
    "mixed logits": lambda *args, **options: kernels.mixed_kl(*args, forward_weight=0.7, temperature=2.0, **options),
    "forward sampled": kernels.forward_kl,
    "forward top_k": kernels.forward_kl_coarse,
    "reverse top_k": kernels.reverse_kl_coarse,
    "mixed top_k": lambda *args, **options: kernels.mixed_kl_coarse(*args, forward_weight=0.3, **options),
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_equals_reference(name: str, dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    """Values, entropies and gradients, with bias, padding, cap, a mask and an uneven upstream gradient."""
    rows, vocab, width = shape
    student = head(rows, vocab, width, 1, dtype=dtype, bias=True, padding=7, soft_cap=9.0, scale=0.8)
    targets = targets_of(name.split()[1], head(rows, vocab, width, 2, dtype=dtype, padding=3))
    mask, upstream = torch.arange(rows) != 1, torch.linspace(0.5, 2, rows)
    outs, grads = [], []
    for backend in ("reference", "triton"):
        copy = trainable(student)
        outs.append(LOSSES[name](copy, targets, backend=backend, row_mask=mask))
        (outs[-1].loss * upstream.to(outs[-1].loss.dtype)).sum().backward()
        grads.append(gradients(copy))
    for field in ("loss", "forward_kl", "reverse_kl", "student_entropy", "teacher_entropy"):
        truth, got = (getattr(out, field) for out in outs)
        if truth is not None:  # draws have no reverse KL
            assert relative_error(got.detach(), truth.detach()) <= 5e-6, field
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}[dtype]  # the gradient's own rounding
    for key, value in grads[0].items():
        assert relative_error(grads[1][key], value) <= tolerance, key


def test_impossible_tokens() -> None:
    """-inf on both sides, and on one: no NaN where the divergence is finite."""
    bias = torch.zeros(9)
    bias[2], bias[5] = -torch.inf, -torch.inf
    student, teacher = trainable(replace(head(4, 9, 4, 1), bias=bias)), replace(head(4, 9, 4, 2), bias=bias.clone())
    out = kernels.mixed_kl(student, teacher, forward_weight=0.5, backend="triton")
    truth = kernels.mixed_kl(student, teacher, forward_weight=0.5, backend="reference")
    assert relative_error(out.loss.detach(), truth.loss.detach()) <= 2e-6
    out.loss.sum().backward()
    assert all(bool(value.isfinite().all()) for value in gradients(student).values())


def test_many_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nine rows a tile, the last one shorter."""
    monkeypatch.setattr("kernels.chunked.TILE_BYTES", 2 * 4 * 97 * 9)
    targets, grads = head(29, 97, 12, 11), []
    for backend in ("reference", "triton"):
        student = trainable(head(29, 97, 12, 10))
        kernels.reverse_kl(student, targets, backend=backend).loss.mean().backward()
        grads.append(gradients(student))
    assert all(relative_error(grads[1][key], value) <= 1e-5 for key, value in grads[0].items())


def test_selected_log_probs() -> None:
    """Of the tokens that were drawn, and their gradient."""
    student, ids, found = head(5, 2049, 8, 1), torch.tensor([0, 2048, 7, 7, 1000]), []
    for backend in ("reference", "triton"):
        copy = trainable(student)
        out = kernels.selected_log_probs(copy, ids, backend=backend)
        out.log_probs.sum().backward()
        found.append((out.log_probs.detach(), gradients(copy)))
    assert relative_error(found[1][0], found[0][0]) <= 5e-6
    assert all(relative_error(found[1][1][key], value) <= 1e-5 for key, value in found[0][1].items())


def test_the_same_bits_every_time() -> None:
    """No atomics: the head's gradient does not depend on scheduling."""
    grads = []
    for _ in range(2):
        student = trainable(head(6, 300, 8, 1))
        kernels.forward_kl(student, head(6, 300, 8, 2), backend="triton").loss.mean().backward()
        grads.append(student.weight.grad)
    assert torch.equal(*grads)  # type: ignore[arg-type]
