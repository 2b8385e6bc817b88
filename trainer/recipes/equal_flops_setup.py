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
from logitcache.prompts import PromptStyle
from logitcache.scoring import Sampling
from trainer.objectives import Objective, require_served
from trainer.planning.costs import Pair, Text, step_cost
from trainer.planning.models import model_shape
from trainer.planning.study import Column, Study, require_a_step, steps_within
from trainer.recipes.data import EXACT, CacheData, kind_of, open_data, require_teacher, require_window
from trainer.schedules import Decay
from trainer.settings import Prefix, Training


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
    """

    cache_url: str
    student_dir: Path
    teacher: str
    training: Training
    sampling: Sampling
    targets: str | None = None
    questions: Questions | None = None
    checkpoint_every: int = 100

    def __post_init__(self) -> None:
        if self.training.schedule is not Decay.CONSTANT:
            found = "how many steps a budget pays for is not known beforehand"
            raise UserError(f"--schedule {self.training.schedule}", found, "leave it constant")
        require(self.training.seed == Training.seed, "no --seed", self.training.seed, "give --seeds")
        require(self.training.steps == Training.steps, "no --steps", self.training.steps, "the --budgets decide")

    def objective(self, weight: float) -> Objective:
        """The mix with this forward weight."""
        training = self.training
        return Objective(forward_weight=weight, temperature=training.kl_temperature, backend=training.backend)

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
        for weight in study.mixes:
            require_served(self.objective(weight), data.kind)
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
        "measured_at": {str(column.prefix): study.points(column.share) for column in mean},
        "flops": total,
        "hours": hours,
        "money": None if hours is None or study.price_per_hour is None else hours * study.price_per_hour,
    }


def _columns(setup: Setup, study: Study, data: CacheData, prompt_tokens: int, completion_tokens: int) -> list[Column]:
    """What a step of sequences of this length costs, from the cache and on student prefixes."""
    student, teacher = model_shape(str(setup.student_dir)), model_shape(setup.teacher)
    pair, training = Pair(student=student, teacher=teacher, vocab=data.vocab_size), setup.training
    text = Text.alike(sequences=training.sequences, prompt_tokens=prompt_tokens, completion_tokens=completion_tokens)
    found = []
    for prefix, tier in ((Prefix.TEACHER, data.reader.tier), (Prefix.STUDENT, None)):
        cost = step_cost(
            pair,
            text,
            prefix=prefix,
            kind=data.kind,
            gradient_checkpointing=training.gradient_checkpointing,
            lora=training.lora,
        )
        share = study.share(prefix, data.build_flops)
        found.append(Column(prefix=prefix, tier=tier, step_flops=sum(cost.values()), share=share))
    return found


def _trained_lengths(data: CacheData) -> pa.Table:
    """Tokens of the prompts and completions that are trained on."""
    return data.reader.samples(["prompt_tokens", "completion_tokens"]).take(list(data.split.train))
