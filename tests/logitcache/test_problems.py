from __future__ import annotations

import json
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from logitcache.errors import UserError
from logitcache.problems import load_problems, problems_digest

ROWS = [{"problem": f"{n} + {n}?", "answer": str(2 * n), "id": f"p{n}"} for n in range(5)]


def write(path: Path, rows: object) -> str:
    match path.suffix:
        case ".parquet":
            pq.write_table(pa.Table.from_pylist(rows), path)
        case ".jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        case _:
            path.write_text(json.dumps(rows))
    return str(path)


@pytest.mark.parametrize("suffix", ["parquet", "json", "jsonl"])
def test_every_format_reads_alike(tmp_path: Path, suffix: str) -> None:
    problems = load_problems(write(tmp_path / f"set.{suffix}", ROWS), limit=4)
    assert [(p.id, p.text, p.answer) for p in problems] == [(r["id"], r["problem"], r["answer"]) for r in ROWS[:4]]


def test_any_fsspec_url() -> None:
    with fsspec.open("memory://set.jsonl", "w") as file:
        file.write(json.dumps(ROWS[0]))
    assert load_problems("memory://set.jsonl")[0].id == "p0"


def test_without_ids_the_text_is_the_id_and_repeats_are_left_out(tmp_path: Path) -> None:
    rows = [{"problem": "a", "answer": 1}, {"problem": "b", "answer": None}, {"problem": "a", "answer": 1}]
    problems = load_problems(write(tmp_path / "set.json", rows))
    assert [(p.text, p.answer) for p in problems] == [("a", "1"), ("b", "")]
    assert len({p.id for p in problems}) == 2


def test_an_id_of_zero_is_an_id(tmp_path: Path) -> None:
    rows = [{"problem": "a", "id": 0}, {"problem": "b", "id": ""}, {"problem": "c", "id": None}]
    first, *rest = load_problems(write(tmp_path / "set.json", rows))
    assert first.id == "0"
    assert {len(problem.id) for problem in rest} == {16}


def test_the_digest_follows_content_and_order(tmp_path: Path) -> None:
    problems = load_problems(write(tmp_path / "set.json", ROWS))
    assert problems_digest(problems) == problems_digest(list(problems))
    assert problems_digest(problems) != problems_digest(problems[::-1])


@pytest.mark.parametrize(
    ("name", "content", "found"),
    [
        ("missing.parquet", None, "no such file"),
        ("set.csv", "a,b", "neither a .parquet, .json, .jsonl file nor a hub dataset id"),
        ("set.json", "[]", "it holds none"),
        ("set.json", '{"problem": "a"}', "found one object"),
        ("set.json", "[1]", "found a int"),
        ("set.json", "5", "a list of problems in"),
        ("set.json", "null", "a list of problems in"),
        ("set.json", '[{"problem": "a", "id": 7}, {"problem": "b", "id": 7}]', "7 names two different ones"),
        ("set.json", "[{", "cannot be read"),
        ("set.jsonl", '{"problem": "a"}\n\n{"problem" "b"}', "line 3 is no JSON (character 12: Expecting ':'"),
        ("set.jsonl", '{"question": "a", "answer": "b"}', "found columns question, answer"),
        ("set.jsonl", '{"problem": 3}', "found a int"),
        ("set.parquet", "not parquet", "cannot be read"),
    ],
)
def test_bad_input_is_one_clear_line(tmp_path: Path, name: str, content: str | None, found: str) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError) as caught:
        load_problems(str(tmp_path / name))
    assert found in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_url_without_a_driver_is_one_clear_line() -> None:
    with pytest.raises(UserError, match="cannot be read"):
        load_problems("nonsense://set.json")


def test_a_limit_below_one_is_refused() -> None:
    with pytest.raises(UserError, match="at least 1"):
        load_problems("memory://set.jsonl", limit=0)
