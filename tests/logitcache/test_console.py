"""What every command does alike: misuse and Ctrl-C are one line, progress has a rate, help says what --json does."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from logitcache.cli import app as logitcache
from logitcache.console import Progress, run_command
from trainer.cli import app as trainer

APPS = {"logitcache": logitcache, "trainer": trainer}


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (
            ["info", "x", "--jsn"],
            "logitcache info: unknown option: --jsn. Did you mean --json?; see logitcache info --help",
        ),
        (["build"], 'logitcache build: command "build" parameter --problems requires an argument; see'),
        (["biuld"], 'logitcache: unknown command "biuld". Did you mean "build"?'),
        (["build", "--problems", "p.jsonl", "--out", "o", "--limit", "x"], 'unable to convert "x" into int; see'),
        (["distil"], 'trainer: unknown command "distil". Did you mean "distill"?'),
        (["distill", "c", "--student", "s", "--out", "o", "--no-json"], "trainer distill: unknown option: --no-json"),
    ],
)
def test_misuse_is_one_line_that_says_where_help_is(
    words: list[str], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    app = APPS[line.split()[0].rstrip(":")] if line.startswith(tuple(APPS)) else logitcache
    assert run_command(app, words, after_interrupt="") == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("error: ")
    assert line in said.err
    assert said.err.count("\n") == 1
    assert said.err.rstrip().endswith("--help")


@pytest.mark.parametrize("name", APPS)
def test_help_and_version(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(APPS[name], ["--version"], after_interrupt="") == 0
    assert capsys.readouterr().out[0].isdigit()
    assert run_command(APPS[name], ["--help"], after_interrupt="") == 0
    said = capsys.readouterr().out
    assert "--debug" in said
    assert "--json" in said


@pytest.mark.parametrize(
    "command", [(name, word) for name in APPS for word in APPS[name] if not word.startswith("-")], ids=" ".join
)
def test_no_two_options_of_a_command_have_the_same_help(
    command: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    """An option without a description of its own is given that of the group it came with."""
    name, word = command
    arguments = APPS[name][word].assemble_argument_collection(parse_docstring=True)
    described = [argument.parameter.help for argument in arguments if argument.parse and argument.show]
    assert described
    assert None not in described
    assert len(set(described)) == len(described)


def interrupted(*words: str, before: str) -> tuple[int, str]:
    """A command that gets SIGINT where `before`, Python run first in its process, prints `here` and waits."""
    # Where the tests themselves run in the background, children would inherit that SIGINT is ignored.
    heard = "import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)"
    code = f"{heard}\nimport time\n{before}\nimport sys\nfrom {words[0]}.cli import main\nmain()"
    process = subprocess.Popen(
        [sys.executable, "-c", code, *words[1:]], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    while "here" not in process.stderr.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    return process.returncode, said


WAIT = """
import sys
def wait(event, args):
    if event == "open" and str(args[0]).endswith(PATH):
        print("here", file=sys.stderr, flush=True)
        time.sleep(30)
sys.addaudithook(wait)
"""


@pytest.mark.parametrize(
    ("words", "path"),
    [
        (("logitcache", "build", "--problems", "p.jsonl", "--out", "cache"), "p.jsonl"),
        (("trainer", "distill", "cache", "--student", "student", "--out", "run"), "student/config.json"),
    ],
)
def test_ctrl_c_says_what_is_left_and_how_to_go_on(words: tuple[str, ...], path: str, tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"problem": "1 + 1?"}\n')
    (tmp_path / "student").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "student" / name).write_text("{}")
    before = f"import os\nos.chdir({str(tmp_path)!r})\nPATH = {path!r}\n{WAIT}"
    code, said = interrupted(*words, before=before)
    assert code == 130
    assert "interrupted; " in said
    assert "Traceback" not in said


def test_a_slow_rate_is_seconds_for_one(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("count", 1, "sequences") as progress:
        time.sleep(1.1)
        progress.add(1)
    said = capsys.readouterr().err
    assert "1/1" in said
    assert " s/sequence]" in said
