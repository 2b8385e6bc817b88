"""What a cell draws on: a cache, split; a live teacher where one is needed; the two sources of prefixes.

Guarantees: training from the cache needs no teacher, and nothing of one is imported for it; a student with another
tokenizer and a live teacher that did not build the cache are refused; held-out problems are neither trained on nor
used as prompts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from logitcache.errors import UserError
from logitcache.flops import ModelShape
from logitcache.identity import require_same_teacher, resolve_model, tokenizer_fingerprint, weights_fingerprint
from logitcache.scoring import Generator, Prompt, Sampling
from logitcache.store import Reader, open_cache
from logitcache.store.opening import SERVED, tier_named
from logitcache.store.place import redact
from trainer.batch import Batch, TeacherHead, batches_of, teacher_head
from trainer.distributed import ALONE, Ranks
from trainer.prefixes import CachedPrefixes, OnPolicyPrefixes, prompts_of
from trainer.provenance import commit, device_name, versions
from trainer.rollouts import (
    VLLMRollouts,
    load_rollout_engine,
    reconciled_stop_ids,
    stops_used,
    student_generator,
    unmerged_adapters,
)
from trainer.settings import BatchPlan, Training
from trainer.split import Split, split_by_problem
from trainer.student import Student, load_student, require_backend, student_config

if TYPE_CHECKING:
    from logitcache.service.scorer import ServedScorer

StudentEngine = Literal["transformers", "vllm"]
"""What a student writes with."""
KINDS = ("hidden", "full", "topk", "sampled")
"""Kinds of tiers, the one that says most first."""
EXACT = ("hidden", "full")
IDENTITY = ("cache_manifest", "student")
"""Entries of a configuration that a checkpoint keeps too: what it was trained from."""
STOPS_FROM = 1000
"""Cached completions that a teacher's stop tokens are read off."""


@dataclass(frozen=True, kw_only=True, eq=False)
class CacheData:
    """An open cache, split into what is trained on and what is measured on.

    Attributes:
        url: where it is.
        reader: of the tier that is trained on.
        measured: of the tier that held-out numbers are taken from: that one, or an exact one if it is coarse.
        split: of its sequences.
    """

    url: str
    reader: Reader
    measured: Reader
    split: Split

    @property
    def kind(self) -> str:
        """Of the targets that are trained on."""
        return kind_of(self.reader)

    @property
    def vocab_size(self) -> int:
        """Of the teacher: real tokens."""
        return int(self.reader.identity["teacher"]["vocab_size"])

    @property
    def build_flops(self) -> int:
        """What generating and scoring the cache cost."""
        return sum(self.reader.manifest.flops.values())

    @property
    def teacher_name(self) -> str:
        """What the cache calls its teacher."""
        return str(self.reader.identity["teacher"]["name"])


@dataclass(frozen=True, kw_only=True, eq=False)
class LiveTeacher:
    """The cache's teacher in memory, for scoring what students write."""

    scorer: Any
    """An engine: a `Scorer` that also knows its stop tokens."""
    shape: ModelShape


@dataclass(frozen=True, kw_only=True, eq=False)
class Writer:
    """A student that writes, and the tokens that end what it writes: its own stop tokens and the teacher's."""

    generator: Generator
    stop_ids: frozenset[int]


def open_data(cache_url: str, student_dir: Path, training: Training, *, targets: str | None = None) -> CacheData:
    """Open a cache for a student, whose tokenizer must be the cache's.

    Args:
        cache_url: a sealed cache.
        student_dir: the student, of which the tokenizer is read.
        training: for the share that is held out.
        targets: a tier to train on, by name or kind; None takes the one that says most (see `KINDS`), and of several
            of its kind the one with the least KL to the teacher.

    Raises:
        IdentityError: the student has another tokenizer.
        UserError: no such cache, tier or student, or too few problems to hold some out.
    """
    student_config(student_dir)
    tokens = open_cache(cache_url, targets=None, tokenizer=_tokenizer_fingerprint(student_dir))
    manifest = tokens.manifest
    # The same manifest for all: a cache that is sealed anew meanwhile must not be read at two states.
    shown = redact(cache_url)
    chosen = tier_named(shown, manifest, targets) if targets else best_tier(tokens, KINDS, shown)
    reader = replace(tokens, tier=chosen)
    measured = reader
    if kind_of(reader) not in EXACT and any(tier.kind in EXACT for tier in manifest.tiers.values()):
        measured = replace(tokens, tier=best_tier(tokens, EXACT, shown))
    problem_ids = tokens.samples(["problem_id"])["problem_id"].to_pylist()
    split = split_by_problem(problem_ids, training.held_out_share)
    return CacheData(url=cache_url, reader=reader, measured=measured, split=split)


