"""GRPO's loss: against hand-computed tables, double precision, and TRL's trainer on the same model and tokens."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from logitcache.errors import UserError
from logitcache.flops import backward, forward, head
from logitcache.records import TokenSequence
from tests.trainer.conftest import random_sequence
from trainer.flops import FlopLedger, Phase
from trainer.loop import new_optimizer
from trainer.policy.groups import Drawn
from trainer.policy.learner import Learner, Part
from trainer.policy.settings import AdvantageScale, Normalisation, PolicyTraining, ReferenceKL, Surrogate
from trainer.policy.surrogate import group_advantages, sequence_weights, surrogate_loss
from trainer.student import Student, load_student

TEMPERATURE, LONGEST = 0.8, 12
"""Of sampling, and the completion tokens that are allowed."""
NORMALISATIONS = {Normalisation.TOKEN: "dapo", Normalisation.SEQUENCE: "grpo", Normalisation.CONSTANT: "dr_grpo"}
"""And what TRL calls them."""
LOSSES = [(normalisation, 0.0, ReferenceKL.K3) for normalisation in Normalisation]
LOSSES += [(Normalisation.TOKEN, 0.1, ReferenceKL.K3), (Normalisation.SEQUENCE, 0.1, ReferenceKL.CORRECTED)]


@pytest.mark.parametrize(
    "options",
    [{"clip_low": 0.0}, {"clip_low": 1.1}, {"clip_high": 0.0}, {"kl_weight": -1.0}, {"kl_weight": float("nan")}],
)
def test_impossible_surrogates_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(UserError, match=f"--{next(iter(options)).replace('_', '-')}"):
        Surrogate(**options)


@pytest.mark.parametrize(
    "options", [{"group": 1}, {"prompts": 0}, {"updates": 0}, {"steps": 0}, {"learning_rate": 0.0}]
)
def test_impossible_training_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"--{next(iter(options)).replace('_', '-')}"):
        PolicyTraining(**options)


def test_advantages_by_hand() -> None:
    rewards = torch.tensor([[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 0.0, 0.0], [0.3, 0.3, 0.3, 0.3], [2.0, 5.0, 5.0, 8.0]])
    centred = [[0.75, -0.25, -0.25, -0.25], [0.5, 0.5, -0.5, -0.5], [0, 0, 0, 0], [-3, 0, 0, 3]]
    plain = group_advantages(rewards, AdvantageScale.NONE)
    assert plain.flatten().tolist() == pytest.approx([value for row in centred for value in row])
    # Sample deviations: sqrt(3 * 1/16 + 9/16) / sqrt(3) = 1/2, sqrt(1/3), 0 and sqrt(18/3), each plus 1e-4.
    by = [0.5001, 0.577350269 + 1e-4, 1e-4, 2.449489743 + 1e-4]
    scaled = [value / std for row, std in zip(centred, by, strict=True) for value in row]
    assert group_advantages(rewards, AdvantageScale.STD).flatten().tolist() == pytest.approx(scaled)
    assert bool((plain[2] == 0).all())


def test_weights_by_hand() -> None:
    found = {kind: sequence_weights([2, 3, 5], kind, 20).tolist() for kind in Normalisation}
    assert found[Normalisation.TOKEN] == pytest.approx([1 / 10] * 3)
    assert found[Normalisation.SEQUENCE] == pytest.approx([1 / 6, 1 / 9, 1 / 15])
    assert found[Normalisation.CONSTANT] == pytest.approx([1 / 60] * 3)


def test_clipping_and_k3_by_hand() -> None:
    ratio = torch.tensor([1.0, 1.1, 1.5, 1.5, 0.7, 0.7], dtype=torch.float64)
    advantage = torch.tensor([2.0, 2.0, 2.0, -2.0, 2.0, -2.0], dtype=torch.float64)
    log_probs = torch.full((6,), -1.0, dtype=torch.float64, requires_grad=True)
    out = surrogate_loss(Surrogate(), log_probs, log_probs.detach() - ratio.log(), advantage, None)
    assert out.loss.tolist() == pytest.approx([-2.0, -2.2, -2.56, 3.0, -1.4, 1.6])
    assert out.clipped.tolist() == [False, False, True, False, False, True]
    (gradient,) = torch.autograd.grad(out.loss.sum(), log_probs)
    assert gradient.tolist() == pytest.approx([-2.0, -2.2, 0.0, 3.0, -1.4, 0.0])

    reference = log_probs.detach() + torch.tensor([0.0, 0.5, -0.5, 1.0, 0.0, 0.0], dtype=torch.float64)
    published = Surrogate(kl_weight=0.1, kl=ReferenceKL.K3)
    near = surrogate_loss(published, log_probs, log_probs.detach(), 0 * advantage, reference)
    assert near.kl.tolist() == pytest.approx([0, 0.1487212707, 0.1065306597, 0.7182818285, 0, 0])
    (gradient,) = torch.autograd.grad(near.loss.sum(), log_probs)
    assert gradient.tolist() == pytest.approx([0, -0.06487212707, 0.03934693403, -0.1718281828, 0, 0])


@pytest.mark.parametrize("kl", ReferenceKL)
def test_whose_gradient_an_estimate_has(kl: ReferenceKL) -> None:
    """In expectation over the policy's tokens; both have the value of KL(policy, reference)."""
    logits = torch.tensor([0.3, -1.0, 2.0, 0.1], dtype=torch.float64, requires_grad=True)
    log_q, log_p = logits.log_softmax(0), torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64).log()
    settings, none = Surrogate(kl_weight=1.0, kl=kl), torch.zeros(4, dtype=torch.float64)
    out = surrogate_loss(settings, log_q, log_q.detach(), none, log_p)
    (found,) = torch.autograd.grad((log_q.detach().exp() * out.loss).sum(), logits, retain_graph=True)
    towards = {
        ReferenceKL.CORRECTED: (log_q.exp() * (log_q - log_p)).sum(),
        ReferenceKL.K3: (log_p.exp() * (log_p - log_q)).sum(),
    }
    (truth,) = torch.autograd.grad(towards[kl], logits, retain_graph=True)
    assert found.tolist() == pytest.approx(truth.tolist())
    value = float((log_q.exp() * out.kl).sum().detach())
    assert value == pytest.approx(float(towards[ReferenceKL.CORRECTED].detach()))


