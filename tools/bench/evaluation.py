"""What checking answers costs beside writing them: the embedded teacher on MATH500, each answer checked by math-verify.

    python -m tools.bench.evaluation [--quick] [--json PATH] [--data DIR]

Writes one answer to each problem, in chunks as `trainer evaluate` does, and checks each chunk after it was written, so
that both meet the same machine; there they overlap. Answers are cut at 96 tokens, a small part of what an evaluation
allows: longer ones cost more to write and hardly more to check. On two cores about four minutes.
"""

from __future__ import annotations

import time
from collections import Counter

from logitcache.console import Progress
from logitcache.identity import EMBEDDED, model_display_name, resolve_model
from logitcache.prompts import PromptStyle, render_prompts
from logitcache.scorers.hf import load_engine, load_tokenizer
from logitcache.scoring import Sampling
from tools.bench.result import at_most, keep, options
from trainer.answers import AnswerChecker, Verdict
from trainer.benchmarks import load_benchmark

GOAL = 0.05
CHUNK = 64
"""Answers, `trainer evaluate`'s default."""


def main() -> None:
    """Write, check, keep."""
    chosen = options("evaluation", __doc__)
    count, max_new_tokens = (16, 16) if chosen.quick else (128, 96)
    sampling = Sampling(max_new_tokens=max_new_tokens)
    problems = load_benchmark(str(chosen.data / "math500.parquet"), limit=count)
    model_dir = resolve_model(EMBEDDED)
    engine, tokenizer = load_engine(model_dir, dtype="bfloat16"), load_tokenizer(model_dir)
    prompts = render_prompts(tokenizer, problems, PromptStyle())
    engine.generate(prompts[:2], Sampling(max_new_tokens=4))  # what is done once
    writing_s = checking_s = 0.0
    tokens = 0
    verdicts: Counter[Verdict] = Counter()
    slowest_s = 0.0
    started = time.perf_counter()
    with AnswerChecker() as checker, Progress("answers", count, "written and checked") as progress:
        starting_s = time.perf_counter() - started
        for at in range(0, count, CHUNK):
            started = time.perf_counter()
            written = engine.generate(prompts[at : at + CHUNK], sampling)
            writing_s += time.perf_counter() - started
            tokens += sum(one.completion_tokens for one in written)
            for problem, one in zip(problems[at : at + CHUNK], written, strict=True):
                started = time.perf_counter()
                text = tokenizer.decode(one.completion_ids, skip_special_tokens=True)
                verdicts[checker.check(problem.answer, text).verdict] += 1
                took_s = time.perf_counter() - started
                checking_s, slowest_s = checking_s + took_s, max(slowest_s, took_s)
            progress.add(len(written))
    share = (starting_s + checking_s) / writing_s
    keep(
        chosen,
        config={
            "model": model_display_name(EMBEDDED),
            "dtype": "bfloat16",
            "problems": "math500",
            "answers": count,
            "max_new_tokens": max_new_tokens,
        },
        figures={
            "writing_s": writing_s,
            "checker_starting_s": starting_s,
            "checking_s": checking_s,
            "slowest_answer_s": slowest_s,
            "checking_share": share,
            "completion_tokens": tokens,
            "verdicts": {str(verdict): verdicts[verdict] for verdict in Verdict},
        },
        goals=[at_most(f"checking {count} answers, of the time of writing them", GOAL, share, "(1 is all)")],
    )


if __name__ == "__main__":
    main()