def kind_of(reader: Reader) -> str:
    """Of the targets that a reader with a tier reads."""
    assert reader.tier is not None
    return reader.manifest.tiers[reader.tier].kind


def best_tier(reader: Reader, kinds: Sequence[str], url: str) -> str:
    """The name of the tier of the first of these kinds that is there; UserError without any."""

    def rank(name: str) -> tuple[int, float, str]:
        tier = tiers[name]
        return kinds.index(tier.kind), math.inf if tier.kl_nats is None else tier.kl_nats["mean"], name

    tiers = {name: tier for name, tier in reader.manifest.tiers.items() if tier.kind in kinds}
    if not tiers:
        raise UserError(f"targets of {url}", "it has tokens alone", "add a tier with `logitcache score`")
    return min(tiers, key=rank)


def configuration(
    command: str, data: CacheData, student_dir: Path, training: Training, sampling: Sampling
) -> dict[str, Any]:
    """What every recipe writes into its `config.json` before it starts. Reads the student's weights file."""
    return {
        "command": command,
        "cache_manifest": data.reader.manifest.digest,
        "targets": data.reader.tier,
        "measured_on": data.measured.tier,
        "student": {"name": student_dir.name, "fingerprint": weights_fingerprint(student_dir)},
        "training": asdict(training),
        "sampling": asdict(sampling),
        "versions": versions(),
        "device": device_name(),
        "commit": commit(),
    }


def open_student(data: CacheData, student_dir: Path, training: Training) -> Student:
    """The student before its first step. Raises UserError as `load_student` and `require_backend` do."""
    student = load_student(
        student_dir,
        vocab_size=data.vocab_size,
        precision=training.precision,
        gradient_checkpointing=training.gradient_checkpointing,
        lora=training.lora,
    )
    if training.backend is not None:
        require_backend(student, training.backend)
    return student


def require_teacher(teacher: str, data: CacheData) -> None:
    """Raise IdentityError unless this model built the cache; reads its weights file, builds nothing.

    Of a served one, `grpc://HOST:PORT#NAME`, the server says what it is.
    """
    if teacher.startswith(SERVED):
        _served_teacher(teacher, data)
    else:
        require_same_teacher(data.url, data.reader.identity["teacher"], resolve_model(teacher))


def require_window(asked: str, window: int, data: CacheData) -> None:
    """Raise UserError, about what was `asked`, unless the cache's completions may be as long as this window."""
    written = data.reader.identity["sampling"]["max_new_tokens"]
    if window > written:
        raise UserError(asked, f"completions of at most {written} tokens in the cache", f"ask for {written} at most")


def require_warmup(training: Training) -> None:
    """Raise UserError for a warm-up longer than the run; the default one is cut to it."""
    if training.warmup_steps > max(training.steps, Training.warmup_steps):
        found = f"the run has {training.steps} steps"
        raise UserError(f"--warmup-steps {training.warmup_steps}", found, "ask for as many at most")


def require_fits(data: CacheData, student_dir: Path, training: Training, *, writes: bool) -> None:
    """Raise UserError unless the student's context holds the longest sequence that it will be trained on.

    `writes` is whether the student writes any of the text: it may fill the window, whatever the cache's text does.
    """
    context = student_config(student_dir).get("max_position_embeddings")
    if context is None:
        return
    lengths = data.reader.samples(["prompt_tokens", "completion_tokens"])
    prompts, completions = (column.to_numpy() for column in lengths.columns)
    longest = int((prompts + (training.window if writes else completions.clip(max=training.window))).max())
    if longest > context:
        found = f"with their prompts up to {longest} tokens, of which the student's context holds {context}"
        raise UserError(f"sequences of a window of {training.window}", found, "choose a shorter --window")


