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
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=49_152 + 128,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        eos_token_id=2,
        initializer_range=0.2,
    )
    directory = tmp_path_factory.mktemp("tiny-teacher")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
        model.model.norm.weight.data.mul_(3)  # else a random net is flat, and flat distributions hide errors
        model.save_pretrained(directory)
    AutoTokenizer.from_pretrained(embedded_dir).save_pretrained(directory)
    return directory
