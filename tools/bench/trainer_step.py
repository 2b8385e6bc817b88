"""A step from each tier beside a plain cross-entropy step on the same tokens: read, forward, backward, AdamW.

python -m tools.bench.trainer_step WORK SEQUENCES WINDOW ROUNDS

Plain cross-entropy: `ce` is torch's, over logits of the completion rows taken in bfloat16 and widened to float32;
`fused_ce` is this trainer's own (`--cross-entropy-share 1`), by the kernels that the divergences go through too.
torch's `linear_cross_entropy` in chunks is many times slower than either in bfloat16 on a CPU, and is left out. Reading
the cache is part of a cached step, reading the tokens part of the others.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from kernels import LinearHead
from logitcache.store import open_cache
from tools.bench.timing import interleaved
from trainer.batch import Batch, collate, teacher_head
from trainer.objectives import Objective, token_mean
from trainer.rollouts import with_own_tokens
from trainer.student import load_student

CPU = torch.device("cpu")


def main() -> None:
    """Print one JSON object; argv as above."""
    work = Path(sys.argv[1])
    sequences, window, rounds = map(int, sys.argv[2:])
    indices = range(sequences)
    hidden = open_cache(str(work / "cache"), targets="hidden")
    top_k = open_cache(str(work / "cache"), targets="topk")
    head = hidden.head
    assert head is not None
    tensors = teacher_head(head, CPU)
    student = load_student(work / "student", vocab_size=head.vocab_size)
    optimizer = torch.optim.AdamW(student.parameters, lr=1e-5, fused=True)
    objective, fine_tuning = Objective(forward_weight=1.0), Objective(forward_weight=1.0, cross_entropy_share=1.0)

    def step(batch: Batch, loss: Tensor) -> None:
        token_mean(loss, batch.target_rows).backward()
        torch.nn.utils.clip_grad_norm_(student.parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    def on_text(loss: Callable[[LinearHead, Batch], Tensor]) -> None:
        scored = [with_own_tokens(one) for one in hidden.read_tokens(indices)]
        batch = collate(scored, None, CPU)
        step(batch, loss(student.head_over(batch), batch))

    def from_hidden() -> None:
        batch = collate(hidden.read(indices, max_completion_tokens=window), tensors, CPU)
        step(batch, objective(student.head_over(batch), batch.targets).loss)

    def from_top_k() -> None:
        batch = collate(top_k.read(indices, max_completion_tokens=window), None, CPU)
        step(batch, objective(student.head_over(batch), batch.targets).loss)

    rows = sum(one.completion_tokens for one in hidden.read_tokens(indices))
    states = torch.randn(rows, tensors.weight.shape[1]).to(tensors.weight.dtype)

    def products() -> None:
        torch.mm(states, tensors.weight.T)

    subjects: dict[str, Callable[[], None]] = {
        "ce": lambda: on_text(_plain),
        "fused_ce": lambda: on_text(lambda over, batch: fine_tuning.over(over, batch)[0]),
        "topk": from_top_k,
        "hidden": from_hidden,
        "head": products,
    }
    seconds = interleaved(subjects, rounds)
    result: dict[str, object] = {f"{name}_s": kept for name, kept in seconds.items()} | {"rows": rows}
    for ce in ("ce", "fused_ce"):
        pairs = zip(seconds[ce], seconds["topk"], seconds["hidden"], seconds["head"], strict=True)
        ratios = [(k / plain, h / (plain + product)) for plain, k, h, product in pairs]
        result[f"topk_over_{ce}"] = median(ratio for ratio, _ in ratios)
        result[f"hidden_over_{ce}_and_head"] = median(ratio for _, ratio in ratios)
    print(json.dumps(result))


def _plain(head: LinearHead, batch: Batch) -> Tensor:
    logits = head.hidden @ head.weight.to(head.hidden.dtype).T
    return cross_entropy(logits.float(), batch.next_ids, reduction="none")


if __name__ == "__main__":
    main()