def load_live_teacher(teacher: str, data: CacheData) -> LiveTeacher:
    """The model that built the cache, in the precision it had then. Check it with `require_teacher` before.

    Args:
        teacher: a model to load, or a served one, `grpc://HOST:PORT#NAME`, which stays where it is.
        data: the cache.

    Raises:
        IdentityError: a served one is another.
        UserError: no such model, or no answer.
    """
    if teacher.startswith(SERVED):
        served = _served_teacher(teacher, data)
        return LiveTeacher(scorer=served, shape=ModelShape.from_config(served.facts["config"]))
    from logitcache.scorers.hf import load_engine

    engine = load_engine(resolve_model(teacher), dtype=data.reader.identity["teacher"]["dtype"])
    return LiveTeacher(scorer=engine, shape=ModelShape.from_config(engine.model.config.to_dict()))


def _served_teacher(url: str, data: CacheData) -> ServedScorer:
    from logitcache.service.scorer import open_scorer

    return open_scorer(url, built_by=data.reader.identity["teacher"])


def held_out_batches(data: CacheData, student: Student, training: Training) -> list[Batch]:
    """The first held-out sequences of the cache, up to the training window."""
    indices = data.split.held_out[: training.held_out_sequences]
    scored = data.measured.read(indices, max_completion_tokens=training.window)
    return batches_of(scored, _head(data.measured, student), student.device, training.micro_batch_tokens)


def held_out_prompts(data: CacheData, training: Training) -> list[Prompt]:
    """The prompts of the held-out sequences that are measured on."""
    return prompts_of(data.reader.read_tokens(data.split.held_out[: training.held_out_sequences]))


def student_writer(
    data: CacheData, student: Student, teacher: LiveTeacher | None, vllm_engine: Any | None = None
) -> Writer:
    """The student's generator, over transformers or over an engine of `student_vllm_engine`.

    Without the teacher, its stop tokens are those that ended its cached completions.
    """
    if teacher is None:
        ids = stops_used(data.reader.read_tokens(data.split.train[:STOPS_FROM]))
    else:
        ids = teacher.scorer.stop_ids
    stop_ids = reconciled_stop_ids(student, ids)
    if vllm_engine is None:
        return Writer(generator=student_generator(student, stop_ids=stop_ids), stop_ids=stop_ids)
    rollouts = VLLMRollouts(student=student, engine=replace(vllm_engine, stop_ids=stop_ids))
    return Writer(generator=rollouts, stop_ids=stop_ids)


def student_vllm_engine(data: CacheData, student: Student, student_dir: Path, training: Training) -> Any:
    """An engine of vLLM with room for a step's rollouts from the cache's prompts; whoever loads it closes it.

    Raises:
        UserError: as `trainer.rollouts.load_rollout_engine`.
    """
    longest = max(data.reader.samples(["prompt_tokens"])["prompt_tokens"].to_pylist())
    return load_rollout_engine(student, student_dir, sequences=training.sequences, tokens=longest + training.window)


def cached_source(
    data: CacheData, student: Student, training: Training, plan: BatchPlan | None = None, *, ranks: Ranks = ALONE
) -> CachedPrefixes:
    """The teacher's text, from the cache alone, this rank's part of it; `plan` in place of the training's."""
    return CachedPrefixes(
        reader=data.reader,
        indices=data.split.train,
        head=_head(data.reader, student),
        plan=plan or training.plan,
        seed=training.seed,
        device=student.device,
        ranks=ranks,
    )


def on_policy_source(
    data: CacheData,
    student: Student,
    training: Training,
    teacher: LiveTeacher,
    sampling: Sampling,
    *,
    generator: Generator,
    plan: BatchPlan | None = None,
) -> OnPolicyPrefixes:
    """The student's text, scored live, on the cache's training prompts; `plan` in place of the training's."""
    return OnPolicyPrefixes(
        generator=generator,
        scorer=teacher.scorer,
        prompts=prompts_of(data.reader.read_tokens(data.split.train)),
        sampling=sampling,
        head=teacher_head(teacher.scorer.head, student.device),
        plan=plan or training.plan,
        student_shape=student.shape,
        teacher_shape=teacher.shape,
        seed=training.seed,
        device=student.device,
        lora=unmerged_adapters(student, generator),
    )


def _head(reader: Reader, student: Student) -> TeacherHead | None:
    return None if reader.head is None else teacher_head(reader.head, student.device)


def _tokenizer_fingerprint(student_dir: Path) -> str:
    from transformers import AutoTokenizer

    try:
        return tokenizer_fingerprint(AutoTokenizer.from_pretrained(student_dir).get_vocab())
    except (OSError, ValueError) as error:
        raise UserError(
            f"a student in {student_dir}", f"its tokenizer cannot be loaded ({error})", "save the tokenizer beside it"
        ) from error
