"""How a student writes fastest on this machine: kind of key-value cache, and weights cast once or at every token.

python -m tools.bench.trainer_rollouts WORK SEQUENCES WINDOW ROUNDS

`dynamic`, `static` and `paged` are transformers' own generate (for the last, `generate_batch`) over one and the same
bfloat16 model, every completion at full length; `copy` and `autocast` are ours, with a copy cast once a call and with
float32 weights cast at every token.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig

from logitcache.scorers.hf import engine_for
from logitcache.scoring import Prompt, Sampling
from tools.bench.timing import interleaved
from trainer.rollouts import student_generator
from trainer.student import load_student

PAGE = 32
"""Tokens of a page."""


def main() -> None:
    """Print one JSON object; argv as above."""
    work = Path(sys.argv[1])
    sequences, window, rounds = map(int, sys.argv[2:])
    tokens = json.loads((work / "tokens.json").read_text())[:sequences]
    prompts = [
        Prompt(problem_id=str(place), token_ids=tuple(one["ids"][: one["prompt_tokens"]]))
        for place, one in enumerate(tokens)
    ]
    student = load_student(work / "student", vocab_size=49_152)
    autocast = engine_for(student.model, student.tokenizer, autocast=torch.bfloat16)
    copied = student_generator(student, stop_ids=autocast.stop_ids)
    plain = AutoModelForCausalLM.from_pretrained(work / "student", dtype=torch.bfloat16).eval()
    shortest = min(len(prompt.token_ids) for prompt in prompts)
    ids = torch.tensor([prompt.token_ids[:shortest] for prompt in prompts])
    sampling = Sampling(max_new_tokens=window)

    def generate(kind: str) -> None:
        how = {"do_sample": True, "top_p": 0.95, "top_k": 20, "max_new_tokens": window, "min_new_tokens": window}
        plain.generate(ids, attention_mask=torch.ones_like(ids), cache_implementation=kind, **how)

    def paged() -> None:
        """Room for exactly this batch: left to itself, it takes most of the memory there is."""
        length = max(len(prompt) for prompt in ids.tolist()) + window
        blocks = ContinuousBatchingConfig(
            num_blocks=len(ids) * -(-length // PAGE) + 1, max_batch_tokens=ids.numel(), page_size=PAGE
        )
        how = GenerationConfig(do_sample=True, top_p=0.95, top_k=20, max_new_tokens=window, eos_token_id=-1)
        written = plain.generate_batch(ids.tolist(), generation_config=how, continuous_batching_config=blocks)
        assert all(len(one.generated_tokens) == window for one in written.values())

    subjects: dict[str, Callable[[], object]] = {
        "dynamic": lambda: generate("dynamic"),
        "static": lambda: generate("static"),
        "paged": paged,
        "copy": lambda: copied.generate(prompts, sampling),
        "autocast": lambda: autocast.generate(prompts, sampling),
    }
    seconds = interleaved(subjects, rounds)
    result: dict[str, object] = {f"{name}_s": kept for name, kept in seconds.items()}
    for name, over in (("static", "dynamic"), ("paged", "dynamic"), ("copy", "autocast")):
        pairs = zip(seconds[name], seconds[over], strict=True)
        result[f"{name}_over_{over}"] = median(one / other for one, other in pairs)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
