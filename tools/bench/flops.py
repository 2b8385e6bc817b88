"""The FLOP formula against torch's own counter, and what packing saves over padding.

    python -m tools.bench.flops [--quick] [--json PATH]

Counts need shapes alone, so models without experts are built without weights. The time is that of one forward and
backward of the embedded model's body, bfloat16 autocast, over the same sequences of unequal length packed and padded;
rounds alternate.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from logitcache import flops
from logitcache.embedded import embedded_teacher_dir
from logitcache.flops import Attention, ModelShape
from tools.bench.result import at_most, keep, options
from trainer.packing import packed_sequences

LENGTHS = (211, 64, 130)
QWEN3_TINY = {
    "model_type": "qwen3", "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4,
    "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 4096,
}  # fmt: skip


QWEN3_MOE_TINY = QWEN3_TINY | {
    "model_type": "qwen3_moe", "num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 192,
    "mlp_only_layers": [1],
}  # fmt: skip


def main() -> None:
    """Count, time and keep."""
    chosen = options("flops", __doc__)
    embedded = json.loads((embedded_teacher_dir() / "config.json").read_text())
    student = {**embedded, "num_hidden_layers": 20}
    models = {"smollm2_135m": embedded, "pruned_20_layers": student, "qwen3_tiny": QWEN3_TINY}
    models["qwen3_moe_tiny"] = QWEN3_MOE_TINY
    errors = {name: _relative_errors(config) for name, config in models.items()}
    layers, sequences, rounds = (4, 4, 1) if chosen.quick else (20, 8, 5)
    lengths = _lengths(sequences)
    packed_s, padded_s = _packed_and_padded({**embedded, "num_hidden_layers": layers}, lengths, rounds)
    worst = max(error for pair in errors.values() for error in pair.values())
    ratio = median(packed / padded for packed, padded in zip(packed_s, padded_s, strict=True))
    padding = len(lengths) * max(lengths) / sum(lengths)
    keep(
        chosen,
        config={"counted_lengths_tokens": LENGTHS, "timed_lengths_tokens": lengths, "layers": layers, "rounds": rounds},
        figures={
            "relative_error": errors,
            "packed_s": packed_s,
            "padded_s": padded_s,
            "packed_over_padded_time": ratio,
            "padded_over_packed_tokens": padding,
        },
        goals=[at_most("formula against FlopCounterMode, largest relative error", 0.01, worst, "of the count")],
    )


def _relative_errors(config: dict[str, Any]) -> dict[str, float]:
    """Of forward and backward, packed, with logits for every row."""
    shape, rows = ModelShape.from_config(config), sum(LENGTHS)
    device = torch.device("cpu" if shape.experts else "meta")  # routing looks at numbers
    with device:
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config)).eval()
    if shape.experts:
        model.set_experts_implementation("eager")  # a product for each expert, which the counter sees
    ids = torch.zeros(1, rows, dtype=torch.long, device=device)
    # The fused CPU kernel is one the counter cannot see; the plain one computes all pairs.
    with sdpa_kernel(SDPBackend.MATH), packed_sequences(model):
        with FlopCounterMode(display=False) as forward:
            logits = model(input_ids=ids, position_ids=ids, sequence_lengths=LENGTHS, use_cache=False).logits
        with FlopCounterMode(display=False) as backward:
            logits.sum().backward()
    expected = flops.forward(shape, LENGTHS, head_rows=rows, attention=Attention.FULL)
    return {
        "forward": abs(forward.get_total_flops() / expected - 1),
        "backward": abs(backward.get_total_flops() / flops.backward(expected) - 1),
    }


def _lengths(sequences: int) -> list[int]:
    """Prompt and window of problems of unequal length."""
    draw = random.Random(0)
    return [draw.randint(40, 220) for _ in range(sequences)]


def _packed_and_padded(config: dict[str, Any], lengths: Sequence[int], rounds: int) -> tuple[list[float], list[float]]:
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config)).model.eval()
    packed_ids = torch.zeros(1, sum(lengths), dtype=torch.long)
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    padded_ids = torch.zeros(len(lengths), max(lengths), dtype=torch.long)

    def packed() -> torch.Tensor:
        with packed_sequences(model):
            return model(
                input_ids=packed_ids, position_ids=positions, sequence_lengths=lengths, use_cache=False
            ).last_hidden_state

    def padded() -> torch.Tensor:
        # Right padding needs no mask under causal attention: the cheapest a padded batch can be.
        return model(input_ids=padded_ids, use_cache=False).last_hidden_state

    times: tuple[list[float], list[float]] = [], []
    for round_number in range(rounds + 1):
        for kept, forward in zip(times, (packed, padded), strict=True):
            seconds = _step_s(model, forward)
            if round_number:  # the first is a warm-up
                kept.append(seconds)
    return times


def _step_s(model: Any, forward: Callable[[], torch.Tensor]) -> float:
    started = time.perf_counter()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        states = forward()
    states.float().sum().backward()
    seconds = time.perf_counter() - started
    model.zero_grad()
    return seconds


if __name__ == "__main__":
    main()
