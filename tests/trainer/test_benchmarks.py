"""Sets with answers: the four that are known by name in the shapes that the hub has them in, and what is refused."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import _registry

from logitcache.errors import UserError
from trainer.answers import AnswerChecker
from trainer.benchmarks import NAMES, benchmark_digest, load_benchmark

ROWS = [{"id": f"p{n}", "problem": f"{n} + {n}?", "answer": str(2 * n)} for n in range(4)]


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def parquet(rows: list[dict]) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), file)
    return file.getvalue()


class Hub(MemoryFileSystem):
    """The hub's file system, held in memory: paths as huggingface_hub gives them."""

    protocol = "hf"

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return super()._strip_protocol(path.removeprefix("hf://"))

    def find(self, path: str, **how: object) -> list[str]:
        return [found.lstrip("/") for found in super().find(path, **how)]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    monkeypatch.setitem(_registry, "hf", Hub)
    monkeypatch.setattr(Hub, "store", {})
    return Hub()


def test_known_sets_are_read_from_the_hub(hub: Hub) -> None:
    aime = {"id": 60, "problem": "a?", "answer": "204", "url": "there"}
    hub.pipe_file("datasets/HuggingFaceH4/aime_2024/data/train-00000-of-00001.parquet", parquet([aime]))
    amc = {"id": 0, "question": "b?", "answer": "27.0"}
    hub.pipe_file("datasets/math-ai/amc23/test-00000-of-00001.parquet", parquet([amc]))
    math = {"unique_id": "test/algebra/1.json", "problem": "c?", "answer": r"\frac{1}{2}"}
    hub.pipe_file("datasets/HuggingFaceH4/MATH-500/test.jsonl", json.dumps(math).encode())
    gsm = {"question": "d?", "answer": "3 * 600 = <<3*600=1800>>1,800\n#### 1,800"}
    for folder in ("main", "socratic"):
        for part in ("train", "test"):
            name = f"datasets/openai/gsm8k/{folder}/{part}-00000-of-00001.parquet"
            hub.pipe_file(name, parquet([gsm | {"question": f"{folder} {part}?"}]))
    found = {name: load_benchmark(name) for name in NAMES}
    assert {name: [(p.text, p.answer) for p in problems] for name, problems in found.items()} == {
        "aime24": [("a?", "204")],
        "amc23": [("b?", "27.0")],
        "math500": [("c?", r"\frac{1}{2}")],
        "gsm8k": [("main test?", "1800")],
    }
    assert [found["aime24"][0].id, found["math500"][0].id] == ["60", "test/algebra/1.json"]


def test_any_hub_dataset_of_that_shape(hub: Hub) -> None:
    hub.pipe_file("datasets/someone/sums/train.jsonl", json.dumps(ROWS[0]).encode())
    hub.pipe_file("datasets/someone/sums/test.jsonl", json.dumps(ROWS[1]).encode())
    assert [problem.id for problem in load_benchmark("someone/sums")] == ["p1"]
    hub.pipe_file("datasets/someone/tests-of-mine/train.jsonl", json.dumps(ROWS[0]).encode())
    with pytest.raises(UserError, match=r"tests-of-mine has no .* file with `test` in its path"):
        load_benchmark("someone/tests-of-mine")


def test_a_file_keeps_its_order_and_limit(tmp_path: Path) -> None:
    problems = load_benchmark(write(tmp_path / "set.jsonl", ROWS), limit=3)
    assert [(p.id, p.text, p.answer) for p in problems] == [(r["id"], r["problem"], r["answer"]) for r in ROWS[:3]]


def test_the_digest_knows_the_answers(tmp_path: Path) -> None:
    problems = load_benchmark(write(tmp_path / "set.jsonl", ROWS))
    others = load_benchmark(write(tmp_path / "other.jsonl", [*ROWS[:3], ROWS[3] | {"answer": "7"}]))
    assert benchmark_digest(problems) == benchmark_digest(list(problems))
    assert len({benchmark_digest(problems), benchmark_digest(problems[::-1]), benchmark_digest(others)}) == 3


@pytest.mark.parametrize(
    ("rows", "found"),
    [
        ([], "it holds none"),
        ([ROWS[0], {"problem": "x?", "answer": ""}, {"problem": "y?"}], r"missing for 2 \("),
        ([ROWS[0], {"id": "no", "problem": "x?", "answer": " "}], r"missing for 1 \(no\); leave those problems out"),
        ([ROWS[0], {"id": "no", "problem": "x?", "answer": "see above ####"}], r"missing for 1 \(no\)"),
        ([*ROWS, ROWS[2]], r"1 \(p2\) come twice"),
        ([{"question": "x?", "answer": "1"}], "found columns question, answer"),
    ],
)
def test_bad_sets(rows: list[dict], found: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=found):
        load_benchmark(write(tmp_path / "set.jsonl", rows))


@pytest.mark.parametrize("name", ["math-500", "set.csv", "a/b/c"])
def test_unknown_names(name: str) -> None:
    with pytest.raises(UserError, match=r"no name of a set \(aime24, amc23, math500, gsm8k\)"):
        load_benchmark(name)


def test_a_limit_below_one(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--limit 0"):
        load_benchmark(write(tmp_path / "set.jsonl", ROWS), limit=0)


@pytest.mark.parametrize(("file", "count"), [("aime24", 30), ("amc23", 40), ("math500", 500), ("gsm8k_test", 1319)])
def test_every_answer_of_the_real_sets_can_be_checked(file: str, count: int) -> None:
    pytest.importorskip("math_verify", reason="needs math-verify: pip install math-verify")
    path = Path(__file__).parents[3] / "shared" / "data" / f"{file}.parquet"
    if not path.exists():
        pytest.skip(f"no {path.name} in ../shared/data")
    problems = load_benchmark(str(path))
    assert len(problems) == count
    with AnswerChecker() as checker:
        checker.require_checkable(problems)
