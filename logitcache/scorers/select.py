"""From final hidden states to a teacher's targets, in torch, one tile of rows at a time.

Guarantees: no more than `tile_rows` rows of full-vocabulary logits exist at once; they are sums in float32 of exact
products, whatever precision the teacher computes in; non-finite logits are an error that names the row.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from logitcache.errors import UserError
from logitcache.records import (
    FullVocabTargets,
    Head,
    HiddenStateTargets,
    SampledTargets,
    TeacherTargets,
    TokenSequence,
    TopKTargets,
)
from logitcache.scoring import FullVocabRequest, HiddenStateRequest, SampledRequest, TargetRequest, TopKRequest

_PRECISION = threading.Lock()
"""Held while torch's process-wide precision of float32 products on a CPU is lowered: for products that lose nothing by
it. A float32 model that computes in another thread meanwhile would lose by it."""
_CPU_ELEMENTS = 1 << 19
"""Log-probabilities that are looked at together on a CPU: what its cache holds, some passes over them being needed."""
_SMALLEST_SUM = 1e-30
"""A tail below this may have lost terms to float32's range; its logarithm is then summed by its largest term."""


@dataclass(frozen=True, kw_only=True, eq=False)
class TorchHead:
    """A `Head` as tensors on the engine's device: weight [V, D], bias [V] or None."""

    weight: Tensor
    bias: Tensor | None
    soft_cap: float | None
    scale: float

    @cached_property
    def _weight32(self) -> Tensor:
        # Logits rounded to bfloat16 already cost 5e-4 nats, so the product is taken in float32.
        return self.weight.float()

    def logits(self, hidden_RD: Tensor) -> Tensor:
        """float32[R, V] logits at temperature 1, a new tensor."""
        logits = self._product(hidden_RD)
        if self.bias is not None:
            logits += self.bias.float()
        if self.scale != 1.0:
            logits *= self.scale
        if self.soft_cap is not None:
            logits = logits.div_(self.soft_cap).tanh_().mul_(self.soft_cap)
        return logits

    def log_probs(self, hidden_RD: Tensor) -> Tensor:
        """float32[R, V] log-probabilities at temperature 1."""
        return torch.log_softmax(self.logits(hidden_RD), dim=-1)

    def _product(self, hidden_RD: Tensor) -> Tensor:
        rounded = self.weight.dtype is hidden_RD.dtype is torch.bfloat16
        if not (rounded and self.weight.device.type == "cpu" and torch.backends.mkldnn.is_available()):
            return hidden_RD.float() @ self._weight32.T
        # Both factors are bfloat16 values: multiplying them as such loses nothing and takes less than half the time.
        matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
        with _PRECISION:
            before, matmul.fp32_precision = matmul.fp32_precision, "bf16"
            try:
                return hidden_RD.float() @ self._weight32.T
            finally:
                matmul.fp32_precision = before

    def to_record(self) -> Head:
        """The head as numpy, in its own precision, padding rows already cut off."""
        bias = None if self.bias is None else self.bias.float().cpu().numpy()
        return Head(weight=to_numpy(self.weight), bias=bias, soft_cap=self.soft_cap, scale=self.scale)


def to_numpy(tensor: Tensor) -> np.ndarray:
    """uint16 bits for bfloat16, float32 for everything else."""
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype is torch.bfloat16:
        return tensor.view(torch.uint16).numpy()
    return tensor.float().numpy()


def targets_of(
    sequence: TokenSequence,
    hidden_CD: Tensor,
    head: TorchHead,
    head_fingerprint: str,
    want: Sequence[TargetRequest],
    tile_rows: int,
) -> tuple[TeacherTargets, ...]:
    """One target per request for the C completion rows of one sequence, from one pass over the vocabulary."""
    collectors = [_collector(request, sequence) for request in want]
    needs_vocabulary = [collector for collector in collectors if collector is not None]
    tiles = _tiles(sequence, hidden_CD, head, tile_rows) if needs_vocabulary else iter(())
    for log_probs_RV, tokens_R in tiles:
        for collector in needs_vocabulary:
            collector.add(log_probs_RV, tokens_R)
    if not needs_vocabulary and not bool(torch.isfinite(hidden_CD).all()):
        bad_row = int((~torch.isfinite(hidden_CD)).any(dim=-1).nonzero()[0])
        raise _not_finite(sequence, "hidden states", bad_row)
    hidden = HiddenStateTargets(hidden=to_numpy(hidden_CD), head_fingerprint=head_fingerprint)
    return tuple(hidden if collector is None else collector.finish() for collector in collectors)


