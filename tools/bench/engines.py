"""Which engine, at what cost: generating, capturing and scoring with transformers and with vLLM, and how they differ.

    python -m tools.bench.engines [--quick] [--json PATH] [--data DIR]

Runs in the vLLM environment: `make vllm`, then `OMP_NUM_THREADS=1 .venv-vllm/bin/python -m tools.bench.engines` on two
idle cores, about 12 minutes; the second core is for the selection of targets beside the engine. The same DeepScaleR
problems and seeds for both engines, one after the other in each round; medians and ratios count. The divergences are
between full-vocabulary distributions of the same tokens, and answer whether scoring with the inference engine is
harmless: compare what the engines differ by with what one engine differs by between bfloat16 and float32.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from logitcache.codecs.fidelity import kl_nats
from logitcache.embedded import embedded_teacher_dir
from logitcache.problems import load_problems
from logitcache.prompts import PromptStyle, render_prompts
from logitcache.records import FullVocabTargets, TokenSequence
from logitcache.scorers.hf import HFEngine, load_engine, load_tokenizer
from logitcache.scorers.vllm_engine import VLLMEngine
from logitcache.scorers.vllm_load import load_vllm_engine, require_vllm
from logitcache.scoring import (
    FullVocabRequest,
    HiddenStateRequest,
    Prompt,
    Sampling,
    Scorer,
    TargetRequest,
    TopKRequest,
)
from tools.bench.result import at_least, at_most, keep, options

TOP_64: tuple[TargetRequest, ...] = (TopKRequest(max_k=64),)
HIDDEN: tuple[TargetRequest, ...] = (HiddenStateRequest(),)


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much is run."""

    problems: int
    window: int
    rounds: int
    compared: int


def main() -> None:
    """Measure and keep."""
    chosen = options("engines", __doc__)
    size = (
        Size(problems=16, window=16, rounds=1, compared=4)
        if chosen.quick
        else Size(problems=256, window=64, rounds=3, compared=32)
    )
    version = require_vllm()
    model_dir = embedded_teacher_dir()
    problems = load_problems(str(chosen.data / "deepscaler.parquet"), limit=size.problems)
    prompts = render_prompts(load_tokenizer(model_dir), problems, PromptStyle())
    sampling = Sampling(max_new_tokens=size.window)
    ours, theirs = load_engine(model_dir), load_vllm_engine(model_dir)
    ours.generate(prompts[:4], sampling)
    theirs.generate_scored(prompts[:4], sampling, TOP_64)
    figures: dict[str, Any] = _rates(ours, theirs, prompts, sampling, size.rounds)
    sample = theirs.generate(prompts[: size.compared], sampling)
    figures |= _scoring_rates(ours, theirs, sample, size.rounds)
    vllm_bf16 = _log_probs(theirs, sample)
    theirs.close()
    figures["kl_nats"] = _divergences(vllm_bf16, ours, model_dir, sample)
    figures["compared_tokens"] = sum(sequence.completion_tokens for sequence in sample)
    keep(
        chosen,
        config={
            "teacher": model_dir.name,
            "dtype": "bfloat16",
            "vllm": version,
            "threads": torch.get_num_threads(),
            **vars(size),
        },
        figures=figures,
        goals=[
            at_least(
                "vLLM over transformers, generated tokens per second", 1.0, figures["vllm_over_transformers"], "x"
            ),
            at_most("capture of top-64 with tail over plain generation, vLLM", 1.15, figures["top64_over_plain"], "x"),
            at_most("capture of hidden states over plain generation, vLLM", 1.15, figures["hidden_over_plain"], "x"),
        ],
    )


def _rates(
    ours: HFEngine, theirs: VLLMEngine, prompts: Sequence[Prompt], sampling: Sampling, rounds: int
) -> dict[str, Any]:
    """Seconds and tokens per second of each way, in rounds that alternate; ratios of the same round."""
    ways: dict[str, Callable[[], list[TokenSequence]]] = {
        "generate_transformers": lambda: ours.generate(prompts, sampling),
        "generate_vllm": lambda: theirs.generate(prompts, sampling),
        "generate_and_top64_vllm": lambda: [s for s, _ in theirs.generate_scored(prompts, sampling, TOP_64)],
        "generate_and_hidden_vllm": lambda: [s for s, _ in theirs.generate_scored(prompts, sampling, HIDDEN)],
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            spent, sequences = _timed(way)
            print(f"{name}: {spent:.1f} s", flush=True)
            seconds[name].append(spent)
            rates[name].append(sum(s.completion_tokens for s in sequences) / spent)
    return {
        **{f"{name}_s": spent for name, spent in seconds.items()},
        **{f"{name}_tokens_per_s": median(rate) for name, rate in rates.items()},
        "vllm_over_transformers": _ratio(rates["generate_vllm"], rates["generate_transformers"]),
        "top64_over_plain": _ratio(seconds["generate_and_top64_vllm"], seconds["generate_vllm"]),
        "hidden_over_plain": _ratio(seconds["generate_and_hidden_vllm"], seconds["generate_vllm"]),
    }


def _scoring_rates(ours: HFEngine, theirs: VLLMEngine, sample: list[TokenSequence], rounds: int) -> dict[str, Any]:
    """Tokens per second of scoring given sequences, prompt tokens included, for each engine and kind of target."""
    tokens = sum(len(sequence) for sequence in sample)
    figures: dict[str, Any] = {}
    for engine_name, engine in (("transformers", ours), ("vllm", theirs)):
        for kind, want in (("top64", TOP_64), ("hidden", HIDDEN)):
            spent = [_timed(lambda: engine.score(sample, want))[0] for _ in range(rounds)]  # noqa: B023 (called at once)
            figures[f"score_{kind}_{engine_name}_tokens_per_s"] = tokens / median(spent)
    return figures


def _divergences(
    vllm_bf16: list[np.ndarray], ours: HFEngine, model_dir: Path, sample: list[TokenSequence]
) -> dict[str, dict[str, float]]:
    """KL(first, second) per token over the completion rows, and its reverse."""
    transformers_bf16 = _log_probs(ours, sample)
    exact = _log_probs(load_engine(model_dir, dtype="float32"), sample)
    return {
        "transformers_bfloat16_to_vllm_bfloat16": _kl(transformers_bf16, vllm_bf16),
        "float32_to_vllm_bfloat16": _kl(exact, vllm_bf16),
        "float32_to_transformers_bfloat16": _kl(exact, transformers_bf16),
    }


def _log_probs(engine: Scorer, sample: Sequence[TokenSequence]) -> list[np.ndarray]:
    found = []
    for sequence in sample:
        ((targets,),) = engine.score([sequence], [FullVocabRequest()])
        assert isinstance(targets, FullVocabTargets)
        found.append(targets.log_probs)
    return found


def _kl(first: list[np.ndarray], second: list[np.ndarray]) -> dict[str, float]:
    rows, reverse = (
        np.concatenate([kl_nats(p, q) for p, q in zip(a, b, strict=True)])
        for a, b in ((first, second), (second, first))
    )
    return {"mean": float(rows.mean()), "p99": float(np.quantile(rows, 0.99)), "reverse_mean": float(reverse.mean())}


def _timed(work: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


def _ratio(first: Sequence[float], second: Sequence[float]) -> float:
    return median(a / b for a, b in zip(first, second, strict=True))


if __name__ == "__main__":
    main()
