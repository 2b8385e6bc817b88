"""A teacher's output head read from its checkpoint, for engines that repack or shard their own copy.

Guarantees: the same `Head`, bit for bit and so by fingerprint, as the transformers engine takes from the loaded model;
padding rows are cut off here, once.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from logitcache.errors import UserError
from logitcache.scorers.select import TorchHead

_HEADS = ("lm_head.weight",)
_EMBEDDINGS = ("model.embed_tokens.weight", "transformer.wte.weight", "model.language_model.embed_tokens.weight")


def read_head(model_dir: Path, config: Any, *, vocab_size: int, dtype: torch.dtype, device: torch.device) -> TorchHead:
    """The head of a model directory in `dtype` on `device`, its first `vocab_size` rows.

    Args:
        model_dir: holds `*.safetensors`.
        config: the model's transformers configuration.
        vocab_size: real tokens, V.
        dtype: the precision the engine computes in.
        device: where targets will be selected.

    Raises:
        UserError: no tensor in the checkpoint is known to be the head.
    """
    text = config.get_text_config()
    files = _tensor_files(model_dir)
    names = _EMBEDDINGS if text.tie_word_embeddings else _HEADS
    name = next((name for name in names if name in files), None)
    if name is None:
        raise UserError(
            f"the output head of {model_dir.name}", f"none of {', '.join(names)} in its checkpoint", "use transformers"
        )
    bias = _tensor(files, "lm_head.bias", vocab_size) if "lm_head.bias" in files else None
    scale = getattr(text, "logit_scale", None) or 1.0 / (getattr(text, "logits_scaling", None) or 1.0)
    return TorchHead(
        weight=_tensor(files, name, vocab_size).to(device=device, dtype=dtype),
        bias=None if bias is None else bias.to(device=device, dtype=dtype),
        soft_cap=getattr(text, "final_logit_softcapping", None),
        scale=float(scale),
    )


def _tensor(files: dict[str, Path], name: str, rows: int) -> Tensor:
    with safe_open(files[name], framework="pt") as checkpoint:
        tensor: Tensor = checkpoint.get_slice(name)[:rows]
    return tensor


def _tensor_files(model_dir: Path) -> dict[str, Path]:
    """Which file holds each tensor."""
    index = model_dir / "model.safetensors.index.json"
    if index.is_file():
        return {name: model_dir / file for name, file in json.loads(index.read_text())["weight_map"].items()}
    names: dict[str, Path] = {}
    for file in sorted(model_dir.glob("*.safetensors")):
        with safe_open(file, framework="pt") as checkpoint:
            names.update(dict.fromkeys(checkpoint.keys(), file))
    return names
