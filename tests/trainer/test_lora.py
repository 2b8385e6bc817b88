"""Adapters: they alone learn and are kept, and what is saved is a plain model with them in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from logitcache import flops
from logitcache.errors import UserError
from logitcache.scoring import Prompt, Sampling
from tests.trainer.test_checkpoint import Stopped
from tests.trainer.test_commands import of_steps
from trainer.batch import TeacherHead, collate
from trainer.checkpoint import MODEL, Checkpoints
from trainer.evaluate import evaluate
from trainer.flops import FlopLedger, Phase, add_rollout
from trainer.loop import distill
from trainer.objectives import Objective
from trainer.prefixes import CachedPrefixes
from trainer.rollouts import VLLMRollouts, student_generator, unmerged_adapters
from trainer.runs import MetricsLog
from trainer.settings import BatchPlan, Lora, Optimisation, Training
from trainer.student import Student, load_student

CPU = torch.device("cpu")
LORA = Lora(rank=4, alpha=8, seed=5)


def beginner(tiny_dir: Path) -> Student:
    """A student that is not its teacher: its embedding's rows are in another order."""
    student = load_student(tiny_dir, vocab_size=49_152, precision="float32", lora=LORA)
    with torch.no_grad():
        weight = student.model.get_input_embeddings().weight
        weight.copy_(weight.roll(1, dims=0))
    return student


def train(
    tiny_dir: Path, reader: Any, head: TeacherHead, out: Path, stop_after: int | None = None
) -> tuple[Student, FlopLedger]:
    """Four steps from wherever `out` stands."""
    student, ledger = beginner(tiny_dir), FlopLedger()

    def on_step(line: dict[str, Any]) -> None:
        if line["step"] == stop_after:
            raise Stopped

    out.mkdir(exist_ok=True)
    plan = BatchPlan(sequences=4, max_completion_tokens=16)
    with MetricsLog(out / "metrics.jsonl") as metrics:
        distill(
            student=student,
            source=CachedPrefixes(reader=reader, indices=range(len(reader)), head=head, plan=plan, seed=3, device=CPU),
            objective=Objective(forward_weight=1.0),
            optimisation=Optimisation(steps=4, learning_rate=1e-2, warmup_steps=1),
            ledger=ledger,
            metrics=metrics,
            checkpoints=Checkpoints(directory=out / "checkpoints", every=2),
            on_step=on_step,
        )
    return student, ledger


def test_adapters_alone_learn_and_a_run_goes_on_bit_for_bit(
    tiny_dir: Path, reader: Any, head: TeacherHead, scored: list[Any], tmp_path: Path
) -> None:
    student, ledger = train(tiny_dir, reader, head, tmp_path / "whole")
    kept = load_file(tmp_path / "whole" / "checkpoints" / "step-00000004" / MODEL)
    assert all(".lora_" in name for name in kept)
    start = beginner(tiny_dir).model.parameters()
    for (name, trained), before in zip(student.model.named_parameters(), start, strict=True):
        assert torch.equal(trained, before) is not trained.requires_grad, name
        assert trained.requires_grad is (".lora_" in name)
    losses = [line["loss_nats"] for line in of_steps(tmp_path / "whole")]
    assert losses[-1] < losses[0]

    with pytest.raises(Stopped):
        train(tiny_dir, reader, head, tmp_path / "cut", stop_after=2)
    again, _ = train(tiny_dir, reader, head, tmp_path / "cut")
    assert of_steps(tmp_path / "cut") == of_steps(tmp_path / "whole")
    assert all(torch.equal(a, b) for a, b in zip(student.parameters, again.parameters, strict=True))

    student.save(tmp_path / "student")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "student").eval()
    assert [name for name, _ in plain.named_parameters()] == [
        name for name, _ in AutoModelForCausalLM.from_pretrained(tiny_dir).named_parameters()
    ]
    batch = collate(scored, head, CPU)
    saved = Student(model=plain, tokenizer=None, vocab_size=49_152, precision=torch.float32)
    with torch.no_grad():
        mine, theirs = student.head_over(batch), saved.head_over(batch)
    assert torch.allclose(mine.hidden, theirs.hidden, atol=1e-5)
    assert torch.equal(mine.weight, theirs.weight)

    totals, rows = ledger.by_phase(), sum(line["rows"] for line in of_steps(tmp_path / "whole"))
    thin = flops.adapters(student.shape, rows, rank=4)
    full = totals[Phase.STUDENT_FORWARD] - thin
    tokens = sum(line["completion_tokens"] for line in of_steps(tmp_path / "whole"))
    frozen = flops.projections(student.shape, rows) + flops.head(student.shape, tokens)
    frozen += flops.before_adapters(student.shape, [rows], rank=4)
    assert totals[Phase.STUDENT_BACKWARD] == 2 * (full + thin) - frozen


