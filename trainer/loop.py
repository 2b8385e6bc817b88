"""The training loop: one straight line, the same for every cell of the grid.

Guarantees: float32 master weights; a step's loss is the mean over all its completion tokens however it is cut into
micro-batches; a loss or gradient that is not finite stops the run before it touches the weights, naming the samples;
every step is a line in `metrics.jsonl`. The loop draws no random numbers: its source does.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kernels import KLOutput
from logitcache.errors import UserError
from trainer.batch import Batch, teacher_head_flops
from trainer.flops import FlopLedger, add_training
from trainer.objectives import Objective, token_mean
from trainer.prefixes import PrefixSource
from trainer.runs import MetricsLog
from trainer.settings import Optimisation
from trainer.student import Student


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What a run did: completion tokens and packed rows trained on, and seconds spent in steps."""

    completion_tokens: int
    rows: int
    seconds: float


def distill(
    *,
    student: Student,
    source: PrefixSource,
    objective: Objective,
    optimisation: Optimisation,
    ledger: FlopLedger,
    metrics: MetricsLog,
    on_step: Callable[[dict[str, Any]], None] = lambda _: None,
) -> Trained:
    """Train `student` in place for `optimisation.steps` steps.

    Raises:
        UserError: a loss or gradient that is not finite (before the step it would have spoiled).
    """
    optimizer = torch.optim.AdamW(
        student.parameters, lr=0.0, betas=optimisation.betas, weight_decay=optimisation.weight_decay, fused=True
    )
    total_tokens = total_rows = 0
    started = time.perf_counter()
    for step in range(optimisation.steps):
        step_started = time.perf_counter()
        batches = source.draw(step, ledger)
        drawn_s = time.perf_counter() - step_started
        step_rows = sum(batch.target_rows for batch in batches)
        sums = torch.zeros(len(_FIELDS), dtype=torch.float64)
        for batch in batches:
            out = objective(student.head_over(batch), batch.targets)
            loss = token_mean(out.loss, step_rows)
            _require_finite("the loss", loss, step, [batch])
            loss.backward()
            sums += _sums(out)
            add_training(ledger, student.shape, batch, teacher_head_flops=teacher_head_flops(batch), step=step)
        grad_norm = torch.nn.utils.clip_grad_norm_(student.parameters, optimisation.max_grad_norm)
        _require_finite("the gradient", grad_norm, step, batches)
        rate = optimisation.rate_at(step)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
        total_tokens, total_rows = total_tokens + step_rows, total_rows + sum(batch.tokens for batch in batches)
        means = dict(zip(_FIELDS, (sums / step_rows).tolist(), strict=True))
        line = {
            "step": step,
            **{name: None if math.isnan(mean) else mean for name, mean in means.items()},
            "grad_norm": float(grad_norm),
            "learning_rate": rate,
            "completion_tokens": step_rows,
            "rows": sum(batch.tokens for batch in batches),
            "draw_s": drawn_s,
            "step_s": time.perf_counter() - step_started,
            "flops": ledger.marginal(),
        }
        metrics.write(line)
        on_step(line)
    return Trained(completion_tokens=total_tokens, rows=total_rows, seconds=time.perf_counter() - started)


_FIELDS = ("loss_nats", "forward_kl_nats", "reverse_kl_nats", "student_entropy_nats", "teacher_entropy_nats")


def _sums(out: KLOutput) -> Tensor:
    """float64, one sum per field; NaN for a reverse KL that the targets say nothing of (null in the metrics)."""
    reverse = torch.full_like(out.loss, math.nan) if out.reverse_kl is None else out.reverse_kl
    fields = (out.loss, out.forward_kl, reverse, out.student_entropy, out.teacher_entropy)
    return torch.stack([field.detach().double().sum() for field in fields]).cpu()


def _require_finite(what: str, value: Tensor, step: int, batches: list[Batch]) -> None:
    if not bool(torch.isfinite(value)):
        samples = ", ".join(sample_id for batch in batches for sample_id in batch.sample_ids)
        raise UserError(
            f"{what} of step {step}",
            f"it is {float(value.detach())}, on samples {samples}",
            "lower --learning-rate, use --precision float32, or look at those samples",
        )
