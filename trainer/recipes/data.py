"""What a cell draws on: a cache, split; a live teacher where one is needed; the two sources of prefixes.

Guarantees: training from the cache needs no teacher, and nothing of one is imported for it; a student with another
tokenizer and a live teacher that did not build the cache are refused; held-out problems are neither trained on nor
used as prompts.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from logitcache.errors import UserError
from logitcache.flops import ModelShape
from logitcache.identity import require_same_teacher, resolve_model, tokenizer_fingerprint
from logitcache.records import Head, Origin
from logitcache.scoring import Sampling, Scorer
from logitcache.store import Reader, open_cache
from trainer.batch import Batch, collate, micro_batches, teacher_head
from trainer.prefixes import CachedPrefixes, OnPolicyPrefixes, prompts_of
from trainer.settings import Training
from trainer.split import Split, split_by_problem
from trainer.student import Student


@dataclass(frozen=True, kw_only=True, eq=False)
class CacheData:
    """An open cache, split into what is trained on and what is measured on."""

    url: str
    reader: Reader
    head: Head
    split: Split

    @property
    def build_flops(self) -> int:
        """What generating and scoring the cache cost."""
        return int(sum(self.reader.manifest.flops.values()))

    @property
    def teacher_name(self) -> str:
        """What the cache calls its teacher."""
        return str(self.reader.identity["teacher"]["name"])


@dataclass(frozen=True, kw_only=True, eq=False)
class LiveTeacher:
    """The cache's teacher in memory, for scoring what students write."""

    scorer: Scorer
    shape: ModelShape


def open_data(cache_url: str, student_dir: Path, training: Training) -> CacheData:
    """Open a cache's hidden-state tier for a student, whose tokenizer must be the cache's.

    Raises:
        IdentityError: the student has another tokenizer.
        UserError: no such cache, tier or student, or too few problems to hold some out.
    """
    reader = open_cache(cache_url, targets="hidden", tokenizer=_tokenizer_fingerprint(student_dir))
    head = reader.head
    assert head is not None
    problem_ids = reader.samples(["problem_id"])["problem_id"].to_pylist()
    return CacheData(
        url=cache_url, reader=reader, head=head, split=split_by_problem(problem_ids, training.held_out_share)
    )


def require_teacher(teacher: str, data: CacheData) -> None:
    """Raise IdentityError unless this model built the cache; reads its weights file, builds nothing."""
    require_same_teacher(data.url, data.reader.identity["teacher"], resolve_model(teacher))


def load_live_teacher(teacher: str, data: CacheData) -> LiveTeacher:
    """Load the model that built the cache, in the precision it had then. Check it with `require_teacher` before.

    Raises:
        UserError: no such model.
    """
    from logitcache.scorers.hf import load_engine

    engine = load_engine(resolve_model(teacher), dtype=data.reader.identity["teacher"]["dtype"])
    return LiveTeacher(scorer=engine, shape=ModelShape.from_config(engine.model.config.to_dict()))


def held_out_batches(data: CacheData, student: Student, training: Training) -> list[Batch]:
    """The first held-out sequences of the cache, up to the training window."""
    indices = data.split.held_out[: training.held_out_sequences]
    scored = data.reader.read(indices, max_completion_tokens=training.window)
    head = teacher_head(data.head, student.device)
    return [collate(part, head, student.device) for part in micro_batches(scored, training.micro_batch_tokens)]


def cached_source(data: CacheData, student: Student, training: Training) -> CachedPrefixes:
    """The teacher's text, from the cache alone."""
    return CachedPrefixes(
        reader=data.reader,
        indices=data.split.train,
        head=teacher_head(data.head, student.device),
        plan=training.plan,
        seed=training.seed,
        device=student.device,
    )


def on_policy_source(
    data: CacheData, student: Student, training: Training, teacher: LiveTeacher, sampling: Sampling
) -> OnPolicyPrefixes:
    """The student's text, scored live, on the cache's training prompts."""
    from logitcache.scorers.hf import engine_for

    generator = engine_for(
        student.model,
        student.tokenizer,
        origin=Origin.STUDENT,
        autocast=None if student.precision is torch.float32 else student.precision,
    )
    return OnPolicyPrefixes(
        generator=generator,
        scorer=teacher.scorer,
        prompts=prompts_of(data.reader.read_tokens(data.split.train)),
        sampling=sampling,
        head=teacher_head(teacher.scorer.head, student.device),
        plan=training.plan,
        student_shape=student.shape,
        teacher_shape=teacher.shape,
        seed=training.seed,
        device=student.device,
    )


def _tokenizer_fingerprint(student_dir: Path) -> str:
    from transformers import AutoTokenizer

    try:
        return tokenizer_fingerprint(AutoTokenizer.from_pretrained(student_dir).get_vocab())
    except (OSError, ValueError) as error:
        raise UserError(
            f"a student in {student_dir}", f"its tokenizer cannot be loaded ({error})", "save the tokenizer beside it"
        ) from error
