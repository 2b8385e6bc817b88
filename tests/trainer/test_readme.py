"""The README's commands are ones that the programs take, and those of a real run are what `trainer advise` prints."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from logitcache.cli import app as logitcache
from trainer.cli import app as trainer
from trainer.planning.advice import advise
from trainer.planning.case import Aim, Case

APPS = {"logitcache": logitcache, "trainer": trainer}
ROOT = Path(__file__).parents[2]


def commands() -> list[list[str]]:
    """Those in its code blocks, continued lines joined."""
    blocks = re.findall(r"^```\n(.*?)^```", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE)
    words = [shlex.split(line) for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [line for line in words if line and line[0] in APPS]


def test_they_are_taken() -> None:
    found = commands()
    assert [line[:2] for line in found] == [["logitcache", "build"], ["trainer", "distill"], ["trainer", "grid"]]
    for program, *words in found:
        APPS[program].parse_args(words, exit_on_error=False, print_error=False)


def test_a_real_run_is_what_is_advised() -> None:
    case = Case(student="Qwen3-0.6B", teacher="Qwen3-4B", students=10)
    advice = advise(Aim.COMPUTE, case, cache="runs/cache", problems="agentica-org/DeepScaleR-Preview-Dataset")
    build, distill, grid = commands()
    assert [tuple(build), tuple(distill)] == list(advice.commands)
    assert grid[grid.index("--steps") :] == distill[distill.index("--steps") :]


def test_every_document_is_listed() -> None:
    listed = re.findall(r"^- \[(docs/\w+\.md)\]", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(f"docs/{file.name}" for file in (ROOT / "docs").glob("*.md"))
