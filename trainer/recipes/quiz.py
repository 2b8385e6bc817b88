"""A student in memory answers a problem set, as a measure during training; `trainer evaluate` is for finished models.

Guarantees: the same problems, prompts and seed at every call, so that two calls differ by the student alone; every
problem counts equally; the writing is in the ledger as evaluation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from logitcache.problems import Problem
from logitcache.prompts import PromptStyle, render_prompts
from logitcache.records import FinishReason
from logitcache.scoring import Generator, Sampling
from trainer.answers import AnswerChecker, Verdict
from trainer.flops import FlopLedger, Phase, rollout
from trainer.rollouts import unmerged_adapters
from trainer.scores import avg_at_k, pass_at_k
from trainer.student import Student


@dataclass(frozen=True, kw_only=True, eq=False)
class Quiz:
    """Problems, how they are put, and how they are answered.

    Attributes:
        sampling: of the answers; `samples_per_problem` is k.
        checker: open for as long as answers are checked.
    """

    problems: Sequence[Problem]
    style: PromptStyle
    sampling: Sampling
    checker: AnswerChecker

    def measure(self, student: Student, generator: Generator, ledger: FlopLedger, *, step: int) -> dict[str, float]:
        """Avg@k and Pass@k as shares of 1, and the answers' mean length and share that ran into the limit."""
        samples = self.sampling.samples_per_problem
        prompts = render_prompts(student.tokenizer, self.problems, self.style)
        written = generator.generate(prompts, self.sampling)
        texts = student.tokenizer.batch_decode([one.completion_ids for one in written], skip_special_tokens=True)
        verdicts = [
            self.checker.check(self.problems[number // samples].answer, text).verdict
            for number, text in enumerate(texts)
        ]
        correct_PN = np.array([verdict is Verdict.CORRECT for verdict in verdicts]).reshape(-1, samples)
        lengths = [one.completion_tokens for one in written]
        prompt_tokens = [one.prompt_tokens for one in written]
        cost = rollout(student.shape, prompt_tokens, lengths, unmerged_adapters(student, generator))
        ledger.add(Phase.EVALUATION, cost, step=step)
        return {
            f"avg_at_{samples}": float(avg_at_k(correct_PN, samples).mean()),
            f"pass_at_{samples}": float(pass_at_k(correct_PN, samples).mean()),
            "answer_length_tokens": sum(lengths) / len(lengths),
            "answer_truncated_share": sum(one.finish_reason is FinishReason.LENGTH for one in written) / len(written),
        }
