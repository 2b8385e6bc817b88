"""From the store's numpy to the trainer's torch: the one crossing.

Guarantees: sequences are packed one after another without padding; target row r belongs to packed row `rows[r]`, which
is the row that predicts the r-th completion token (alignment as in `logitcache.records`); bfloat16 bits become
bfloat16 without a change of value; hidden states of another head than the given one are refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kernels import DenseTargets, LinearHead, SampledTargets, TopKTargets
from kernels.types import Targets
from logitcache import records
from logitcache.errors import IdentityError
from logitcache.records import ScoredSequence

Kind = TypeVar("Kind")


@dataclass(frozen=True, kw_only=True, eq=False)
class TeacherHead:
    """A teacher's head as tensors, converted once per run: weight [V, D], bias [V] or None."""

    weight: Tensor
    bias: Tensor | None
    soft_cap: float | None
    scale: float
    fingerprint: str


@dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """B scored sequences, packed: T = sum of their rows, R = sum of their completion tokens.

    Attributes:
        input_ids: int64[T], each sequence without its last token, whose own distribution nobody asks for.
        position_ids: int64[T], restarting at 0 with each sequence.
        sequence_lengths: rows of each sequence; they add up to T.
        rows: int64[R], the packed rows that predict completion tokens.
        next_ids: int64[R], those tokens: what the text goes on with after each of `rows`.
        targets: the teacher's distributions of those R rows.
        sample_ids: of the B sequences, to name them when something goes wrong.
    """

    input_ids: Tensor
    position_ids: Tensor
    sequence_lengths: tuple[int, ...]
    rows: Tensor
    next_ids: Tensor
    targets: Targets
    sample_ids: tuple[str, ...]

    @property
    def tokens(self) -> int:
        """T, what the student runs over."""
        return len(self.input_ids)

    @property
    def target_rows(self) -> int:
        """R, what the loss is taken over."""
        return len(self.rows)


def teacher_head(head: records.Head, device: torch.device) -> TeacherHead:
    """Move a head across, in its own precision."""
    return TeacherHead(
        weight=to_torch(head.weight, device),
        bias=None if head.bias is None else to_torch(head.bias, device),
        soft_cap=head.soft_cap,
        scale=head.scale,
        fingerprint=head.fingerprint,
    )


def to_torch(array: NDArray[Any], device: torch.device) -> Tensor:
    """A tensor with the same values; uint16 is what the store calls bfloat16."""
    # A copy, contiguous and writable: the reader may hand out read-only views of its file.
    tensor = torch.from_numpy(np.array(array, order="C"))
    if array.dtype == np.uint16:
        tensor = tensor.view(torch.bfloat16)
    return tensor.to(device)


def collate(scored: Sequence[ScoredSequence], head: TeacherHead | None, device: torch.device) -> Batch:
    """Pack sequences and their targets.

    Args:
        scored: at least one; all with the same kind of targets.
        head: the one that hidden-state targets belong to; None for other kinds.
        device: where the batch goes.

    Raises:
        IdentityError: hidden states that belong to another head.
        TypeError: kinds of targets mixed in one batch.
    """
    sequences = [item.sequence for item in scored]
    lengths = tuple(len(sequence) - 1 for sequence in sequences)
    starts = np.cumsum([0, *lengths[:-1]])
    ids = np.concatenate([sequence.token_ids[:-1] for sequence in sequences]).astype(np.int64)
    rows = np.concatenate(
        [start + np.flatnonzero(sequence.loss_mask) for start, sequence in zip(starts, sequences, strict=True)]
    )
    return Batch(
        input_ids=to_torch(ids, device),
        position_ids=to_torch(np.concatenate([np.arange(length) for length in lengths]), device),
        sequence_lengths=lengths,
        rows=to_torch(rows.astype(np.int64), device),
        next_ids=to_torch(np.concatenate([sequence.completion_ids for sequence in sequences]).astype(np.int64), device),
        targets=_targets([item.targets for item in scored], head, device),
        sample_ids=tuple(sequence.sample_id for sequence in sequences),
    )