def answers() -> list[TokenSequence]:
    """Two groups of three, of different lengths."""
    return [random_sequence(number, 2 + number // 3, 4 + number) for number in range(6)]


def drawn(rewards: Sequence[float] = (1, 0, 0, 0, 1, 1)) -> Drawn:
    return Drawn(sequences=answers(), reward_PG=torch.tensor(rewards, dtype=torch.float64).view(2, 3))


def learner(policy: Student, surrogate: Surrogate, **options: Any) -> Learner:
    training = PolicyTraining(steps=2, learning_rate=1e-3, warmup_steps=0, **options)
    return Learner(
        policy=policy,
        surrogate=surrogate,
        training=training,
        sampling_temperature=TEMPERATURE,
        max_new_tokens=LONGEST,
    )


def shifts(part: Part, seed: int, size: float) -> Tensor:
    return size * torch.randn(part.batch.target_rows, generator=torch.Generator().manual_seed(seed))


def whole(policy: Student, surrogate: Surrogate) -> tuple[Learner, Part]:
    """All answers as one part, written by another policy and kept near a third."""
    one = learner(policy, surrogate)
    learning, others = one.parts(drawn())
    assert not others
    (part,) = learning
    with torch.no_grad():
        now = one.log_probs(policy.head_over(part.batch), part).log_probs
    part.old = now + shifts(part, 1, 0.3)
    if surrogate.kl_weight:
        part.reference = now + shifts(part, 2, 0.5)
    return one, part


def gradients(model: Any) -> dict[str, Tensor]:
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def require_equal(found: dict[str, Tensor], truth: dict[str, Tensor], tolerance: float) -> None:
    assert found.keys() == truth.keys()
    for name, value in truth.items():
        assert float((found[name].double() - value.double()).norm() / value.double().norm()) < tolerance, name


@pytest.mark.parametrize(("normalisation", "kl_weight", "kl"), LOSSES)
def test_loss_and_gradients_equal_double_precision(
    normalisation: Normalisation, kl_weight: float, kl: ReferenceKL, student: Student
) -> None:
    surrogate = Surrogate(normalisation=normalisation, kl_weight=kl_weight, kl=kl, clip_low=0.1, clip_high=0.15)
    one, part = whole(student, surrogate)
    out, _ = one.backward(part, FlopLedger(), 0)
    assert part.old is not None
    assert 0 < int(out.clipped.sum()) < part.batch.target_rows

    truth = copy.deepcopy(student.model).double()
    truth.zero_grad()
    total, row = torch.zeros((), dtype=torch.float64), 0
    for sequence, reward, mean, std in zip(
        answers(), (1, 0, 0, 0, 1, 1), [1 / 3] * 3 + [2 / 3] * 3, [3**-0.5] * 6, strict=True
    ):
        ids = torch.from_numpy(sequence.token_ids.astype("int64"))
        logits = truth(input_ids=ids[None]).logits[0, sequence.first_row : -1, : student.vocab_size] / TEMPERATURE
        log_prob = logits.log_softmax(-1).gather(1, ids[sequence.prompt_tokens :, None])[:, 0]
        rows = slice(row, row + len(log_prob))
        row += len(log_prob)
        ratio = (log_prob - part.old[rows].double()).exp()
        advantage = (reward - mean) / (std + 1e-4)
        loss = -torch.minimum(ratio * advantage, ratio.clamp(0.9, 1.15) * advantage)
        if part.reference is not None:
            away = part.reference[rows].double() - log_prob
            k3 = away.exp() - away - 1
            loss = loss + kl_weight * (k3 if kl is ReferenceKL.K3 else ratio * k3)
        by = {"token": 39, "sequence": 6 * len(log_prob), "constant": 6 * LONGEST}[normalisation]
        total = total + loss.sum() / by
    total.backward()
    assert float((out.loss * part.weight).sum().detach()) == pytest.approx(float(total.detach()), rel=1e-4, abs=1e-6)
    require_equal(gradients(student.model), gradients(truth), 1e-4)


@pytest.fixture(scope="module")
def trl(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """TRL's trainer over the tiny model, which takes no step here: its loss is asked for given tensors."""
    pytest.importorskip("trl", reason="needs TRL: pip install 'logitcache[test]'")
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    model = AutoModelForCausalLM.from_pretrained(tiny_dir, dtype=torch.float32)
    config = GRPOConfig(
        output_dir=str(tmp_path_factory.mktemp("trl")),
        use_cpu=True,
        bf16=False,
        report_to="none",
        per_device_train_batch_size=6,
        num_generations=3,
        temperature=TEMPERATURE,
        max_completion_length=LONGEST,
        epsilon=0.1,
        epsilon_high=0.15,
    )
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=config,
        train_dataset=Dataset.from_list([{"prompt": "1+1="}]),
        processing_class=AutoTokenizer.from_pretrained(tiny_dir),
    )
    trainer.model.eval()
    return trainer


def padded(rows: Sequence[Tensor], side: str) -> tuple[Tensor, Tensor]:
    values = torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_side=side)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones(len(row)) for row in rows], batch_first=True, padding_side=side)
    return values, mask.long()


