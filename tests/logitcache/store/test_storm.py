"""An object store on its worst days while a cache is built: what is refused, lost or cut short is asked for again."""

from __future__ import annotations

import random
import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from logitcache.errors import UserError
from logitcache.store import remote, verify
from logitcache.store.local import LocalPlace
from logitcache.store.place import Place, open_place
from tests.logitcache.store.test_crash import SMALL, build
from tools.bench.loopback import Application, Gate, Start, s3


@dataclass(kw_only=True)
class Storm:
    """A proxy that spoils requests: refuses some, carries some out and loses the reply, cuts some replies in half.

    Attributes:
        application: the real server.
        rate: of requests that are spoiled; the same request at most `most` times, so that five tries are enough.
        kinds: of spoiling, one of which is drawn.
        out_after: requests answered before everything is refused; None for a server that stays.
    """

    application: Application
    rate: float = 0.0
    most: int = 0
    kinds: tuple[str, ...] = ("refuse", "lose", "half")
    out_after: int | None = None
    draw: random.Random = field(default_factory=lambda: random.Random(0))
    spoiled: Counter[str] = field(default_factory=Counter)
    seen: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __call__(self, environ: dict[str, Any], start: Start) -> Iterable[bytes]:
        how = self._how(f"{environ['REQUEST_METHOD']} {environ['PATH_INFO']}")
        if how == "refuse":
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        elif how == "lose":
            b"".join(self.application(environ, lambda *_: None))
        elif how == "half":
            body = b"".join(self.application(environ, start))
            return [body[: len(body) // 2]]
        else:
            return self.application(environ, start)
        start("503 Slow Down" if how == "refuse" else "500 Internal Server Error", [("Content-Length", "0")])
        return [b""]

    def _how(self, request: str) -> str | None:
        with self.lock:
            self.seen += 1
            if self.out_after is not None and self.seen > self.out_after:
                return "refuse"
            if self.draw.random() >= self.rate or self.spoiled[request] >= self.most:
                return None
            self.spoiled[request] += 1
            return self.draw.choice(self.kinds)


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[Gate, dict[str, Any]]]:
    with s3() as (gate, options):
        # botocore's own tries wait for seconds; those of this package are what is tested
        yield gate, {**options, "config_kwargs": {"retries": {"max_attempts": 0}}}


@pytest.fixture
def storm(server: tuple[Gate, dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> Storm:
    monkeypatch.setattr(remote, "FIRST_WAIT_S", 0.01)
    storm = Storm(application=server[0].application)
    monkeypatch.setattr(server[0], "application", storm)
    return storm


def contents(place: Place) -> dict[str, bytes]:
    return {name: place.read(name) for name, _ in place.sizes("")}


@pytest.fixture(scope="module")
def want(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The objects of a cache built in peace."""
    folder = str(tmp_path_factory.mktemp("peace") / "cache")
    build(SMALL.start(folder))
    return contents(LocalPlace(root=folder))


@pytest.mark.parametrize(("rate", "most"), [(0.3, 3), (1.0, 1)])
def test_a_build_through_a_storm_ends_in_the_same_bytes(storm, server, want, rate, most):
    storm.rate, storm.most = rate, most
    url, options = f"s3://caches/storm-{most}", server[1]
    build(SMALL.start(url, storage_options=options))
    reader = SMALL.open(url, targets="hidden", storage_options=options)
    assert len(reader.read(range(len(reader)))) == 2 * len(SMALL.lengths)
    assert {request.split()[0] for request in storm.spoiled} >= {"PUT", "GET"}
    assert sum(storm.spoiled.values()) > 20
    storm.rate = 0.0
    assert contents(open_place(url, options)) == want


def test_a_store_that_goes_away_is_an_error_and_the_build_goes_on_once_it_is_back(storm, server, want):
    url, options = "s3://caches/away", server[1]
    for answered in (0, 3, 12, 30, 60):
        storm.seen, storm.out_after = 0, answered
        with pytest.raises(UserError, match=r"Service Unavailable after 5 attempts; check the network"):
            build(SMALL.start(url, storage_options=options))
        storm.out_after = None
        if answered > 3:
            assert verify(url, deep=True, storage_options=options).sound
    build(SMALL.start(url, storage_options=options))
    assert contents(open_place(url, options)) == want


@pytest.mark.parametrize("kind", ["refuse", "lose", "half"])
def test_an_object_is_created_once_whatever_becomes_of_the_reply(storm, server, kind):
    storm.rate, storm.most, storm.kinds = 1.0, 2, (kind,)
    place = open_place(f"s3://caches/create-{kind}", server[1])
    place.create("x", b"first")  # False if its own reply got lost: whoever asked reads what is there
    assert place.read("x") == b"first"
    assert not place.create("x", b"second")
    assert place.read("x") == b"first"


def test_a_bucket_that_is_not_there_is_one_line(server):
    with pytest.raises(
        UserError, match=r"write identity.json in s3://nowhere/cache: The specified bucket does not exist"
    ):
        SMALL.start("s3://nowhere/cache", storage_options=server[1])
    with pytest.raises(UserError, match=r"write x in s3://nowhere: The specified bucket does not exist"):
        open_place("s3://nowhere", server[1]).write({"x": b"1"})
