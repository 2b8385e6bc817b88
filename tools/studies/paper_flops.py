"""FLOPs a step of arXiv 2605.16826 from model configurations alone, in its convention and in this project's.

    python -m tools.studies.paper_flops [--quick] [--json PATH]

The paper gives two figures, for the 4B teacher and 128 tokens. The convention that gives both: attention over all pairs
of a full square, a query and an output projection of D x D although Qwen3's are wider, logits at every position of
prompt and completion on both sides, and no second look at a cached target's logits. The one number that no
configuration holds is the mean length of a prompt: `PROMPT_TOKENS` was fitted to the first figure, and the other is
then a prediction.
"""

from __future__ import annotations

from typing import Any

from logitcache import flops
from logitcache.flops import ModelShape
from tools.bench.result import at_most, keep, options
from trainer.planning.costs import Pair, Text, step_cost
from trainer.planning.models import model_shape
from trainer.settings import Prefix

BATCH = 32
PROMPT_TOKENS = 94
PAPER_TFLOPS = {"cached": 23.19, "live": 83.98}
"""Of one step with the 4B teacher and 128 completion tokens, from cached teacher prefixes and on student prefixes."""


def paper_forward(shape: ModelShape, tokens: int) -> int:
    """One forward over a sequence, as the paper counts it."""
    width, keys = shape.hidden, shape.kv_heads * shape.head_dim
    layer = 4 * tokens * width**2 + 4 * tokens * width * keys + 2 * tokens**2 * width + 6 * tokens * width * shape.mlp
    return shape.layers * layer + flops.head(shape, tokens)


def paper_step(student: ModelShape, teacher: ModelShape, completion: int) -> dict[str, float]:
    """TFLOPs of a step: forward and backward of the student; live, a rollout and the teacher's forward besides."""
    own, other = (BATCH * paper_forward(shape, PROMPT_TOKENS + completion) for shape in (student, teacher))
    return {"cached": 3 * own / 1e12, "live": (4 * own + other) / 1e12}


def ledger_step(student: ModelShape, teacher: ModelShape, completion: int) -> dict[str, float]:
    """The same step as this project's ledger counts it (docs/flops.md), from hidden states. Live and cached, the
    teacher's logits are one product.
    """
    pair = Pair(student=student, teacher=teacher)
    text = Text.alike(sequences=BATCH, prompt_tokens=PROMPT_TOKENS, completion_tokens=completion)
    names = {Prefix.TEACHER: "cached", Prefix.STUDENT: "live"}
    return {name: sum(step_cost(pair, text, prefix=prefix).values()) / 1e12 for prefix, name in names.items()}


def steps() -> list[dict[str, Any]]:
    """Every teacher and length, in both conventions."""
    student = model_shape("Qwen3-0.6B")
    return [
        {
            "teacher": teacher,
            "completion_tokens": completion,
            "paper_tflops": paper_step(student, model_shape(f"Qwen3-{teacher}"), completion),
            "ledger_tflops": ledger_step(student, model_shape(f"Qwen3-{teacher}"), completion),
        }
        for teacher in ("4B", "8B")
        for completion in (128, 512, 1024, 2048, 4096)
    ]


def main() -> None:
    """Compute and keep."""
    chosen = options("paper_flops", __doc__)
    rows = steps()
    ours = rows[0]["paper_tflops"]
    ratio = (ours["live"] / ours["cached"]) / (PAPER_TFLOPS["live"] / PAPER_TFLOPS["cached"])
    goals = [
        at_most(
            f"{name} step, 4B teacher, 128 tokens, off the paper's {figure}",
            0.02,
            abs(ours[name] / figure - 1),
            "of it",
        )
        for name, figure in PAPER_TFLOPS.items()
    ]
    goals.append(at_most("error of their ratio", 0.01, abs(ratio - 1), "of it"))
    config = {"student": "Qwen3-0.6B", "batch": BATCH, "prompt_tokens": PROMPT_TOKENS}
    keep(chosen, config=config, figures={"steps": rows}, goals=goals)


if __name__ == "__main__":
    main()
