"""Packed sequences see themselves and nothing else: values and gradients equal those of each run alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from logitcache.records import ScoredSequence
from trainer.batch import TeacherHead, collate
from trainer.packing import packed_sequences
from trainer.student import Student

CPU = torch.device("cpu")


def tiny_qwen3(tiny_dir: Path) -> Student:
    from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=49_152, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, tie_word_embeddings=False, eos_token_id=2, pad_token_id=2,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = Qwen3ForCausalLM(config).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_dir)
    return Student(model=model, tokenizer=tokenizer, vocab_size=49_152, precision=torch.float32)


@pytest.fixture(params=["llama", "qwen3"])
def any_student(request: pytest.FixtureRequest, student: Student, tiny_dir: Path) -> Student:
    return student if request.param == "llama" else tiny_qwen3(tiny_dir)


def gradients(student: Student) -> list[torch.Tensor]:
    collected = [parameter.grad.clone() for parameter in student.parameters if parameter.grad is not None]
    student.model.zero_grad()
    return collected


def test_packed_equals_each_alone(any_student: Student, scored: list[ScoredSequence], head: TeacherHead) -> None:
    packed = any_student.head_over(collate(scored, head, CPU)).hidden
    # Not the sum of squares: after a norm that is a constant, whose gradient is nought.
    weights = torch.randn(packed.shape, generator=torch.Generator().manual_seed(0))
    (packed * weights).sum().backward()
    together = gradients(any_student)
    alone = []
    for item in scored:
        ids = torch.from_numpy(item.sequence.token_ids[None, :-1].astype("int64"))
        states = any_student.model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state[0]
        alone.append(states[item.sequence.first_row :])
    (torch.cat(alone) * weights).sum().backward()
    assert torch.allclose(packed, torch.cat(alone), atol=1e-5)
    for one, other in zip(together, gradients(any_student), strict=True):
        assert torch.allclose(one, other, rtol=1e-3, atol=1e-3 * float(other.abs().max()))


def test_a_sequence_does_not_feel_its_neighbours(
    student: Student, scored: list[ScoredSequence], head: TeacherHead
) -> None:
    batch = collate(scored, head, CPU)
    first = batch.sequence_lengths[0]
    changed = batch.input_ids.clone()
    changed[:first] = changed[:first].flip(0)
    with torch.no_grad():
        before = student.head_over(batch).hidden
        after = student.head_over(replace(batch, input_ids=changed)).hidden
    rows = scored[0].sequence.completion_tokens
    assert not torch.allclose(before[:rows], after[:rows], atol=1e-3)
    assert torch.equal(before[rows:], after[rows:])


def test_the_model_generates_as_before_afterwards(student: Student) -> None:
    ids = torch.tensor([[5, 6, 7, 8]])
    before = student.model(input_ids=ids).logits
    with packed_sequences(student.model):
        assert student.model.config._attn_implementation == "packed_sequences"
    assert torch.equal(student.model(input_ids=ids).logits, before)
