"""From a raw problem set to one fit for training: one row per problem, and none of the questions it will be judged by.

Guarantees: what is kept is kept verbatim and in order; every row that is left out is written down with the reason and
the row it repeats or overlaps. Both files appear whole or not at all.

Three comparisons, each looser than the last: white space collapsed; LaTeX-normalised (`problem_key`); and n-gram
containment, the share of an evaluation problem's token n-grams that a training problem holds. They find copies and
light edits, not paraphrases.
"""

from __future__ import annotations

import io
import json
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum

from logitcache.errors import UserError, require
from logitcache.problems import Columns, Problem, load_evaluation_rows, load_rows
from logitcache.store.place import open_place

_TOKEN = re.compile(r"\\[a-z]+|[^\W\d_]+|\d+(?:\.\d+)?|[^\s\w]")
_LAYOUT = re.compile(
    r"\\(?:left|right|displaystyle|textstyle|quad|qquad|text|textbf|textit|mathrm|mathbf|operatorname)(?![a-z])"
    r"|\\[,;:! \[\]()]|[$~{}]"
)
_FRACTION = re.compile(r"\\[dt]frac(?![a-z])")
_PUNCTUATION = frozenset(".,;:?'\"`")
_ITSELF = "itself"
"""The problem set as its own `Dropped.of_set`."""


class Reason(StrEnum):
    """Why a row was left out, from the strictest comparison that found it to the loosest."""

    DUPLICATE = "duplicate"
    """The same text, white space aside, as an earlier row."""
    DUPLICATE_LATEX = "duplicate-latex"
    """The same LaTeX-normalised text as an earlier row."""
    DUPLICATE_ID = "duplicate-id"
    """Another problem than the earlier row of the same id: one of two could not be told from the other."""
    OVERLAP = "overlap"
    """The same text, white space aside, as an evaluation problem."""
    OVERLAP_LATEX = "overlap-latex"
    """The same LaTeX-normalised text as an evaluation problem."""
    OVERLAP_NGRAMS = "overlap-ngrams"
    """It holds at least the threshold's share of an evaluation problem's n-grams."""


@dataclass(frozen=True, kw_only=True)
class PrepareRequest:
    """What to prepare: the options of `logitcache prepare`.

    Attributes:
        problems: the raw set: Parquet, JSON or JSONL (any fsspec URL), or a hub dataset id.
        out: where the kept problems go, a `.parquet` or `.jsonl` path or URL; what was dropped goes beside it.
        against: evaluation sets that must not be trained on, read like `problems`; of a hub dataset, its test split.
        against_column: where to find the problem in them; by default `problem`, `question` or `Problem`.
        problem_column: where to find the problem in `problems`.
        answer_column: likewise the answer.
        id_column: likewise the id.
        ngram: tokens in an n-gram.
        containment: the least share of an evaluation problem's n-grams that counts as overlap, in (0, 1]. The defaults
            find all 13 known MATH500 items in DeepScaleR, and with them about 110 rows, mostly the same problem with
            other numbers; stricter ones miss known items.
    """

    problems: str
    out: str
    against: tuple[str, ...] = ()
    against_column: str | None = None
    problem_column: str = "problem"
    answer_column: str = "answer"
    id_column: str = "id"
    ngram: int = 5
    containment: float = 0.5

    def __post_init__(self) -> None:
        require(self.out.endswith((".parquet", ".jsonl")), "--out ending in .parquet or .jsonl", self.out, "rename it")
        require(self.ngram >= 1, "--ngram of at least 1", self.ngram)
        require(0 < self.containment <= 1, "--containment above 0 and at most 1", self.containment)


@dataclass(frozen=True, kw_only=True)
class Dropped:
    """A row that was left out.

    Attributes:
        id, problem, answer: the row itself.
        reason: why.
        of: the id it repeats or overlaps; of_answer: that one's answer (a repeat may contradict the row it repeats).
        of_set: the evaluation set `of` belongs to, or the set itself.
        containment: the share of `of`'s n-grams in this row, where that was the reason.
    """

    id: str
    problem: str
    answer: str
    reason: Reason
    of: str
    of_answer: str
    of_set: str
    containment: float | None = None


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """What is kept, in order, and what is not."""

    kept: list[Problem]
    dropped: list[Dropped]

    def counts(self) -> dict[str, int]:
        """Rows kept, and dropped for each reason."""
        reasons = Counter(row.reason for row in self.dropped)
        return {"kept": len(self.kept), **{reason.value: reasons[reason] for reason in Reason}}


def prepare(request: PrepareRequest) -> dict[str, object]:
    """Read, sift and write a problem set.

    Returns:
        Where the two files are, and the counts.

    Raises:
        UserError: a set cannot be read, lacks a column, an evaluation set is empty, or nothing is left of the problems;
            a file cannot be written.
    """
    columns = Columns(problem=request.problem_column, answer=request.answer_column, id=request.id_column)
    rows = load_rows(request.problems, columns)
    evaluation = {name: load_evaluation_rows(name, request.against_column) for name in request.against}
    sifted = sift(rows, evaluation, ngram=request.ngram, containment=request.containment)
    if not sifted.kept:
        raise UserError(f"problems from {request.problems}", "none is left", "check --against and --containment")
    base, _, suffix = request.out.rpartition(".")
    dropped = f"{base}.dropped.jsonl"
    _write(dropped, _jsonl(asdict(row) for row in sifted.dropped))
    kept = [{"id": row.id, "problem": row.text, "answer": row.answer} for row in sifted.kept]
    _write(request.out, _parquet(kept) if suffix == "parquet" else _jsonl(kept))
    return {"out": request.out, "dropped": dropped, "rows": len(rows), **sifted.counts()}


