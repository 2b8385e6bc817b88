"""A model writes its answers to problems, says what it thought of every token, and has them checked.

Guarantees: work goes chunk by chunk, and a chunk is kept whole or not at all; what is written depends on the problems
and the sampling seed, not on where an earlier run was killed. Answers are checked while the next chunk is written.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from logitcache.console import Progress, note
from logitcache.errors import UserError
from logitcache.problems import Problem
from logitcache.prompts import PromptStyle, prompts_identity, render_prompts
from logitcache.records import TokenSequence
from logitcache.scorers.choose import EngineName, load_teacher, teacher_identity
from logitcache.scorers.fits import check_context
from logitcache.scorers.hf import load_stop_ids, load_tokenizer
from logitcache.scoring import Prompt, Sampling, Scorer
from trainer.answers import AnswerChecker
from trainer.own_text import OwnDistribution, own_distributions
from trainer.recipes.reader import TeacherAsReader
from trainer.recipes.samples import append_lines, keep_whole_chunks, sample_line


def require_causal(model_dir: Path) -> None:
    """Raise UserError for a checkpoint of another kind, to which transformers would give a random head."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    causal: set[str] = set()
    for names in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        causal |= {names} if isinstance(names, str) else set(names)
    named = json.loads((model_dir / "config.json").read_text()).get("architectures") or []
    if named and not causal.intersection(named):
        raise UserError(f"{model_dir.name} to write answers", f"it is a {named[0]}", "name a causal language model")


@dataclass(frozen=True, kw_only=True, eq=False)
class Writing:
    """Problems and how they are done; no model is loaded for it yet.

    Attributes:
        model_dir: of a causal language model.
        style: how a problem is put to it.
        generator: the engine that writes; scorer: the one that says what the model's distributions were.
        dtype: what both compute in.
        stop_tokens: that end a completion besides the model's own.
        problems_at_once: of a chunk.
        teacher: to read what was written, and be compared with the model.

    Raises:
        UserError: a prompt that leaves too little of the model's context, no stop token, or an unknown one.
    """

    model_dir: Path
    problems: Sequence[Problem]
    sampling: Sampling
    style: PromptStyle
    generator: EngineName
    scorer: EngineName
    dtype: str
    stop_tokens: Sequence[str]
    problems_at_once: int
    teacher: TeacherAsReader | None = None

    def __post_init__(self) -> None:
        if not self.stop_ids:
            name = self.model_dir.name
            raise UserError("completions that end", f"{name} has no stop token", "name one with --stop-tokens")
        context = json.loads((self.model_dir / "config.json").read_text()).get("max_position_embeddings")
        for prompt in self.prompts:
            check_context(prompt.problem_id, len(prompt.token_ids) + self.sampling.max_new_tokens, context)

    @cached_property
    def tokenizer(self) -> Any:
        """The model's."""
        return load_tokenizer(self.model_dir)

    @cached_property
    def prompts(self) -> list[Prompt]:
        """One for each problem."""
        return render_prompts(self.tokenizer, self.problems, self.style)

    @cached_property
    def stop_ids(self) -> frozenset[int]:
        """What ends a completion."""
        vocabulary = self.tokenizer.get_vocab()
        if unknown := [token for token in self.stop_tokens if token not in vocabulary]:
            raise UserError(f"stop token {unknown[0]}", "the tokenizer has no such token", "check its spelling")
        return load_stop_ids(self.model_dir, self.tokenizer) | {vocabulary[token] for token in self.stop_tokens}

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the text beside the model and the problems."""
        return {
            "prompts": prompts_identity(self.tokenizer, self.style),
            "sampling": asdict(self.sampling),
            "stop_tokens": list(self.stop_tokens),
            "engines": teacher_identity(self.generator, self.scorer),
            "dtype": self.dtype,
            "problems_at_once": self.problems_at_once,
        }

    def run(self, directory: Path, checker: AnswerChecker) -> None:
        """Do the chunks that are not in `directory` yet."""
        samples, size = self.sampling.samples_per_problem, self.problems_at_once
        chunks = [slice(at, at + size) for at in range(0, len(self.problems), size)]
        done = keep_whole_chunks(directory, [self.problems[chunk] for chunk in chunks], samples)
        if done == len(chunks):
            return
        if done:
            note(f"going on after {done * size} of {len(self.problems)} problems")
        stages = 2 if self.teacher is None else 3
        with Progress("evaluate", stages * samples * len(self.problems), "completions written and read") as progress:
            progress.add(stages * samples * done * size)
            writer = replace(self._load(self.generator, progress), stop_ids=self.stop_ids)
            scorer = writer if self.scorer == self.generator else self._load(self.scorer, progress)
            teacher = None if self.teacher is None else self.teacher.load()
            try:
                with ThreadPoolExecutor(max_workers=1, thread_name_prefix="checker") as beside:
                    pending: Future[None] | None = None
                    for chunk in chunks[done:]:
                        written = self._written(chunk, writer, scorer, teacher)
                        progress.add(0 if teacher is None else len(written))
                        if pending is not None:
                            pending.result()
                        pending = beside.submit(self._keep, directory, chunk, written, checker)
                    if pending is not None:
                        pending.result()
            finally:
                for engine in {writer, scorer}:
                    getattr(engine, "close", lambda: None)()

    def _load(self, name: EngineName, progress: Progress) -> Any:
        return load_teacher(name, name, self.model_dir, dtype=self.dtype, on_sequences=progress.add)

    def _written(
        self, chunk: slice, writer: Any, scorer: Scorer, teacher: Scorer | None
    ) -> list[tuple[TokenSequence, OwnDistribution]]:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        sequences = writer.generate(self.prompts[chunk], self.sampling)
        own = own_distributions(scorer, sequences, self.stop_ids, device, teacher)
        return list(zip(sequences, own, strict=True))

    def _keep(
        self,
        directory: Path,
        chunk: slice,
        written: Sequence[tuple[TokenSequence, OwnDistribution]],
        checker: AnswerChecker,
    ) -> None:
        samples = self.sampling.samples_per_problem
        lines = []
        for number, (sequence, own) in enumerate(written):
            text = self.tokenizer.decode(sequence.completion_ids, skip_special_tokens=True)
            checked = checker.check(self.problems[chunk][number // samples].answer, text)
            lines.append(sample_line(number % samples, sequence, own, text, checked))
        append_lines(directory, lines)
