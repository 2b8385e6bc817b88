r"""A world small enough for a laptop: sums of two-digit numbers, worked step by step in two styles.

    47+38-29=?
    47+38=85;85-20=65;65-9=56;\boxed{56}

Guarantees: problems and workings follow from a seed; every problem has one answer, a whole number from 0 to 199; the
held-out problems of the study are in no training text; the tokenizer is a `tokenizer.json` that transformers loads,
one token a symbol. A step is either terse (the term at once) or split (its tens and its units, in either order), by a
fair coin at every step: so there is entropy that no skill removes, and answers of different length to one problem.

    python -m tools.studies.world --out runs/world

writes `train.jsonl`, `easy.jsonl` and `hard.jsonl`, which the commands take with `--instruction ''`. The world's models
are in `tools/studies/models`.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np
from cyclopts import App

from logitcache.console import run_command
from logitcache.problems import Problem

END, BOX = "<end>", "\\boxed{"
SYMBOLS = (END, "\n", BOX, "}", *"0123456789", *"+-=;?")
LARGEST = 199
"""No running total is larger, or negative."""
LONGEST = 96
"""Completion tokens that hold every working of a hard problem."""

HELD_OUT = 200
"""Problems of each level that nothing is taught on."""

app = App(name="world", help="Write the problems of the world.", version_flags=[])


class Level(StrEnum):
    """How many terms a problem has, and so how many steps."""

    EASY = "easy"
    HARD = "hard"

    @property
    def terms(self) -> int:
        """Numbers to add and subtract."""
        return 3 if self is Level.EASY else 5


@dataclass(frozen=True, kw_only=True)
class Sum:
    """A problem: its terms with their signs, the first positive."""

    terms: tuple[int, ...]

    @property
    def text(self) -> str:
        """As it is put."""
        return f"{self.terms[0]}{''.join(f'{term:+d}' for term in self.terms[1:])}=?"

    @property
    def answer(self) -> int:
        """Its value."""
        return sum(self.terms)

    def working(self, rng: np.random.Generator) -> str:
        """One way to write the solution, each step in a style of its own."""
        total, steps = self.terms[0], []
        for term in self.terms[1:]:
            for part in _parts(term, rng):
                steps.append(f"{total}{part:+d}={total + part};")
                total += part
        return f"{''.join(steps)}{BOX}{total}}}"


def _parts(term: int, rng: np.random.Generator) -> tuple[int, ...]:
    """The term at once, or its tens and units in either order; units that are 0 are no step."""
    sign, size = (-1, -term) if term < 0 else (1, term)
    tens, units = sign * (size - size % 10), sign * (size % 10)
    style = rng.integers(4)
    if style < 2 or units == 0:
        return (term,)
    return (tens, units) if style == 2 else (units, tens)


def draw_sum(rng: np.random.Generator, level: Level) -> Sum:
    """Terms from 10 to 99, signs such that no partial sum, in either order of tens and units, leaves 0 to 199."""
    terms = [int(rng.integers(10, 100))]
    while len(terms) < level.terms:
        term, total = int(rng.integers(10, 100)), sum(terms)
        signs = [sign for sign in (1, -1) if 0 <= total + sign * term <= LARGEST]
        if signs:
            terms.append(term * signs[int(rng.integers(len(signs)))])
    return Sum(terms=tuple(terms))


def draw_sums(seed: int, level: Level, count: int, besides: Collection[Sum] = ()) -> list[Sum]:
    """Distinct problems, none of `besides`."""
    rng = np.random.default_rng([seed, level.terms])
    drawn: dict[Sum, None] = {}
    while len(drawn) < count:
        one = draw_sum(rng, level)
        if one not in besides:
            drawn[one] = None
    return list(drawn)


def held_out_sums(level: Level) -> list[Sum]:
    """What is evaluated on: no model is taught on it, the teacher included."""
    return draw_sums(1, level, HELD_OUT)


def training_sums(count: int) -> list[Sum]:
    """So many of each level, none of those held out: what a cache is built from."""
    taken = {one for level in Level for one in held_out_sums(level)}
    return [one for level in Level for one in draw_sums(0, level, count, taken)]


def as_problem(one: Sum) -> Problem:
    """For the commands, whose checker compares answers as text or mathematics."""
    return Problem(id=one.text.removesuffix("=?"), text=one.text, answer=str(one.answer))


def write_problems(file: Path, sums: Sequence[Sum]) -> None:
    """JSONL, as `logitcache build` and `trainer evaluate` take it (with `--instruction ''`)."""
    rows = ({"id": p.id, "problem": p.text, "answer": p.answer} for p in map(as_problem, sums))
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_tokenizer() -> Any:
    """One token a symbol; what is no symbol cannot be encoded."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({symbol: place for place, symbol in enumerate(SYMBOLS)}))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\\boxed\{|[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, clean_up_tokenization_spaces=False)


@app.default
def main(*, out: Path = Path("runs/world"), problems: int = 2048) -> int:
    """Write `train.jsonl`, and the held-out `easy.jsonl` and `hard.jsonl`.

    Args:
        out: where.
        problems: of each level in `train.jsonl`.
    """
    write_problems(out / "train.jsonl", training_sums(problems))
    for level in Level:
        write_problems(out / f"{level}.jsonl", held_out_sums(level))
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command(app, after_interrupt="run it again"))
