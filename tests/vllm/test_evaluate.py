"""An evaluation over vLLM keeps what one over transformers keeps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="needs the vLLM environment: make vllm")
pytest.importorskip("math_verify", reason="needs math-verify: pip install math-verify")

from logitcache.prompts import PromptStyle
from logitcache.scoring import Sampling
from trainer.recipes.evaluate import run_evaluate


def test_both_engines_write_and_measure_alike(tiny_dir: Path, tmp_path: Path) -> None:
    problems = tmp_path / "sums.jsonl"
    rows = [{"id": f"p{n}", "problem": f"What is {n} + {n}?", "answer": str(2 * n)} for n in range(5)]
    problems.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = {}
    for engine in ("transformers", "vllm"):
        result = run_evaluate(
            model=str(tiny_dir),
            problems=str(problems),
            out=tmp_path / engine,
            sampling=Sampling(max_new_tokens=12, samples_per_problem=2, seed=3),
            style=PromptStyle(instruction=""),
            generator=engine,
            dtype="float32",
            chunk=6,
        )
        lines = (tmp_path / engine / "samples.jsonl").read_text().splitlines()
        found[engine] = result, [json.loads(line)["text"] for line in lines]
    (mine, my_texts), (theirs, their_texts) = found["transformers"], found["vllm"]
    assert my_texts == their_texts
    assert mine["scores"] == theirs["scores"]
    assert theirs["entropy_nats"] == pytest.approx(mine["entropy_nats"], rel=1e-4)
    assert theirs["eos_mass"] == pytest.approx(mine["eos_mass"], rel=1e-3)
