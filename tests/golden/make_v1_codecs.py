"""Made `v1-codecs`, once: a tiny cache of format version 1 with a tier of every codec, as builds write it.

    python -m tests.golden.make_v1_codecs FOLDER

writes FOLDER/v1-codecs, and beside it v1-codecs.npz: what reading it returned. What is kept here is never made again:
every later version must read it as it is.
"""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from logitcache import open_cache
from logitcache.codecs import Calibration, Codec, calibrate, parse_targets, spread_tail
from logitcache.codecs.dense import DenseHead
from logitcache.codecs.fidelity import Gauge, targets_of
from logitcache.codecs.quantize import bf16_bits
from logitcache.codecs.topk import TopKCodec
from logitcache.identity import tokenizer_fingerprint
from logitcache.problems import Problem, problems_digest
from logitcache.records import (
    FinishReason,
    Head,
    HiddenStateTargets,
    Origin,
    SampledTargets,
    TeacherTargets,
    TokenSequence,
    TopKTargets,
    sample_id_of,
)
from logitcache.scoring import SampledRequest
from logitcache.store import AppendedSet, Store, create

VOCAB, WIDTH, CALIBRATED = 97, 8, 600
TIERS = {
    "topk": "topk:p=1e-2",
    "hidden": "hidden",
    "hidden-transform": "hidden:step=0.05",
    "full": "full",
    "sampled": "sampled:n=20",
}
VOCABULARY = {f"word {n}": n for n in range(VOCAB - 1)} | {"Größe \N{GRINNING FACE}": VOCAB - 1}
TOKENIZER = tokenizer_fingerprint(VOCABULARY)
PROBLEMS = [Problem(id=f"p{n}", text=f"What is {n}·{n}?", answer=str(n * n)) for n in range(5)]
UNITS = {"00000000": ((3, 5), (1, 0), (7, 24), (2, 1)), "00000001": ((5, 12),)}
"""Prompt and completion tokens of each sequence; the second unit was appended."""
IDENTITY: dict[str, Any] = {
    "teacher": {
        "name": "drawn",
        "fingerprint": "0" * 32,
        "vocab_size": VOCAB,
        "dtype": "bfloat16",
        "engine": {"name": "numpy", "version": "2"},
    },
    "tokenizer": {"fingerprint": TOKENIZER},
    "prompts": {"chat_template": "0" * 32, "instruction": "", "thinking": False},
    "problems": {"count": 4, "sha256": problems_digest(PROBLEMS[:4]), "per_unit": 4},
    "sampling": {"max_new_tokens": 24, "samples_per_problem": 1, "seed": 5, "temperature": 1.0},
}


def make(where: str) -> None:
    """Build and seal the cache."""
    rng = np.random.default_rng(0)
    head = Head(
        weight=bf16_bits(rng.standard_normal((VOCAB, WIDTH), np.float32)),
        bias=rng.standard_normal(VOCAB, np.float32),
        soft_cap=20.0,
        scale=1.5,
    )
    teacher = DenseHead(head)
    sample = Calibration(
        hidden=rng.standard_normal((CALIBRATED, WIDTH), np.float32),
        token_ids=rng.integers(0, VOCAB, CALIBRATED, np.int32),
        sequence=np.arange(CALIBRATED) // 20,
    )
    store = create(where, IDENTITY)
    for tier, text in TIERS.items():
        (spec,) = parse_targets(text)
        store.create_tier(tier, calibrate(spec, teacher, sample), asdict(spec))
    for number, unit in enumerate(UNITS):
        if number:
            appended = problems_digest(PROBLEMS[4:])
            store.append(AppendedSet(count=1, sha256=appended, first_unit=1, units=1))
        _write_unit(store, unit, number, teacher)
        store.seal()


