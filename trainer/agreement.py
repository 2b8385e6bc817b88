"""How well a model foretells tokens that are given, and how often it would choose what its teacher would.

Guarantees: means over tokens, at temperature 1; logits exist in tiles of the vocabulary only; nothing is trained.
KL on the same tokens is `trainer.evaluate`'s.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels import DenseTargets, LinearHead, SampledTargets, Targets, TopKTargets, selected_log_probs
from trainer.batch import Batch
from trainer.student import Student

_TILE_TOKENS = 8192


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """Of a student with given text and its teacher.

    Attributes:
        nll_nats: mean negative log-likelihood of the given tokens.
        top1_share: of the rows, in which the likeliest token is the teacher's likeliest; None where the targets do not
            say which that is (samples).
    """

    nll_nats: float
    top1_share: float | None


def agreement(student: Student, batches: Sequence[Batch], token_ids: Sequence[Tensor]) -> Agreement:
    """Measure a student on text it is given.

    Args:
        student: whose distributions count.
        batches: what it reads, with the teacher's targets.
        token_ids: int64[R] for each batch, the token that each of its rows has to predict.
    """
    nll = same = rows = 0.0
    known = True
    with torch.no_grad():
        for batch, ids in zip(batches, token_ids, strict=True):
            head = student.head_over(batch)
            nll -= float(selected_log_probs(head, ids.to(student.device)).log_probs.double().sum())
            choice = likeliest(batch.targets)
            if choice is None:
                known = False
            else:
                same += float((likeliest_of_head(head) == choice).sum())
            rows += batch.target_rows
    return Agreement(nll_nats=nll / rows, top1_share=same / rows if known else None)


def likeliest(targets: Targets) -> Tensor | None:
    """int64[R]: the teacher's likeliest token of each row, of equals the smallest id; None where samples are all."""
    match targets:
        case LinearHead():
            return likeliest_of_head(targets)
        case DenseTargets():
            return targets.values.argmax(dim=-1)
        case TopKTargets():
            return _likeliest_kept(targets)
        case SampledTargets():
            return None


def likeliest_of_head(head: LinearHead) -> Tensor:
    """int64[R]. Scale and soft cap change no order: the product alone decides, of inputs in `hidden`'s dtype."""
    best_R = torch.full((head.rows,), -torch.inf, device=head.hidden.device)
    ids_R = torch.zeros(head.rows, dtype=torch.int64, device=head.hidden.device)
    for start in range(0, head.width, _TILE_TOKENS):
        end = min(start + _TILE_TOKENS, head.width)
        tile_RV = head.hidden.float() @ head.weight[start:end].to(head.hidden.dtype).float().T
        if head.bias is not None:
            tile_RV += head.bias[start:end].float()
        values_R, places_R = tile_RV.max(dim=-1)
        ids_R = torch.where(values_R > best_R, places_R + start, ids_R)
        best_R = torch.maximum(best_R, values_R)
    return ids_R


def _likeliest_kept(targets: TopKTargets) -> Tensor:
    lengths_R = targets.row_splits.diff()
    row_E = torch.repeat_interleave(torch.arange(len(lengths_R), device=lengths_R.device), lengths_R)
    order_E = torch.argsort(targets.log_probs, descending=True, stable=True)  # ids ascend within a row
    order_E = order_E[torch.argsort(row_E[order_E], stable=True)]
    return targets.ids[order_E[targets.row_splits[:-1]]].long()
