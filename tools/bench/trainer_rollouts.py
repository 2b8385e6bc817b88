"""How a student writes fastest on this machine: kind of key-value cache, and weights cast once or at every token.

python -m tools.bench.trainer_rollouts WORK SEQUENCES WINDOW ROUNDS

`dynamic` and `static` are transformers' own generate over one and the same bfloat16 model, every completion at full
length; `copy` and `autocast` are ours, with a copy cast once a call and with float32 weights cast at every token.
Its paged cache (`generate_batch`) is for GPUs and is left out.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from transformers import AutoModelForCausalLM

from logitcache.scorers.hf import engine_for
from logitcache.scoring import Prompt, Sampling
from tools.bench.timing import interleaved
from trainer.rollouts import student_generator
from trainer.student import load_student


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

    subjects: dict[str, Callable[[], object]] = {
        "dynamic": lambda: generate("dynamic"),
        "static": lambda: generate("static"),
        "copy": lambda: copied.generate(prompts, sampling),
        "autocast": lambda: autocast.generate(prompts, sampling),
    }
    seconds = interleaved(subjects, rounds)
    result: dict[str, object] = {f"{name}_s": kept for name, kept in seconds.items()}
    for name, over in (("static", "dynamic"), ("copy", "autocast")):
        pairs = zip(seconds[name], seconds[over], strict=True)
        result[f"{name}_over_{over}"] = median(one / other for one, other in pairs)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
