"""Problem sets: where prompts come from.

Guarantees: a list of distinct problems in file order, each with an id, or one clear error. Reads Parquet, JSON (an
array of objects) and JSONL through any fsspec URL, and dataset ids of the Hugging Face hub.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from logitcache.errors import UserError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_SUFFIXES = (".parquet", ".json", ".jsonl")


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One problem: its id, its text, and the final answer (the empty string where none is known)."""

    id: str
    text: str
    answer: str


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Where to find a problem's parts."""

    problem: str = "problem"
    answer: str = "answer"
    id: str = "id"


def load_problems(source: str, *, limit: int | None = None) -> list[Problem]:
    """Read the problems of a file, URL or hub dataset, `limit` of them at most.

    Columns: `problem` (required), `answer` and `id` (optional; an id is otherwise a hash of the text). A problem whose
    id was seen before is left out: published sets repeat themselves.

    Raises:
        UserError: nothing there, not a format this reads, a missing column, a non-text value, or no problems.
    """
    if limit is not None and limit < 1:
        raise UserError(f"--limit {limit}", "no problem would be left", "ask for at least 1")
    problems = _distinct(_rows(source), source, limit)
    if not problems:
        raise UserError(f"problems from {source}", "it holds none", "point --problems at a file with rows")
    return problems


def load_rows(source: str, columns: Columns | None = None) -> list[Problem]:
    """Every row of a problem set as it stands, repeats included. Raises as `load_problems`, but may be empty."""
    return [_problem(row, source, columns or Columns()) for row in _rows(source)]


def problems_digest(problems: Iterable[Problem]) -> str:
    """SHA-256 over ids and texts in order, 64 hex digits."""
    digest = hashlib.sha256()
    for problem in problems:
        digest.update(json.dumps([problem.id, problem.text]).encode())
    return digest.hexdigest()


def _distinct(rows: Iterable[dict[str, Any]], source: str, limit: int | None) -> list[Problem]:
    problems: dict[str, Problem] = {}
    for row in rows:
        if limit is not None and len(problems) >= limit:
            break
        problem = _problem(row, source, Columns())
        problems.setdefault(problem.id, problem)
    return list(problems.values())


def _problem(row: dict[str, Any], source: str, columns: Columns) -> Problem:
    text = row.get(columns.problem)
    if not isinstance(text, str):
        have = ", ".join(map(str, row)) or "none"
        found = f"found columns {have}" if text is None else f"found a {type(text).__name__} in it"
        asked = f"a text column `{columns.problem}` in {source}"
        raise UserError(asked, found, "name or rename the column that holds the problems")
    answer = row.get(columns.answer)
    ident = row.get(columns.id) or hashlib.sha256(text.encode()).hexdigest()[:16]
    return Problem(id=str(ident), text=text, answer="" if answer is None else str(answer))


def _rows(source: str) -> Iterable[dict[str, Any]]:
    if not source.endswith(_SUFFIXES):
        for file in _hub_files(source):
            yield from _file_rows(file)
    else:
        yield from _file_rows(source)


def _file_rows(url: str) -> Iterable[dict[str, Any]]:
    import fsspec

    try:
        with fsspec.open(url, "rb") as file:
            if url.endswith(".parquet"):
                import pyarrow.parquet as pq

                for batch in pq.ParquetFile(file).iter_batches():
                    yield from batch.to_pylist()
            elif url.endswith(".jsonl"):
                yield from _objects((json.loads(line) for line in file if line.strip()), url)
            else:
                yield from _objects(json.load(file), url)
    except FileNotFoundError:
        raise UserError(f"problems from {url}", "no such file", "check the path or URL") from None
    except (OSError, ValueError, ImportError) as error:
        # ValueError covers malformed JSON and Parquet (pyarrow.ArrowInvalid), ImportError a missing file system driver.
        raise UserError(f"problems from {url}", f"cannot be read ({error})", "check the file and its format") from error


def _objects(rows: Any, url: str) -> Iterable[dict[str, Any]]:
    if isinstance(rows, dict):
        raise UserError(f"a list of problems in {url}", "found one object", "wrap it in a list")
    for row in rows:
        if not isinstance(row, dict):
            raise UserError(f"problems as objects in {url}", f"found a {type(row).__name__}", "give each its columns")
        yield row


def _hub_files(dataset: str) -> Sequence[str]:
    if not _HUB_ID.fullmatch(dataset):
        formats = ", ".join(_SUFFIXES)
        raise UserError(f"problems from {dataset}", f"neither a {formats} file nor a hub dataset id", "check the name")
    import fsspec

    try:
        found = fsspec.filesystem("hf").find(f"datasets/{dataset}")
    except Exception as error:  # the hub's client raises a zoo of types; all of them mean the set is out of reach
        raise UserError(f"hub dataset {dataset}", f"cannot be listed ({error})", "check the id and network") from error
    files = [f"hf://{path}" for path in sorted(found) if path.endswith(_SUFFIXES) and "test" not in path.lower()]
    if not files:
        raise UserError(f"hub dataset {dataset}", "no Parquet, JSON or JSONL file in it", "name a file's URL instead")
    return files