@pytest.mark.parametrize(("normalisation", "kl_weight", "kl"), LOSSES)
def test_loss_and_gradients_equal_trl_s(
    normalisation: Normalisation, kl_weight: float, kl: ReferenceKL, trl: Any, tiny_dir: Path
) -> None:
    # TRL takes the softmax over the head's padding rows too, so here they are tokens.
    rows = trl.model.get_output_embeddings().weight.shape[0]
    policy = load_student(tiny_dir, vocab_size=rows, precision="float32")
    surrogate = Surrogate(normalisation=normalisation, kl_weight=kl_weight, kl=kl, clip_low=0.1, clip_high=0.15)
    one, part = whole(policy, surrogate)
    out, _ = one.backward(part, FlopLedger(), 0)

    sequences = answers()
    lengths = [sequence.completion_tokens for sequence in sequences]
    ids = [torch.from_numpy(sequence.token_ids.astype("int64")) for sequence in sequences]
    prompt_ids, prompt_mask = padded([i[: s.prompt_tokens] for i, s in zip(ids, sequences, strict=True)], "left")
    completion_ids, completion_mask = padded(
        [i[s.prompt_tokens :] for i, s in zip(ids, sequences, strict=True)], "right"
    )
    assert part.old is not None
    inputs = {
        "prompt_ids": prompt_ids,
        "prompt_mask": prompt_mask,
        "completion_ids": completion_ids,
        "completion_mask": completion_mask,
        "advantages": group_advantages(drawn().reward_PG, AdvantageScale.STD).flatten().float(),
        "old_per_token_logps": padded(part.old.split(lengths), "right")[0],
        "num_items_in_batch": completion_mask.sum(),
    }
    if part.reference is not None:
        inputs["ref_per_token_logps"] = padded(part.reference.split(lengths), "right")[0]
    trl.loss_type, trl.beta = NORMALISATIONS[normalisation], kl_weight
    trl.args.use_bias_correction_kl = kl is ReferenceKL.CORRECTED
    trl.model.zero_grad()
    loss = trl.compute_loss(trl.model, inputs)
    loss.backward()
    assert float((out.loss * part.weight).sum().detach()) == pytest.approx(float(loss.detach()), rel=1e-4, abs=1e-6)
    require_equal(gradients(policy.model), gradients(trl.model), 1e-4)
    low, high = (trl._metrics["eval"][f"clip_ratio/{side}_mean"][-1] for side in ("low", "high"))
    assert float(out.clipped.float().mean()) == pytest.approx(low + high)


