from __future__ import annotations

import numpy as np
import pytest

from logitcache.errors import UserError
from logitcache.records import (
    FinishReason,
    Head,
    HiddenStateTargets,
    Origin,
    ScoredSequence,
    TokenSequence,
    TopKTargets,
    sample_id_of,
)


def sequence(tokens: list[int], prompt_tokens: int) -> TokenSequence:
    return TokenSequence(
        token_ids=np.array(tokens, np.int32),
        prompt_tokens=prompt_tokens,
        origin=Origin.TEACHER,
        sample_id="0" * 32,
        problem_id="p",
        finish_reason=FinishReason.STOP,
    )


def topk(rows: int) -> TopKTargets:
    row = np.zeros(rows, np.float32)
    return TopKTargets(
        ids=np.arange(rows, dtype=np.int32),
        log_probs=row,
        row_splits=np.arange(rows + 1),
        tail_log_mass=row - np.inf,
        token_log_prob=row,
        entropy=row,
    )


def test_alignment_row_t_speaks_of_token_t_plus_1() -> None:
    seq = sequence([10, 11, 12, 13, 14], prompt_tokens=3)
    assert seq.completion_tokens == 2
    assert seq.loss_mask.tolist() == [False, False, True, True]
    rows = np.flatnonzero(seq.loss_mask)
    assert rows[0] == seq.first_row == 2
    assert seq.token_ids[rows + 1].tolist() == seq.completion_ids.tolist() == [13, 14]


def test_a_prompt_without_completion_has_no_rows() -> None:
    seq = sequence([10], prompt_tokens=1)
    assert seq.completion_tokens == 0
    assert seq.loss_mask.tolist() == []
    assert len(ScoredSequence(sequence=seq, targets=topk(0)).targets) == 0


@pytest.mark.parametrize(
    ("tokens", "prompt_tokens", "found"),
    [([], 1, "got 0"), ([1, 2], 0, "got 0"), ([1, 2], 3, "got 3"), ([1, -2], 1, "got -2")],
)
def test_a_sequence_that_cannot_be_is_refused(tokens: list[int], prompt_tokens: int, found: str) -> None:
    with pytest.raises(UserError, match=found):
        sequence(tokens, prompt_tokens)


def test_targets_must_have_one_row_per_completion_token() -> None:
    with pytest.raises(UserError, match="2 target rows"):
        ScoredSequence(sequence=sequence([1, 2, 3], prompt_tokens=1), targets=topk(3))


def test_an_array_of_another_dtype_is_named() -> None:
    with pytest.raises(UserError, match=r"hidden: uint16 or float32\[\*, \*\]: got float64\[2, 3\]"):
        HiddenStateTargets(hidden=np.zeros((2, 3)), head_fingerprint="f")


def test_sample_ids_depend_on_tokens_prompt_and_tokenizer() -> None:
    tokens = np.array([1, 2, 3], np.int32)
    ids = {
        sample_id_of(tokens, 1, "a"),
        sample_id_of(tokens, 2, "a"),
        sample_id_of(tokens, 1, "b"),
        sample_id_of(tokens[:2], 1, "a"),
    }
    assert len(ids) == 4
    assert all(len(ident) == 32 for ident in ids)


def test_a_heads_fingerprint_depends_on_everything_that_changes_a_logit() -> None:
    weight = np.arange(6, dtype=np.float32).reshape(3, 2)
    heads = [
        Head(weight=weight),
        Head(weight=weight + 1),
        Head(weight=weight, bias=np.zeros(3, np.float32)),
        Head(weight=weight, soft_cap=30.0),
        Head(weight=weight, scale=0.5),
    ]
    assert len({head.fingerprint for head in heads}) == len(heads)
    assert Head(weight=weight.copy()).fingerprint == heads[0].fingerprint