def _tiles(
    sequence: TokenSequence, hidden_CD: Tensor, head: TorchHead, tile_rows: int
) -> Iterator[tuple[Tensor, Tensor]]:
    tokens = torch.from_numpy(sequence.completion_ids.astype(np.int64)).to(hidden_CD.device)
    rows = max(1, _CPU_ELEMENTS // len(head.weight)) if hidden_CD.device.type == "cpu" else tile_rows
    for start in range(0, max(len(hidden_CD), 1), tile_rows):
        logits_RV = head.logits(hidden_CD[start : start + tile_rows])
        for first in range(0, max(len(logits_RV), 1), rows):
            log_probs_RV = torch.log_softmax(logits_RV[first : first + rows], dim=-1)
            bad = ~torch.isfinite(log_probs_RV.amax(dim=-1))  # a NaN or an infinity makes all of its row NaN or -inf
            if bad.any():
                raise _not_finite(sequence, "logits", start + first + int(bad.nonzero()[0]))
            yield log_probs_RV, tokens[start + first : start + first + len(log_probs_RV)]


def _not_finite(sequence: TokenSequence, what: str, row: int) -> UserError:
    return UserError(
        f"targets of problem {sequence.problem_id}",
        f"the teacher's {what} are not finite at completion row {row}",
        "score in float32 (--dtype float32), or check the teacher's weights",
    )


class _Rows:
    """What every kind that does not keep the whole vocabulary keeps of a row."""

    def __init__(self) -> None:
        self.token_log_prob: list[np.ndarray] = []
        self.entropy: list[np.ndarray] = []

    def add(self, log_probs_RV: Tensor, probs_RV: Tensor, tokens_R: Tensor) -> None:
        self.token_log_prob.append(log_probs_RV.gather(1, tokens_R[:, None])[:, 0].cpu().numpy())
        finite_RV = log_probs_RV.clamp(min=torch.finfo(torch.float32).min)  # 0 log 0 = 0, for logits of -inf
        self.entropy.append(-torch.linalg.vecdot(probs_RV, finite_RV).cpu().numpy())

    def columns(self) -> dict[str, np.ndarray]:
        return {"token_log_prob": np.concatenate(self.token_log_prob), "entropy": np.concatenate(self.entropy)}


class _TopK:
    def __init__(self, request: TopKRequest) -> None:
        self.request, self.rows = request, _Rows()
        self.ids: list[np.ndarray] = []
        self.log_probs: list[np.ndarray] = []
        self.counts: list[np.ndarray] = []
        self.tails: list[np.ndarray] = []

    def add(self, log_probs_RV: Tensor, tokens_R: Tensor) -> None:
        probs_RV = log_probs_RV.exp()
        self.rows.add(log_probs_RV, probs_RV, tokens_R)
        values_RK, ids_RK = log_probs_RV.topk(min(self.request.max_k, log_probs_RV.shape[1]), dim=-1)
        probs_RK = values_RK.exp()
        keep_RK = (probs_RK >= self.request.min_probability) & (values_RK > -torch.inf)
        if self.request.mass < 1:  # a peaked row's float32 sum reaches 1 long before its last entry
            keep_RK &= probs_RK.cumsum(dim=-1) - probs_RK < self.request.mass
        keep_RK[:, :1] = True
        self.tails.append(_tail_log_mass(log_probs_RV, probs_RV, ids_RK, keep_RK).cpu().numpy())
        ids_RK, order = torch.where(keep_RK, ids_RK, log_probs_RV.shape[1]).sort(dim=-1)
        values_RK, keep_RK = values_RK.gather(1, order), keep_RK.gather(1, order)
        self.ids.append(ids_RK[keep_RK].to(torch.int32).cpu().numpy())
        self.log_probs.append(values_RK[keep_RK].cpu().numpy())
        self.counts.append(keep_RK.sum(dim=-1).cpu().numpy())

    def finish(self) -> TopKTargets:
        return TopKTargets(
            ids=np.concatenate(self.ids),
            log_probs=np.concatenate(self.log_probs),
            row_splits=_splits(self.counts),
            tail_log_mass=np.concatenate(self.tails),
            **self.rows.columns(),
        )


def _tail_log_mass(log_probs_RV: Tensor, probs_RV: Tensor, ids_RK: Tensor, keep_RK: Tensor) -> Tensor:
    """float32[R]: what remains once the kept ids are struck out (of `probs_RV` too), never 1 - kept, which cancels."""
    sums_R = probs_RV.scatter_(1, ids_RK, torch.where(keep_RK, 0.0, probs_RV.gather(1, ids_RK))).sum(dim=-1)
    tails_R, small = sums_R.log(), sums_R < _SMALLEST_SUM
    if small.any():
        log_probs_SV, ids_SK = log_probs_RV[small], ids_RK[small]
        kept_SK = log_probs_SV.gather(1, ids_SK).masked_fill(keep_RK[small], -torch.inf)
        tails_R[small] = log_probs_SV.scatter(1, ids_SK, kept_SK).logsumexp(dim=-1)
    return tails_R


class _FullVocab:
    def __init__(self) -> None:
        self.log_probs: list[np.ndarray] = []

    def add(self, log_probs_RV: Tensor, tokens_R: Tensor) -> None:
        self.log_probs.append(log_probs_RV.cpu().numpy())

    def finish(self) -> FullVocabTargets:
        return FullVocabTargets(log_probs=np.concatenate(self.log_probs))


class _Sampled:
    def __init__(self, request: SampledRequest, sequence: TokenSequence) -> None:
        self.request, self.rows = request, _Rows()
        seed = hashlib.sha256(f"sampled targets {sequence.sample_id}".encode()).digest()[:8]
        self.random = np.random.default_rng(int.from_bytes(seed, "little"))
        self.ids: list[np.ndarray] = []
        self.draws: list[np.ndarray] = []
        self.counts: list[np.ndarray] = []

    def add(self, log_probs_RV: Tensor, tokens_R: Tensor) -> None:
        self.rows.add(log_probs_RV, log_probs_RV.exp(), tokens_R)
        cumulative_RV = log_probs_RV.double().exp().cumsum(dim=-1)
        uniform = torch.from_numpy(self.random.random((len(log_probs_RV), self.request.samples)))
        points_RS = uniform.to(cumulative_RV.device) * cumulative_RV[:, -1:]
        ids_RS = torch.searchsorted(cumulative_RV, points_RS, right=True).clamp_(max=log_probs_RV.shape[1] - 1)
        for row in ids_RS.cpu().numpy():
            ids, counts = np.unique(row, return_counts=True)
            self.ids.append(ids.astype(np.int32))
            self.draws.append(counts.astype(np.int32))
            self.counts.append(np.array([len(ids)]))

    def finish(self) -> SampledTargets:
        return SampledTargets(
            ids=np.concatenate([np.zeros(0, np.int32), *self.ids]),
            counts=np.concatenate([np.zeros(0, np.int32), *self.draws]),
            row_splits=_splits(self.counts),
            **self.rows.columns(),
        )


def _splits(counts: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(np.concatenate([np.zeros(0, np.int64), *counts]))])


def _collector(request: TargetRequest, sequence: TokenSequence) -> _TopK | _FullVocab | _Sampled | None:
    match request:
        case TopKRequest():
            return _TopK(request)
        case FullVocabRequest():
            return _FullVocab()
        case SampledRequest():
            return _Sampled(request, sequence)
        case HiddenStateRequest():
            return None
