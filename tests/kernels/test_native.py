"""The compiled engine with the vectors of other processors, as far as this one can run them."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import kernels
from kernels.native import build
from kernels.native.engine import NativeEngine
from tests.kernels.cases import gradients, head, relative_error, trainable

LANES = {"-march=haswell": 8, "-march=x86-64": 4}  # AVX2; and four floats a vector, the tile that NEON takes


@pytest.fixture(params=LANES, ids=["avx2", "four lanes"])
def lanes(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """The engine rebuilt for fewer lanes; how many."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(build, "FLAGS", (*build.FLAGS, request.param))
    build.library.cache_clear()
    yield LANES[request.param]
    build.library.cache_clear()


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64", reason="compiles for x86-64")
def test_narrower_vectors(lanes: int) -> None:
    """Values and gradients of a mixed loss against float64, at sizes that are no multiple of a tile."""
    assert NativeEngine.load().panel == 2 * lanes
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 8e-3)):  # the gradient's own rounding
        for cap in (None, 4.0):
            student = head(37, 301, 38, 1, dtype=dtype, bias=True, padding=19, soft_cap=cap)
            teacher, losses, grads = head(37, 301, 26, 2, dtype=dtype, padding=3), [], []
            for backend in ("reference", "native"):
                copy = trainable(student)
                out = kernels.mixed_kl(copy, teacher, forward_weight=0.3, backend=backend)  # type: ignore[arg-type]
                out.loss.sum().backward()
                losses.append(out.loss.detach())
                grads.append(gradients(copy))
            assert relative_error(losses[1], losses[0]) <= 2e-6
            for key, truth in grads[0].items():
                assert relative_error(grads[1][key], truth) <= tolerance, (dtype, cap, key)
