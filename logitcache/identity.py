"""Fingerprints: what must be the same for a cache, its teacher and its students to belong together.

Guarantees: a fingerprint depends on content alone (weights, configuration, the id space of a tokenizer), never on where
a file lies.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from logitcache.embedded import NAME as EMBEDDED_NAME
from logitcache.embedded import embedded_teacher_dir
from logitcache.errors import IdentityError, UserError

EMBEDDED = "embedded"
"""The model name that stands for the embedded default teacher."""

_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")
_UNSTABLE_CONFIG = ("_name_or_path", "transformers_version", "dtype", "torch_dtype")


def resolve_model(name: str) -> Path:
    """The local directory of a model: the embedded default, a directory, or a hub id (downloaded if need be).

    Raises:
        UserError: there is no such model, or it has no safetensors weights (pickled ones are never read).
    """
    if name == EMBEDDED:
        return embedded_teacher_dir()
    path = Path(name).expanduser()
    if not path.is_dir():
        if not _HUB_ID.fullmatch(name):
            raise UserError(f"model {name}", "no such directory, and no hub id", "check the name")
        path = _hub_snapshot(name)
    if not (path / "config.json").is_file() or not list(path.glob("*.safetensors")):
        raise UserError(
            f"a model in {name}", "no config.json with *.safetensors beside it", "save it with save_pretrained"
        )
    return path


def model_display_name(name: str) -> str:
    """What a manifest calls a model: a hub id, a directory's own name, or the embedded model's."""
    if name == EMBEDDED:
        return EMBEDDED_NAME
    return Path(name).expanduser().resolve().name if Path(name).expanduser().is_dir() else name


def weights_fingerprint(model_dir: Path) -> str:
    """32 hex digits over configuration and every safetensors file.

    A file in the hub's content-addressed cache is named by its SHA-256 already, and is not read again.
    """
    config = json.loads((model_dir / "config.json").read_text())
    stable = {key: value for key, value in config.items() if key not in _UNSTABLE_CONFIG}
    digest = hashlib.sha256(json.dumps(stable, sort_keys=True).encode())
    for file in sorted(model_dir.glob("*.safetensors")):
        digest.update(f"{file.name} {_file_sha256(file)}\n".encode())
    return digest.hexdigest()[:32]


def tokenizer_fingerprint(vocabulary: Mapping[str, int]) -> str:
    """32 hex digits over a tokenizer's id space (`get_vocab()`): two models share targets if they agree on it."""
    pairs = sorted((ident, token) for token, ident in vocabulary.items())
    return hashlib.sha256(json.dumps(pairs).encode()).hexdigest()[:32]


def require_same_teacher(url: str, built_by: Mapping[str, Any], model_dir: Path) -> None:
    """Raise IdentityError unless a directory holds the teacher that a cache's identity names (`built_by`)."""
    have = weights_fingerprint(model_dir)
    if have != built_by["fingerprint"]:
        raise IdentityError(
            f"teacher {model_dir.name} for {url}",
            f"its weights are {have[:12]}, the cache was built by {built_by['name']}, {built_by['fingerprint'][:12]}",
            "name the teacher that built the cache",
        )


def _file_sha256(file: Path) -> str:
    blob = file.resolve().name
    if file.is_symlink() and re.fullmatch(r"[0-9a-f]{64}", blob):
        return blob
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _hub_snapshot(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        path = Path(name)
        local = path.parent.is_dir() and path.parent != Path()
        missing = f"{path.parent} has no directory {path.name}" if local else "no such directory"
        raise UserError(
            f"model {name}", f"{missing}, and the hub says: {reason}", "check the name or the network"
        ) from error
