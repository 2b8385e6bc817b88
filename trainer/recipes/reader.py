"""A teacher that reads what a model wrote, whoever built a cache: in this process, or served.

Guarantees: a teacher with another tokenizer is refused before any work; nothing is loaded until then.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from logitcache.errors import IdentityError
from logitcache.flops import ModelShape
from logitcache.identity import model_display_name, resolve_model, tokenizer_fingerprint, weights_fingerprint
from logitcache.scoring import Scorer
from logitcache.store.opening import SERVED


@dataclass(frozen=True, kw_only=True, eq=False)
class TeacherAsReader:
    """A teacher that was found.

    Attributes:
        identity: what decides its distributions.
        shape: what running it costs follows from.
        load: puts it into memory, or gives the one that is served.
    """

    identity: Mapping[str, Any]
    shape: ModelShape
    load: Callable[[], Scorer]


def find_reader(teacher: str, model_dir: Path, dtype: str) -> TeacherAsReader:
    """A teacher for what the model in `model_dir` writes.

    Args:
        teacher: a model, or a served one, `grpc://HOST:PORT#NAME`.
        model_dir: the model, of which the tokenizer is read.
        dtype: what a teacher in this process computes in; a served one has its own.

    Raises:
        IdentityError: it has another tokenizer.
        UserError: no such model, or no answer.
    """
    from logitcache.scorers.hf import load_engine, load_tokenizer

    def vocabulary_of(directory: Path) -> str:
        return tokenizer_fingerprint(load_tokenizer(directory).get_vocab())

    if teacher.startswith(SERVED):
        from logitcache.service.scorer import open_scorer

        served = open_scorer(teacher)
        found = served.facts["tokenizer"]
        identity = {name: served.facts[name] for name in ("name", "fingerprint", "dtype")}
        shape = ModelShape.from_config(served.facts["config"])
        reader = TeacherAsReader(identity=identity, shape=shape, load=lambda: served)
    else:
        directory, name = resolve_model(teacher), model_display_name(teacher)
        found = vocabulary_of(directory)
        identity = {"name": name, "fingerprint": weights_fingerprint(directory), "dtype": dtype}
        shape = ModelShape.of(directory)
        reader = TeacherAsReader(identity=identity, shape=shape, load=lambda: load_engine(directory, dtype=dtype))
    if found != vocabulary_of(model_dir):
        do = "name a teacher of the model's own tokenizer"
        raise IdentityError(f"--teacher {teacher} for {model_dir.name}", "it has another tokenizer", do)
    return reader
