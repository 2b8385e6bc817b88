"""The crossing from numpy to torch, and the alignment rule: shift any one component by one and it shows."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from kernels import LinearHead, TopKTargets, forward_kl
from logitcache import records
from logitcache.errors import IdentityError
from logitcache.records import HiddenStateTargets, ScoredSequence
from logitcache.scorers.hf import HFEngine
from logitcache.scoring import FullVocabRequest, SampledRequest, TopKRequest
from trainer.batch import Batch, TeacherHead, collate, micro_batches, to_torch
from trainer.student import Student

CPU = torch.device("cpu")


def mean_kl(student: Student, batch: Batch) -> float:
    with torch.no_grad():
        assert isinstance(batch.targets, LinearHead)
        return float(forward_kl(student.head_over(batch), batch.targets).loss.mean())


def test_a_student_that_is_the_teacher_has_no_divergence(
    student: Student, scored: list[ScoredSequence], head: TeacherHead
) -> None:
    assert mean_kl(student, collate(scored, head, CPU)) < 1e-5


@pytest.mark.parametrize("what", ["tokens", "rows", "targets", "positions"])
@pytest.mark.parametrize("by", [-1, 1])
def test_any_component_off_by_one_shows(
    what: str, by: int, student: Student, scored: list[ScoredSequence], head: TeacherHead
) -> None:
    batch = collate(scored, head, CPU)
    assert isinstance(batch.targets, LinearHead)
    match what:
        case "tokens":
            off = replace(batch, input_ids=batch.input_ids.roll(by))
        case "rows":
            off = replace(batch, rows=(batch.rows + by).clamp(0, batch.tokens - 1))
        case "targets":
            off = replace(batch, targets=replace(batch.targets, hidden=batch.targets.hidden.roll(by, dims=0)))
        case _:
            starts = torch.tensor([sum(batch.sequence_lengths[:i]) for i in range(len(batch.sequence_lengths))])
            moved = batch.position_ids.clone()
            # Rotary attention knows only differences, so one token in each sequence moves, not all of them.
            moved[starts + 1] += by
            off = replace(batch, position_ids=moved)
    assert mean_kl(student, off) > (0.1 if what != "positions" else 1e-3)


def test_rows_predict_exactly_the_completion(scored: list[ScoredSequence], head: TeacherHead) -> None:
    batch = collate(scored, head, CPU)
    start, rows = 0, []
    for item, length in zip(scored, batch.sequence_lengths, strict=True):
        ids = batch.input_ids[start : start + length].tolist()
        assert ids == item.sequence.token_ids[:-1].tolist()
        rows += [start + row for row in range(length) if item.sequence.loss_mask[row]]
        start += length
    assert batch.rows.tolist() == rows
    assert batch.next_ids.tolist() == [token for item in scored for token in item.sequence.completion_ids.tolist()]
    assert batch.target_rows == sum(item.sequence.completion_tokens for item in scored)
    assert batch.sample_ids == tuple(item.sequence.sample_id for item in scored)


def test_bfloat16_bits_keep_their_values() -> None:
    values = torch.tensor([0.0, -0.0, 1.0, -2.5, 3.0e38, 1e-38, float("inf")]).bfloat16()
    bits = values.view(torch.uint16).numpy()
    back = to_torch(bits, CPU)
    assert back.dtype is torch.bfloat16
    assert torch.equal(back, values)


def test_a_read_only_view_is_copied() -> None:
    array = np.arange(3.0, dtype=np.float32)
    array.setflags(write=False)
    to_torch(array, CPU).add_(1)
    assert array.tolist() == [0, 1, 2]


def test_states_of_another_head_are_refused(scored: list[ScoredSequence], head: TeacherHead) -> None:
    hidden = scored[0].targets
    assert isinstance(hidden, HiddenStateTargets)
    stray = ScoredSequence(
        sequence=scored[0].sequence, targets=HiddenStateTargets(hidden=hidden.hidden, head_fingerprint="0" * 32)
    )
    with pytest.raises(IdentityError, match="belong to head 000000000000"):
        collate([scored[1], stray], head, CPU)


def test_other_kinds_cross_too(teacher: HFEngine, scored: list[ScoredSequence]) -> None:
    sequences = [item.sequence for item in scored[:3]]
    requests = [TopKRequest(max_k=5), FullVocabRequest(), SampledRequest(samples=4)]
    by_kind = zip(*teacher.score(sequences, requests), strict=True)
    rows = sum(sequence.completion_tokens for sequence in sequences)
    for targets in by_kind:
        items = [ScoredSequence(sequence=s, targets=t) for s, t in zip(sequences, targets, strict=True)]
        crossed = collate(items, None, CPU).targets
        assert crossed.rows == rows
        if isinstance(crossed, TopKTargets):
            last = targets[-1]
            assert isinstance(last, records.TopKTargets)
            splits = crossed.row_splits[-len(last) - 1 :]
            assert torch.equal(splits - splits[0], torch.from_numpy(last.row_splits))
            assert crossed.ids[int(splits[0]) :].tolist() == last.ids.tolist()


def test_kinds_do_not_mix(teacher: HFEngine, scored: list[ScoredSequence], head: TeacherHead) -> None:
    ((top,),) = teacher.score([scored[0].sequence], [TopKRequest(max_k=5)])
    with pytest.raises(TypeError, match="HiddenStateTargets holds TopKTargets"):
        collate([scored[1], ScoredSequence(sequence=scored[0].sequence, targets=top)], head, CPU)


def test_micro_batches_keep_order_and_bound(scored: list[ScoredSequence]) -> None:
    parts = list(micro_batches(scored, 20))
    assert [item for part in parts for item in part] == scored
    assert all(len(part) == 1 or sum(len(item.sequence) - 1 for item in part) <= 20 for part in parts)
    assert len(parts) > 2
