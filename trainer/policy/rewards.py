"""What an answer earns: verifiable rewards, or a function of one's own.

Guarantees: a reward depends on the problem and the text alone; nothing that a model writes hangs or crashes the caller.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from logitcache.errors import UserError
from logitcache.problems import Problem
from trainer.answers import AnswerChecker, Verdict
from trainer.policy.settings import RewardKind

Reward = Callable[[Problem, str], float]
"""Of a problem and the text of an answer without special tokens. The same arguments must give the same finite value."""

_BOX = re.compile(r"\\boxed\{([^{}]*)\}")


@contextmanager
def judging(reward: RewardKind | Reward, asked: Sequence[Problem]) -> Iterator[Reward]:
    """The function that judges; while it is open, a process of its own checks answers if they are mathematics.

    Args:
        reward: how.
        asked: what will be judged. With a reward of ours, the right answer to each must earn something.

    Raises:
        UserError: a problem whose own answer would earn nothing; mathematics to check without math-verify.
    """
    match reward:
        case RewardKind.MATH:
            with AnswerChecker() as checker:
                checker.require_checkable(asked)
                yield lambda problem, text: float(checker.check(problem.answer, text).verdict is Verdict.CORRECT)
        case RewardKind.EXACT:
            for problem in asked:
                if not exact_match(problem, f"\\boxed{{{problem.answer}}}"):
                    found = f"`{problem.answer[:40]}` cannot be in a box that --reward exact reads"
                    raise UserError(f"the answer of problem {problem.id}", found, "use --reward math, or leave it out")
            yield exact_match
        case _:
            yield reward


def exact_match(problem: Problem, text: str) -> float:
    """1 if the last box of the text, or its last word where there is no box, is the answer letter by letter."""
    found = _BOX.findall(text) or text.split() or [""]
    return float(found[-1].strip() == problem.answer)


def reward_name(reward: RewardKind | Reward) -> str:
    """What a configuration calls it."""
    if isinstance(reward, RewardKind):
        return str(reward)
    return f"{reward.__module__}.{getattr(reward, '__qualname__', type(reward).__qualname__)}"
