"""The truth: every divergence in float64, from its definition, with torch's own autograd.

Guarantees: no shortcut; logits, log-softmax and sums as the equations in docs/objectives.md say. Deliberately not here:
any care for memory or speed, and heads split over ranks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.checks import Call
from kernels.ragged import row_of_entry
from kernels.types import DenseTargets, KLOutput, LinearHead, SampledTargets, TopKTargets
from kernels.validate import require


def divergence(call: Call) -> KLOutput:
    """Compute `call` in float64."""
    require(call.student.shard is None, "backend 'reference' with a head", "split over ranks", "a whole head")
    log_q = torch.log_softmax(_logits(call.student.tempered(call.temperature)), dim=1)
    student_entropy = _entropy(log_q.detach())
    reverse: Tensor | None
    match call.targets:
        case LinearHead() | DenseTargets():
            log_p = _teacher_log_probs(call.targets, call)
            forward, reverse = _kl(log_p, log_q), _kl(log_q, log_p)
            teacher_entropy = _entropy(log_p)
        case TopKTargets():
            log_p, log_q = _outcomes(call.targets, log_q)
            forward, reverse = _kl(log_p, log_q), _kl(log_q, log_p)
            teacher_entropy = call.targets.entropy.double()
        case SampledTargets():
            forward, reverse = _sampled(call.targets, log_q), None
            teacher_entropy = call.targets.entropy.double()
    loss = forward if call.forward_weight == 1 else reverse
    assert loss is not None
    if 0 < call.forward_weight < 1 and reverse is not None:
        loss = call.forward_weight * forward + (1 - call.forward_weight) * reverse

    def keep(value: Tensor) -> Tensor:
        return value if call.row_mask is None else torch.where(call.row_mask, value, 0.0)

    return KLOutput(
        loss=keep(loss),
        forward_kl=keep(forward.detach()),
        reverse_kl=None if reverse is None else keep(reverse.detach()),
        student_entropy=keep(student_entropy),
        teacher_entropy=keep(teacher_entropy),
    )


def _logits(head: LinearHead) -> Tensor:
    logits = head.hidden.double() @ head.weight[: head.width].double().T
    if head.bias is not None:
        logits = logits + head.bias[: head.width].double()
    logits = logits * head.scale
    return logits if head.soft_cap is None else head.soft_cap * torch.tanh(logits / head.soft_cap)


@torch.no_grad()
def _teacher_log_probs(targets: LinearHead | DenseTargets, call: Call) -> Tensor:
    match targets:
        case LinearHead():
            logits = _logits(targets.tempered(call.temperature))
        case DenseTargets():
            logits = targets.values[:, : call.student.width].double() / call.temperature
    return torch.log_softmax(logits, dim=1)


def _kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    """Sum a (log a - log b) with 0 log 0 = 0; outcomes of no mass are cut out of the graph, where they would be NaN."""
    none = torch.isneginf(log_a)
    safe_a = torch.where(none, 0.0, log_a)
    safe_b = torch.where(none, 0.0, log_b)
    return torch.where(none, 0.0, safe_a.exp() * (safe_a - safe_b)).sum(1)


def _entropy(log_p: Tensor) -> Tensor:
    return -torch.where(torch.isneginf(log_p), 0.0, log_p.exp() * log_p).sum(1)


def _outcomes(targets: TopKTargets, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the kept ids and of everything else, both sides, [T, V+1] with absent outcomes at -inf."""
    rows, ids = row_of_entry(targets.row_splits), targets.ids.long()
    kept = torch.zeros_like(log_q, dtype=torch.bool)
    kept[rows, ids] = True
    log_p = torch.full_like(log_q.detach(), -torch.inf)
    log_p[rows, ids] = targets.log_probs.double()
    everything_kept = kept.all(1)
    rest = torch.where(kept, -torch.inf, log_q)
    rest = torch.where(everything_kept[:, None], 0.0, rest).logsumexp(1)
    rest = torch.where(everything_kept, -torch.inf, rest)
    log_p = torch.cat([log_p, targets.tail_log_mass.double()[:, None]], dim=1)
    return log_p, torch.cat([torch.where(kept, log_q, -torch.inf), rest[:, None]], dim=1)


def _sampled(targets: SampledTargets, log_q: Tensor) -> Tensor:
    rows, counts = row_of_entry(targets.row_splits), targets.counts.double()
    drawn = torch.zeros(targets.rows, dtype=torch.float64, device=counts.device).index_add_(0, rows, counts)
    surprise = -counts * log_q[rows, targets.ids.long()]
    cross = torch.zeros_like(drawn).index_add_(0, rows, surprise)
    return cross / drawn - targets.entropy.double()
