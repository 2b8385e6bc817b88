"""vLLM writes a student's text with the weights that the student has at that moment."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("vllm", reason="needs the vLLM environment: make vllm")

from logitcache.scoring import Prompt, Sampling
from trainer.rollouts import VLLMRollouts, student_generator
from trainer.student import load_student

PROMPTS = [Prompt(problem_id=f"p{n}", token_ids=tuple(range(5, 9 + n))) for n in range(6)]
SAMPLING = Sampling(max_new_tokens=24, seed=3)


def test_weights_are_refreshed_in_place(tiny_dir: Path) -> None:
    student = load_student(tiny_dir, vocab_size=49_152, precision="float32")
    stop_ids = frozenset({2, 700})
    reference = student_generator(student, stop_ids=stop_ids)
    rollouts = VLLMRollouts.load(student, tiny_dir, stop_ids=stop_ids)
    noise = torch.Generator().manual_seed(1)
    seen = []
    try:
        for _ in range(3):
            written = [sequence.sample_id for sequence in rollouts.generate(PROMPTS, SAMPLING)]
            assert written == [sequence.sample_id for sequence in reference.generate(PROMPTS, SAMPLING)]
            seen.append(written)
            with torch.no_grad():
                for parameter in student.parameters:
                    parameter += 0.1 * torch.randn(parameter.shape, generator=noise)
    finally:
        rollouts.close()
    assert seen[0] != seen[1] != seen[2]
