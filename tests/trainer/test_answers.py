"""Answers are checked as mathematics, and none of them hangs or crashes whoever asks."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from logitcache.errors import UserError
from logitcache.problems import Problem
from trainer.answers import AnswerChecker, Verdict

pytest.importorskip("math_verify", reason="needs math-verify: pip install math-verify")


@pytest.fixture(scope="module")
def checker() -> Iterator[AnswerChecker]:
    with AnswerChecker(limit_s=1) as found:
        yield found


@pytest.mark.parametrize(
    ("gold", "text", "verdict"),
    [
        ("4", r"So it is $\boxed{4}$.", "correct"),
        ("4", "2 + 2 makes 4.", "correct"),
        (
            "4",
            r"Is it \boxed{5}? That leaves out the first of them. So it is \boxed{4}",
            "correct",
        ),
        (r"\{4, 5\}", r"\boxed{5} and \boxed{4}", "correct"),
        ("4", r"The final answer is 5, that is, \boxed{4}", "correct"),
        (r"\frac{1}{2}", "The answer is 0.5", "correct"),
        ("p - q", r"\boxed{-q + p}", "correct"),
        (r"\left( 3, \frac{\pi}{2} \right)", r"\boxed{(3, \pi/2)}", "correct"),
        (r"\text{Evelyn}", r"\boxed{\text{Evelyn}}", "correct"),
        ("1,2", r"\boxed{2, 1}", "correct"),
        ("18", "She makes $18.", "correct"),
        ("4", r"\boxed{5}", "wrong"),
        ("4", "4 is not it, 5 is", "wrong"),
        ("4", r"\boxed{-4}", "wrong"),
        ("4", "I do not know.", "unparsed"),
        ("4", "", "unparsed"),
        ("4", "\x00\ud800\n\u2028", "unparsed"),
        ("4", "\n\ud800" + r"\boxed{4}" + "\n", "correct"),
    ],
)
def test_verdicts(checker: AnswerChecker, gold: str, text: str, verdict: str) -> None:
    assert checker.check(gold, text).verdict == verdict


@pytest.mark.parametrize(
    ("spelling", "texts"),
    [
        ("1/2", [r"\frac12", "1/2", "0.5", r"\frac{2}{4}", "x = 0.5", r"50\%"]),
        ("8", ["8", "2^3", "3 + 5", r"\sqrt{64}", "8.0", "n = 2^3"]),
        ("0.707106781187", [r"\frac{\sqrt2}{2}", r"\frac{1}{\sqrt2}", r"\sqrt{\frac12}"]),
        ("x + 1", ["x + 1", "1 + x"]),
        ("evelyn", [r"\text{Evelyn}"]),
    ],
)
def test_an_answer_has_one_spelling(checker: AnswerChecker, spelling: str, texts: list[str]) -> None:
    """So that wrong answers of one value vote together."""
    assert {text: checker.check("7", f"\\boxed{{{text}}}").answer for text in texts} == dict.fromkeys(texts, spelling)


def test_what_has_no_spelling(checker: AnswerChecker) -> None:
    assert checker.check("7", "the answer is 1/2").answer == "1/2"
    assert checker.check("7", r"\boxed{2^{100000}}").answer == "2**100000"  # too long to print
    assert checker.check("7", "nothing").answer is None


@pytest.mark.parametrize(
    "text",
    [
        r"\boxed{9^{9^{9^{9}}}}",
        r"\boxed{((100!)!)!}",
        r"\boxed{" + r"\frac{1}{" * 3000 + "2" + "}" * 3000 + "}",
    ],
    ids=["power", "factorial", "endless LaTeX"],
)
def test_what_takes_too_long_is_cut_off_and_the_next_answer_is_checked(checker: AnswerChecker, text: str) -> None:
    started = time.process_time()
    assert checker.check("3", text).verdict is Verdict.CUT_OFF
    assert time.process_time() - started < 0.5  # of this process: it only waits
    assert checker.check("3", r"\boxed{3}").verdict is Verdict.CORRECT


@pytest.mark.parametrize(
    "text",
    [r"\boxed{" + r"\sqrt{" * 5000, "9" * 100_000, "$" * 20_000, "\\" * 20_000, r"\boxed{" * 20_000],
    ids=["unclosed", "digits", "dollars", "backslashes", "boxes"],
)
def test_nonsense_is_wrong(checker: AnswerChecker, text: str) -> None:
    assert checker.check("3", text).verdict is not Verdict.CORRECT
    assert checker.check("3", r"\boxed{3}").verdict is Verdict.CORRECT


def test_memory_is_bounded() -> None:
    with AnswerChecker(limit_s=60, memory_bytes=400 << 20) as small:
        assert small.check("3", "x" * (100 << 20)).verdict is Verdict.CUT_OFF
        assert small.check("3", r"\boxed{3}").verdict is Verdict.CORRECT


def test_answers_that_cannot_be_checked_are_refused_before_anything_is_written(checker: AnswerChecker) -> None:
    good = [Problem(id="a", text="", answer=r"\frac{1}{2}"), Problem(id="b", text="", answer="17")]
    checker.require_checkable(good)
    bad = [Problem(id=f"bad{number}", text="", answer="}{") for number in range(22)]
    with pytest.raises(UserError, match=r"3 problems .*: it cannot those of bad0 \(`}{`\); mend them"):
        checker.require_checkable([*good, bad[0]])
    with pytest.raises(UserError, match=r"bad0 .*, bad19 \(`}{`\) and 2 more"):
        checker.require_checkable(bad)


def test_without_the_library_the_error_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "math_verify.py").write_text("raise ImportError('No module named math_verify')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=r"No module named math_verify.*pip install 'logitcache\[evaluate\]'"):
        AnswerChecker()
