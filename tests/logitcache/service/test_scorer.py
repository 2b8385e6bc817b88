"""A teacher behind the service: the scorers' contract, whose calls share a pass, and what is kept and counted."""

from __future__ import annotations

import json
import pickle
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.flight as flight
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from logitcache.errors import IdentityError, UserError
from logitcache.records import Head, TeacherTargets, TokenSequence
from logitcache.scorers.hf import HFEngine, load_engine
from logitcache.scoring import HiddenStateRequest, SampledRequest, Scorer, TargetRequest, TopKRequest
from logitcache.service import wire
from logitcache.service.access import Tokens
from logitcache.service.catalogue import Catalogue
from logitcache.service.limits import Limits
from logitcache.service.offer import offer_teacher
from logitcache.service.refusals import from_flight
from logitcache.service.requests import ScoreRequest, parse_score, score_to_bytes
from logitcache.service.scorer import ServedScorer, open_scorer
from logitcache.service.server import CacheServer
from logitcache.service.teachers import Scoring, Teacher
from logitcache.store import DiskCache
from tests.logitcache.scorers.test_engines import (  # the contract suite, with this module's engine
    SAMPLING,
    Kind,
    prompts,  # noqa: F401
    test_a_prompt_without_completion_has_targets_of_zero_rows,  # noqa: F401
    test_kept_mass_and_tail_make_one,  # noqa: F401
    test_padding_rows_of_the_head_are_cut_off,  # noqa: F401
    test_scoring_twice_gives_the_same_bytes,  # noqa: F401
    test_targets_agree_with_the_reference,  # noqa: F401
)
from tests.logitcache.service.test_server import JSON

HIDDEN = [HiddenStateRequest()]
Start = Callable[..., ServedScorer]


@dataclass(kw_only=True, eq=False)
class Watched:
    """A real engine, each of whose passes is noted, and can be held up."""

    engine: Scorer
    passes: list[list[str]] = field(default_factory=list)
    go_on: threading.Event = field(default_factory=threading.Event)

    @property
    def head(self) -> Head:
        return self.engine.head

    def score(
        self, sequences: Sequence[TokenSequence], want: Sequence[TargetRequest]
    ) -> list[tuple[TeacherTargets, ...]]:
        self.passes.append([sequence.sample_id for sequence in sequences])
        self.go_on.wait(10)
        return self.engine.score(sequences, want)


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def kind(request: pytest.FixtureRequest) -> Kind:
    return Kind(name="transformers", dtype=request.param)


@pytest.fixture(scope="module")
def offered(tiny_dir: Path, kind: Kind) -> Teacher:
    return replace(offer_teacher(f"tiny={tiny_dir}", dtype=kind.dtype), scorer=kind.load(tiny_dir))


@pytest.fixture(scope="module")
def rollouts(offered: Teacher, prompts: Any) -> list[TokenSequence]:  # noqa: F811
    scorer: Any = offered.scorer
    rollouts: list[TokenSequence] = scorer.generate(prompts, SAMPLING)
    return rollouts


@pytest.fixture(scope="module")
def engine(offered: Teacher) -> Iterator[ServedScorer]:
    scoring = Scoring(offered)
    server = CacheServer("grpc://127.0.0.1:0", Catalogue([]), teachers=[scoring])
    yield open_scorer(f"grpc://127.0.0.1:{server.port}#tiny")
    server.shutdown()
    scoring.close()


@pytest.fixture
def watched(tiny_dir: Path) -> Watched:
    watched = Watched(engine=load_engine(tiny_dir, dtype="float32"))
    watched.go_on.set()
    return watched