def sift(
    problems: Sequence[Problem], evaluation: Mapping[str, Sequence[Problem]], *, ngram: int, containment: float
) -> Prepared:
    """Separate what to keep from repeats and from what overlaps an evaluation set (its name to its problems)."""
    held_out = _Texts(reasons=(Reason.OVERLAP, Reason.OVERLAP_LATEX))
    for name, rows in evaluation.items():
        for row in rows:
            held_out.add(row, name)
    grams = _Grams.of(evaluation, ngram)
    seen = _Texts(reasons=(Reason.DUPLICATE, Reason.DUPLICATE_LATEX))
    kept: list[Problem] = []
    dropped: list[Dropped] = []
    ids: dict[str, Problem] = {}
    for problem in problems:
        found = held_out.match(problem) or grams.match(problem, containment) or seen.match(problem)
        if found is None and problem.id in ids:
            found = _dropped(problem, Reason.DUPLICATE_ID, (ids[problem.id], _ITSELF))
        if found is None:
            kept.append(problem)
            seen.add(problem, _ITSELF)
            ids[problem.id] = problem
        else:
            dropped.append(found)
    return Prepared(kept=kept, dropped=dropped)


def problem_tokens(text: str) -> list[str]:
    """Lower-case words, numbers, LaTeX commands and symbols, without what only lays out or delimits mathematics."""
    text = unicodedata.normalize("NFKC", text).lower()
    return _TOKEN.findall(_LAYOUT.sub(" ", _FRACTION.sub(r"\\frac", text)))


def problem_key(text: str) -> str:
    """The LaTeX-normalised text: its tokens without punctuation, run together."""
    return "".join(token for token in problem_tokens(text) if token not in _PUNCTUATION)


_Named = tuple[Problem, str]
"""A problem and the set it belongs to."""


@dataclass(kw_only=True)
class _Texts:
    """Problems by white-space-collapsed and by LaTeX-normalised text; the first of equal ones counts."""

    reasons: tuple[Reason, Reason]
    texts: dict[str, _Named] = field(default_factory=dict)
    keys: dict[str, _Named] = field(default_factory=dict)

    def add(self, problem: Problem, of_set: str) -> None:
        self.texts.setdefault(_collapsed(problem.text), (problem, of_set))
        if key := problem_key(problem.text):
            self.keys.setdefault(key, (problem, of_set))

    def match(self, problem: Problem) -> Dropped | None:
        strict, loose = self.reasons
        if (same := self.texts.get(_collapsed(problem.text))) is not None:
            return _dropped(problem, strict, same)
        if (same := self.keys.get(problem_key(problem.text))) is not None:
            return _dropped(problem, loose, same)
        return None


@dataclass(frozen=True, kw_only=True)
class _Grams:
    """Which evaluation problems hold each n-gram, and how many distinct ones each problem has."""

    ngram: int
    problems: list[_Named]
    sizes: list[int]
    holders: dict[tuple[str, ...], list[int]]

    @classmethod
    def of(cls, evaluation: Mapping[str, Sequence[Problem]], ngram: int) -> _Grams:
        problems = [(row, name) for name, rows in evaluation.items() for row in rows]
        grams = [_grams(row.text, ngram) for row, _ in problems]
        holders: dict[tuple[str, ...], list[int]] = defaultdict(list)
        for number, own in enumerate(grams):
            for gram in own:
                holders[gram].append(number)
        return cls(ngram=ngram, problems=problems, sizes=[len(own) for own in grams], holders=dict(holders))

    def match(self, problem: Problem, containment: float) -> Dropped | None:
        shared = Counter(number for gram in _grams(problem.text, self.ngram) for number in self.holders.get(gram, ()))
        best = max(shared, key=lambda number: (shared[number] / self.sizes[number], -number), default=None)
        if best is None or shared[best] / self.sizes[best] < containment:
            return None
        share = round(shared[best] / self.sizes[best], 4)
        return _dropped(problem, Reason.OVERLAP_NGRAMS, self.problems[best], share)


def _grams(text: str, ngram: int) -> set[tuple[str, ...]]:
    tokens = problem_tokens(text)
    return {tuple(tokens[start : start + ngram]) for start in range(len(tokens) - ngram + 1)}


def _collapsed(text: str) -> str:
    return " ".join(text.split())


def _dropped(problem: Problem, reason: Reason, of: _Named, containment: float | None = None) -> Dropped:
    same, of_set = of
    return Dropped(
        id=problem.id,
        problem=problem.text,
        answer=problem.answer,
        reason=reason,
        of=same.id,
        of_answer=same.answer,
        of_set=of_set,
        containment=containment,
    )


def _jsonl(rows: Iterable[Mapping[str, object]]) -> bytes:
    return "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows).encode()


def _parquet(rows: list[dict[str, str]]) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), buffer, compression="zstd")
    return buffer.getvalue()


def _write(url: str, data: bytes) -> None:
    folder, separator, name = url.rpartition("/")
    open_place(folder if separator else ".").write({name: data})
