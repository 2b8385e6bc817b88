"""vLLM writes a student's text with the weights that the student has at that moment."""

from __future__ import annotations

import json
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("vllm", reason="needs the vLLM environment: make vllm")

from logitcache.console import run_command
from logitcache.errors import UserError
from logitcache.scoring import Prompt, Sampling
from tests.trainer.test_commands import SIZE, built, of_steps
from trainer.cli import app
from trainer.prune import pruned_student
from trainer.rollouts import VLLMRollouts, load_rollout_engine, student_generator
from trainer.student import load_student

PROMPTS = [Prompt(problem_id=f"p{n}", token_ids=tuple(range(5, 9 + n))) for n in range(6)]
SAMPLING = Sampling(max_new_tokens=24, seed=3)


def test_weights_are_refreshed_in_place(tiny_dir: Path) -> None:
    student, twin = (load_student(tiny_dir, vocab_size=49_152, precision="float32") for _ in range(2))
    stop_ids = frozenset({2, 700})
    noise = torch.Generator().manual_seed(1)
    seen = []
    with closing(load_rollout_engine(student, tiny_dir, sequences=2, tokens=40)) as loaded:
        engine = replace(loaded, stop_ids=stop_ids)
        for learner in (student, student, student, twin):  # one engine serves several students
            rollouts = VLLMRollouts(student=learner, engine=engine)
            written = [sequence.sample_id for sequence in rollouts.generate(PROMPTS, SAMPLING)]
            reference = student_generator(learner, stop_ids=stop_ids)
            assert written == [sequence.sample_id for sequence in reference.generate(PROMPTS, SAMPLING)]
            seen.append(written)
            with torch.no_grad():
                for parameter in learner.parameters:
                    parameter += 0.1 * torch.randn(parameter.shape, generator=noise)
    assert seen[0] != seen[1] != seen[2]
    assert seen[3] == seen[0]


@pytest.fixture(scope="module")
def cache(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built(tmp_path_factory.mktemp("cache"), tiny_dir, "hidden")


def test_a_run_by_vllm_takes_the_steps_of_one_by_transformers(
    cache: Path, tiny_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In float32 both draw the same tokens, so that a weight which was not refreshed would show in the next loss."""
    pruned_student(tiny_dir, tmp_path / "start", layers=range(1))

    def run(name: str, engine: str, steps: int) -> tuple[int, Path]:
        out = tmp_path / name
        command: list[Any] = ["distill", cache, "--student", tmp_path / "start", "--teacher", tiny_dir, "--out", out]
        command += [*SIZE[2:], "--prefix", "student", "--generator", engine, "--steps", steps]
        command += ["--curriculum", 4, 12, "--entropy-floor", "1%", "--check-every", 2]
        return run_command(app, [str(word) for word in command], after_interrupt=""), out

    (_, mine), (_, theirs) = run("transformers", "transformers", 4), run("vllm", "vllm", 4)
    assert [line["window"] for line in of_steps(theirs)] == [4, 4, 12, 12]
    assert of_steps(theirs) == of_steps(mine)
    weights = "student/model.safetensors"
    assert (theirs / weights).read_bytes() == (mine / weights).read_bytes()
    assert json.loads((theirs / "config.json").read_text())["generator"] == "vllm"
    assert run("vllm", "transformers", 4)[0] == 2
    assert 'generator: "vllm" there, "transformers" asked' in capsys.readouterr().err


def test_a_window_beyond_the_context_is_refused(tiny_dir: Path) -> None:
    student = load_student(tiny_dir, vocab_size=49_152, precision="float32")
    with pytest.raises(UserError, match=r"in vLLM: cannot be loaded .*513"):
        load_rollout_engine(student, tiny_dir, sequences=1, tokens=513)
