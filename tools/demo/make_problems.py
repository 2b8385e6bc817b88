"""Write the demo's problem set: word problems from templates, with answers computed, the same bytes at every run.

python -m tools.demo.make_problems tools/demo/problems.jsonl
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable
from pathlib import Path

_PER_TEMPLATE = 12

_Template = tuple[str, Callable[..., int]]
_TEMPLATES: tuple[_Template, ...] = (
    ("A shop sells {a} pens a day. How many pens does it sell in {b} days?", lambda a, b, c: a * b),
    ("Maya has {a} stickers, gives {b} to a friend and buys {c} more. How many now?", lambda a, b, c: a - b + c),
    ("A train travels {a} km in one hour. How far does it travel in {b} hours?", lambda a, b, c: a * b),
    ("A box holds {b} eggs. How many eggs are in {a} full boxes if {c} eggs are broken and removed?",
     lambda a, b, c: a * b - c),
    ("What is the perimeter of a rectangle that is {a} cm long and {b} cm wide?", lambda a, b, c: 2 * (a + b)),
    ("What is the area of a rectangle with sides {a} and {b}?", lambda a, b, c: a * b),
    ("Compute {a} + {b} * {c}.", lambda a, b, c: a + b * c),
    ("Find x if x + {b} = {a}.", lambda a, b, c: a - b),
    ("Find the remainder when {a} is divided by {b}.", lambda a, b, c: a % b),
    ("A book has {a} pages. Tom reads {b} pages a day for {c} days. How many pages has he read?",
     lambda a, b, c: b * c),
    ("The sum of two numbers is {a} and one of them is {c}. What is the other?", lambda a, b, c: a - c),
    ("A garden has {b} rows of {c} plants. {a} more plants are added. How many plants are there?",
     lambda a, b, c: b * c + a),
    ("Lena earns {a} dollars an hour. How much does she earn in {b} hours after paying {c} dollars in fees?",
     lambda a, b, c: a * b - c),
    ("What is the greatest common divisor of {a} and {b}?", lambda a, b, c: _gcd(a, b)),
    ("How many minutes are there in {b} hours and {c} minutes?", lambda a, b, c: 60 * b + c),
    ("A class of {a} pupils loses {b} pupils and gains {c}. How many pupils are in the class?",
     lambda a, b, c: a - b + c),
)  # fmt: skip


def main(path: Path) -> None:
    """Write `_PER_TEMPLATE` problems of each template to `path`, one JSON object a line."""
    draw = random.Random(20260516)
    lines = []
    for number in range(_PER_TEMPLATE):
        for index, (text, solve) in enumerate(_TEMPLATES):
            a, b, c = draw.randint(25, 99), draw.randint(3, 12), draw.randint(2, 20)
            problem = {"id": f"demo-{index:02d}-{number:02d}", "problem": text.format(a=a, b=b, c=c)}
            lines.append(json.dumps({**problem, "answer": str(solve(a, b, c))}))
    path.write_text("\n".join(lines) + "\n")


def _gcd(a: int, b: int) -> int:
    return a if b == 0 else _gcd(b, a % b)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