def _write_unit(store: Store, unit: str, number: int, teacher: DenseHead) -> None:
    rng = np.random.default_rng(number + 1)
    sequences = [_sequence(rng, 4 * number + b, *lengths) for b, lengths in enumerate(UNITS[unit])]
    states = [rng.standard_normal((item.completion_tokens, WIDTH), np.float32) for item in sequences]
    store.write_sequences(unit, sequences, {"flops": {"generate": 1000 + number}})
    for tier in TIERS:
        codec = store.tier_codec(tier)
        targets = [_targets(codec, teacher, *pair) for pair in zip(sequences, states, strict=True)]
        facts: dict[str, Any] = {"flops": {"score": 10}}
        if not isinstance(codec.request, SampledRequest):
            facts["kl_nats"] = Gauge(codec, teacher).measure(np.concatenate(states)).forward[:8].tolist()
        if tier == "hidden" and not number:
            facts["engine_kl_nats"] = {"forward": [1e-5, 3e-5], "reverse": [2e-5, 2e-5]}
        store.write_targets(unit, tier, codec, targets, facts)


def _sequence(rng: np.random.Generator, problem: int, prompt: int, completion: int) -> TokenSequence:
    ids = rng.integers(0, VOCAB, prompt + completion, np.int32)
    return TokenSequence(
        token_ids=ids,
        prompt_tokens=prompt,
        origin=Origin.TEACHER if completion else Origin.CORPUS,
        sample_id=sample_id_of(ids, prompt, TOKENIZER),
        problem_id=PROBLEMS[problem].id,
        finish_reason=FinishReason.STOP if completion else FinishReason.GIVEN,
        seed=(1 << 63) + problem if completion else None,
    )


def _targets(codec: Codec, teacher: DenseHead, sequence: TokenSequence, states: NDArray[np.float32]) -> TeacherTargets:
    log_probs = teacher.log_probs(states) if len(states) else np.empty((0, VOCAB), np.float32)
    if not isinstance(codec.request, SampledRequest):
        return targets_of(codec.request, log_probs, states, teacher.head.fingerprint, sequence.completion_ids)
    probs = np.exp(log_probs.astype(np.float64))
    drawn = np.random.default_rng(2).multinomial(codec.request.samples, probs / probs.sum(axis=1, keepdims=True))
    rows, ids = np.nonzero(drawn)
    return SampledTargets(
        ids=ids.astype(np.int32),
        counts=drawn[rows, ids].astype(np.int32),
        row_splits=np.searchsorted(rows, np.arange(len(states) + 1)).astype(np.int64),
        token_log_prob=log_probs[np.arange(len(states)), sequence.completion_ids],
        entropy=-np.einsum("nv,nv->n", np.exp(log_probs), log_probs),
    )


def read(where: str) -> dict[str, NDArray[Any]]:
    """Every number that reading returns, sequences one after another; distributions too, where they take work."""
    plain = open_cache(where, targets=None)
    sequences = plain.read_tokens(range(len(plain)))
    found: dict[str, NDArray[Any]] = {
        "token_ids": np.concatenate([item.token_ids for item in sequences]),
        "prompt_tokens": np.array([item.prompt_tokens for item in sequences], np.int32),
        "sample_id": np.array([item.sample_id for item in sequences]),
    }
    for tier in TIERS:
        reader = open_cache(where, targets=tier, tokenizer=TOKENIZER)
        targets: list[Any] = [item.targets for item in reader.read(range(len(reader)))]
        arrays = [name for name, value in vars(targets[0]).items() if isinstance(value, np.ndarray)]
        for name in arrays:
            parts = [getattr(item, name) for item in targets]
            splits = name == "row_splits"
            found[f"{tier}/{'counts_of_rows' if splits else name}"] = np.concatenate(
                [np.diff(part) if splits else part for part in parts]
            )
        match targets[0]:
            case HiddenStateTargets():
                assert reader.head is not None
                states = found[f"{tier}/hidden"]
                found[f"{tier}/distributions"] = DenseHead(reader.head).log_probs(states)
            case TopKTargets():
                assert isinstance(reader.codec, TopKCodec)
                prior = reader.codec.prior
                rows = [spread_tail(item, prior) for item in targets if len(item)]
                found[f"{tier}/distributions"] = np.concatenate(rows)
    return found


if __name__ == "__main__":
    cache = Path(sys.argv[1]) / "v1-codecs"
    make(str(cache))
    np.savez_compressed(cache.with_suffix(".npz"), **read(str(cache)))  # type: ignore[arg-type]
    print(open_cache(str(cache), targets=None).manifest.digest)