def test_what_adapters_cost_is_counted_where_they_run(tiny_dir: Path, scored: list[Any], head: TeacherHead) -> None:
    """In evaluation, and in what a student writes with its adapters beside the weights."""
    prompts, sampling = [Prompt(problem_id="p", token_ids=(3, 4, 5))], Sampling(max_new_tokens=5, temperature=0.0)
    batch, counts, costs = collate(scored, head, CPU), [], []
    for lora in (None, LORA):
        student = load_student(tiny_dir, vocab_size=49_152, precision="float32", lora=lora)
        generator = student_generator(student, stop_ids=frozenset())
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            student.head_over(batch)
            (written,) = generator.generate(prompts, sampling)
        ledger, adapters = FlopLedger(), unmerged_adapters(student, generator)
        evaluate(student, [batch], ledger, step=0)
        add_rollout(ledger, student.shape, [3], [written.completion_tokens], step=0, lora=adapters)
        counts.append(counter.get_total_flops())
        costs.append(sum(ledger.by_phase().values()))
    assert costs[1] - costs[0] == counts[1] - counts[0] > 0
    assert unmerged_adapters(student, VLLMRollouts(student=student, engine=None)) is None


def test_adapters_begin_as_nothing_and_follow_their_seed(tiny_dir: Path, student: Student, scored: list[Any]) -> None:
    state = torch.random.get_rng_state()
    one, two, other = (
        load_student(tiny_dir, vocab_size=49_152, precision="float32", lora=Lora(rank=2, alpha=4, seed=seed))
        for seed in (1, 1, 2)
    )
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters, two.parameters, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(one.parameters, other.parameters, strict=True))
    ids = torch.from_numpy(scored[0].sequence.token_ids[None].astype("int64"))
    with torch.no_grad():
        assert torch.equal(one.model(ids).logits, student.model(ids).logits)


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"lora_rank": 0}, "--lora-rank, at least 1"),
        ({"lora_rank": 4, "lora_alpha": 0}, "--lora-alpha, at least 1"),
        ({"lora_rank": 4, "lora_matrices": ("q", "embedding")}, "--lora-matrices, of q, k, v"),
        ({"lora_rank": 4, "lora_matrices": ()}, "--lora-matrices, of q, k, v"),
    ],
)
def test_impossible_adapters_are_refused(options: dict[str, Any], found: str) -> None:
    with pytest.raises(UserError, match=found):
        Training(**options)


def test_matrices_that_a_model_lacks_are_refused() -> None:
    from transformers import AutoConfig

    from trainer.lora import adapt

    config = AutoConfig.for_model("gpt2", n_embd=8, n_layer=1, n_head=1, vocab_size=11)
    with pytest.raises(UserError, match="GPT2LMHeadModel has none of these"):
        adapt(AutoModelForCausalLM.from_config(config), LORA)


def test_adapters_count_twice_unless_told_otherwise() -> None:
    assert Training().lora is None
    assert Training(lora_rank=16, seed=3).lora == Lora(rank=16, alpha=32, seed=3)
