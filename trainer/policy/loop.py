"""The GRPO loop: groups of answers are written and judged, then learned from, one rollout batch a step.

Guarantees: as `trainer.loop`'s: float32 master weights, a line of metrics for every step, and with checkpoints, a run
that was killed takes the same steps as one that never was, bit for bit on one machine.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from trainer.checkpoint import Checkpoints, Stateful
from trainer.flops import FlopLedger
from trainer.loop import Trained, new_optimizer
from trainer.policy.groups import Groups
from trainer.policy.learner import Learner
from trainer.runs import MetricsLog


def train_policy(
    *,
    learner: Learner,
    source: Groups,
    ledger: FlopLedger,
    metrics: MetricsLog,
    checkpoints: Checkpoints | None = None,
    on_step: Callable[[dict[str, Any]], None] = lambda _: None,
) -> Trained:
    """Train a policy in place, from the newest checkpoint if there is one.

    Args:
        learner: the policy and how it learns.
        source: writes and judges its answers.
        ledger: gets the FLOPs.
        metrics: gets a line per step; emptied, or cut to the checkpoint's length.
        checkpoints: where they go and are looked for; None writes none.
        on_step: told each line of metrics.

    Raises:
        UserError: a reward, ratio, loss or gradient that is not finite (before the update it would have spoiled); a
            checkpoint that cannot be read or written.
    """
    policy, training = learner.policy, learner.training
    optimizer = new_optimizer(policy, training.optimisation)
    trained = Trained()
    parts: dict[str, Stateful] = {"source": source, "ledger": ledger, "metrics": metrics, "trained": trained}
    if checkpoints is None or checkpoints.latest() is None:
        metrics.clear()
    first = 0 if checkpoints is None else checkpoints.restore(policy.model, optimizer, parts)
    for step in range(first, training.steps):
        started = time.perf_counter()
        trained.usage.skip()
        drawn = source.draw(step, ledger)
        drawn_s = time.perf_counter() - started
        learned = learner.learn(drawn, optimizer, ledger, step)
        step_s = time.perf_counter() - started
        tokens = sum(sequence.completion_tokens for sequence in drawn.sequences)
        rows = sum(len(sequence) - 1 for sequence in drawn.sequences)
        trained.completion_tokens += tokens
        trained.rows += rows
        trained.usage.lap()
        line = {
            "step": step,
            **drawn.figures(),
            **learned,
            "learning_rate": training.optimisation.rate.at(step),
            "completion_tokens": tokens,
            "rows": rows,
            "draw_s": drawn_s,
            "step_s": step_s,
            "flops": ledger.marginal(),
        }
        metrics.write(line)
        on_step(line)
        if checkpoints is not None and checkpoints.due(step + 1, of=training.steps):
            checkpoints.save(step + 1, policy.model, optimizer, parts)
    return trained
