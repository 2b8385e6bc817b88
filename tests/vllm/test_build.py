"""A cache built by vLLM from its command line: the same bytes twice, and no mixing with another engine's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="needs the vLLM environment: make vllm")

from logitcache.cli import cache_summary


def build(problems: Path, out: Path, teacher: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "logitcache.cli", "build", "--problems", str(problems), "--out", str(out)]
    command += ["--teacher", str(teacher), "--max-new-tokens", "12", "--problems-per-unit", "2", "--json", *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def files(cache: Path) -> dict[str, bytes]:
    return {str(file.relative_to(cache)): file.read_bytes() for file in cache.rglob("*") if file.is_file()}


def test_two_builds_are_one_and_another_engine_is_refused(tiny_dir: Path, tmp_path: Path) -> None:
    problems = tmp_path / "p.jsonl"
    problems.write_text("\n".join(json.dumps({"problem": f"add {n} and {n}"}) for n in range(4)))
    vllm = ("--generator", "vllm", "--scorer", "vllm")
    first, second = tmp_path / "first", tmp_path / "second"
    for out in (first, second):
        done = build(problems, out, tiny_dir, *vllm)
        assert done.returncode == 0, done.stderr
        told = json.loads(done.stdout)  # vLLM's own words go elsewhere
        assert told["sealed"]
        assert told["teacher"]["engine"]["name"] == "vllm"
        assert told["completion_tokens"] == 48
        for tier in told["targets"].values():  # 2 problems of 12 tokens in the first unit
            forward, reverse = (tier["engine_kl_nats"][direction] for direction in ("forward", "reverse"))
            assert forward["samples"] == reverse["samples"] == 24
            assert 0 < forward["mean"] <= forward["p99"] < 0.1
    assert "KL(transformers in float32, the scoring engine): " in cache_summary(told)
    assert files(first) == files(second)
    unmeasured = json.loads(build(problems, tmp_path / "third", tiny_dir, *vllm, "--no-compare-engines").stdout)
    assert [tier["engine_kl_nats"] for tier in unmeasured["targets"].values()] == [None, None]
    mixed = build(problems, first, tiny_dir)
    assert mixed.returncode == 2
    assert "error:" in mixed.stderr
