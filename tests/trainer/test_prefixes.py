"""Sources of prefixes: reproducible, resumable, honest about their FLOPs, and never on a held-out problem."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from logitcache import flops
from logitcache.errors import UserError
from logitcache.flops import ModelShape
from logitcache.records import Origin, ScoredSequence
from logitcache.scorers.hf import HFEngine, engine_for
from logitcache.scoring import Sampling
from trainer.batch import Batch, TeacherHead
from trainer.flops import FlopLedger, Phase
from trainer.prefixes import CachedPrefixes, MixedPrefixes, OnPolicyPrefixes, PrefixSource, prompts_of, shares
from trainer.settings import BatchPlan
from trainer.split import is_held_out, split_by_problem
from trainer.student import Student

CPU = torch.device("cpu")
PLAN = BatchPlan(sequences=3, max_completion_tokens=12, micro_batch_tokens=16)


def cached(reader: Any, head: TeacherHead) -> CachedPrefixes:
    return CachedPrefixes(reader=reader, indices=[1, 3, 4, 6, 7], head=head, plan=PLAN, seed=5, device=CPU)


def on_policy(student: Student, teacher: HFEngine, scored: list[ScoredSequence], head: TeacherHead) -> OnPolicyPrefixes:
    return OnPolicyPrefixes(
        generator=engine_for(student.model, student.tokenizer, origin=Origin.STUDENT),
        scorer=teacher,
        prompts=prompts_of([item.sequence for item in scored]),
        sampling=Sampling(),
        head=head,
        plan=PLAN,
        student_shape=student.shape,
        teacher_shape=ModelShape.from_config(teacher.model.config.to_dict()),
        seed=5,
        device=CPU,
    )


def drawn(batches: list[Batch]) -> list[tuple[str, ...]]:
    return [batch.sample_ids for batch in batches]


@pytest.mark.parametrize("kind", ["cached", "on policy", "mixed"])
def test_a_restored_source_goes_on_as_if_nothing_happened(
    kind: str, reader: Any, student: Student, teacher: HFEngine, scored: list[ScoredSequence], head: TeacherHead
) -> None:
    def make() -> PrefixSource:
        if kind == "cached":
            return cached(reader, head)
        own = on_policy(student, teacher, scored, head)
        return own if kind == "on policy" else MixedPrefixes(teacher=cached(reader, head), student=own)

    whole, ledger = make(), FlopLedger()
    expected = [drawn(whole.draw(step, ledger)) for step in range(4)]
    first = make()
    assert [drawn(first.draw(step, ledger)) for step in range(2)] == expected[:2]
    again = make()
    again.restore(json.loads(json.dumps(first.state())))
    assert [drawn(again.draw(step, ledger)) for step in (2, 3)] == expected[2:]


def test_cached_prefixes_keep_to_their_indices_and_cost_nothing(
    reader: Any, scored: list[ScoredSequence], head: TeacherHead
) -> None:
    source, ledger = cached(reader, head), FlopLedger()
    seen = {sample for step in range(5) for batch in source.draw(step, ledger) for sample in batch.sample_ids}
    assert seen == {scored[index].sequence.sample_id for index in (1, 3, 4, 6, 7)}
    assert ledger.rows == ()


def test_on_policy_text_is_the_students_and_is_paid_for(
    student: Student, teacher: HFEngine, scored: list[ScoredSequence], head: TeacherHead
) -> None:
    source, ledger = on_policy(student, teacher, scored, head), FlopLedger()
    batches = source.draw(0, ledger)
    assert sum(len(batch.sequence_lengths) for batch in batches) == PLAN.sequences
    assert len(batches) > 1  # the micro-batch bound is small
    by_phase = ledger.by_phase()
    lengths = [length for batch in batches for length in batch.sequence_lengths]
    shape = ModelShape.from_config(teacher.model.config.to_dict())
    assert by_phase[Phase.TEACHER_PREFILL] == flops.body(shape, lengths)
    rows = sum(batch.target_rows for batch in batches)
    # Prompt and completion but its last token run once; every completion token needs one row of logits.
    assert by_phase[Phase.STUDENT_ROLLOUT] == flops.forward(student.shape, lengths, head_rows=rows)
    assert by_phase[Phase.HEAD_REPROJECTION] == 0  # the loop's to add, with the loss


def test_what_is_written_follows_the_student(
    student: Student, teacher: HFEngine, scored: list[ScoredSequence], head: TeacherHead
) -> None:
    before = [batch.input_ids.tolist() for batch in on_policy(student, teacher, scored, head).draw(0, FlopLedger())]
    source = on_policy(student, teacher, scored, head)
    with torch.no_grad():
        student.model.get_output_embeddings().weight.mul_(-1)
    after = [batch.input_ids.tolist() for batch in source.draw(0, FlopLedger())]
    assert before != after


def test_prompts_are_distinct_and_whole(scored: list[ScoredSequence]) -> None:
    sequences = [item.sequence for item in scored]
    prompts = prompts_of([*sequences, *sequences])
    assert [prompt.problem_id for prompt in prompts] == [sequence.problem_id for sequence in sequences]
    for prompt, sequence in zip(prompts, sequences, strict=True):
        assert list(prompt.token_ids) == sequence.token_ids[: sequence.prompt_tokens].tolist()


def test_the_split_depends_on_the_problem_alone() -> None:
    names = [f"problem {number}" for number in range(2000)]
    split = split_by_problem([*names, *names], 0.2)
    assert set(split.train).isdisjoint(split.held_out)
    held_out = {name for name in names if is_held_out(name, 0.2)}
    assert 320 < len(held_out) < 480
    assert {([*names, *names])[index] for index in split.held_out} == held_out
    assert {name for name in names if is_held_out(name, 0.1)} < held_out  # a larger share only adds


def test_an_empty_side_is_an_error() -> None:
    with pytest.raises(UserError, match="0 held out"):
        split_by_problem(["a"], 1e-9)


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0, 1.5, float("nan")])
def test_a_share_that_is_no_number_of_sequences_is_refused(share: float) -> None:
    with pytest.raises(UserError, match="--student-share"):
        shares(PLAN, share)


def test_shares_add_up() -> None:
    theirs, own = shares(PLAN, 1 / 3)
    assert (theirs.sequences, own.sequences) == (2, 1)


def test_another_window_holds_from_the_next_draw_on(
    student: Student, teacher: HFEngine, scored: list[ScoredSequence], head: TeacherHead
) -> None:
    """Also where batches of the old window were read ahead; the order stays."""
    windows: list[int | None] = []

    class Reader:
        def __len__(self) -> int:
            return len(scored)

        def read(self, indices: Any, *, max_completion_tokens: int | None = None, **_: Any) -> list[ScoredSequence]:
            windows.append(max_completion_tokens)
            return [scored[index] for index in indices]

    ledger = FlopLedger()
    fixed, changed = cached(Reader(), head), cached(Reader(), head)
    expected = [drawn(fixed.draw(step, ledger)) for step in range(3)]
    fixed.close()
    found = [drawn(changed.draw(0, ledger))]
    changed.use_window(20)
    windows.clear()
    found += [drawn(changed.draw(step, ledger)) for step in (1, 2)]
    changed.close()
    assert found == expected
    assert set(windows) == {20}
    own = on_policy(student, teacher, scored, head)
    own.use_window(3)
    assert sum(batch.target_rows for batch in own.draw(0, ledger)) <= 3 * PLAN.sequences