@pytest.fixture
def start(watched: Watched) -> Iterator[Start]:
    """Starts a server of a teacher; what is returned scores with it."""
    running: list[tuple[CacheServer, Scoring]] = []
    head = watched.head
    facts = {
        "name": "tiny",
        "fingerprint": "f",
        "dtype": "float32",
        "stop_ids": [],
        "head": {"arrays": ["weight"], "soft_cap": None, "scale": 1.0, "fingerprint": head.fingerprint},
    }

    def serve(*, limits: Limits = Limits(), tokens: Tokens | None = None, **options: Any) -> ServedScorer:  # noqa: B008
        scoring = Scoring(Teacher(name="tiny", scorer=watched, facts=facts), **options)
        server = CacheServer("grpc://127.0.0.1:0", Catalogue([]), teachers=[scoring], limits=limits, tokens=tokens)
        running.append((server, scoring))
        token = None if tokens is None else "a-token-for-the-teacher"
        return open_scorer(f"grpc://127.0.0.1:{server.port}#tiny", storage_options={"token": token, "patience_s": 2.0})

    yield serve
    for server, scoring in running:
        scoring.close()
        server.shutdown()


@pytest.fixture
def texts(watched: Watched) -> list[TokenSequence]:
    from tests.trainer.conftest import random_sequence

    return [random_sequence(number, 2, 3 + number) for number in range(6)]


def hidden(scored: list[tuple[TeacherTargets, ...]]) -> list[Any]:
    return [targets[0].hidden for targets in scored]  # type: ignore[union-attr]


def same(one: list[Any], other: list[Any]) -> bool:
    return len(one) == len(other) and all(map(np.array_equal, one, other))


def test_its_numbers_are_those_of_the_engine(engine: ServedScorer, offered: Teacher, rollouts: Any) -> None:
    for want in (TopKRequest(max_k=9, min_probability=1e-4), SampledRequest(samples=20), HiddenStateRequest()):
        for (one,), (other,) in zip(
            engine.score(rollouts, [want]), offered.scorer.score(rollouts, [want]), strict=True
        ):
            assert type(one) is type(other)
            assert all(np.array_equal(value, vars(other)[name]) for name, value in vars(one).items())
    assert pickle.loads(pickle.dumps(engine)).head.fingerprint == offered.scorer.head.fingerprint
    local: HFEngine = offered.scorer  # type: ignore[assignment]
    assert engine.stop_ids == local.stop_ids
    assert engine.score([], HIDDEN) == []


GOOD: dict[str, Any] = json.loads(score_to_bytes(ScoreRequest(teacher="tiny", digest="d", want=TopKRequest())))


@pytest.mark.parametrize(
    "change",
    [
        {"want": {"kind": "everything"}},
        {"want": {"kind": "hidden", "layer": 3}},
        {"want": {"kind": "topk", "max_k": 0, "min_probability": 0.0, "mass": 1.0}},
        {"want": {"kind": "topk", "max_k": 8, "min_probability": float("nan"), "mass": 1.0}},
        {"want": {"kind": "topk", "max_k": 8, "min_probability": 0, "mass": True}},
        {"want": {"kind": "sampled", "samples": 1 << 40}},
        {"want": ["hidden"]},
        {"want": None},
        {"teacher": 3},
        {"teacher": None},
        {"path": "x"},
    ],
)
def test_a_request_to_score_is_exactly_one(change: dict[str, Any]) -> None:
    assert parse_score(json.dumps(GOOD).encode()).want == TopKRequest()
    with pytest.raises(UserError, match="a request"):
        parse_score(json.dumps(GOOD | change).encode())


def test_what_is_no_sequences_is_refused(start: Start, texts: list[TokenSequence]) -> None:
    scorer = start()
    client = flight.FlightClient(scorer.connection.location)
    request = score_to_bytes(ScoreRequest(teacher="tiny", digest=scorer_digest(scorer), want=HiddenStateRequest()))

    def refused(batch: pa.RecordBatch | None) -> str:
        writer, reader = client.do_exchange(flight.FlightDescriptor.for_command(request))
        if batch is not None:
            writer.begin(batch.schema)
            writer.write_batch(batch)
        writer.done_writing()
        with pytest.raises((flight.FlightError, pa.ArrowException)) as caught:
            reader.read_all()
        error = from_flight(caught.value)
        assert error is not None, caught.value
        return str(error)

    (good,) = wire.encode_rows(wire.rows_schema(None), range(3), texts[:3])
    token_ids = pa.array([[1], [], [2]], pa.large_list(pa.int32()))
    place = good.schema.get_field_index("token_ids")
    bad = good.set_column(place, good.schema.field(place), token_ids)
    for batch in (None, pa.record_batch({"a": [1]}), bad, good.drop_columns(["token_ids"])):
        assert any(word in refused(batch) for word in ("a request", "a sequence of", "prompt tokens"))
    foreign = replace(texts[0], token_ids=np.array([1, 2, 49_152], np.int32))
    with pytest.raises(UserError, match="beyond the teacher's 49152 tokens"):
        scorer.score([foreign], HIDDEN)
    assert len(scorer.score(texts, HIDDEN)) == 6


