"""From a model's name to a teacher that a server offers. Engines are imported here, when one is asked for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Literal

from logitcache.errors import require
from logitcache.identity import model_display_name, resolve_model, tokenizer_fingerprint, weights_fingerprint
from logitcache.records import Head
from logitcache.scoring import DTYPES
from logitcache.service.teachers import Teacher
from logitcache.store import layout


def offer_teacher(
    model: str, *, dtype: str = "bfloat16", engine: Literal["transformers", "vllm"] = "transformers"
) -> Teacher:
    """Load a teacher to offer.

    Args:
        model: as for `logitcache build --teacher`, named by the last part of its name, or as `NAME=MODEL`.
        dtype: the precision it computes in.
        engine: that runs it.

    Raises:
        UserError: no such model, or a name that is none.
    """
    from transformers import AutoConfig

    from logitcache.scorers.choose import load_teacher, teacher_identity
    from logitcache.scorers.hf import load_stop_ids, load_tokenizer

    require(dtype in DTYPES, f"--dtype, {' or '.join(DTYPES)}", dtype)
    name, separator, model = model.partition("=") if "=" in model else ("", "", model)
    shown = model_display_name(model)
    name = layout.check_name("a teacher", name if separator else shown.rpartition("/")[2])
    model_dir = resolve_model(model)
    tokenizer = load_tokenizer(model_dir)
    scorer = load_teacher(engine, engine, model_dir, dtype=dtype, on_sequences=lambda _: None)
    facts = {
        "name": shown,
        "fingerprint": weights_fingerprint(model_dir),
        "dtype": dtype,
        "vocab_size": scorer.head.vocab_size,
        "tokenizer": tokenizer_fingerprint(tokenizer.get_vocab()),
        "engine": teacher_identity(engine, engine),
        "config": json.loads(AutoConfig.from_pretrained(model_dir).to_json_string(use_diff=False)),
        "stop_ids": sorted(load_stop_ids(model_dir, tokenizer)),
        "head": head_facts(scorer.head),
    }
    return Teacher(name=name, scorer=scorer, facts=facts)


def head_facts(head: Head) -> Mapping[str, Any]:
    """What a client must know of a head beside its arrays."""
    return {
        "arrays": [name for name in ("weight", "bias") if getattr(head, name) is not None],
        "soft_cap": head.soft_cap,
        "scale": head.scale,
        "fingerprint": head.fingerprint,
        "nbytes_per_row": head.weight[:1].nbytes,
    }
