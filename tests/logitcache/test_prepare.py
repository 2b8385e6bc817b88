"""Preparing problem sets: what is dropped, why, and that nothing is lost without a word."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.local import LocalFileSystem
from fsspec.registry import _registry

from logitcache.errors import UserError
from logitcache.prepare import PrepareRequest, Reason, prepare, problem_key, sift
from logitcache.problems import Problem, load_evaluation_rows, load_problems

DATA = Path(__file__).parents[3] / "shared" / "data"


def problem(ident: str, text: str, answer: str = "1") -> Problem:
    return Problem(id=ident, text=text, answer=answer)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (r"Find $\dfrac{1}{2} + x$.", r"find \(\frac12+x\)"),
        (r"Let $\left( a, b \right)$ be", r"Let $(a,\,b)$ be"),
        ("What is  2 + 2 ?", "What is 2+2?"),
        (r"so $x \text{ is prime}$", "so $x$ is prime"),
    ],
)
def test_layout_does_not_tell_problems_apart(one: str, other: str) -> None:
    assert problem_key(one) == problem_key(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [("What is 1.5 + 2?", "What is 15 + 2?"), ("$x - 1$", "$x + 1$"), (r"$\sin x$", r"$\cos x$"), ("$x^2$", "$x_2$")],
)
def test_what_differs_in_content_stays_apart(one: str, other: str) -> None:
    assert problem_key(one) != problem_key(other)


def test_every_reason_names_what_it_matched() -> None:
    long = "A train leaves the station at noon and travels east at sixty miles per hour until it meets another train"
    rows = [
        problem("a", "What is $1+1$?"),
        problem("b", "What  is\n$1+1$?", answer="3"),
        problem("c", r"what is \(1 + 1\)"),
        problem("d", "Known question one"),
        problem("e", "known question, one."),
        problem("f", f"{long} today. How far?"),
        problem("g", "Something else entirely"),
        problem("a", "A third thing under the name of the first"),
    ]
    evaluation = {"exam": [problem("x", "Known  question one", answer="7"), problem("y", f"{long} tomorrow.")]}
    found = sift(rows, evaluation, ngram=5, containment=0.5)
    assert [row.id for row in found.kept] == ["a", "g"]
    assert {row.id: (row.reason, row.of, row.of_set) for row in found.dropped} == {
        "a": (Reason.DUPLICATE_ID, "a", "itself"),
        "b": (Reason.DUPLICATE, "a", "itself"),
        "c": (Reason.DUPLICATE_LATEX, "a", "itself"),
        "d": (Reason.OVERLAP, "x", "exam"),
        "e": (Reason.OVERLAP_LATEX, "x", "exam"),
        "f": (Reason.OVERLAP_NGRAMS, "y", "exam"),
    }
    contradiction = found.dropped[0]
    assert (contradiction.answer, contradiction.of_answer) == ("3", "1")
    assert found.dropped[-2].containment == pytest.approx(16 / 18, abs=1e-4)


@pytest.mark.parametrize("suffix", ["parquet", "jsonl"])
def test_columns_are_mapped_and_both_files_written(tmp_path: Path, suffix: str) -> None:
    raw = tmp_path / "raw.jsonl"
    rows = [{"question": "Q one?", "gold": 4, "key": "k1"}, {"question": "q ONE", "gold": 5, "key": "k2"}]
    raw.write_text("\n".join(json.dumps(row) for row in rows))
    out = tmp_path / f"kept.{suffix}"
    request = PrepareRequest(
        problems=str(raw), out=str(out), problem_column="question", answer_column="gold", id_column="key"
    )
    told = prepare(request)
    assert (told["rows"], told["kept"], told["duplicate-latex"]) == (2, 1, 1)
    assert load_problems(str(out)) == [Problem(id="k1", text="Q one?", answer="4")]
    (dropped,) = map(json.loads, Path(str(told["dropped"])).read_text().splitlines())
    assert (dropped["id"], dropped["of"], dropped["reason"]) == ("k2", "k1", "duplicate-latex")
    if suffix == "parquet":
        assert pq.read_table(out).column_names == ["id", "problem", "answer"]


def test_an_object_store_is_as_good_as_a_disk(tmp_path: Path) -> None:
    raw = tmp_path / "raw.jsonl"
    raw.write_text('{"problem": "one"}\n')
    prepare(PrepareRequest(problems=str(raw), out="memory://prepared/kept.jsonl"))
    assert load_problems("memory://prepared/kept.jsonl")[0].text == "one"


def test_what_cannot_be_done_is_said(tmp_path: Path) -> None:
    raw = tmp_path / "raw.jsonl"
    raw.write_text('{"problem": "one"}\n')
    with pytest.raises(UserError, match=r"text column `question`.*found columns problem"):
        prepare(PrepareRequest(problems=str(raw), out=str(tmp_path / "o.jsonl"), problem_column="question"))
    with pytest.raises(UserError, match="none is left"):
        prepare(PrepareRequest(problems=str(raw), out=str(tmp_path / "o.jsonl"), against=(str(raw),)))
    assert not (tmp_path / "o.jsonl").exists()
    with pytest.raises(UserError, match=r"ending in \.parquet or \.jsonl"):
        PrepareRequest(problems=str(raw), out="kept.csv")
    with pytest.raises(UserError, match="--containment"):
        PrepareRequest(problems=str(raw), out="kept.jsonl", containment=0)


@pytest.mark.parametrize("option", ["answer_column", "id_column"])
def test_a_column_that_was_named_and_is_not_there(tmp_path: Path, option: str) -> None:
    raw = tmp_path / "raw.jsonl"
    raw.write_text('{"problem": "one", "answer": 1, "id": 0}\n')
    named: dict[str, str] = {option: "anwser"}
    with pytest.raises(UserError, match=r"a column `anwser`.*found columns problem, answer, id"):
        prepare(PrepareRequest(problems=str(raw), out=str(tmp_path / "o.jsonl"), **named))
    assert not (tmp_path / "o.jsonl").exists()


@pytest.mark.parametrize("column", ["problem", "question", "Problem"])
def test_an_evaluation_set_may_call_its_problems_otherwise(tmp_path: Path, column: str) -> None:
    raw, exam, out = tmp_path / "raw.jsonl", tmp_path / "exam.jsonl", str(tmp_path / "o.jsonl")
    raw.write_text('{"problem": "one plus one"}\n{"problem": "two plus two"}\n')
    exam.write_text(json.dumps({"text": "two plus two", column: "one plus one"}) + "\n")

    def kept(**options: str) -> list[str]:
        prepare(PrepareRequest(problems=str(raw), out=out, against=(str(exam),), **options))
        return [row.text for row in load_problems(out)]

    assert kept() == ["two plus two"]
    assert kept(against_column="text") == ["one plus one"]


def test_an_empty_evaluation_set_proves_nothing(tmp_path: Path) -> None:
    raw, exam = tmp_path / "raw.jsonl", tmp_path / "exam.jsonl"
    raw.write_text('{"problem": "one"}\n')
    exam.write_text("")
    with pytest.raises(UserError, match=r"evaluation problems from .*exam.jsonl: it holds none"):
        prepare(PrepareRequest(problems=str(raw), out=str(tmp_path / "o.jsonl"), against=(str(exam),)))


def rows(*texts: str) -> str:
    return "".join(json.dumps({"problem": text}) + "\n" for text in texts)


@pytest.mark.parametrize(
    ("files", "trained_on", "held_out"),
    [
        ({"train.jsonl": "a", "test.jsonl": "b", "validation.jsonl": "c"}, ["a", "c"], ["b"]),
        ({"main/train-0.jsonl": "a", "main/test-0.jsonl": "b", "contest.jsonl": "c"}, ["c", "a"], ["b"]),
        ({"test.jsonl": "b"}, ["b"], ["b"]),
        ({"aime.jsonl": "a"}, ["a"], ["a"]),
    ],
)
def test_the_side_of_a_hub_dataset_that_is_read(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    files: dict[str, str],
    trained_on: list[str],
    held_out: list[str],
) -> None:
    """The hub is a folder here; the name of a dataset may say `test` too."""

    class Hub(DirFileSystem):  # type: ignore[misc]
        protocol, cachable = "hf", False

        def __init__(self, **_: object) -> None:
            super().__init__(path=str(tmp_path), fs=LocalFileSystem())

    monkeypatch.setitem(_registry, "hf", Hub)
    for name, text in files.items():
        file = tmp_path / "datasets" / "someone" / "latest-test" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(rows(text))
    assert [row.text for row in load_problems("someone/latest-test")] == trained_on
    assert [row.text for row in load_evaluation_rows("someone/latest-test")] == held_out


@pytest.mark.slow
@pytest.mark.skipif(not DATA.is_dir(), reason=f"the real problem sets are not at {DATA.name}/ beside the repository")
def test_deepscaler_loses_the_known_math500_items_and_little_else(tmp_path: Path) -> None:
    names = ("aime24", "amc23", "math500", "gsm8k_test")
    request = PrepareRequest(
        problems=str(DATA / "deepscaler.parquet"),
        out=str(tmp_path / "train.parquet"),
        against=tuple(str(DATA / f"{name}.parquet") for name in names),
    )
    told = prepare(request)
    kept = {row.id for row in load_problems(request.out)}
    dropped = [json.loads(line) for line in Path(str(told["dropped"])).read_text().splitlines()]
    overlaps = json.loads((DATA / "overlaps.json").read_text())
    known = {pair["train"] for pairs in overlaps["suggested_exclusions_deepscaler"].values() for pair in pairs}
    assert len(known) == 13
    assert not known & kept
    same = overlaps["deepscaler vs math500"]
    strict = {pair["train"] for kind in ("exact", "whitespace") for pair in same[kind]}
    assert strict == {row["id"] for row in dropped if row["reason"] == "overlap"}
    normalised = {pair["train"] for pair in same["normalised"]}
    assert normalised <= {row["id"] for row in dropped if row["reason"] in ("overlap", "overlap-latex")}
    overlapping = [row for row in dropped if row["reason"].startswith("overlap")]
    assert len(overlapping) < 200
    assert len(kept) + len(dropped) == 39_090
