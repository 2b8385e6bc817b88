"""What an equal-FLOP study needs and what it will come to: its inputs checked, its steps counted, before any training.

Guarantees: nothing is written and no weights are built; the smallest budget pays for the longest step there can be.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from logitcache.errors import UserError, require
from logitcache.flops import ModelShape
from logitcache.prompts import PromptStyle
from logitcache.scoring import Sampling
from logitcache.store.opening import SERVED
from trainer.objectives import Objective, require_served
from trainer.planning.costs import Pair, Text, step_cost
from trainer.planning.models import model_shape
from trainer.planning.study import Column, Study, prefix_name, prefix_of, require_a_step, require_rate, steps_within
from trainer.prefixes import shares
from trainer.recipes.data import (
    EXACT,
    CacheData,
    kind_of,
    load_live_teacher,
    open_data,
    require_teacher,
    require_window,
)
from trainer.schedules import Decay
from trainer.settings import BatchPlan, Prefix, Training


@dataclass(frozen=True, kw_only=True)
class Questions:
    """A problem set to answer at every point.

    Attributes:
        source: see `load_benchmark`.
        limit: the first so many problems; None for all.
        samples: answers to each.
        max_new_tokens: of an answer.
        style: how a problem is put.
    """

    source: str
    limit: int | None = None
    samples: int = 4
    max_new_tokens: int = 256
    style: PromptStyle = PromptStyle()  # noqa: RUF009 (frozen)


@dataclass(frozen=True, kw_only=True)
class Setup:
    """How a study is run: the options of `trainer equal-flops` beside the study's own.

    Attributes:
        cache_url: a sealed cache with hidden states or full vocabularies, to measure on.
        student_dir: the model that every run starts from.
        teacher: the model that built the cache; loaded for student prefixes only.
        training: how every run is trained, but for steps, which follow from budgets, and seeds, which are the study's.
        sampling: how students write, in training and to answer.
        targets: the tier to train from on teacher prefixes; None for the one that says most.
        questions: to answer at every point; None measures on held-out text alone.
        checkpoint_every: steps between checkpoints of a run.
        cross_entropy_share: of the loss, see `Objective`; on teacher prefixes alone.
    """

    cache_url: str
    student_dir: Path
    teacher: str
    training: Training
    sampling: Sampling
    targets: str | None = None
    questions: Questions | None = None
    checkpoint_every: int = 100
    cross_entropy_share: float = 0.0

    def __post_init__(self) -> None:
        if self.training.schedule is not Decay.CONSTANT:
            found = "how many steps a budget pays for is not known beforehand"
            raise UserError(f"--schedule {self.training.schedule}", found, "leave it constant")
        require(self.training.seed == Training.seed, "no --seed", self.training.seed, "give --seeds")
        require(self.training.steps == Training.steps, "no --steps", self.training.steps, "the --budgets decide")
        require(self.checkpoint_every >= 1, "--checkpoint-every, at least 1", self.checkpoint_every)

    def objective(self, prefix: Prefix, weight: float) -> Objective:
        """The mix with this forward weight, and on teacher prefixes the cross-entropy of their text."""
        return Objective(
            forward_weight=weight,
            temperature=self.training.kl_temperature,
            backend=self.training.backend,
            cross_entropy_share=self.share_of_text(prefix),
        )

    def share_of_text(self, prefix: Prefix) -> float:
        """Of the loss, that is the cross-entropy of the text: none where the student writes it."""
        return self.cross_entropy_share if prefix is Prefix.TEACHER else 0.0

    def open(self, study: Study) -> CacheData:
        """Open the cache for a study.

        Raises:
            UserError: as `open_data` and `require_teacher`; no exact targets to measure on; a mix the tier does not
                serve; a model whose cost is not known; a budget that is too small.
        """
        data = open_data(self.cache_url, self.student_dir, self.training, targets=self.targets)
        if kind_of(data.measured) not in EXACT:
            found = "it has no exact targets to measure on"
            raise UserError(f"equal FLOPs from {self.cache_url}", found, "add `logitcache score --targets hidden`")
        if self.cross_entropy_share and 0 not in study.student_shares:
            found = "no cell on teacher prefixes, whose text it is of"
            raise UserError(f"--cross-entropy-share {self.cross_entropy_share:g}", found, "leave it out")
        for share in study.student_shares:
            if prefix_of(share) is Prefix.MIXED and data.kind not in EXACT:
                found = f"{data.kind} targets, which no metric may mix with the teacher's exact ones"
                raise UserError(f"--student-shares {share:g}", found, "train from hidden states or full vocabularies")
        for weight in study.mixes:
            require_served(self.objective(Prefix.TEACHER, weight), data.kind)
        require_teacher(self.teacher, data)
        require_window(f"--window {self.training.window}", self.training.window, data)
        longest_prompt = pc.max(_trained_lengths(data)["prompt_tokens"]).as_py()
        require_a_step(_columns(self, study, data, longest_prompt, self.training.window), study.budgets[0])
        return data


def plan_equal_flops(setup: Setup, study: Study, *, flops_per_second: float | None = None) -> dict[str, Any]:
    """What a study will come to, from the cache's mean lengths: steps by cell and budget, runs, FLOPs, time, money.

    Args:
        setup: see `Setup`.
        study: see `Study`.
        flops_per_second: that training is known to achieve on this machine; a finished study reports it.

    Raises:
        UserError: see the functions called.
    """
    require_rate("--flops-per-second", flops_per_second)
    data = setup.open(study)
    lengths = _trained_lengths(data)
    within = pc.min_element_wise(lengths["completion_tokens"], setup.training.window)
    prompt_tokens, completion_tokens = (round(pc.mean(column).as_py()) for column in (lengths["prompt_tokens"], within))
    mean = _columns(setup, study, data, prompt_tokens, completion_tokens)
    total = study.runs * study.budgets[-1]
    hours = None if flops_per_second is None else total / flops_per_second / 3600
    epoch_steps = len(data.split.train) / setup.training.sequences
    return {
        "budgets": steps_within(mean, study.budgets, epoch_steps=epoch_steps, flops_per_second=flops_per_second),
        "runs": study.runs,
        "measured_at": {column.prefix: study.points(column.share) for column in mean},
        "flops": total,
        "hours": hours,
        "money": None if hours is None or study.price_per_hour is None else hours * study.price_per_hour,
    }


def _columns(setup: Setup, study: Study, data: CacheData, prompt_tokens: int, completion_tokens: int) -> list[Column]:
    """What a step of sequences of this length costs with each share of the student's own."""
    student, training = model_shape(str(setup.student_dir)), setup.training
    pair = Pair(student=student, teacher=_teacher_shape(setup.teacher, data), vocab=data.vocab_size)
    found = []
    for student_share in study.student_shares:
        prefix, step_flops = prefix_of(student_share), 0
        for written_by, plan in parts(training.plan, student_share).items():
            cost = step_cost(
                pair,
                Text.alike(sequences=plan.sequences, prompt_tokens=prompt_tokens, completion_tokens=completion_tokens),
                prefix=written_by,
                kind=data.kind,
                gradient_checkpointing=training.gradient_checkpointing,
                lora=training.lora,
                cross_entropy_share=setup.share_of_text(prefix),
            )
            step_flops += sum(cost.values())
        found.append(
            Column(
                prefix=prefix_name(student_share),
                tier=None if prefix is Prefix.STUDENT else data.reader.tier,
                step_flops=step_flops,
                share=study.share(student_share, data.build_flops),
            )
        )
    return found


def parts(plan: BatchPlan, student_share: float) -> dict[Prefix, BatchPlan]:
    """Who writes how much of a step; UserError for a share that is no whole number of sequences."""
    prefix = prefix_of(student_share)
    if prefix is not Prefix.MIXED:
        return {prefix: plan}
    return dict(zip((Prefix.TEACHER, Prefix.STUDENT), shares(plan, student_share), strict=True))


def _teacher_shape(teacher: str, data: CacheData) -> ModelShape:
    """Of a model by its configuration; of a served one, which loads nothing here, as its server says."""
    return load_live_teacher(teacher, data).shape if teacher.startswith(SERVED) else model_shape(teacher)


def _trained_lengths(data: CacheData) -> pa.Table:
    """Tokens of the prompts and completions that are trained on."""
    return data.reader.samples(["prompt_tokens", "completion_tokens"]).take(list(data.split.train))
