"""Problem sets with known answers: AIME24, AMC23, MATH500, GSM8K by name, and any file or hub dataset of that shape.

Guarantees: every problem has an id of its own and an answer that is not empty, or there is one clear error: a set is
never made smaller without a word, because its size is what scores are divided by.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from logitcache.errors import UserError
from logitcache.problems import Columns, Problem, load_rows

_FORMATS = (".parquet", ".json", ".jsonl")


@dataclass(frozen=True, kw_only=True)
class _Published:
    """A dataset of the hub: which of its files (by a part of their path) to read, and how."""

    dataset: str
    part: str = "test"
    columns: Columns = Columns()  # noqa: RUF009 (frozen)


_KNOWN = {
    "aime24": _Published(dataset="HuggingFaceH4/aime_2024", part="train"),
    "amc23": _Published(dataset="math-ai/amc23", columns=Columns(problem="question")),
    "math500": _Published(dataset="HuggingFaceH4/MATH-500", columns=Columns(id="unique_id")),
    "gsm8k": _Published(dataset="openai/gsm8k", part="main/test", columns=Columns(problem="question")),
}
NAMES = tuple(_KNOWN)
"""Of the sets that are known by name."""


def load_benchmark(source: str, *, limit: int | None = None) -> list[Problem]:
    """The problems of a set in its own order, the first `limit` of them.

    Args:
        source: one of `NAMES` (read from the hub), a Parquet, JSON or JSONL file or URL with columns `problem`,
            `answer` and, if it likes, `id`, or the id of a hub dataset of such files, of which those that have `test`
            in their path are read. An answer that ends in working and `#### 42` (GSM8K's) is 42.
        limit: None for all.

    Raises:
        UserError: no such set, a missing column, no problems, problems without an answer or with the same id.
    """
    if limit is not None and limit < 1:
        raise UserError(f"--limit {limit}", "no problem would be left", "ask for at least 1")
    if source.endswith(_FORMATS):
        rows = load_rows(source)
    else:
        published = _KNOWN.get(source) or _Published(dataset=source)
        rows = [row for file in _files(published, source) for row in load_rows(file, published.columns)]
    problems = [replace(row, answer=_final_answer(row.answer)) for row in rows[:limit]]
    if not problems:
        raise UserError(f"problems from {source}", "it holds none", "point --problems at a file with rows")
    unanswered = [problem.id for problem in problems if not problem.answer]
    if unanswered:
        if len(unanswered) == len(problems):
            raise UserError(f"answers to {source}", "no problem has one", "give each its own in a column `answer`")
        raise UserError(f"answers to {source}", f"missing for {_some(unanswered)}", "leave those problems out")
    repeated = [name for name, count in Counter(problem.id for problem in problems).items() if count > 1]
    if repeated:
        raise UserError(f"an id for each problem of {source}", f"{_some(repeated)} come twice", "mend the ids")
    return problems


def benchmark_digest(problems: Sequence[Problem]) -> str:
    """32 hex digits of SHA-256 over ids, texts and answers in order."""
    parts = json.dumps([[problem.id, problem.text, problem.answer] for problem in problems])
    return hashlib.sha256(parts.encode()).hexdigest()[:32]


def _final_answer(text: str) -> str:
    _, mark, last = text.rpartition("####")
    return last.strip().replace(",", "") if mark else text.strip()


def _files(published: _Published, source: str) -> list[str]:
    import fsspec

    root = f"datasets/{published.dataset}"
    asked = f"problems from {source}"
    if published.dataset.count("/") != 1:
        found = f"no name of a set ({', '.join(NAMES)}), {', '.join(_FORMATS)} file or hub dataset id"
        raise UserError(asked, found, "check the name")
    try:
        paths = fsspec.filesystem("hf").find(root)
    except Exception as error:  # the hub's client raises a zoo of types; all of them mean the set is out of reach
        raise UserError(asked, f"{published.dataset} cannot be listed ({error})", "check the id and network") from error
    files = [path for path in sorted(paths) if path.endswith(_FORMATS) and published.part in path.partition(root)[2]]
    if not files:
        found = f"{published.dataset} has no {' or '.join(_FORMATS)} file with `{published.part}` in its path"
        raise UserError(asked, found, "name a file's URL, such as hf://datasets/OWNER/NAME/FILE.parquet")
    return [f"hf://{path}" for path in files]


def _some(ids: Sequence[str]) -> str:
    return f"{len(ids)} ({', '.join(ids[:3])}{', ...' if len(ids) > 3 else ''})"
