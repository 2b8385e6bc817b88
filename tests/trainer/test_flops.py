"""The formula against torch's own counter, and the ledger's arithmetic."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from kernels import LinearHead, mixed_kl
from logitcache import flops
from logitcache.errors import UserError
from logitcache.flops import Attention, ModelShape
from trainer.batch import Batch
from trainer.flops import FlopLedger, Phase
from trainer.packing import packed_sequences
from trainer.student import Student

SMOLLM2_135M = {
    "model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49_152, "tie_word_embeddings": True,
}  # fmt: skip
QWEN3_TINY = {
    "model_type": "qwen3", "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3,
    "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 1_000,
    "tie_word_embeddings": False,
}  # fmt: skip
LENGTHS = (37, 120, 5)


def meta_model(config: dict[str, Any], layers: int | None = None) -> Any:
    """The architecture without weights: the counter sees shapes, and shapes are all it needs."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = config | ({} if layers is None else {"num_hidden_layers": layers})
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(**config)).eval()


def counted(counter: FlopCounterMode) -> int:
    return int(counter.get_total_flops())


def addmm_in_place(total: Any, left: tuple[int, int], right: tuple[int, int], *_: Any, **__: Any) -> int:
    """The counter knows `addmm` and not `addmm_`, with which the chunked backend sums the head's gradient."""
    return 2 * left[0] * left[1] * right[1]


@pytest.mark.parametrize("config", [SMOLLM2_135M, QWEN3_TINY], ids=["smollm2", "qwen3"])
def test_forward_and_backward_agree_with_torch(config: dict[str, Any]) -> None:
    model, shape = meta_model(config), ModelShape.from_config(config)
    ids = torch.zeros(1, sum(LENGTHS), dtype=torch.long, device="meta")
    with sdpa_kernel(SDPBackend.MATH), packed_sequences(model):  # the fused CPU kernel is one the counter cannot see
        with FlopCounterMode(display=False) as counter:
            logits = model(
                input_ids=ids, position_ids=torch.zeros_like(ids), sequence_lengths=LENGTHS, use_cache=False
            ).logits
        forward = counted(counter)
        with FlopCounterMode(display=False) as counter:
            logits.sum().backward()
    expected = flops.forward(shape, LENGTHS, head_rows=sum(LENGTHS), attention=Attention.FULL)
    assert forward == pytest.approx(expected, rel=1e-2)
    assert counted(counter) == pytest.approx(flops.backward(expected), rel=1e-2)


@pytest.mark.parametrize("config", [SMOLLM2_135M | {"num_hidden_layers": 4}, QWEN3_TINY], ids=["smollm2", "qwen3"])
@pytest.mark.parametrize("forward_weight", [0.0, 1.0])
def test_a_whole_training_step_agrees_with_torch(config: dict[str, Any], forward_weight: float) -> None:
    """Student forward, divergence with the teacher's logits from hidden states, and backward, as they really run."""
    from transformers import AutoConfig, AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config)).eval()
    shape = ModelShape.from_config(config)
    student = Student(model=model, tokenizer=None, vocab_size=shape.vocab, precision=torch.float32)
    teacher_width, rows = 96, 40
    batch = Batch(
        input_ids=torch.zeros(sum(LENGTHS), dtype=torch.long),
        position_ids=torch.cat([torch.arange(length) for length in LENGTHS]),
        sequence_lengths=LENGTHS,
        rows=torch.arange(rows),
        next_ids=torch.zeros(rows, dtype=torch.long),
        targets=LinearHead(hidden=torch.ones(rows, teacher_width), weight=torch.ones(shape.vocab, teacher_width)),
        sample_ids=("a", "b", "c"),
    )
    assert isinstance(batch.targets, LinearHead)
    in_place = {torch.ops.aten.addmm_: addmm_in_place}
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        # The native backend's products happen outside torch, where the counter cannot see them; they are the same.
        student_head = student.head_over(batch)
        out = mixed_kl(student_head, batch.targets, forward_weight=forward_weight, backend="chunked")
        out.loss.sum().backward()
    forward = flops.forward(shape, LENGTHS, head_rows=rows, attention=Attention.FULL)
    teacher_head = 2 * rows * teacher_width * shape.vocab
    assert counted(counter) == pytest.approx(forward + flops.backward(forward) + teacher_head, rel=1e-2)


@pytest.mark.parametrize("config", [SMOLLM2_135M | {"num_hidden_layers": 2}, QWEN3_TINY], ids=["smollm2", "qwen3"])
def test_generation_agrees_with_torch(config: dict[str, Any]) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config)).eval()
    prompt, new, cache = 11, 9, DynamicCache(config=model.config)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(input_ids=torch.zeros(1, prompt, dtype=torch.long), past_key_values=cache, logits_to_keep=1)
        for _ in range(new - 1):
            model(input_ids=torch.zeros(1, 1, dtype=torch.long), past_key_values=cache, logits_to_keep=1)
    expected = flops.generate(ModelShape.from_config(config), [prompt], [new], attention=Attention.FULL)
    assert counted(counter) == pytest.approx(sum(expected), rel=1e-2)


def test_one_layer_by_hand() -> None:
    shape = ModelShape(layers=1, hidden=4, heads=2, kv_heads=1, head_dim=3, mlp=5, vocab=7)
    # q 4x6, k and v 4x3, o 6x4, gate and up and down 4x5: 24 + 24 + 24 + 60 weights, 2 FLOPs each and token
    assert flops.body(shape, [1], attention=Attention.FULL) == 2 * 132 + 4 * 2 * 3
    assert flops.body(shape, [3], attention=Attention.FULL) == 3 * 264 + 9 * 24
    assert flops.body(shape, [3]) == 3 * 264 + 6 * 24
    assert flops.head(shape, 5) == 2 * 5 * 4 * 7
    assert shape.parameters == 132 + 28


def test_decoding_costs_what_one_forward_over_the_same_tokens_costs() -> None:
    shape = ModelShape.from_config(SMOLLM2_135M)
    assert sum(flops.generate(shape, [50], [64])) == flops.forward(shape, [50 + 63], head_rows=64)
    assert flops.generate(shape, [50, 20], [0, 1]) == (flops.forward(shape, [20], head_rows=1), 0)


@pytest.mark.parametrize(
    "config", [{"model_type": "mamba"}, {}, QWEN3_TINY | {"use_sliding_window": True}], ids=["other", "none", "window"]
)
def test_an_unknown_architecture_is_an_error(config: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="no formula"):
        ModelShape.from_config(config)


def test_the_ledger_adds_up_and_survives_json() -> None:
    ledger = FlopLedger()
    ledger.add(Phase.STUDENT_FORWARD, 10, step=0)
    ledger.add(Phase.STUDENT_BACKWARD, 20, step=0)
    ledger.add(Phase.STUDENT_FORWARD, 10, step=1)
    ledger.add(Phase.EVALUATION, 1000, step=None)
    assert ledger.by_phase()[Phase.STUDENT_FORWARD] == 20
    assert ledger.by_phase()[Phase.TEACHER_PREFILL] == 0
    assert ledger.marginal() == 40
    assert ledger.amortised(build_flops=100, students=3) == 40 + 34
    assert ledger.amortised(build_flops=0, students=1) == 40
    again = FlopLedger.from_json(json.loads(json.dumps(ledger.to_json())))
    assert again.rows == ledger.rows
    with pytest.raises(ValueError, match="expected 0 or more"):
        ledger.add(Phase.EVALUATION, -1, step=None)
    with pytest.raises(ValueError, match="expected 1 or more"):
        ledger.amortised(build_flops=1, students=0)
