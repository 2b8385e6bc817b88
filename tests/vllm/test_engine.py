"""What only vLLM does: continuous batches, chunks, preemption, and both abilities in one pass."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("vllm", reason="needs the vLLM environment: make vllm")

from logitcache.errors import UserError
from logitcache.problems import Problem
from logitcache.prompts import PromptStyle, render_prompts
from logitcache.records import HiddenStateTargets
from logitcache.scorers.hf import HFEngine, load_engine, load_tokenizer
from logitcache.scorers.vllm_engine import VLLMEngine
from logitcache.scorers.vllm_load import load_vllm_engine
from logitcache.scoring import HiddenStateRequest, Prompt, Sampling, TopKRequest

SAMPLING = Sampling(max_new_tokens=100, samples_per_problem=3, seed=5)
TOKEN_BYTES = 2 * 2 * 32 * 4
"""Keys and values of one token: 2 layers, 1 head of 32, float32."""


@pytest.fixture(scope="module")
def prompts(tiny_dir: Path) -> list[Prompt]:
    problems = [Problem(id=f"p{n}", text="add " + "1 + " * n, answer="") for n in (20, 1, 9)]
    return render_prompts(load_tokenizer(tiny_dir), problems, PromptStyle(instruction=""))


@pytest.fixture(scope="module")
def reference(tiny_dir: Path) -> HFEngine:
    return load_engine(tiny_dir, dtype="float32")


@pytest.fixture(scope="module", params=["roomy", "cramped"])
def engine(tiny_dir: Path, request: pytest.FixtureRequest) -> Iterator[VLLMEngine]:
    """With all the room it wants, or with chunks of 32 tokens and room for four of nine sequences."""
    cramped = {"batch_tokens": 32, "batch_size": 9, "kv_cache_bytes": 768 * TOKEN_BYTES}
    options = cramped if request.param == "cramped" else {}
    engine = load_vllm_engine(tiny_dir, dtype="float32", **options)
    yield engine
    engine.close()


def states(targets: tuple[object, ...]) -> np.ndarray:
    (found,) = targets
    assert isinstance(found, HiddenStateTargets)
    return found.hidden


def test_tokens_and_head_are_those_of_the_reference_engine(
    engine: VLLMEngine, reference: HFEngine, prompts: list[Prompt]
) -> None:
    assert engine.head.fingerprint == reference.head.fingerprint
    assert engine.stop_ids == reference.stop_ids
    assert engine.tokenizer_fingerprint == reference.tokenizer_fingerprint
    ours, theirs = engine.generate(prompts, SAMPLING), reference.generate(prompts, SAMPLING)
    assert [(r.sample_id, r.seed, r.finish_reason) for r in ours] == [
        (r.sample_id, r.seed, r.finish_reason) for r in theirs
    ]


def test_one_pass_keeps_the_states_that_a_second_pass_computes(engine: VLLMEngine, prompts: list[Prompt]) -> None:
    both = engine.generate_scored(prompts, SAMPLING, [HiddenStateRequest()])
    sequences = [sequence for sequence, _ in both]
    assert [s.sample_id for s in sequences] == [s.sample_id for s in engine.generate(prompts, SAMPLING)]
    again = engine.score(sequences, [HiddenStateRequest()])
    for (sequence, once), twice in zip(both, again, strict=True):
        assert states(once).shape == (sequence.completion_tokens, 64)
        assert np.abs(states(once) - states(twice)).max() < 1e-4


def test_preemption_really_happened(engine: VLLMEngine, prompts: list[Prompt], request: pytest.FixtureRequest) -> None:
    """Otherwise the cramped engine proves nothing."""
    scheduler = engine.engine.engine_core.engine_core.scheduler
    preempted: list[str] = []
    preempt = scheduler._preempt_request

    def watched(victim: object, *rest: object, **named: object) -> None:
        preempted.append(str(victim))
        preempt(victim, *rest, **named)

    scheduler._preempt_request = watched
    try:
        engine.generate(prompts, SAMPLING)
    finally:
        del scheduler._preempt_request
    assert bool(preempted) == (request.node.callspec.params["engine"] == "cramped")


def test_a_context_filled_to_the_brim_is_scored(engine: VLLMEngine, prompts: list[Prompt]) -> None:
    room = 512 - len(prompts[1].token_ids)
    (sequence,) = engine.generate(prompts[1:2], Sampling(max_new_tokens=room, seed=1))
    assert len(sequence) == 512
    ((targets,),) = engine.score([sequence], [TopKRequest(max_k=3)])
    assert len(targets) == room
    with pytest.raises(UserError, match="513 tokens for problem p1: the model's context holds 512"):
        engine.generate(prompts[1:2], Sampling(max_new_tokens=room + 1))


@pytest.fixture(scope="module")
def poisoned_dir(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny teacher with one embedding row, and so one row of its head, that is not a number."""
    from transformers import AutoModelForCausalLM

    directory = tmp_path_factory.mktemp("poisoned")
    model = AutoModelForCausalLM.from_pretrained(tiny_dir, dtype=torch.float32)
    with torch.no_grad():
        model.get_output_embeddings().weight[40_000] = torch.nan
    model.save_pretrained(directory)
    load_tokenizer(tiny_dir).save_pretrained(directory)
    return directory


def test_non_finite_logits_are_an_error(poisoned_dir: Path, reference: HFEngine, prompts: list[Prompt]) -> None:
    engine = load_vllm_engine(poisoned_dir, dtype="float32")
    try:
        rollouts = reference.generate(prompts[:1], Sampling(max_new_tokens=4))
        with pytest.raises(UserError, match=r"problem p20.*not finite at completion row 0"):
            engine.score(rollouts, [TopKRequest()])
        with pytest.raises(UserError, match=r"problem p20.*not finite at completion row 0"):
            engine.generate(prompts[:1], SAMPLING)
    finally:
        engine.close()


def test_a_step_without_memory_is_one_line_and_leaves_nothing_behind(
    engine: VLLMEngine, prompts: list[Prompt], monkeypatch: pytest.MonkeyPatch
) -> None:
    sampling = Sampling(max_new_tokens=2)
    with monkeypatch.context() as patched:
        patched.setattr(engine.engine, "step", lambda: torch.empty(1 << 60))
        with pytest.raises(
            UserError, match=r"a step of the vLLM engine: it failed \(.*memory.*check the memory it needs"
        ):
            engine.generate(prompts, sampling)
    assert len(engine.generate(prompts, sampling)) == 3


def test_what_cannot_be_loaded_is_said(tiny_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="a dtype, bfloat16 or float32: got int3"):
        load_vllm_engine(tiny_dir, dtype="int3")
    with pytest.raises(UserError, match=r"in vLLM: cannot be loaded .*memory"):
        load_vllm_engine(tiny_dir, dtype="float32", kv_cache_bytes=128 * TOKEN_BYTES)
    huge = json.loads((tiny_dir / "config.json").read_text()) | {"intermediate_size": 1 << 40}
    load_tokenizer(tiny_dir).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(huge))
    with pytest.raises(UserError, match=r"cannot be loaded .*allocate memory.*check the model and the memory it needs"):
        load_vllm_engine(tmp_path, dtype="float32")
    (tmp_path / "config.json").write_text('{"model_type": "nobody-made-this"}')
    with pytest.raises(UserError, match="in vLLM: cannot be loaded"):
        load_vllm_engine(tmp_path)
