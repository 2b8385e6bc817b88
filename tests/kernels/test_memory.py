"""Peak memory: a bounded tile beyond the gradients, flat in the number of rows. Measured, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

SCRIPT = """
import sys, torch, kernels
from kernels import chunked
from tools.bench.kernels_memory import peak_extra_bytes
from tests.kernels.cases import head, targets_of, log_probs_of, top_k

backend, kind, vocab, width, tile = sys.argv[1], sys.argv[2], 10_007, 32, 4 << 20
chunked.TILE_BYTES = tile
teacher = head(1, vocab, width, 2)
for rows in (64, 1024, 8192):
    student = head(rows, vocab, width, 1, bias=kind == "capped", soft_cap=9.0 if kind == "capped" else None)
    student.hidden.requires_grad_()
    if kind != "frozen":
        student.weight.requires_grad_()
    if kind != "top_k":
        loss, targets = kernels.reverse_kl, head(rows, vocab, width, 2)
    else:
        one = top_k(log_probs_of(teacher), [8])
        loss = kernels.forward_kl_coarse
        targets = kernels.TopKTargets(
            ids=one.ids.repeat(rows), log_probs=one.log_probs.repeat(rows), entropy=one.entropy.repeat(rows),
            row_splits=torch.arange(rows + 1) * 8, tail_log_mass=one.tail_log_mass.repeat(rows))
    def step():
        loss(student, targets, backend=backend).loss.sum().backward()
        return student.hidden.grad, student.weight.grad
    if rows > 64:
        gradients = student.hidden.nbytes + (0 if kind == "frozen" else student.weight.nbytes)
        student.hidden.grad = student.weight.grad = None
        print((peak_extra_bytes(step) - gradients) / 2**20)
    else:
        step()
"""


@pytest.mark.parametrize("kind", ["hidden", "capped", "frozen", "top_k"])
@pytest.mark.parametrize("backend", ["chunked", "native"])
def test_peak_is_a_tile_and_flat_in_rows(backend: str, kind: str) -> None:
    """4 MiB of tiles; 8,192 rows of dense float32 logits would be 313 MiB a side."""
    command = [sys.executable, "-c", SCRIPT, backend, kind]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}  # what is freed goes back: nothing hides in a heap
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    few, many = map(float, done.stdout.split())
    assert many <= 24, "MiB beyond the gradients: tiles, a few numbers a row, a library's workspace"
    assert many - few <= 4, "MiB more for eight times the rows: hidden-sized buffers only"


UNEVEN = """
import sys, torch, kernels
from kernels import chunked
from tools.bench.kernels_memory import peak_extra_bytes
from tests.kernels.cases import head

chunked.TILE_BYTES = 4 << 20
student, targets = head(64, 50_003, 256, 1), head(64, 50_003, 32, 2)
student.hidden.requires_grad_(), student.weight.requires_grad_()
def step():
    loss = kernels.reverse_kl(student, targets, backend=sys.argv[1]).loss
    (loss * torch.linspace(-1, 2, 64)).sum().backward()
    return student.weight.grad
step()
student.hidden.grad = student.weight.grad = None
print(peak_extra_bytes(step) / student.weight.nbytes)
"""


@pytest.mark.parametrize("backend", ["chunked", "native"])
def test_an_uneven_upstream_gradient_does_not_hold_the_heads_gradient_twice(backend: str) -> None:
    """It is summed again in backward, for weights that only backward knows."""
    command = [sys.executable, "-c", UNEVEN, backend]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert float(done.stdout) < 1.8


UNASKED = """
import torch, kernels
from kernels import chunked
from tools.bench.kernels_memory import peak_extra_bytes
from tests.kernels.cases import head

chunked.TILE_BYTES = 4 << 20
student, targets = head(64, 100_003, 128, 1), head(64, 100_003, 128, 2)
student.hidden.requires_grad_(), student.weight.requires_grad_()
def measure():
    with torch.no_grad():
        return kernels.forward_kl(student, targets, backend="native").loss
measure()
print(peak_extra_bytes(measure) / student.weight.nbytes)
"""


def test_without_autograd_no_gradient_is_held() -> None:
    """Evaluating a student whose weights ask for a gradient: their own size would be the half of what is measured."""
    done = subprocess.run([sys.executable, "-c", UNASKED], check=True, capture_output=True, text=True)
    assert float(done.stdout) < 0.5
