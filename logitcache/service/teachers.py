"""A teacher that scores for every student of a server: one thread, calls gathered into one pass, answers kept.

Guarantees: what a sequence is told depends on its tokens, the teacher and the request alone, but for the rounding of an
engine whose numbers depend on a sequence's neighbours in a batch (`gather_s=0` gives each call a pass of its own); one
that was kept is read and not scored; a call that the engine refuses spoils no other's.

Deliberately not here: what a client may ask for, and how many at once (`logitcache.service.server`).
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from logitcache.errors import UserError
from logitcache.records import ScoredSequence, TeacherTargets, TokenSequence
from logitcache.scoring import Scorer, TargetRequest
from logitcache.service import wire
from logitcache.service.refusals import LOG
from logitcache.service.requests import kind_of
from logitcache.store.disk_cache import DiskCache, key_of
from logitcache.store.envelope import digest_of


class Answer(NamedTuple):
    """One sequence's targets, and whether the teacher was run for them."""

    targets: TeacherTargets
    scored: bool


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """A teacher that a server offers.

    Attributes:
        name: in the catalogue.
        scorer: runs it.
        facts: what a client is told: `name, fingerprint, dtype, vocab_size, tokenizer, engine, config, stop_ids, head`.
        digest: of the facts; answers are kept under it, and a request names it.
    """

    name: str
    scorer: Scorer
    facts: Mapping[str, Any]
    digest: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "digest", digest_of(self.facts))


@dataclass(frozen=True, kw_only=True)
class Kept:
    """Answers of one teacher on disk.

    Attributes:
        cache: where.
        teacher: whose.
    """

    cache: DiskCache
    teacher: Teacher

    def get(self, key: str) -> TeacherTargets | None:
        """What was said under that key; None if nothing is kept."""
        data = self.cache.get(key)
        if data is None:
            return None
        batch = wire.from_ipc(data)
        kind = batch.schema.metadata[b"kind"].decode()
        ((_, item),) = wire.decode_rows(batch, wire.rebuild_decoded(kind, self.teacher.scorer.head.fingerprint))
        assert isinstance(item, ScoredSequence)
        return item.targets

    def put(self, key: str, kind: str, sequence: TokenSequence, targets: TeacherTargets) -> None:
        """Keep it, as one row of what the wire carries."""
        schema = wire.targets_schema(targets).with_metadata({"kind": kind})
        (batch,) = wire.encode_rows(schema, [0], [ScoredSequence(sequence=sequence, targets=targets)])
        try:
            self.cache.put(key, wire.to_ipc(batch))
        except UserError as error:  # it is answered all the same, and scored again if it is asked again
            LOG.error("not kept", extra={"error": str(error)})


class _Call(NamedTuple):
    sequences: Sequence[TokenSequence]
    keys: Sequence[str]
    want: TargetRequest
    future: Future[list[Answer]]


class Scoring:
    """A teacher's thread. Thread-safe.

    Args:
        teacher: who scores.
        gather_s: how long a call waits for others to share a pass with; 0 gives each a pass of its own.
        cache: where answers are kept; None keeps none.
        told: called with the calls, the sequences scored and their rows, and the sequences answered otherwise.
    """

    def __init__(
        self,
        teacher: Teacher,
        *,
        gather_s: float = 0.005,
        cache: DiskCache | None = None,
        told: Callable[..., None] = lambda **_: None,
    ) -> None:
        self.teacher = teacher
        self._kept = None if cache is None else Kept(cache=cache, teacher=teacher)
        self._gather_s, self._told = gather_s, told
        self._calls: queue.SimpleQueue[_Call | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=f"teacher {teacher.name}", daemon=True)
        self._thread.start()

    def submit(self, sequences: Sequence[TokenSequence], want: TargetRequest) -> Future[list[Answer]]:
        """An answer for each sequence, in order; fails with UserError as `Scorer.score` does. It can be cancelled."""
        keys = [self._key(sequence, want) for sequence in sequences]
        call = _Call(sequences, keys, want, Future())
        kept = {key: self._read(key) for key in keys}
        if None in kept.values():
            self._calls.put(call)
        else:  # nothing to wait for
            self._told(calls=1, scored=0, rows=0, others=len(keys))
            call.future.set_result([Answer(kept[key], scored=False) for key in keys])  # type: ignore[arg-type]
        return call.future

    def close(self) -> None:
        """End the thread once the calls before this one are answered."""
        self._calls.put(None)

    def _run(self) -> None:
        while (first := self._calls.get()) is not None:
            gathered = [first, *self._others()]
            by_want: dict[TargetRequest, list[_Call]] = {}
            for call in gathered:
                if call is None:
                    self._calls.put(None)
                elif call.future.set_running_or_notify_cancel():
                    by_want.setdefault(call.want, []).append(call)
            for calls in by_want.values():
                self._answer(calls)

    def _others(self) -> list[_Call | None]:
        """The calls that come within `gather_s`, and those that were there already."""
        found: list[_Call | None] = []
        until = time.monotonic() + self._gather_s
        while self._gather_s and (left := until - time.monotonic()) > 0:
            try:
                found.append(self._calls.get(timeout=left))
            except queue.Empty:
                break
        return found

    def _answer(self, calls: list[_Call]) -> None:
        """Answer calls that want the same, in one pass; each alone where the engine refuses them together."""
        try:
            answers = self._score(calls)
        except UserError as error:
            if len(calls) == 1:
                calls[0].future.set_exception(error)
            else:
                for call in calls:
                    self._answer([call])
        except Exception as error:
            for call in calls:
                call.future.set_exception(error)
        else:
            for call, answer in zip(calls, answers, strict=True):
                call.future.set_result(answer)

    def _score(self, calls: list[_Call]) -> list[list[Answer]]:
        want = calls[0].want
        asked = {key: sequence for call in calls for key, sequence in zip(call.keys, call.sequences, strict=True)}
        said = {key: targets for key in asked if (targets := self._read(key)) is not None}
        missing = {key: sequence for key, sequence in asked.items() if key not in said}
        if missing:
            found = self.teacher.scorer.score(list(missing.values()), [want])
            for (key, sequence), (targets,) in zip(missing.items(), found, strict=True):
                said[key] = targets
                if self._kept is not None:
                    self._kept.put(key, kind_of(want), sequence, targets)
        rows = sum(len(sequence) - 1 for sequence in missing.values())
        everything = sum(len(call.keys) for call in calls)
        self._told(calls=len(calls), scored=len(missing), rows=rows, others=everything - len(missing))
        # A sequence that several asked for was scored for the first of them.
        return [[Answer(said[key], missing.pop(key, None) is not None) for key in call.keys] for call in calls]

    def _read(self, key: str) -> TeacherTargets | None:
        return None if self._kept is None else self._kept.get(key)

    def _key(self, sequence: TokenSequence, want: TargetRequest) -> str:
        """Of what decides an answer; a sample's id seeds what is drawn."""
        parts = ("scores 1", self.teacher.digest, want, sequence.prompt_tokens, repr(sequence.sample_id))
        return key_of(*parts, sequence.token_ids.tobytes().hex())
