"""`samples.jsonl`, what an evaluation keeps of every completion, and what follows from it.

Guarantees: lines come in the order of problems and samples and in whole chunks, from one process at a time; what a
killed run left of a chunk is cut off and made again; lines of other problems are refused. All figures but those of the
cache follow from the lines alone, so shares that were made apart are summed up as if they were one.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from logitcache.errors import UserError
from logitcache.flops import ModelShape, forward
from logitcache.problems import Problem
from logitcache.records import FinishReason, TokenSequence
from trainer.answers import Checked, Verdict
from trainer.flops import rollout
from trainer.own_text import OwnDistribution
from trainer.runs import lock_alone
from trainer.scores import score_table

FILE = "samples.jsonl"
APART = ("forward_kl_nats", "reverse_kl_nats", "top1_share")
"""What a teacher adds to a line."""
Line = dict[str, Any]


def sample_line(number: int, sequence: TokenSequence, own: OwnDistribution, text: str, checked: Checked) -> Line:
    """One completion: what was written, what became of its answer, what the model's distributions were like."""
    return {
        "problem_id": sequence.problem_id,
        "sample": number,
        "verdict": str(checked.verdict),
        "answer": checked.answer,
        "prompt_tokens": sequence.prompt_tokens,
        "completion_tokens": sequence.completion_tokens,
        "finish_reason": str(sequence.finish_reason),
        **{name: value for name, value in asdict(own).items() if value is not None},
        "seed": sequence.seed,
        "text": text,
    }


@contextmanager
def only_writer(directory: Path) -> Iterator[None]:
    """Within it, no other process adds lines here. Raises UserError if one does already."""
    with (directory / FILE).open("ab") as file:
        do = "wait for it, choose another --out, or share the problems with --worker"
        lock_alone(file, f"evaluate in {directory}", do)
        yield


def append_lines(directory: Path, lines: Iterable[Line]) -> None:
    """Add a chunk, and force it to the disk."""
    with (directory / FILE).open("a") as file:
        file.write("".join(json.dumps(line, allow_nan=False) + "\n" for line in lines))
        file.flush()
        os.fsync(file.fileno())


def keep_whole_chunks(directory: Path, chunks: Sequence[Sequence[Problem]], samples: int) -> int:
    """How many chunks are there; whatever is left behind them is cut off.

    Raises:
        UserError: the lines are not those of these problems.
    """
    file = directory / FILE
    lines = file.read_bytes().split(b"\n")[:-1]
    kept = used = 0
    for chunk in chunks:
        expected = _keys(chunk, samples)
        part = lines[used : used + len(expected)]
        if len(part) < len(expected):
            break
        if [_key(line) for line in part] != expected:
            found = f"lines {used + 1} to {used + len(part)} are not those of this evaluation"
            raise UserError(f"go on with {file}", found, "choose another --out")
        used, kept = used + len(expected), kept + 1
    os.truncate(file, sum(len(line) + 1 for line in lines[:used]))
    return kept


def read_lines(directory: Path, problems: Sequence[Problem], samples: int) -> list[Line]:
    """All samples of a share that is done.

    Raises:
        UserError: the lines are not exactly one for each sample of each problem, in order.
    """
    file = directory / FILE
    lines = file.read_bytes().split(b"\n")[:-1]
    expected = _keys(problems, samples)
    if [_key(line) for line in lines] != expected:
        found = f"its {len(lines)} lines are not the {len(expected)} of this evaluation"
        raise UserError(f"sum up {file}", found, "do it again with another --out")
    return [json.loads(line) for line in lines]


def figures(lines: Sequence[Line], samples: int, ks: Sequence[int]) -> dict[str, Any]:
    """Scores with their intervals, what became of the answers, lengths, and the model's own distributions.

    Args:
        lines: of whole problems, `samples` after another.
        samples: N, of every problem.
        ks: of Pass@k and maj@k, each 1 to N.
    """
    correct_PN = np.array([line["verdict"] == Verdict.CORRECT for line in lines]).reshape(-1, samples)
    answers = [[line["answer"] for line in lines[at : at + samples]] for at in range(0, len(lines), samples)]
    tokens = np.array([line["completion_tokens"] for line in lines])
    verdicts = Counter(line["verdict"] for line in lines)
    truncated = sum(line["finish_reason"] == FinishReason.LENGTH for line in lines)
    return {
        "problems": len(answers),
        "samples_per_problem": samples,
        "scores": {name: asdict(score) for name, score in score_table(correct_PN, answers, ks).items()},
        "verdicts": {str(verdict): verdicts[verdict] for verdict in Verdict},
        "mean_length_tokens": float(tokens.mean()),
        "p95_length_tokens": float(np.percentile(tokens, 95)),
        "truncated_share": truncated / len(lines),
        "entropy_nats": _token_mean(lines, "entropy_nats"),
        "eos_mass": _token_mean(lines, "eos_mass"),
        "own_text": {name: _token_mean(lines, name) for name in APART} if APART[0] in lines[0] else None,
    }


def flops_of_lines(
    lines: Sequence[Line], shape: ModelShape, *, stop_tokens: int, teacher: ModelShape | None
) -> dict[str, int]:
    """What an evaluation took: the model that writes, the model that reads it again, the teacher that does.

    Reading asks the model's head once for each stop token, and both heads twice where there is a teacher.
    """
    prompts, new = ([line[name] for line in lines] for name in ("prompt_tokens", "completion_tokens"))
    lengths, rows = [a + b - 1 for a, b in zip(prompts, new, strict=True)], sum(new)
    heads = stop_tokens + (0 if teacher is None else 2)
    return {
        "writing": rollout(shape, prompts, new, None),
        "reading": forward(shape, lengths, head_rows=heads * rows),
        "teacher": 0 if teacher is None else forward(teacher, lengths, head_rows=2 * rows),
    }


def described(result: Mapping[str, Any]) -> str:
    """A result of `trainer.recipes.evaluate` for people."""
    lines = [
        f"{name:18}{score['mean']:7.1%}  ({score['low']:.1%} to {score['high']:.1%})"
        for name, score in result["scores"].items()
    ]
    verdicts = ", ".join(f"{count} {name}" for name, count in result["verdicts"].items())
    lines += [
        f"{result['problems']} problems, {result['samples_per_problem']} samples each: {verdicts}",
        f"length {result['mean_length_tokens']:.1f} tokens (p95 {result['p95_length_tokens']:.0f}), "
        f"{result['truncated_share']:.1%} truncated",
        f"entropy {result['entropy_nats']:.4f} nats, stop mass {result['eos_mass']:.4f}",
    ]
    lines.append("FLOPs: " + ", ".join(f"{name} {flops:.4g}" for name, flops in result["flops"].items() if flops))
    for text, key in (("own text", "own_text"), ("held out", "held_out")):
        found = result.get(key) or {}
        lines += [f"{text}: {name} {value:.4f}" for name, value in found.items() if isinstance(value, float)]
    return "\n".join(lines)


def _token_mean(lines: Sequence[Line], name: str) -> float:
    """Over all tokens; a line's value is the mean over its own."""
    tokens = sum(line["completion_tokens"] for line in lines)
    return sum(line[name] * line["completion_tokens"] for line in lines) / tokens


def _keys(problems: Sequence[Problem], samples: int) -> list[tuple[Any, Any]]:
    return [(problem.id, number) for problem in problems for number in range(samples)]


def _key(line: bytes) -> tuple[Any, Any] | None:
    try:
        value: Mapping[str, Any] = json.loads(line)
        return value["problem_id"], value["sample"]
    except (ValueError, KeyError, TypeError):
        return None
