"""Who writes the student's text writes with its present weights, and what is measured on it is exact."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from logitcache.console import run_command
from logitcache.errors import UserError
from logitcache.records import FinishReason, Origin
from logitcache.scorers.hf import HFEngine
from logitcache.scoring import Prompt, Sampling
from trainer.cli import app
from trainer.flops import FlopLedger, Phase
from trainer.rollouts import measure_own_text, reconciled_stop_ids, stops_used, student_generator
from trainer.student import Student, load_student

PROMPTS = [Prompt(problem_id=f"p{n}", token_ids=tuple(range(5, 9 + n))) for n in range(6)]
SAMPLING = Sampling(max_new_tokens=12, seed=3)
EOS = frozenset({2})
"""The tiny model's, and its tokenizer's."""


def disturb(student: Student) -> None:
    noise = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in student.parameters:
            parameter += 0.1 * torch.randn(parameter.shape, generator=noise)


@pytest.fixture
def rounded(tiny_dir: Path) -> Student:
    """A student computing in bfloat16."""
    return load_student(tiny_dir, vocab_size=49_152)


def test_a_copy_writes_with_the_student_s_present_weights(rounded: Student) -> None:
    generator = student_generator(rounded, stop_ids=EOS)
    before = generator.generate(PROMPTS, SAMPLING)
    disturb(rounded)
    after = generator.generate(PROMPTS, SAMPLING)
    assert [r.sample_id for r in after] == [
        r.sample_id for r in student_generator(rounded, stop_ids=EOS).generate(PROMPTS, SAMPLING)
    ]
    assert [r.sample_id for r in after] != [r.sample_id for r in before]
    assert {r.origin for r in after} == {Origin.STUDENT}


def test_the_student_is_left_as_it_was(rounded: Student) -> None:
    weights = [parameter.clone() for parameter in rounded.parameters]
    student_generator(rounded, stop_ids=EOS).generate(PROMPTS, SAMPLING)
    for parameter, before in zip(rounded.parameters, weights, strict=True):
        assert parameter.dtype is torch.float32
        assert parameter.requires_grad
        assert torch.equal(parameter, before)


def test_either_side_s_stop_token_ends_a_completion(student: Student, rounded: Student) -> None:
    for learner in (student, rounded):
        whole = student_generator(learner, stop_ids=EOS).generate(PROMPTS, SAMPLING)
        long = next(sequence for sequence in whole if sequence.completion_tokens > 3)
        stop = int(long.completion_ids[2])
        stop_ids = reconciled_stop_ids(learner, frozenset({stop}))
        assert stop_ids == EOS | {stop}
        stopped = student_generator(learner, stop_ids=stop_ids).generate(PROMPTS, SAMPLING)
        assert stop in stops_used(stopped) <= stop_ids
        assert stops_used(whole) <= EOS
        for sequence, longer in zip(stopped, whole, strict=True):
            ids = longer.completion_ids.tolist()
            cut = ids[: ids.index(stop) + 1] if stop in ids else ids
            assert sequence.completion_ids.tolist() == cut
            assert (sequence.finish_reason is FinishReason.STOP) == (cut[-1] in (stop, 2))


@pytest.mark.parametrize("micro_batch_tokens", [1, 4096])
def test_own_text_is_measured_as_in_double_precision(
    student: Student, teacher: HFEngine, micro_batch_tokens: int
) -> None:
    disturb(student)
    stop_ids = frozenset({2, 700})
    generator = student_generator(student, stop_ids=stop_ids)
    ledger = FlopLedger()
    found = measure_own_text(
        student, generator, PROMPTS, SAMPLING, ledger, stop_ids=stop_ids, micro_batch_tokens=micro_batch_tokens, step=4
    )
    written = generator.generate(PROMPTS, SAMPLING)
    entropies, stops = [], []
    for sequence in written:
        ids = torch.from_numpy(sequence.token_ids[None].astype("int64"))
        with torch.no_grad():
            logits = student.model(input_ids=ids).logits[0, sequence.first_row : -1, : student.vocab_size]
        log_q = logits.double().log_softmax(-1)
        entropies.append(-(log_q.exp() * log_q).sum(-1))
        stops.append(log_q[:, sorted(stop_ids)].exp().sum(-1))
    assert found.entropy_nats == pytest.approx(float(torch.cat(entropies).mean()), rel=1e-4)
    assert found.eos_mass == pytest.approx(float(torch.cat(stops).mean()), rel=1e-4)
    assert found.tokens == sum(sequence.completion_tokens for sequence in written)
    assert found.mean_length == found.tokens / 6
    assert found.truncated_share == sum(sequence.completion_tokens == 12 for sequence in written) / 6
    assert ledger.marginal() == 0
    assert ledger.by_phase()[Phase.EVALUATION] > 0
    assert {row.step for row in ledger.rows} == {4}


def test_nothing_to_measure_on_is_refused(student: Student) -> None:
    generator = student_generator(student, stop_ids=EOS)
    for prompts, stop_ids in (([], {2}), (PROMPTS, set())):
        with pytest.raises(UserError, match="on its own text: no "):
            measure_own_text(
                student, generator, prompts, replace(SAMPLING), FlopLedger(),
                stop_ids=frozenset(stop_ids), micro_batch_tokens=64, step=0,
            )  # fmt: skip


@pytest.mark.parametrize("command", [["distill", "--prefix", "student"], ["grid"]])
def test_vllm_that_is_not_installed_is_said_first(
    command: list[str],
    tiny_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    models = ["--student", str(tiny_dir), "--teacher", str(tiny_dir), "--generator", "vllm"]
    words = [*command, str(tmp_path / "no-cache"), *models, "--out", str(tmp_path / "run")]
    assert run_command(app, words, after_interrupt="") == 2
    assert "vLLM cannot be imported" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
