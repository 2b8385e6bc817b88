"""A model's shape by its name, without its weights.

Guarantees: nothing is downloaded; a name that leads to no configuration, or to one whose cost is not known, is an
error, never a guess.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from logitcache.embedded import embedded_teacher_dir
from logitcache.errors import UserError
from logitcache.flops import ModelShape
from logitcache.identity import EMBEDDED

QWEN3: dict[str, dict[str, Any]] = {
    f"Qwen3-{size}": {
        "model_type": "qwen3", "hidden_size": hidden, "intermediate_size": mlp, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151_936,
    }
    for size, hidden, mlp, layers, heads in [
        ("0.6B", 1024, 3072, 28, 16), ("1.7B", 2048, 6144, 28, 16), ("4B", 2560, 9728, 36, 32),
        ("8B", 4096, 12_288, 36, 32), ("14B", 5120, 17_408, 40, 40), ("32B", 5120, 25_600, 64, 64),
    ]
}  # fmt: skip
"""What the published `config.json` of each dense Qwen3 says of its widths; a base model has those of its chat model."""


def model_shape(name: str) -> ModelShape:
    """The shape of a model.

    Args:
        name: a directory with a `config.json`, that file itself, `embedded`, a hub id whose configuration is in the
            hub's cache on this machine, or a name of `QWEN3` (with or without `Qwen/` before and `-Base` behind).

    Raises:
        UserError: no configuration is found, or it has no formula.
    """
    published = _published(name)
    config = _read(_config_file(name)) if published is None else QWEN3[published]
    return ModelShape.from_config(config)


def hub_name(name: str) -> str:
    """What a command that loads the model must be given: a hub id for a short name of `QWEN3`, else the name."""
    return f"Qwen/{name.removeprefix('Qwen/')}" if _published(name) else name


def _published(name: str) -> str | None:
    """The key of `QWEN3` that a name means; a directory of that name comes first."""
    short = name.removeprefix("Qwen/").removesuffix("-Base")
    return short if short in QWEN3 and not Path(name).exists() else None


def _config_file(name: str) -> Path:
    path = embedded_teacher_dir() if name == EMBEDDED else Path(name).expanduser()
    for file in (path / "config.json", path):
        if file.is_file():
            return file
    if not path.exists() and (cached := _in_hub_cache(name)) is not None:
        return cached
    raise UserError(
        f"the configuration of {name}",
        "no such directory or config.json, and none in the hub's cache here",
        f"give a path to a config.json, or one of {', '.join(QWEN3)}",
    )


def _in_hub_cache(name: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(name, "config.json")
    except HFValidationError:
        return None
    return Path(found) if isinstance(found, str) else None


def _read(file: Path) -> dict[str, Any]:
    try:
        config = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"the configuration {file}", f"it cannot be read ({error})", "check the file") from error
    if not isinstance(config, dict):
        raise UserError(f"the configuration {file}", "it is no JSON object", "check the file")
    return config
