"""GRPO whose answers vLLM writes takes the steps of one whose answers transformers writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="needs the vLLM environment: make vllm")

from logitcache.problems import Problem
from logitcache.prompts import PromptStyle
from logitcache.scoring import Sampling
from trainer.policy.settings import PolicyTraining, Surrogate
from trainer.recipes.grpo import run_grpo


def vowels(_: Problem, text: str) -> float:
    return sum(letter in "aeiou" for letter in text) / max(len(text), 1)


def test_both_engines_take_the_same_steps(tiny_dir: Path, tmp_path: Path) -> None:
    """In float32 both draw the same tokens, so that a weight which was not refreshed would show in the next reward."""
    problems = tmp_path / "problems.jsonl"
    rows = [{"id": f"p{n}", "problem": f"What is {n} + {n}?", "answer": str(2 * n)} for n in range(4)]
    problems.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def run(engine: Any) -> list[dict[str, Any]]:
        run_grpo(
            model_dir=tiny_dir,
            problems=str(problems),
            out=tmp_path / engine,
            training=PolicyTraining(
                steps=3, prompts=2, group=3, learning_rate=1e-3, warmup_steps=0, precision="float32"
            ),
            surrogate=Surrogate(),
            sampling=Sampling(max_new_tokens=8, top_p=1.0, top_k=None),
            style=PromptStyle(instruction=""),
            reward=vowels,
            generator=engine,
        )
        lines = [json.loads(line) for line in (tmp_path / engine / "metrics.jsonl").read_text().splitlines()]
        return [{name: value for name, value in line.items() if name not in ("draw_s", "step_s")} for line in lines]

    assert run("vllm") == run("transformers")
