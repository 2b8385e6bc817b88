r"""Whether an answer is right, by math-verify, in a process of its own.

Guarantees: an answer costs at most a stated processor time and memory. What would take more (a power that fills the
memory, LaTeX without an end) is cut off and wrong, and the next answer is checked by a new process; nothing that a
model writes hangs or crashes the caller. The limit is of processor time: a busy machine changes no verdict.

What counts as the answer: the last \boxed{}, with those just before it if they are listed together; without one, what
follows a phrase such as "the final answer is"; without that, the last formula or number. POSIX only.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from enum import StrEnum
from types import TracebackType
from typing import IO, Any

from logitcache.console import Progress
from logitcache.errors import UserError
from logitcache.problems import Problem

_ANSWER_CHARACTERS = 200
_NAMED = 20
"""Of the problems that cannot be checked, at most."""
_DIGITS = 12
"""In which irrational numbers are told apart."""


class Verdict(StrEnum):
    """What became of an answer; all but the first count as wrong."""

    CORRECT = "correct"
    WRONG = "wrong"
    UNPARSED = "unparsed"
    """No answer was found in the text, or none that can be read as mathematics."""
    CUT_OFF = "cut_off"
    """It took more time or memory than an answer may."""


@dataclass(frozen=True, kw_only=True)
class Checked:
    """A verdict, and the answer that was found in the text, if any: of a number, always in the same spelling."""

    verdict: Verdict
    answer: str | None = None


class AnswerChecker(AbstractContextManager["AnswerChecker"]):
    """Checks one answer after another. Not for several threads at once.

    Args:
        limit_s: processor seconds that an answer may take, rounded up to the next full second.
        memory_bytes: address space of the process that checks.

    Raises:
        UserError: math-verify is not installed.
    """

    def __init__(self, *, limit_s: int = 5, memory_bytes: int = 2 << 30) -> None:
        self._limits = (str(limit_s), str(memory_bytes))
        self._process = self._start()

    def check(self, gold: str, text: str) -> Checked:
        """Compare the final answer in `text` with `gold`, which is LaTeX without dollars, or plain."""
        requests, replies = _pipes(self._process)
        reply = ""
        with suppress(BrokenPipeError):
            requests.write(json.dumps([gold, text]) + "\n")
            requests.flush()
            reply = replies.readline()
        if not reply.endswith("\n"):  # it was ended: by its limits, or by what they made it do
            self._end()
            self._process = self._start()
            return Checked(verdict=Verdict.CUT_OFF)
        verdict, answer = json.loads(reply)
        return Checked(verdict=Verdict(verdict), answer=answer)

    def require_checkable(self, problems: Sequence[Problem]) -> None:
        """Raise UserError, naming them, if problems have an answer that would not be recognised as itself."""
        unlike = []
        with Progress("check answers", len(problems), "problems") as progress:
            for problem in problems:
                if self.check(problem.answer, f"\\boxed{{{problem.answer}}}").verdict is not Verdict.CORRECT:
                    unlike.append(problem)
                progress.add()
        if unlike:
            named = ", ".join(f"{problem.id} (`{problem.answer[:40]}`)" for problem in unlike[:_NAMED])
            more = f" and {len(unlike) - _NAMED} more" if len(unlike) > _NAMED else ""
            asked = f"answers to {len(problems)} problems that math-verify can compare"
            raise UserError(asked, f"it cannot those of {named}{more}", "mend them or leave those problems out")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def _start(self) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", __name__, *self._limits],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # of the limits' victims
            text=True,
            start_new_session=True,  # an interrupt is for the caller
            # With one hash seed sympy takes one order, and an answer one verdict.
            env=os.environ | {"PYTHONPATH": os.pathsep.join(path or "." for path in sys.path), "PYTHONHASHSEED": "0"},
        )
        _, replies = _pipes(process)
        if (ready := replies.readline()) != _READY:
            process.kill()
            process.communicate()
            found = f"math-verify cannot be imported ({ready.strip() or 'its process ended'})"
            raise UserError("answers to check", found, "pip install 'logitcache[evaluate]'")
        return process

    def _end(self) -> None:
        self._process.kill()
        with suppress(BrokenPipeError):  # what was still to be written to it
            self._process.communicate()


def _pipes(process: subprocess.Popen[str]) -> tuple[IO[str], IO[str]]:
    assert process.stdin is not None
    assert process.stdout is not None
    return process.stdin, process.stdout


_READY = "ready\n"


def _serve(limit_s: int, memory_bytes: int) -> None:
    """The process that checks: a request a line, a reply a line."""
    import logging
    import math
    import resource
    import time

    try:
        from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify
    except ImportError as error:
        print(error, flush=True)
        return
    logging.disable(logging.CRITICAL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    extraction = [LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()]
    print(_READY, end="", flush=True)
    for line in sys.stdin:
        soft = math.ceil(time.process_time()) + limit_s
        resource.setrlimit(resource.RLIMIT_CPU, (soft, resource.RLIM_INFINITY))  # beyond it, SIGXCPU ends the process
        gold, text = json.loads(line)
        found = parse(text, extraction, parsing_timeout=None)
        known = parse(f"\\boxed{{{gold}}}", extraction, parsing_timeout=None)
        readable = [one for one in found if not isinstance(one, str)]
        if verify(known, found, timeout_seconds=None):
            verdict = Verdict.CORRECT
        else:
            verdict = Verdict.WRONG if readable else Verdict.UNPARSED
        answer = None
        for spelling in (str, _value):
            with suppress(Exception):  # numbers too long to print, expressions too deep
                answer = spelling(readable[0])[:_ANSWER_CHARACTERS]
        print(json.dumps([verdict, answer]), flush=True)


def _value(expression: Any) -> str:
    """Of a number its value, whichever way it was written (2/4, 0.5, x = 1/2); of all else its own form."""
    import sympy

    if isinstance(expression, sympy.Eq) and expression.lhs.is_Symbol:
        expression = expression.rhs
    if expression.is_number:
        expression = expression.doit()
        if expression.is_rational or expression.has(sympy.Float):
            expression = sympy.nsimplify(expression, rational=True)
        else:
            expression = expression.evalf(_DIGITS)
    return str(expression)


if __name__ == "__main__":
    _serve(int(sys.argv[1]), int(sys.argv[2]))