def test_the_first_update_equals_the_general_one(student: Student, tiny_dir: Path) -> None:
    """Where the ratio is known to be 1, one pass of the head does what two do elsewhere."""
    twin = load_student(tiny_dir, vocab_size=student.vocab_size, precision="float32")
    (one,), _ = learner(student, Surrogate()).parts(drawn())
    (two,), _ = learner(twin, Surrogate()).parts(drawn())
    ledger, other = FlopLedger(), FlopLedger()
    learner(student, Surrogate()).backward(one, ledger, 0)
    assert one.old is not None
    two.old = one.old.clone()
    learner(twin, Surrogate()).backward(two, other, 0)
    require_equal(gradients(student.model), gradients(twin.model), 1e-6)
    shape, rows = student.shape, one.batch.target_rows
    cost = forward(shape, one.batch.sequence_lengths, head_rows=rows)
    assert ledger.by_phase()[Phase.STUDENT_FORWARD] == cost
    assert other.by_phase()[Phase.STUDENT_FORWARD] == cost + head(shape, rows)
    assert ledger.by_phase()[Phase.STUDENT_BACKWARD] == other.by_phase()[Phase.STUDENT_BACKWARD] == backward(cost)


@pytest.mark.parametrize("kl_weight", [0.0, 0.1])
def test_micro_batches_change_no_result(kl_weight: float, student: Student, tiny_dir: Path) -> None:
    results = []
    for micro_batch_tokens in (4096, 1):
        policy = load_student(tiny_dir, vocab_size=student.vocab_size, precision="float32")
        surrogate = Surrogate(kl_weight=kl_weight)
        one = learner(policy, surrogate, updates=2, micro_batch_tokens=micro_batch_tokens)
        one = replace(one, reference=student if kl_weight else None)
        optimizer = new_optimizer(policy, one.training.optimisation)
        results.append(one.learn(drawn(), optimizer, FlopLedger(), 0))
    assert results[1] == pytest.approx(results[0], rel=1e-3, abs=1e-6)


def test_answers_without_an_advantage_are_measured_and_not_trained_on(student: Student) -> None:
    silent = drawn((0.5, 0.5, 0.5, 0, 1, 1))
    one = learner(student, Surrogate())
    learning, others = one.parts(silent)
    assert sum(len(part.batch.sequence_lengths) for part in learning) == 3
    ledger = FlopLedger()
    first = [parameter.clone() for parameter in student.parameters]
    optimizer = new_optimizer(student, one.training.optimisation)
    found = one.learn(silent, optimizer, ledger, 0)
    assert found["grad_norm"] > 0
    assert any(not torch.equal(a, b) for a, b in zip(first, student.parameters, strict=True))
    (part,) = others
    cost = forward(student.shape, part.batch.sequence_lengths, head_rows=part.batch.target_rows)
    assert ledger.by_phase()[Phase.EVALUATION] == cost
    assert silent.figures()["no_signal_share"] == 0.5


def test_a_step_without_any_signal_leaves_the_weights_alone(student: Student) -> None:
    one = learner(student, Surrogate())
    optimizer = new_optimizer(student, one.training.optimisation)
    one.learn(drawn(), optimizer, FlopLedger(), 0)  # so that there is momentum
    before = [parameter.clone() for parameter in student.parameters]
    found = one.learn(drawn((1, 1, 1, 0, 0, 0)), optimizer, FlopLedger(), 1)
    assert all(torch.equal(a, b) for a, b in zip(before, student.parameters, strict=True))
    assert found["grad_norm"] == found["policy_loss"] == found["clip_share"] == 0
    assert found["student_entropy_nats"] > 0


def test_a_ratio_that_is_not_finite_names_its_samples(student: Student) -> None:
    one, part = whole(student, Surrogate())
    assert part.old is not None
    part.old[3] = -1e4
    with pytest.raises(UserError, match=f"a ratio of step 7: it is inf, on samples .*{part.batch.sample_ids[0]}"):
        one.backward(part, FlopLedger(), 7)