NEARLY = st.dictionaries(st.sampled_from([*GOOD, "get"]), JSON, max_size=2).map(lambda change: GOOD | change)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(command=st.binary(max_size=200) | NEARLY.map(lambda fields: json.dumps(fields).encode()))
def test_no_command_does_harm(engine: ServedScorer, command: bytes) -> None:
    client = flight.FlightClient(engine.connection.location)
    writer, reader = client.do_exchange(flight.FlightDescriptor.for_command(command))
    with pytest.raises((flight.FlightError, pa.ArrowException)) as caught:
        reader.read_all()
    assert from_flight(caught.value) is not None
    with suppress(pa.ArrowException):
        writer.close()


def scorer_digest(scorer: ServedScorer) -> str:
    from logitcache.store.envelope import digest_of

    return digest_of(scorer.facts)


def test_it_is_named_checked_and_bounded(start: Start, texts: list[TokenSequence], tmp_path: Path) -> None:
    scorer = start(limits=Limits(answer_bytes=1000))
    url = f"{scorer.connection.location}#tiny"
    with pytest.raises(UserError, match=r"score fewer sequences at once"):
        scorer.score(texts, HIDDEN)
    with pytest.raises(UserError, match="none of that name"):
        open_scorer(url.replace("tiny", "other"))
    with pytest.raises(IdentityError, match="dtype float32 where the cache has bfloat16"):
        open_scorer(url, built_by={"fingerprint": "f", "dtype": "bfloat16"})
    assert open_scorer(url, built_by={"fingerprint": "f", "dtype": "float32"}).facts["name"] == "tiny"
    with pytest.raises(IdentityError, match="another by now"):
        replace(scorer, facts={**scorer.facts, "name": "x"}).score(texts[:1], HIDDEN)
    for bad in ("grpc://127.0.0.1:1", "grpc://127.0.0.1:1/tiny", "grpc://127.0.0.1:1#a#b", "http://127.0.0.1:1#tiny"):
        with pytest.raises(UserError, match="grpc://HOST:PORT#NAME"):
            open_scorer(bad)
    (tmp_path / "tokens").write_text("a-token-for-the-teacher tiny\na-token-for-a-cache cache\n")
    guarded = start(tokens=Tokens.read(tmp_path / "tokens"))
    assert len(guarded.score(texts[:1], HIDDEN)) == 1
    with pytest.raises(UserError, match="none of that name for you"):
        replace(guarded, connection=replace(guarded.connection, token="a-token-for-a-cache")).score(texts[:1], HIDDEN)


def test_students_share_a_pass_and_a_bad_call_spoils_no_other(
    start: Start, watched: Watched, texts: list[TokenSequence]
) -> None:
    scorer = start(gather_s=0.5)
    alone = hidden(watched.engine.score(texts, HIDDEN))
    with ThreadPoolExecutor(3) as pool:
        calls = [pool.submit(scorer.score_counted, some, HIDDEN) for some in (texts[:3], texts[2:5], texts[5:])]
        got = [call.result() for call in calls]
    assert [sorted(some) for some in watched.passes] == [sorted(text.sample_id for text in texts)]
    assert same([state for part in got for state in hidden(part.targets)], [*alone[:3], *alone[2:5], *alone[5:]])
    assert sum(sum(part.passes) for part in got) == 6  # the sequence that two asked for was scored once
    foreign = replace(texts[0], token_ids=np.array([1, 2, 49_152], np.int32))
    with ThreadPoolExecutor(2) as pool:
        bad, good = pool.submit(scorer.score, [foreign], HIDDEN), pool.submit(scorer.score, texts, HIDDEN)
        assert same(hidden(good.result()), alone)
        with pytest.raises(UserError, match="beyond the teacher's"):
            bad.result()


