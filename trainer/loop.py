"""The training loop: one straight line, the same for every cell of the grid.

Guarantees: float32 master weights; a step's loss is the mean over all its completion tokens (or sequences) however it
is cut into micro-batches, and what is logged are means over tokens; a loss or gradient that is not finite stops the run
before it touches the weights, naming the samples; every step is a line in `metrics.jsonl`. The loop draws no random
numbers: its source does. With checkpoints, a run that was killed and is started again takes the same steps as one that
never was, bit for bit on one machine.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from logitcache.errors import UserError
from logitcache.usage import Stopwatch
from trainer.batch import Batch, teacher_head_flops
from trainer.checkpoint import Checkpoints, Stateful
from trainer.distributed import Ranks, whole
from trainer.flops import FlopLedger, Phase, add_training
from trainer.objectives import Objective, StepSize, known, step_mean
from trainer.prefixes import PrefixSource
from trainer.runs import MetricsLog, Unlogged
from trainer.schedules import WeightSchedule
from trainer.settings import Optimisation, Weighting
from trainer.student import Student


@dataclass(kw_only=True)
class Trained:
    """What a run did: completion tokens and packed rows trained on, and what its steps took beside FLOPs."""

    completion_tokens: int = 0
    rows: int = 0
    usage: Stopwatch = field(default_factory=Stopwatch)

    def facts(self) -> dict[str, Any]:
        """For a result: tokens and their rate, seconds, joules."""
        tokens, seconds = self.completion_tokens, self.usage.seconds
        rate = tokens / seconds if seconds else 0.0
        return {"completion_tokens": tokens, "tokens_per_s": rate, **self.usage.state()}

    def state(self) -> dict[str, Any]:
        """As JSON values."""
        return {"completion_tokens": self.completion_tokens, "rows": self.rows, **self.usage.state()}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self.completion_tokens, self.rows = state["completion_tokens"], state["rows"]
        self.usage.restore(state)


def distill(
    *,
    student: Student,
    source: PrefixSource,
    objective: Objective,
    optimisation: Optimisation,
    ledger: FlopLedger,
    metrics: MetricsLog | Unlogged,
    weights: WeightSchedule | None = None,
    weighting: Weighting = Weighting.TOKEN,
    check: Callable[[int, FlopLedger], Mapping[str, Any]] = lambda _step, _ledger: {},
    checkpoints: Checkpoints | None = None,
    stateful: Mapping[str, Stateful] | None = None,
    on_step: Callable[[dict[str, Any]], None] = lambda _: None,
) -> Trained:
    """Train `student` in place up to `optimisation.steps` steps, from the newest checkpoint if there is one.

    Ends before that if the source does. On several ranks, all call it alike, each with its part of the text.

    Args:
        student: the model that learns.
        source: text and the teacher's distributions.
        objective: the divergence.
        optimisation: steps and the optimizer.
        ledger: gets the FLOPs.
        metrics: gets a line per step; emptied, or cut to the checkpoint's length.
        weights: of forward KL over the steps; None keeps the objective's.
        weighting: what counts equally in the loss.
        check: called before each step, outside its time; what it returns goes into the step's line.
        checkpoints: where they go and are looked for; None writes none.
        stateful: further parts whose state belongs into a checkpoint, by name.
        on_step: told each line of metrics.

    Raises:
        UserError: a loss or gradient that is not finite (before the step it would have spoiled); a checkpoint that
            cannot be read or written.
    """
    optimizer, ranks = new_optimizer(student, optimisation), student.ranks
    trained = Trained()
    parts: dict[str, Stateful] = {
        "source": source,
        "ledger": ledger,
        "metrics": metrics,
        "trained": trained,
        **(stateful or {}),
    }
    if checkpoints is None or checkpoints.latest() is None:
        metrics.clear()
    first = 0 if checkpoints is None else checkpoints.restore(student.model, optimizer, parts)
    for step in range(first, optimisation.steps):
        checked = check(step, ledger)
        if weights is not None:
            objective = replace(objective, forward_weight=weights.at(step))
        step_started, spent = time.perf_counter(), ledger.by_phase()
        trained.usage.skip()
        batches = source.draw(step, ledger)
        drawn_s = time.perf_counter() - step_started
        size = StepSize.of(batches, ranks)
        if size.micro_batches == 0:
            break
        names = objective.names(batches[0].targets)
        sums = torch.zeros(len(names), dtype=torch.float64)
        for batch in batches:
            loss_R, batch_sums = objective.over(student.head_over(batch), batch)
            loss = step_mean(loss_R, batch, size, weighting)
            require_finite("the loss", loss, step, [batch])
            loss.backward()
            sums += batch_sums
            add_batch(ledger, student, objective, batch, step=step)
        for _ in range(size.micro_batches - len(batches)):
            # All ranks gather sharded weights at once: one with fewer micro-batches goes along for nothing.
            (0 * objective.over(student.head_over(batches[0]), batches[0])[0].sum()).backward()
        grad_norm = take_step(student, optimizer, optimisation, step, batches)
        add_other_ranks(ledger, ranks, before=spent, step=step)
        step_s = time.perf_counter() - step_started
        trained.completion_tokens += size.target_rows
        trained.rows += size.tokens
        trained.usage.lap()
        means = map(known, (ranks.gathered(sums).sum(0) / size.target_rows).tolist())
        line = {
            "step": step,
            **dict(zip(names, means, strict=True)),
            "grad_norm": grad_norm,
            "learning_rate": optimisation.rate.at(step),
            "forward_weight": objective.forward_weight,
            "sequences": size.sequences,
            "completion_tokens": size.target_rows,
            "rows": size.tokens,
            "draw_s": drawn_s,
            "step_s": step_s,
            "flops": ledger.marginal(),
            **checked,
        }
        metrics.write(line)
        on_step(line)
        if checkpoints is not None and checkpoints.due(step + 1, of=optimisation.steps):
            checkpoints.save(step + 1, student.model, optimizer, parts)
    source.close()
    return trained


def add_batch(ledger: FlopLedger, student: Student, objective: Objective, batch: Batch, *, step: int) -> None:
    """What `distill` spends on a micro-batch that is drawn."""
    add_training(
        ledger,
        student.shape,
        batch,
        teacher_head_flops=teacher_head_flops(batch),
        step=step,
        gradient_checkpointing=student.gradient_checkpointing,
        cross_entropy_share=objective.cross_entropy_share,
        lora=student.lora,
    )


def add_other_ranks(ledger: FlopLedger, ranks: Ranks, *, before: Mapping[Phase, int], step: int) -> None:
    """Add to this rank's ledger what the other ranks' have gained since it stood at `before`: then all hold the sum."""
    if ranks.size == 1:
        return
    gained = torch.tensor([flops - before[phase] for phase, flops in ledger.by_phase().items()])
    others = ranks.gathered(gained).sum(0) - gained
    for phase, flops in zip(Phase, others.tolist(), strict=True):
        if flops:
            ledger.add(phase, flops, step=step)


def new_optimizer(student: Student, optimisation: Optimisation) -> torch.optim.Optimizer:
    """AdamW over what is trained; `take_step` sets its learning rate."""
    return torch.optim.AdamW(
        student.parameters, lr=0.0, betas=optimisation.betas, weight_decay=optimisation.weight_decay, fused=True
    )


def take_step(
    student: Student, optimizer: torch.optim.Optimizer, optimisation: Optimisation, step: int, batches: Sequence[Batch]
) -> float:
    """Clip the gradient, take it at the step's learning rate, and forget it; its 2-norm before it was clipped.

    Raises:
        UserError: it is not finite, naming the batches' samples; the weights are as they were.
    """
    grad_norm = whole(torch.nn.utils.clip_grad_norm_(student.parameters, optimisation.max_grad_norm))
    require_finite("the gradient", grad_norm, step, batches)
    for group in optimizer.param_groups:
        group["lr"] = optimisation.rate.at(step)
    optimizer.step()
    optimizer.zero_grad()
    return float(grad_norm)


def require_finite(what: str, value: Tensor, step: int, batches: Sequence[Batch]) -> None:
    """Raise UserError, naming the batches' samples, unless a scalar is finite."""
    if not bool(torch.isfinite(value)):
        samples = ", ".join(sample_id for batch in batches for sample_id in batch.sample_ids)
        raise UserError(
            f"{what} of step {step}",
            f"it is {float(value.detach())}, on samples {samples}",
            "look at those samples, or use a lower --learning-rate or --precision float32 in another --out",
        )
