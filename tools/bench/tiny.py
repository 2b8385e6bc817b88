"""A teacher of no knowledge and real shape, for what is measured of everything but the teacher."""

from __future__ import annotations

from pathlib import Path


def tiny_teacher(directory: Path) -> None:
    """Save a Llama of 2 layers and width 64 with random weights, a padded head and the embedded teacher's tokenizer."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from logitcache.embedded import embedded_teacher_dir

    config = LlamaConfig(
        vocab_size=49_152 + 128,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,  # 32 wide, the least that vLLM takes on a CPU
        num_key_value_heads=1,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        eos_token_id=2,
        initializer_range=0.2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
    model.model.norm.weight.data.mul_(3)  # else a random net is flat, and flat distributions hide errors
    model.save_pretrained(directory)
    AutoTokenizer.from_pretrained(embedded_teacher_dir()).save_pretrained(directory)
