"""A tiny teacher, its scored sequences, and students of it, for the trainer's tests."""

from __future__ import annotations

import resource
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from logitcache.records import FinishReason, Origin, ScoredSequence, TokenSequence, sample_id_of
from logitcache.scorers.hf import HFEngine, load_engine
from logitcache.scoring import HiddenStateRequest
from trainer.batch import TeacherHead, teacher_head
from trainer.student import Student, load_student

VOCAB = 49_152


@dataclass(frozen=True)
class ListReader:
    """A cache that is a list."""

    items: Sequence[ScoredSequence]

    def __len__(self) -> int:
        return len(self.items)

    def read(
        self, indices: Sequence[int], *, first_completion_token: int = 0, max_completion_tokens: int | None = None
    ) -> list[ScoredSequence]:
        assert first_completion_token == 0
        assert max_completion_tokens is None or max_completion_tokens >= 12
        return [self.items[index] for index in indices]


def random_sequence(number: int, prompt_tokens: int, completion_tokens: int) -> TokenSequence:
    ids = np.random.default_rng(number).integers(0, VOCAB, prompt_tokens + completion_tokens).astype(np.int32)
    return TokenSequence(
        token_ids=ids,
        prompt_tokens=prompt_tokens,
        origin=Origin.CORPUS,
        sample_id=sample_id_of(ids, prompt_tokens, "tests"),
        problem_id=f"p{number}",
        finish_reason=FinishReason.GIVEN,
    )


@contextmanager
def room(bytes_: int) -> Iterator[None]:
    """Within it, a file holds at most so many bytes: to a writer, a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture(scope="session")
def teacher(tiny_dir: Path) -> HFEngine:
    return load_engine(tiny_dir, dtype="float32")


@pytest.fixture(scope="session")
def scored(teacher: HFEngine) -> list[ScoredSequence]:
    """Eight sequences of different lengths with the teacher's hidden states, in float32."""
    sequences = [random_sequence(number, 2 + number % 3, 4 + number) for number in range(8)]
    targets = teacher.score(sequences, [HiddenStateRequest()])
    return [ScoredSequence(sequence=s, targets=t[0]) for s, t in zip(sequences, targets, strict=True)]


@pytest.fixture
def student(tiny_dir: Path) -> Student:
    """The teacher's twin, in float32, with weights of its own."""
    return load_student(tiny_dir, vocab_size=VOCAB, precision="float32")


@pytest.fixture(scope="session")
def head(teacher: HFEngine) -> TeacherHead:
    import torch

    return teacher_head(teacher.head, torch.device("cpu"))


@pytest.fixture(scope="session")
def reader(scored: list[ScoredSequence]) -> ListReader:
    return ListReader(scored)
