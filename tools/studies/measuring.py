"""How a student does on the world's held-out problems, measured in memory while it trains.

Guarantees: the same problems, prompts and seed at every call, so two calls differ by the student alone; answers are
compared letter by letter; entropy is of the whole distribution at temperature 1, exact.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from logitcache.problems import Problem
from logitcache.prompts import PromptStyle, render_prompts
from logitcache.records import FinishReason, Origin
from logitcache.scorers.hf import engine_for
from logitcache.scoring import Sampling
from tools.studies.world import LONGEST, SYMBOLS, Level, as_problem, held_out_sums
from trainer.own_text import own_distributions
from trainer.policy.rewards import exact_match
from trainer.scores import avg_at_k, pass_at_k
from trainer.student import Student

STYLE = PromptStyle(instruction="")
SAMPLES = 8
ANSWERED = Sampling(max_new_tokens=LONGEST)
"""How every model writes: as in the paper, temperature 1, top-p 0.95."""
VOCABULARY = len(SYMBOLS)


@dataclass(frozen=True, kw_only=True)
class Exam:
    """The first `problems` held-out problems of each level."""

    problems: int

    def measure(self, student: Student) -> dict[str, dict[str, float]]:
        """Figures by level, see `figures_of`."""
        asked = {level: [as_problem(one) for one in held_out_sums(level)[: self.problems]] for level in Level}
        return {str(level): figures_of(student, problems) for level, problems in asked.items()}


def figures_of(student: Student, problems: Sequence[Problem]) -> dict[str, float]:
    """Avg@8 and Pass@8 (shares of 1), entropy (mean over tokens), mean length, share that ran into the limit.

    `avg_at_8_even` and `avg_at_8_odd` are of every other problem: what is chosen on one half is judged on the other.
    """
    engine = engine_for(student.model, student.tokenizer, origin=Origin.STUDENT, batch_size=512)
    sampling = replace(ANSWERED, samples_per_problem=SAMPLES)
    written = engine.generate(render_prompts(student.tokenizer, problems, STYLE), sampling)
    texts = student.tokenizer.batch_decode([one.completion_ids for one in written], skip_special_tokens=True)
    right = [exact_match(problems[number // SAMPLES], text) for number, text in enumerate(texts)]
    correct_PN = np.array(right, bool).reshape(-1, SAMPLES)
    own = own_distributions(engine, written, engine.stop_ids, student.device)
    lengths = np.array([one.completion_tokens for one in written])
    entropy_nats = np.array([one.entropy_nats for one in own])
    avg_P = avg_at_k(correct_PN, SAMPLES)
    return {
        "avg_at_8": float(avg_P.mean()),
        "avg_at_8_even": float(avg_P[::2].mean()),
        "avg_at_8_odd": float(avg_P[1::2].mean()),
        "pass_at_8": float(pass_at_k(correct_PN, SAMPLES).mean()),
        "entropy_nats": float(entropy_nats @ lengths / lengths.sum()),
        "length_tokens": float(lengths.mean()),
        "truncated_share": float(np.mean([one.finish_reason is FinishReason.LENGTH for one in written])),
    }


def mean_over_levels(measured: Mapping[str, Mapping[str, float]], figure: str) -> float:
    """Of one figure, each level counting equally."""
    return float(np.mean([measured[level][figure] for level in Level]))