def micro_batches(scored: Sequence[ScoredSequence], max_tokens: int) -> Iterator[list[ScoredSequence]]:
    """Cut a step's sequences, in the order given, into runs of at most `max_tokens` rows; a longer one goes alone."""
    batch: list[ScoredSequence] = []
    tokens = 0
    for item in scored:
        length = len(item.sequence) - 1
        if batch and tokens + length > max_tokens:
            yield batch
            batch, tokens = [], 0
        batch.append(item)
        tokens += length
    if batch:
        yield batch


def batches_of(
    scored: Sequence[ScoredSequence], head: TeacherHead | None, device: torch.device, max_tokens: int
) -> list[Batch]:
    """Sequences as micro-batches of at most `max_tokens` rows; see `micro_batches` and `collate`."""
    return [collate(part, head, device) for part in micro_batches(scored, max_tokens)]


def teacher_head_flops(batch: Batch) -> int:
    """What the teacher's logits of this batch cost: a product for hidden states, nothing for what was stored."""
    match batch.targets:
        case LinearHead() as teacher:
            return 2 * teacher.rows * teacher.weight.numel()
        case _:
            return 0


def _targets(targets: Sequence[records.TeacherTargets], head: TeacherHead | None, device: torch.device) -> Targets:
    match targets[0]:
        case records.HiddenStateTargets():
            return _hidden(_all_of(records.HiddenStateTargets, targets), head, device)
        case records.FullVocabTargets():
            dense = _all_of(records.FullVocabTargets, targets)
            return DenseTargets(log_probs=to_torch(np.concatenate([t.log_probs for t in dense]), device))
        case records.TopKTargets():
            return _top_k(_all_of(records.TopKTargets, targets), device)
        case records.SampledTargets():
            drawn = _all_of(records.SampledTargets, targets)
            return SampledTargets(
                ids=_joined(drawn, "ids", device),
                counts=_joined(drawn, "counts", device),
                row_splits=to_torch(_row_splits([t.row_splits for t in drawn]), device),
                entropy=_joined(drawn, "entropy", device),
            )
    raise TypeError(f"no crossing for {type(targets[0]).__name__}")


def _hidden(
    targets: Sequence[records.HiddenStateTargets], head: TeacherHead | None, device: torch.device
) -> LinearHead:
    if head is None:
        raise TypeError("hidden-state targets need the head they belong to")
    for item in targets:
        if item.head_fingerprint != head.fingerprint:
            found = f"these belong to head {item.head_fingerprint[:12]}"
            raise IdentityError(f"hidden states of head {head.fingerprint[:12]}", found, "open the cache they are from")
    return LinearHead(
        hidden=_joined(targets, "hidden", device),
        weight=head.weight,
        bias=head.bias,
        soft_cap=head.soft_cap,
        scale=head.scale,
        fingerprint=head.fingerprint,
        hidden_fingerprint=head.fingerprint,
    )


def _top_k(targets: Sequence[records.TopKTargets], device: torch.device) -> TopKTargets:
    return TopKTargets(
        ids=_joined(targets, "ids", device),
        log_probs=_joined(targets, "log_probs", device),
        row_splits=to_torch(_row_splits([t.row_splits for t in targets]), device),
        tail_log_mass=_joined(targets, "tail_log_mass", device),
        entropy=_joined(targets, "entropy", device),
    )


def _all_of(kind: type[Kind], targets: Sequence[Any]) -> list[Kind]:
    for item in targets:
        if not isinstance(item, kind):
            raise TypeError(f"a batch of {kind.__name__} holds {type(item).__name__}")
    return list(targets)


def _joined(targets: Sequence[Any], name: str, device: torch.device) -> Tensor:
    return to_torch(np.concatenate([getattr(item, name) for item in targets]), device)


def _row_splits(splits: Sequence[NDArray[np.int64]]) -> NDArray[np.int64]:
    """Each sequence's splits start at 0; those of the batch go on where the one before ended."""
    ends = np.cumsum([0, *(part[-1] for part in splits)])
    return np.concatenate([np.zeros(1, np.int64), *(part[1:] + end for part, end in zip(splits, ends, strict=False))])
