"""The Triton kernels without a GPU: correct under the interpreter, and compiled for sm_80 and sm_90 as they ship."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import kernels
from tests.kernels.cases import head

triton = pytest.importorskip("triton", reason="the optional extra `triton` is not installed")

MAX_REGISTERS = 128  # two programs of 256 threads then fill a multiprocessor's 65,536 registers
MAX_SHARED_BYTES = 4096  # scratch of the reductions across warps, and the 1 KiB that CUDA keeps on sm_90


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel takes, as the CUDA tools report it."""

    registers: int
    local_bytes: int
    stack_bytes: int
    shared_bytes: int


@pytest.mark.slow
def test_interpreted() -> None:
    """Runs tests/kernels/interpreted.py in a process whose Triton interprets."""
    path = Path(__file__).with_name("interpreted.py")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(path)]
    done = subprocess.run(
        command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout + done.stderr or "100%" in done.stdout


def compile_for(name: str, flags: dict[str, bool], capability: int, tmp_path: Path) -> Resources:
    """Compile one kernel as `triton_engine` launches it and read its resources from the machine code."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from kernels import triton_engine, triton_rows

    launch = triton_engine.SUMS if name.endswith("sums_kernel") else triton_engine.GRADIENT
    kernel = getattr(triton_rows, name)
    constants = {**flags, "BLOCK": launch.block}
    integers, floats = ("rows", "width"), ("forward_weight", "scale", "inverse_cap")
    signature = {
        arg: "constexpr" if arg in constants else "i32" if arg in integers else "fp32" if arg in floats else "*fp32"
        for arg in kernel.arg_names
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": launch.warps})
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(built.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    usage = subprocess.run([tool, "-res-usage", cubin], check=True, capture_output=True, text=True).stdout
    found = {key: int(value) for key, value in re.findall(r"(REG|LOCAL|STACK|SHARED):(\d+)", usage)}
    shared = max(found["SHARED"], built.metadata.shared)
    return Resources(found["REG"], found["LOCAL"], found["STACK"], shared)


CONFIGURATIONS: dict[str, dict[str, bool]] = {
    "pair_sums_kernel": {},
    "solo_sums_kernel": {},
    **{
        f"pair_gradient_kernel {direction}{' capped' * capped}": {
            "FORWARD": forward,
            "REVERSE": reverse,
            "CAPPED": capped,
        }
        for direction, forward, reverse in (("forward", True, False), ("reverse", False, True), ("mixed", True, True))
        for capped in (False, True)
    },
    **{f"solo_gradient_kernel{' capped' * capped}": {"CAPPED": capped} for capped in (False, True)},
}


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("configuration", CONFIGURATIONS)
def test_compiles_without_spills(configuration: str, capability: int, tmp_path: Path) -> None:
    """Registers for at least 16 warps a multiprocessor, nothing spilled, next to no shared memory."""
    used = compile_for(configuration.split()[0], CONFIGURATIONS[configuration], capability, tmp_path)
    assert used.local_bytes == 0
    assert used.stack_bytes == 0
    assert used.registers <= MAX_REGISTERS
    assert used.shared_bytes <= MAX_SHARED_BYTES


def test_refuses_the_cpu() -> None:
    student = head(2, 5, 4, 1)
    with pytest.raises(ValueError, match="device: got cpu, expected cuda"):
        kernels.forward_kl(student, student, backend="triton")


def test_refuses_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    student = head(2, 5, 4, 1, dtype=torch.float64)
    with pytest.raises(ValueError, match="dtype: got float64"):
        kernels.forward_kl(student, student, backend="triton")
