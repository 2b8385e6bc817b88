"""What every command line of the project does alike: errors in one line, progress, machine-readable output.

Guarantees: standard output carries the answer and nothing else (one JSON object with `--json`); progress and notes go
to standard error, redrawn on a terminal and as plain lines elsewhere.
"""

from __future__ import annotations

import atexit
import json
import os
import re
import sys
import time
from contextlib import AbstractContextManager, suppress
from importlib.metadata import version
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn

from logitcache.errors import UserError

if TYPE_CHECKING:
    from cyclopts import App, CycloptsError

_PLAIN_INTERVAL_S = 10.0
_EPILOGUE = (
    "With --json, standard output is one JSON object, or empty where the command fails. An error is one line on "
    "standard error; --debug, with any command, shows its traceback."
)


def command_line(name: str, doc: str) -> App:
    """An empty cyclopts app, for `run_command`; the first line of `doc` is its help."""
    from cyclopts import App, Parameter

    return App(
        name=name,
        help=doc.splitlines()[0],
        help_epilogue=_EPILOGUE,
        version=lambda: version("logitcache"),
        default_parameter=Parameter(negative=()),  # no --no-json, no --empty-curriculum
    )


def run_command(app: App, argv: list[str] | None = None, *, after_interrupt: str) -> int:
    """Run a cyclopts app; the exit code. `--debug` anywhere shows tracebacks of user errors.

    Args:
        app: the app, as `command_line` makes it.
        argv: its arguments; the process's by default.
        after_interrupt: what Ctrl-C leaves behind, and how to go on.
    """
    from cyclopts import CycloptsError

    argv = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in argv
    argv = [argument for argument in argv if argument != "--debug"]
    app.suppress_keyboard_interrupt = False  # cyclopts would end the process without a word
    try:
        try:
            result = app(argv, result_action="return_value", exit_on_error=False, print_error=False)
        except CycloptsError as error:
            raise _misused(app, error) from error
    except UserError as error:
        if debug:
            raise
        note(f"error: {error}")
        return error.exit_code
    except KeyboardInterrupt:
        note(f"interrupted; {after_interrupt}")
        return 130
    except BrokenPipeError:
        return 141
    return result if isinstance(result, int) else 0


def _misused(app: App, error: CycloptsError) -> UserError:
    program = " ".join([app.name[0], *(error.command_chain or ())])
    found = str(error)[:1].lower() + str(error)[1:]
    found = found if found.endswith("...") else found.removesuffix(".")
    return UserError(program, found, f"see {program} --help")


def parse_worker(text: str) -> tuple[int, int]:
    """A `--worker`: `1/4`, the first of four, is (0, 4). Raises UserError for what is none of several."""
    number, _, workers = text.partition("/")
    do = "write it as 1/4 for the first of four"
    if not (number.isdecimal() and workers.isdecimal() and int(number) >= 1):
        raise UserError(f"--worker {text}", "not a worker of several", do)
    if int(number) > int(workers):
        raise UserError(f"--worker {text}", f"{number} is beyond {workers}", do)
    return int(number) - 1, int(workers)


def leave(code: int) -> NoReturn:
    """End the process with this exit code, without tearing the interpreter down.

    Python's exit functions are run. Native libraries that end beside each other can abort the process after them, and
    a caller would see that in place of the command's own code.
    """
    atexit._run_exitfuncs()
    leave_at_once(code)


def leave_at_once(code: int) -> NoReturn:
    """`leave` without the exit functions, where one of them could wait for a thread that does not end."""
    with suppress(BrokenPipeError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def note(text: str) -> None:
    """One line for the person watching, on standard error."""
    print(text, file=sys.stderr, flush=True)


def answer(value: dict[str, Any], text: str, *, as_json: bool) -> None:
    """The command's answer on standard output: one JSON object, or text for people."""
    print(json.dumps(value) if as_json else text, flush=True)


def quiet_transformers() -> None:
    """Switch off transformers' own progress bars, which would be drawn across ours."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def _meter() -> Any:
    """The bar of tqdm, with a rate below 1 as `1.17 s/sequence`."""
    from tqdm import tqdm

    class Meter(tqdm):
        @staticmethod
        def format_meter(*values: Any, **named: Any) -> str:
            return re.sub(r"s/ (\w+?)s?\b", r" s/\1", tqdm.format_meter(*values, **named))

    return Meter


class Progress(AbstractContextManager["Progress"]):
    """Progress of long work: what is done, rate, time left. `add` may be called from any thread."""

    def __init__(self, what: str, total: int, unit: str) -> None:
        self._live = sys.stderr.isatty()
        self._meter = _meter()
        self._bar = self._meter(
            total=total, desc=what, unit=f" {unit}", file=sys.stderr, dynamic_ncols=True, disable=not self._live
        )
        self._what, self._total, self._unit = what, total, unit
        self._done, self._start, self._said, self._extra = 0, time.monotonic(), time.monotonic(), ""

    def add(self, count: int = 1) -> None:
        """`count` more units are done (never more than the total: work may be repeated)."""
        count = min(count, self._total - self._done)
        self._done += count
        self._bar.update(count)
        if not self._live and time.monotonic() - self._said >= _PLAIN_INTERVAL_S:
            self._say()

    def reach(self, done: int, total: int) -> None:
        """`done` of `total` units are done, for work that learns its size on the way."""
        self._total = self._bar.total = total
        self.add(done - self._done)

    def show(self, **values: str) -> None:
        """Values to show beside the bar, such as `loss="1.23"`."""
        self._extra = ", ".join(f"{name} {value}" for name, value in values.items())
        self._bar.set_postfix_str(self._extra, refresh=False)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()
        if not self._live and kind is None:
            self._say()

    def _say(self) -> None:
        self._said = time.monotonic()
        elapsed = self._said - self._start
        line = self._meter.format_meter(
            self._done, self._total, elapsed, ncols=0, prefix=self._what, unit=f" {self._unit}", postfix=self._extra
        )
        note(line)