def test_each_has_its_own_pass_where_nothing_is_gathered(
    start: Start, watched: Watched, texts: list[TokenSequence]
) -> None:
    scorer = start(gather_s=0)
    watched.go_on.clear()
    with ThreadPoolExecutor(3) as pool:
        calls = [pool.submit(scorer.score, [text], HIDDEN) for text in texts[:3]]
        watched.go_on.set()
        assert all(call.result() for call in calls)
    assert [len(some) for some in watched.passes] == [1, 1, 1]


def test_what_is_kept_is_read_and_what_is_damaged_scored_again(
    start: Start, watched: Watched, texts: list[TokenSequence], tmp_path: Path
) -> None:
    cache = DiskCache(folder=str(tmp_path), max_bytes=1 << 20)
    first = start(cache=cache).score_counted(texts[:4], HIDDEN)
    assert first.passes == [1] * 4
    scorer = start(cache=cache)  # a server that was started again
    again = scorer.score_counted(texts, HIDDEN)
    assert again.passes == [0, 0, 0, 0, 1, 1]
    assert same(hidden(again.targets)[:4], hidden(first.targets))
    assert scorer.score_counted(texts, [TopKRequest(max_k=3)]).passes == [1] * 6
    assert len(watched.passes) == 3
    for file in tmp_path.rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[:-1])
    healed = scorer.score_counted(texts, HIDDEN)
    assert healed.passes == [1] * 6
    assert same(hidden(healed.targets), hidden(watched.engine.score(texts, HIDDEN)))


def test_a_folder_that_cannot_be_written_keeps_nobody_waiting(
    start: Start, texts: list[TokenSequence], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    scorer = start(cache=DiskCache(folder=str(tmp_path / "file" / "folder"), max_bytes=1 << 20))
    assert len(scorer.score(texts, HIDDEN)) == 6
    assert "not kept" in caplog.text


def test_a_busy_teacher_sends_away_in_time_and_forgets_who_is_gone(
    start: Start, watched: Watched, texts: list[TokenSequence]
) -> None:
    scorer = start(limits=Limits(streams=1, queue_s=0.2, stream_s=0.5), gather_s=0)
    watched.go_on.clear()
    impatient = replace(scorer, connection=replace(scorer.connection, patience_s=0.3))
    with pytest.raises(UserError, match="longer than the server allows"):
        impatient.score(texts[:1], HIDDEN)
    watched.go_on.set()
    assert len(scorer.score(texts, HIDDEN)) == 6


def test_uploads_wait_for_their_turn_and_end_in_time(start: Start, texts: list[TokenSequence]) -> None:
    """Who opens many calls and sends little holds as many as there are turns; who sends for too long is sent away."""
    scorer = start(limits=Limits(streams=1, queue=2, queue_s=0.2, stream_s=0.5))
    client = flight.FlightClient(scorer.connection.location)
    request = score_to_bytes(ScoreRequest(teacher="tiny", digest=scorer_digest(scorer), want=HiddenStateRequest()))
    (batch,) = wire.encode_rows(wire.rows_schema(None), range(3), texts[:3])
    calls = [client.do_exchange(flight.FlightDescriptor.for_command(request)) for _ in range(6)]

    def ends(writer: Any, reader: Any) -> str:
        with suppress(pa.ArrowException):
            writer.begin(batch.schema)
            for _ in range(20):
                writer.write_batch(batch)
                time.sleep(0.05)
        with pytest.raises(flight.FlightError) as caught:
            reader.read_chunk()
        with suppress(pa.ArrowException):
            writer.close()
        return str(from_flight(caught.value))

    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda call: ends(*call), calls))
    assert sorted("busy" in line for line in found) == [False, *[True] * 5]
    assert sum("longer than the server allows" in line for line in found) == 1
    assert len(scorer.score(texts, HIDDEN)) == 6
