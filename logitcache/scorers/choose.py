"""Engines by name: `transformers`, `vllm`, or a server's `http://host:port#model`.

Guarantees: one engine serves both abilities where both names are the same; nothing is loaded until it is asked for, and
no engine stands in for another.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from logitcache.build import Engine
from logitcache.codecs import TargetSpec, TopKSpec
from logitcache.errors import UserError
from logitcache.records import Head, TeacherTargets, TokenSequence
from logitcache.scoring import Generator, Prompt, Sampling, Scorer, TargetRequest


@dataclass(frozen=True, kw_only=True)
class Served:
    """A model behind a URL."""

    url: str
    model: str


EngineName = Literal["transformers", "vllm"] | Served
_SERVER = "http"
"""A server's name in a cache's identity, which keeps no address."""


def parse_engine(text: str, option: str) -> EngineName:
    """An engine from the command line. Raises UserError for a name that is none."""
    match text:
        case "transformers" | "vllm":
            return text
        case _ if text.startswith(("http://", "https://")) and text.count("#") == 1:
            url, _, model = text.partition("#")
            return Served(url=url, model=model)
    raise UserError(f"{option} {text}", "no engine of that name", "say transformers, vllm or http://host:port#model")


def scorer_of(identity: Mapping[str, Any]) -> EngineName:
    """The engine that scored a cache, by its `teacher_identity`. Raises UserError for a server, which has no more."""
    name = identity.get("scorer", identity)["name"]
    if name == _SERVER:
        found = "a server scored it, and a server gives top-k and nothing else"
        raise UserError("more targets of this cache", found, "build another one with --scorer transformers or vllm")
    return parse_engine(name, "the cache's scorer")


def require_servable(specs: Iterable[TargetSpec]) -> None:
    """Raise UserError unless a server can score for these: top-k, at a threshold that is named."""
    for spec in specs:
        match spec:
            case TopKSpec(max_kl=None):
                continue
            case TopKSpec():
                asked, found = "topk:max-kl=", "a server gives no full distribution to measure it against"
            case _:
                asked, found = spec.kind, "a server gives top-k and nothing else"
        do = "say --targets topk:k=64, or score with transformers or vllm"
        raise UserError(f"--targets {asked} of a server as scorer", found, do)


@dataclass(frozen=True, kw_only=True)
class TwoEngines:
    """One engine writes, another scores."""

    generator: Generator
    scorer: Scorer

    @property
    def head(self) -> Head:
        """The scorer's."""
        return self.scorer.head

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[TokenSequence]:
        """See `Generator.generate`."""
        return self.generator.generate(prompts, sampling)

    def score(
        self, sequences: Sequence[TokenSequence], want: Sequence[TargetRequest]
    ) -> list[tuple[TeacherTargets, ...]]:
        """See `Scorer.score`."""
        return self.scorer.score(sequences, want)


def require_divisible(engines: Iterable[EngineName], devices: int) -> None:
    """Raise UserError if a model is to be divided over several devices, and no engine of these can do so."""
    if devices > 1 and "vllm" not in engines:
        found, do = "vllm alone divides a model over several", "pass --generator vllm --scorer vllm, or ask for one"
        raise UserError(f"{devices} GPUs for one engine", found, do)


def load_teacher(
    generator: EngineName,
    scorer: EngineName,
    model_dir: Path,
    *,
    dtype: str,
    on_sequences: Callable[[int], None],
    devices: int = 1,
) -> Engine:
    """The engine, or the two engines, of a build. Raises UserError as their loaders do.

    Args:
        generator: writes.
        scorer: scores.
        model_dir: the model; where servers do both, its tokenizer and configuration.
        dtype: the precision to compute in.
        on_sequences: called with the number of sequences that were just generated or scored.
        devices: that vLLM divides the model over; the other engines take no more than one.
    """

    def load(name: EngineName) -> Any:
        match name:
            case "transformers":
                from logitcache.scorers.hf import load_engine

                return load_engine(model_dir, dtype=dtype, on_sequences=on_sequences)
            case "vllm":
                from logitcache.scorers.vllm_load import load_vllm_engine

                return load_vllm_engine(model_dir, dtype=dtype, tensor_parallel=devices, on_sequences=on_sequences)
            case Served(url=url, model=model):
                from logitcache.scorers.endpoint import KEY_VARIABLE, Endpoint
                from logitcache.scorers.vllm_http import connect

                endpoint = Endpoint(url=url, model=model, api_key=os.environ.get(KEY_VARIABLE))
                return connect(endpoint, model_dir, on_sequences=on_sequences)

    if generator == scorer:
        both: Engine = load(generator)
        return both
    return TwoEngines(generator=load(generator), scorer=load(scorer))


def teacher_identity(generator: EngineName, scorer: EngineName) -> dict[str, Any]:
    """The engines and versions that decide a cache's bytes: one engine's, or both."""
    if generator == scorer:
        return _identity(generator)
    return {"generator": _identity(generator), "scorer": _identity(scorer)}


def _identity(name: EngineName) -> dict[str, str]:
    match name:
        case "transformers":
            from logitcache.scorers.hf import engine_identity

            return engine_identity()
        case "vllm":
            from logitcache.scorers.vllm_load import vllm_identity

            return vllm_identity()
        case Served(model=model):
            return {"name": _SERVER, "model": model}
