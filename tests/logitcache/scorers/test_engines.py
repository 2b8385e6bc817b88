"""One suite for every engine: order, alignment, stop rules, agreement with a float32 reference."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from logitcache.errors import UserError
from logitcache.problems import Problem
from logitcache.prompts import PromptStyle, render_prompts
from logitcache.records import (
    FinishReason,
    FullVocabTargets,
    HiddenStateTargets,
    SampledTargets,
    TokenSequence,
    TopKTargets,
)
from logitcache.scorers.drawing import draw
from logitcache.scorers.hf import HFEngine, load_engine, load_tokenizer
from logitcache.scorers.vllm_engine import VLLMEngine
from logitcache.scoring import FullVocabRequest, HiddenStateRequest, Prompt, SampledRequest, Sampling, TopKRequest

VOCAB = 49_152
SAMPLING = Sampling(max_new_tokens=12, samples_per_problem=2, seed=3)


Engine = HFEngine | VLLMEngine


@dataclass(frozen=True, kw_only=True)
class Kind:
    """An engine by name, in one precision."""

    name: str
    dtype: str

    def load(self, directory: Path) -> Engine:
        """Small batches and tiles, so that every test crosses their borders."""
        if self.name == "transformers":
            return load_engine(directory, dtype=self.dtype, batch_size=4, batch_tokens=64, tile_rows=5)
        pytest.importorskip("vllm", reason="needs the vLLM environment: make vllm")
        from logitcache.scorers.vllm_load import load_vllm_engine

        return load_vllm_engine(directory, dtype=self.dtype, batch_size=4, batch_tokens=64, tile_rows=5)


KINDS = [Kind(name=name, dtype=dtype) for name in ("transformers", "vllm") for dtype in ("float32", "bfloat16")]


@pytest.fixture(scope="module", params=KINDS, ids=lambda kind: f"{kind.name}-{kind.dtype}")
def kind(request: pytest.FixtureRequest) -> Kind:
    found: Kind = request.param
    return found


@pytest.fixture(scope="module")
def engine(tiny_dir: Path, kind: Kind) -> Iterator[Engine]:
    engine = kind.load(tiny_dir)
    yield engine
    if not isinstance(engine, HFEngine):
        engine.close()  # one at a time in a process


exactly = pytest.mark.parametrize(
    "kind", [kind for kind in KINDS if kind.dtype == "float32"], indirect=True, ids=lambda kind: kind.name
)
"""For what only holds where rounding does not decide."""


@pytest.fixture(scope="module")
def prompts(tiny_dir: Path) -> list[Prompt]:
    problems = [Problem(id=f"p{n}", text="add " + "1 + " * n, answer="") for n in (7, 1, 4)]
    return render_prompts(load_tokenizer(tiny_dir), problems, PromptStyle(instruction=""))


@pytest.fixture(scope="module")
def rollouts(engine: Engine, prompts: list[Prompt]) -> list[TokenSequence]:
    return engine.generate(prompts, SAMPLING)


def reference_log_probs(directory: Path, sequence: TokenSequence) -> np.ndarray:
    """float64 [C, V]: what the whole model says of each completion token, by the plainest route."""
    model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    with torch.no_grad():
        logits = model(torch.from_numpy(sequence.token_ids.astype(np.int64))[None]).logits[0, :, :VOCAB]
    rows = np.flatnonzero(sequence.loss_mask)
    return torch.log_softmax(logits.double(), dim=-1).numpy()[rows]


def test_rollouts_keep_the_order_of_prompts_and_samples(rollouts: list[TokenSequence], prompts: list[Prompt]) -> None:
    assert [r.problem_id for r in rollouts] == [p.problem_id for p in prompts for _ in range(2)]
    for rollout, prompt in zip(rollouts, [p for p in prompts for _ in range(2)], strict=True):
        assert tuple(rollout.token_ids[: rollout.prompt_tokens]) == prompt.token_ids
    assert len({r.seed for r in rollouts}) == len(rollouts)


@exactly
def test_a_rollout_does_not_depend_on_its_neighbours(engine: Engine, prompts: list[Prompt]) -> None:
    together = engine.generate(prompts, SAMPLING)
    alone = [rollout for prompt in prompts for rollout in engine.generate([prompt], SAMPLING)]
    assert [r.sample_id for r in together] == [r.sample_id for r in alone]
    other = engine.generate(prompts, Sampling(max_new_tokens=12, samples_per_problem=2, seed=4))
    assert [r.sample_id for r in together] != [r.sample_id for r in other]


@exactly
def test_a_stop_token_ends_a_completion_and_belongs_to_it(engine: Engine, prompts: list[Prompt]) -> None:
    free = engine.generate(prompts, SAMPLING)
    stop = int(free[0].completion_ids[3])
    stopping = replace(engine, stop_ids=frozenset({stop}))
    for before, after in zip(free, stopping.generate(prompts, SAMPLING), strict=True):
        hits = np.flatnonzero(before.completion_ids == stop)
        if len(hits):
            assert after.finish_reason is FinishReason.STOP
            assert after.completion_ids.tolist() == before.completion_ids[: hits[0] + 1].tolist()
        else:
            assert after.finish_reason is FinishReason.LENGTH
            assert after.completion_tokens == SAMPLING.max_new_tokens


@exactly
def test_greedy_generation_takes_the_likeliest_token(engine: Engine, tiny_dir: Path, prompts: list[Prompt]) -> None:
    (rollout,) = engine.generate(prompts[:1], Sampling(max_new_tokens=5, temperature=0.0))
    assert reference_log_probs(tiny_dir, rollout).argmax(axis=-1).tolist() == rollout.completion_ids.tolist()


def test_targets_agree_with_the_reference(
    engine: Engine, tiny_dir: Path, rollouts: list[TokenSequence], kind: Kind
) -> None:
    want = [TopKRequest(max_k=9), HiddenStateRequest(), FullVocabRequest(), SampledRequest(samples=50)]
    for sequence, targets in zip(rollouts, engine.score(rollouts, want), strict=True):
        topk, hidden, full, sampled = targets
        assert isinstance(topk, TopKTargets)
        assert isinstance(hidden, HiddenStateTargets)
        assert isinstance(full, FullVocabTargets)
        assert isinstance(sampled, SampledTargets)
        truth = reference_log_probs(tiny_dir, sequence)
        if kind.dtype == "float32":
            # Some ulps of log-probabilities down to -30: the engine sums batches of other lengths in another order.
            assert np.abs(full.log_probs - truth).max() < 5e-5
        else:  # rounding every activation moves single logits by tenths; the distribution as a whole hardly moves
            assert (np.exp(truth) * (truth - full.log_probs)).sum(axis=-1).mean() < 0.02
        rows = np.arange(len(truth))
        assert np.array_equal(topk.token_log_prob, full.log_probs[rows, sequence.completion_ids])
        assert np.array_equal(topk.log_probs, full.log_probs[np.repeat(rows, 9), topk.ids])
        entropy = -(np.exp(full.log_probs) * full.log_probs.astype(np.float64)).sum(axis=-1)
        assert np.abs(topk.entropy - entropy).max() < 1e-4
        assert hidden.hidden.dtype == (np.float32 if kind.dtype == "float32" else np.uint16)
        assert hidden.head_fingerprint == engine.head.fingerprint
        assert np.add.reduceat(sampled.counts, sampled.row_splits[:-1]).tolist() == [50] * len(truth)


def test_kept_mass_and_tail_make_one(engine: Engine, rollouts: list[TokenSequence]) -> None:
    requests = [TopKRequest(max_k=9), TopKRequest(max_k=500, min_probability=1e-4), TopKRequest(max_k=9000, mass=0.5)]
    for targets in engine.score(rollouts, requests):
        for topk in targets:
            assert isinstance(topk, TopKTargets)
            kept = np.add.reduceat(np.exp(topk.log_probs.astype(np.float64)), topk.row_splits[:-1])
            assert np.abs(kept + np.exp(topk.tail_log_mass.astype(np.float64)) - 1).max() < 1e-5
            ascending = np.diff(topk.ids) > 0
            ascending[topk.row_splits[1:-1] - 1] = True
            assert ascending.all()
        fixed, threshold, nucleus = targets
        assert set(np.diff(fixed.row_splits)) == {9}
        assert np.exp(threshold.log_probs).min() >= 1e-4 or np.diff(threshold.row_splits).min() == 1
        assert np.exp(nucleus.tail_log_mass).max() <= 0.5 + 1e-6


def test_scoring_twice_gives_the_same_bytes(engine: Engine, rollouts: list[TokenSequence]) -> None:
    want = [TopKRequest(max_k=9), HiddenStateRequest(), SampledRequest(samples=20)]
    for once, twice in zip(engine.score(rollouts, want), engine.score(rollouts, want), strict=True):
        for a, b in zip(once, twice, strict=True):
            assert all(np.array_equal(x, vars(b)[name]) for name, x in vars(a).items())


def test_a_prompt_without_completion_has_targets_of_zero_rows(engine: Engine, rollouts: list[TokenSequence]) -> None:
    first = rollouts[0]
    bare = TokenSequence(
        token_ids=first.token_ids[: first.prompt_tokens],
        prompt_tokens=first.prompt_tokens,
        origin=first.origin,
        sample_id=first.sample_id,
        problem_id=first.problem_id,
        finish_reason=FinishReason.GIVEN,
    )
    ((topk, hidden),) = engine.score([bare], [TopKRequest(), HiddenStateRequest()])
    assert len(topk) == len(hidden) == 0


def test_the_last_token_of_a_sequence_is_not_run(tiny_dir: Path, rollouts: list[TokenSequence]) -> None:
    engine, run = load_engine(tiny_dir, dtype="float32"), []
    engine.model.get_input_embeddings().register_forward_pre_hook(lambda _, inputs: run.append(inputs[0].tolist()))
    engine.score(rollouts[:1], [HiddenStateRequest()])
    assert run == [[rollouts[0].token_ids[:-1].tolist()]]


def test_padding_rows_of_the_head_are_cut_off(engine: Engine, rollouts: list[TokenSequence]) -> None:
    assert engine.head.vocab_size == VOCAB
    assert max(int(r.token_ids.max()) for r in rollouts) < VOCAB


def test_what_does_not_fit_is_refused(engine: Engine, rollouts: list[TokenSequence], prompts: list[Prompt]) -> None:
    with pytest.raises(UserError, match="the model's context holds 512"):
        engine.generate(prompts, Sampling(max_new_tokens=512))
    first = rollouts[0]
    foreign = TokenSequence(**{**vars(first), "token_ids": np.array([1, VOCAB], np.int32), "prompt_tokens": 1})
    with pytest.raises(UserError, match="beyond the teacher's 49152 tokens"):
        engine.score([foreign], [HiddenStateRequest()])


def test_non_finite_logits_name_the_problem_and_row(tiny_dir: Path, rollouts: list[TokenSequence]) -> None:
    engine = load_engine(tiny_dir, dtype="float32")
    with torch.no_grad():
        engine.model.get_output_embeddings().weight[5] = torch.nan
    with pytest.raises(UserError, match=f"problem {rollouts[0].problem_id}.*not finite at completion row 0"):
        engine.score(rollouts[:1], [TopKRequest()])
    with torch.no_grad():
        engine.model.model.norm.weight[3] = torch.inf
    with pytest.raises(UserError, match="hidden states are not finite at completion row 0"):
        engine.score(rollouts[:1], [HiddenStateRequest()])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_a_completion_is_not_drawn_from_what_is_not_finite(
    tiny_dir: Path, prompts: list[Prompt], temperature: float, poison: float
) -> None:
    engine = load_engine(tiny_dir, dtype="float32")
    with torch.no_grad():
        engine.model.get_output_embeddings().weight[5] = poison
    with pytest.raises(UserError, match=f"completion of problem {prompts[0].problem_id}: .*logits are not finite"):
        engine.generate(prompts[:1], Sampling(max_new_tokens=2, temperature=temperature))


@pytest.mark.parametrize(
    "sampling", [Sampling(max_new_tokens=1, temperature=t, top_k=k) for t in (0.0, 1.0) for k in (2, None)]
)
def test_a_row_may_forbid_tokens_but_not_all(sampling: Sampling) -> None:
    scores = torch.tensor([[-torch.inf, 3.0, -torch.inf], [0.0, 1.0, -torch.inf]])
    assert draw(scores[:1], [0.999], sampling).tolist() == [1]
    scores[1] = -torch.inf
    with pytest.raises(UserError, match="row 1"):
        draw(scores, [0.5, 0.5], sampling)
    with pytest.raises(UserError, match="problem q"):
        draw(scores, [0.5, 0.5], sampling, ["p", "q"])


def test_a_model_that_is_not_there_or_not_loadable(tmp_path: Path, tiny_dir: Path) -> None:
    from logitcache.identity import resolve_model

    with pytest.raises(UserError, match=r"no config.json with \*.safetensors"):
        resolve_model(str(tmp_path))
    with pytest.raises(UserError, match="no such directory"):
        resolve_model("nobody/has-this-model")
    with pytest.raises(UserError, match="bfloat16 or float32: got int3"):
        load_engine(tiny_dir, dtype="int3")


def test_a_model_too_large_for_memory_is_one_line(embedded_dir: Path) -> None:
    """A process of its own, which may map 100 MB more than it has: the model needs 540."""
    code = """
import resource, sys
from pathlib import Path
from logitcache.errors import UserError
from logitcache.scorers.hf import load_engine
import transformers.models.llama.modeling_llama
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 100_000_000, resource.RLIM_INFINITY))
try:
    load_engine(Path(sys.argv[1]), dtype="float32")
except UserError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code, str(embedded_dir)], capture_output=True, text=True, check=False)
    assert "cannot be loaded" in done.stdout, done.stderr
    assert "check the directory and the memory it needs" in done.stdout
