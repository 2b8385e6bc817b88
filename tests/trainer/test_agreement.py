"""Likelihood and agreement on given text, and a model's own distributions, against plain double precision."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from kernels import DenseTargets, LinearHead, TopKTargets
from logitcache.records import ScoredSequence
from logitcache.scorers.hf import HFEngine
from logitcache.scoring import Prompt, Sampling, TopKRequest
from trainer.agreement import agreement, likeliest, likeliest_of_head
from trainer.batch import TeacherHead, collate
from trainer.own_text import own_distributions
from trainer.rollouts import with_own_tokens
from trainer.student import Student

CPU = torch.device("cpu")


def disturb(student: Student) -> None:
    noise = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in student.parameters:
            parameter += 0.02 * torch.randn(parameter.shape, generator=noise)


def log_probs(model: object, scored: ScoredSequence, vocab_size: int) -> Tensor:
    """float64[C, V] of the completion rows."""
    ids = torch.from_numpy(scored.sequence.token_ids[None].astype("int64"))
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0, scored.sequence.first_row : -1, :vocab_size]  # type: ignore[operator]
    return logits.double().log_softmax(-1)


def given_ids(scored: list[ScoredSequence]) -> Tensor:
    return torch.from_numpy(np.concatenate([one.sequence.completion_ids for one in scored]).astype(np.int64))


def test_likelihood_and_agreement(
    student: Student, teacher: HFEngine, scored: list[ScoredSequence], head: TeacherHead
) -> None:
    disturb(student)
    parts = [scored[:3], scored[3:]]
    found = agreement(student, [collate(part, head, CPU) for part in parts], [given_ids(part) for part in parts])
    mine = torch.cat([log_probs(student.model, one, student.vocab_size) for one in scored])
    theirs = torch.cat([log_probs(teacher.model, one, student.vocab_size) for one in scored])
    nll = -mine.gather(1, given_ids(scored)[:, None]).mean()
    same = (mine.argmax(-1) == theirs.argmax(-1)).double().mean()
    assert found.nll_nats == pytest.approx(float(nll), rel=1e-5)
    assert found.top1_share == pytest.approx(float(same))
    assert 0 < found.top1_share < 1


def test_top_k_targets_agree_with_the_states_and_samples_do_not_say(
    student: Student, teacher: HFEngine, scored: list[ScoredSequence], head: TeacherHead
) -> None:
    sequences = [one.sequence for one in scored]
    kept = teacher.score(sequences, [TopKRequest(max_k=4)])
    top_k = [ScoredSequence(sequence=one, targets=t) for one, (t,) in zip(sequences, kept, strict=True)]
    exact = likeliest(collate(scored, head, CPU).targets)
    coarse = likeliest(collate(top_k, None, CPU).targets)
    assert exact is not None
    assert coarse is not None
    assert torch.equal(exact, coarse)
    samples = collate([with_own_tokens(one) for one in sequences], None, CPU)
    found = agreement(student, [samples], [given_ids(scored)])
    assert found.top1_share is None
    assert found.nll_nats > 0


def test_the_likeliest_of_rows_of_different_widths() -> None:
    targets = TopKTargets(
        ids=torch.tensor([4, 9, 2, 0, 5, 7], dtype=torch.int32),
        log_probs=torch.tensor([0.2, 0.7, 0.9, 0.3, 0.3, 0.1]).log(),
        row_splits=torch.tensor([0, 2, 3, 6]),
        tail_log_mass=torch.tensor([0.1, 0.1, 0.3]).log(),
        entropy=torch.ones(3),
    )
    found = likeliest(targets)
    assert found is not None
    assert found.tolist() == [9, 2, 0]
    dense = likeliest(DenseTargets(log_probs=torch.tensor([[0.2, 0.5, 0.3]]).log()))
    assert dense is not None
    assert dense.tolist() == [1]


@pytest.mark.parametrize("biased", [False, True])
def test_the_head_is_searched_in_tiles_and_its_padding_left_out(biased: bool) -> None:
    rng = torch.Generator().manual_seed(0)
    width = 20_001  # no multiple of a tile
    head = LinearHead(
        hidden=torch.randn(7, 8, generator=rng),
        weight=torch.randn(width + 50, 8, generator=rng),
        bias=torch.randn(width + 50, generator=rng) if biased else None,
        soft_cap=5.0,
        vocab_size=width,
    )
    head.weight[width:] *= 100
    logits = head.hidden.double() @ head.weight[:width].double().T
    if head.bias is not None:
        logits += head.bias[:width].double()
    assert torch.equal(likeliest_of_head(head), logits.argmax(-1))


def test_own_distributions_are_exact_and_of_each_completion(teacher: HFEngine) -> None:
    prompts = [Prompt(problem_id=f"p{n}", token_ids=tuple(range(5, 9 + n))) for n in range(9)]
    stop_ids = frozenset({2, 700})
    writer = replace(teacher, stop_ids=stop_ids)
    written = writer.generate(prompts, Sampling(max_new_tokens=12, samples_per_problem=2, seed=3))
    found = own_distributions(teacher, written, stop_ids, CPU)
    assert len(found) == 18
    for one, own in zip(written, found, strict=True):
        log_q = log_probs(teacher.model, with_own_tokens(one), teacher.vocab_size)
        assert own.entropy_nats == pytest.approx(float(-(log_q.exp() * log_q).sum(-1).mean()), rel=1e-4)
        assert own.eos_mass == pytest.approx(float(log_q[:, sorted(stop_ids)].exp().sum(-1).mean()), rel=1e-4)
