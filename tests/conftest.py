"""Models the tests share: the real embedded teacher, and a tiny one of the same tokenizer for what only needs speed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session")
def embedded_dir() -> Path:
    """SmolLM2-135M-Instruct, converted once per machine."""
    from logitcache.embedded import embedded_teacher_dir

    return embedded_teacher_dir()


@pytest.fixture(scope="session")
def tiny_dir(embedded_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of 2 layers and width 64 with random weights, a padded head and SmolLM2's tokenizer."""
    from tools.bench.tiny import tiny_teacher

    directory = tmp_path_factory.mktemp("tiny-teacher")
    tiny_teacher(directory)
    return directory
