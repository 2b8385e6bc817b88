"""A plan's step is the ledger's, a plan's build the manifest's, and a break-even point what it says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from logitcache.flops import ModelShape
from logitcache.jobs import BuildRequest, build_cache
from logitcache.prompts import PromptStyle
from logitcache.records import Origin, ScoredSequence
from logitcache.scorers.hf import HFEngine, engine_for
from logitcache.scoring import Sampling, TopKRequest
from logitcache.store import open_store
from trainer.batch import Batch, TeacherHead
from trainer.flops import FlopLedger
from trainer.loop import distill
from trainer.objectives import Objective
from trainer.planning.case import Have
from trainer.planning.costs import BreakEven, Instead, Pair, Text, break_even, build_cost, step_cost
from trainer.planning.models import model_shape
from trainer.prefixes import CachedPrefixes, OnPolicyPrefixes, PrefixSource, prompts_of
from trainer.runs import MetricsLog
from trainer.settings import BatchPlan, Optimisation, Prefix
from trainer.student import Student

CPU = torch.device("cpu")
PLAN = BatchPlan(sequences=3, max_completion_tokens=12, micro_batch_tokens=16)
OBJECTIVE = Objective(forward_weight=1.0)


class Seen:
    """A source that also remembers the lengths of what it yields, a text for each step."""

    def __init__(self, source: PrefixSource) -> None:
        self.source = source
        self.texts: list[Text] = []

    def draw(self, step: int, ledger: FlopLedger) -> list[Batch]:
        batches = self.source.draw(step, ledger)
        prompts, completions = [], []
        for batch in batches:
            start = 0
            for length in batch.sequence_lengths:
                rows = int(((batch.rows >= start) & (batch.rows < start + length)).sum())
                prompts.append(length + 1 - rows)
                completions.append(rows)
                start += length
        self.texts.append(Text(prompt_tokens=tuple(prompts), completion_tokens=tuple(completions)))
        return batches

    def __getattr__(self, name: str) -> Any:
        return getattr(self.source, name)


def run(student: Student, source: PrefixSource, directory: Path, steps: int = 2) -> tuple[FlopLedger, list[Text]]:
    seen, ledger = Seen(source), FlopLedger()
    with MetricsLog(directory / "metrics.jsonl") as metrics:
        optimisation = Optimisation(steps=steps, learning_rate=1e-4, warmup_steps=1)
        distill(
            student=student, source=seen, objective=OBJECTIVE, optimisation=optimisation, ledger=ledger, metrics=metrics
        )
    return ledger, seen.texts


def planned(pair: Pair, texts: list[Text], prefix: Prefix, kind: str = "hidden") -> dict[str, int]:
    steps = [step_cost(pair, text, prefix=prefix, kind=kind) for text in texts]
    return {phase: sum(step[phase] for step in steps) for phase in steps[0]}


@pytest.fixture
def pair(student: Student, teacher: HFEngine) -> Pair:
    shape = ModelShape.from_config(teacher.model.config.to_dict())
    assert teacher.vocab_size < shape.vocab  # its head has padding rows
    return Pair(student=student.shape, teacher=shape, vocab=teacher.vocab_size)


@pytest.mark.parametrize("kind", ["hidden", "topk"])
def test_a_planned_step_from_the_cache_is_the_one_in_the_ledger(
    kind: str,
    pair: Pair,
    student: Student,
    teacher: HFEngine,
    scored: list[ScoredSequence],
    reader: Any,
    head: TeacherHead,
    tmp_path: Path,
) -> None:
    if kind == "topk":
        sequences = [item.sequence for item in scored]
        kept = [targets for (targets,) in teacher.score(sequences, [TopKRequest(max_k=8)])]
        reader = type(reader)([ScoredSequence(sequence=s, targets=t) for s, t in zip(sequences, kept, strict=True)])
    source = CachedPrefixes(
        reader=reader, indices=range(8), head=head if kind == "hidden" else None, plan=PLAN, seed=5, device=CPU
    )
    ledger, texts = run(student, source, tmp_path)
    assert len({text.completion_tokens for text in texts}) == 2
    assert planned(pair, texts, Prefix.TEACHER, kind) == ledger.by_phase()


def test_a_planned_step_on_student_prefixes_is_the_one_in_the_ledger(
    pair: Pair, student: Student, teacher: HFEngine, scored: list[ScoredSequence], head: TeacherHead, tmp_path: Path
) -> None:
    source = OnPolicyPrefixes(
        generator=engine_for(student.model, student.tokenizer, origin=Origin.STUDENT),
        scorer=teacher,
        prompts=prompts_of([item.sequence for item in scored]),
        sampling=Sampling(),
        head=head,
        plan=PLAN,
        student_shape=pair.student,
        teacher_shape=pair.teacher,
        seed=5,
        device=CPU,
    )
    ledger, texts = run(student, source, tmp_path)
    assert planned(pair, texts, Prefix.STUDENT) == ledger.by_phase()


@pytest.mark.parametrize("kind", ["hidden", "topk"])
def test_a_planned_build_is_the_one_in_the_manifest(kind: str, tiny_dir: Path, tmp_path: Path) -> None:
    problems = tmp_path / "problems.jsonl"
    problems.write_text("".join(json.dumps({"id": f"p{n}", "problem": f"What is {n} + {n}?"}) + "\n" for n in range(4)))
    out = tmp_path / "cache"
    request = BuildRequest(problems=str(problems), out=str(out), teacher=str(tiny_dir), targets=kind, dtype="float32")
    build_cache(request, sampling=Sampling(max_new_tokens=6), style=PromptStyle(instruction=""))
    store = open_store(str(out))
    sequences = [sequence for name in store.committed().sequences for sequence in store.read_sequences(name)]
    text = Text(
        prompt_tokens=tuple(sequence.prompt_tokens for sequence in sequences),
        completion_tokens=tuple(sequence.completion_tokens for sequence in sequences),
    )
    from logitcache import open_cache

    assert build_cost(model_shape(str(tiny_dir)), text, kind=kind) == open_cache(str(out), targets=None).manifest.flops


lengths = st.integers(1, 3000)


@given(
    prompt=lengths,
    completion=lengths,
    window=lengths,
    epochs=st.floats(0.01, 100),
    kind=st.sampled_from(["topk", "hidden"]),
    have=st.sampled_from([Have.NOTHING, Have.TEXT]),
)
def test_from_so_many_students_on_a_cache_pays_and_before_it_does_not(
    prompt: int, completion: int, window: int, epochs: float, kind: str, have: Have
) -> None:
    pair = Pair(student=model_shape("Qwen3-0.6B"), teacher=model_shape("Qwen3-8B"))
    text = Text.alike(sequences=5, prompt_tokens=prompt, completion_tokens=completion)
    point = break_even(pair, text, window=window, kind=kind, have=have, instead=Instead.STUDENT_PREFIX)
    build = sum(build_cost(pair.teacher, text, kind=kind, have=have).values())
    cached, live = (
        sum(step_cost(pair, text.within(window), prefix=prefix, kind=kind).values())
        for prefix in (Prefix.TEACHER, Prefix.STUDENT)
    )
    students = point.students(epochs)

    def saved(count: int) -> float:
        return count * epochs * (live - cached) - build

    tolerance = 1e-9 * build
    assert saved(students) >= -tolerance
    assert students == 1 or saved(students - 1) < tolerance
    assert point.trained_tokens == pytest.approx(point.passes * 5 * min(completion, window))


def test_the_number_of_problems_cancels_out() -> None:
    pair = Pair(student=model_shape("Qwen3-0.6B"), teacher=model_shape("Qwen3-4B"))
    points = [
        break_even(
            pair,
            Text.alike(sequences=count, prompt_tokens=94, completion_tokens=512),
            window=512,
            kind="hidden",
            have=Have.NOTHING,
            instead=Instead.STUDENT_PREFIX,
        )
        for count in (1, 1000)
    ]
    assert points[0].passes == pytest.approx(points[1].passes, rel=1e-12)


def test_what_is_there_need_not_be_built() -> None:
    text = Text.alike(sequences=2, prompt_tokens=10, completion_tokens=20)
    shape = model_shape("Qwen3-4B")
    whole = build_cost(shape, text, kind="topk")
    assert build_cost(shape, text, kind="topk", have=Have.TEXT) == {"generate": 0, "score": whole["score"]}
    assert build_cost(shape, text, kind="topk", have=Have.CACHE) == {"generate": 0, "score": 0}
    assert build_cost(shape, text, kind="hidden")["score"] < whole["score"]


@pytest.mark.parametrize("kind", ["topk", "hidden"])
def test_keeping_what_would_be_scored_again_pays_after_one_pass(kind: str) -> None:
    pair = Pair(student=model_shape("Qwen3-0.6B"), teacher=model_shape("Qwen3-4B"))
    text = Text.alike(sequences=32_000, prompt_tokens=94, completion_tokens=128)
    point = break_even(pair, text, window=128, kind=kind, have=Have.TEXT, instead=Instead.RESCORING)
    assert (point.passes, point.students(1.0)) == (1.0, 1)


def test_a_break_even_point_by_hand() -> None:
    point = BreakEven(build_flops=100, saved_flops=40, tokens=10)
    assert point.passes == 2.5
    assert point.trained_tokens == 25
    assert [point.students(epochs) for epochs in (0.5, 1, 2.5, 10)] == [5, 3, 1, 1]
