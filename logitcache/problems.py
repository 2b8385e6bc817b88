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

EVALUATION_COLUMNS = ("problem", "question", "Problem")
"""What published evaluation sets call the column of their problems."""

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_SUFFIXES = (".parquet", ".json", ".jsonl")
_TEST = re.compile(r"(?<![a-z])test(?![a-z])")


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

    Columns: `problem` (required), `answer` and `id` (optional; an id is otherwise a hash of the text). A problem that
    was seen before under the same id is left out: published sets repeat themselves.

    Raises:
        UserError: nothing there, not a format this reads, a missing column, a non-text value, one id for two problems,
            or no problems.
    """
    if limit is not None and limit < 1:
        raise UserError(f"--limit {limit}", "no problem would be left", "ask for at least 1")
    problems = _distinct(_rows(source, evaluation=False), source, limit)
    if not problems:
        raise UserError(f"problems from {source}", "it holds none", "point --problems at a file with rows")
    return problems


def load_rows(source: str, columns: Columns | None = None) -> list[Problem]:
    """Every row of a problem set as it stands, repeats included.

    May be empty, and may give one id to several problems; else raises as `load_problems`, and where a column that
    `columns` renames is in no row.
    """
    columns = columns or Columns()
    rows = list(_rows(source, evaluation=False))
    _require_columns(rows, source, columns)
    return [_problem(row, source, columns) for row in rows]


def load_evaluation_rows(source: str, column: str | None = None) -> list[Problem]:
    """Every row of a set that is not to be trained on; of a hub dataset its test split, or all of it if it has none.

    The problems are in `column`, or where None in the first of `EVALUATION_COLUMNS` that the first row has.

    Raises:
        UserError: as `load_problems`; an empty set too.
    """
    rows = list(_rows(source, evaluation=True))
    if not rows:
        raise UserError(f"evaluation problems from {source}", "it holds none", "point --against at a file with rows")
    named = column or next((name for name in EVALUATION_COLUMNS if name in rows[0]), EVALUATION_COLUMNS[0])
    return [_problem(row, source, Columns(problem=named)) for row in rows]


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
        if problems.setdefault(problem.id, problem).text != problem.text:
            asked, do = f"an id for each problem of {source}", "mend the ids, or let `logitcache prepare` sift the set"
            raise UserError(asked, f"{problem.id} names two different ones", do)
    return list(problems.values())


def _require_columns(rows: Sequence[dict[str, Any]], source: str, columns: Columns) -> None:
    """A column that was named is meant: one that no row has would be lost without a word."""
    for name, default in ((columns.answer, Columns.answer), (columns.id, Columns.id)):
        if rows and name != default and not any(name in row for row in rows):
            found = f"found columns {', '.join(map(str, rows[0]))}"
            raise UserError(f"a column `{name}` in {source}", found, "name a column that is there")


def _problem(row: dict[str, Any], source: str, columns: Columns) -> Problem:
    text = row.get(columns.problem)
    if not isinstance(text, str):
        have = ", ".join(map(str, row)) or "none"
        found = f"found columns {have}" if text is None else f"found a {type(text).__name__} in it"
        asked = f"a text column `{columns.problem}` in {source}"
        raise UserError(asked, found, "name or rename the column that holds the problems")
    answer = row.get(columns.answer)
    ident = row.get(columns.id)
    if ident is None or ident == "":
        ident = hashlib.sha256(text.encode()).hexdigest()[:16]
    return Problem(id=str(ident), text=text, answer="" if answer is None else str(answer))


def _rows(source: str, *, evaluation: bool) -> Iterable[dict[str, Any]]:
    if not source.endswith(_SUFFIXES):
        for file in _hub_files(source, evaluation=evaluation):
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
                yield from _objects(_lines(file, url), url)
            else:
                rows = json.load(file)
                if not isinstance(rows, list):
                    found = "one object" if isinstance(rows, dict) else f"a {type(rows).__name__}"
                    raise UserError(f"a list of problems in {url}", f"found {found}", "wrap it in a list")
                yield from _objects(rows, url)
    except FileNotFoundError:
        raise UserError(f"problems from {url}", "no such file", "check the path or URL") from None
    except (OSError, ValueError, ImportError) as error:
        # ValueError covers malformed JSON and Parquet (pyarrow.ArrowInvalid), ImportError a missing file system driver.
        raise UserError(f"problems from {url}", f"cannot be read ({error})", "check the file and its format") from error


def _lines(file: Iterable[bytes], url: str) -> Iterable[Any]:
    for number, line in enumerate(file, 1):
        if line.strip():
            try:
                yield json.loads(line)
            except ValueError as error:
                at = f"character {error.colno}: {error.msg}" if isinstance(error, json.JSONDecodeError) else str(error)
                found = f"line {number} is no JSON ({at})"
                raise UserError(f"problems from {url}", found, "mend that line") from error


def _objects(rows: Iterable[Any], url: str) -> Iterable[dict[str, Any]]:
    for row in rows:
        if not isinstance(row, dict):
            raise UserError(f"problems as objects in {url}", f"found a {type(row).__name__}", "give each its columns")
        yield row


def _hub_files(dataset: str, *, evaluation: bool) -> Sequence[str]:
    """The files of one side: a set of one split alone, whatever its name, is that split on either side."""
    if not _HUB_ID.fullmatch(dataset):
        formats = ", ".join(_SUFFIXES)
        raise UserError(f"problems from {dataset}", f"neither a {formats} file nor a hub dataset id", "check the name")
    import fsspec

    try:
        found = fsspec.filesystem("hf").find(f"datasets/{dataset}")
    except Exception as error:  # the hub's client raises a zoo of types; all of them mean the set is out of reach
        raise UserError(f"hub dataset {dataset}", f"cannot be listed ({error})", "check the id and network") from error
    files = [path for path in sorted(found) if path.endswith(_SUFFIXES)]
    if not files:
        raise UserError(f"hub dataset {dataset}", "no Parquet, JSON or JSONL file in it", "name a file's URL instead")
    side = [path for path in files if bool(_TEST.search(path.partition(dataset)[2].lower())) is evaluation]
    return [f"hf://{path}" for path in side or files]
