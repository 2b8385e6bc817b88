"""The number that says whether an engine's scores are harmless: zero for the reference, small for its rounding."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from logitcache.codecs.quantize import as_float32
from logitcache.errors import UserError
from logitcache.problems import Problem
from logitcache.prompts import PromptStyle, render_prompts
from logitcache.records import HiddenStateTargets
from logitcache.scorers import compare
from logitcache.scorers.compare import compare_with_reference
from logitcache.scorers.hf import load_engine, load_tokenizer
from logitcache.scoring import HiddenStateRequest, Sampling


def compared(directory: Path, dtype: str) -> dict[str, list[float]]:
    engine = load_engine(directory, dtype=dtype)
    problems = [Problem(id=f"p{n}", text=f"add {n}", answer="") for n in range(3)]
    prompts = render_prompts(load_tokenizer(directory), problems, PromptStyle(instruction=""))
    sequences = engine.generate(prompts, Sampling(max_new_tokens=6, seed=1))
    states = []
    for (targets,) in engine.score(sequences, [HiddenStateRequest()]):
        assert isinstance(targets, HiddenStateTargets)
        states.append(as_float32(targets.hidden))
    return compare_with_reference(directory, sequences, states, engine.head)


def test_the_reference_is_itself_and_bfloat16_is_near_it(tiny_dir: Path) -> None:
    itself, rounded = compared(tiny_dir, "float32"), compared(tiny_dir, "bfloat16")
    for direction in ("forward", "reverse"):
        assert len(itself[direction]) == len(rounded[direction]) == 18
        assert max(itself[direction]) < 1e-8
        assert 1e-6 < np.mean(rounded[direction]) < 0.05
    assert rounded["forward"] != rounded["reverse"]


def test_too_little_memory_is_said_before_the_model_is_loaded(
    tiny_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 9000 kB\nMemAvailable:    1000 kB\n")
    monkeypatch.setattr(compare, "_AVAILABLE", meminfo)
    with pytest.raises(UserError, match=r"0\.0 GB of memory are free, it takes about .*--no-compare-engines"):
        compared(tiny_dir, "float32")
