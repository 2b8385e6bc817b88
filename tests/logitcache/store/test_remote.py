"""Object stores: a real S3 server on loopback, plain http, and what they do on a bad day."""

from __future__ import annotations

import multiprocessing
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from logitcache.codecs import codec_from_config
from logitcache.errors import DamagedError, IdentityError, UserError
from logitcache.store import DiskCache, Reader, create, remote, verify
from logitcache.store.disk_cache import key_of
from logitcache.store.place import ByteRange, open_place, redact
from tests.logitcache.store.conftest import World
from tests.logitcache.store.plain_codecs import plain_codec
from tools.bench.loopback import Answer, Gate, HalfBody, files, s3, serve

URL = "s3://caches/a/cache"
Server = tuple[Gate, dict[str, Any]]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """An S3 server that holds one sealed cache at `URL`."""
    with s3() as (gate, options):
        World().build(URL, units=2, storage_options=options)
        yield gate, options


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "FIRST_WAIT_S", 0.01)


def hidden_of(reader: Reader) -> list[Any]:
    return [item.targets.hidden for item in reader.read(range(len(reader)))]


def expected(world: World) -> list[Any]:
    return [item.hidden for n in range(2) for item in world.hidden_targets(n)]


def equal(one: list[Any], other: list[Any]) -> bool:
    return len(one) == len(other) and all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def test_a_cache_on_s3_has_the_bytes_of_a_local_one(world, server, tmp_path, objects_of):
    world.build(str(tmp_path), units=2)
    place = open_place(URL, server[1])
    assert {name: place.read(name) for name, _ in place.sizes("")} == objects_of(str(tmp_path))
    assert equal(hidden_of(world.open(URL, targets="hidden", storage_options=server[1])), expected(world))
    report = verify(URL, deep=True, storage_options=server[1])
    assert report.sound
    assert report.parts == 6


def test_requests_of_a_warm_reader_are_one_an_array(world, server):
    gate, options = server
    for tier, arrays in (("hidden", 2), ("topk", 5)):
        reader = world.open(URL, targets=tier, storage_options=options)
        reader.read([4])
        gate.log.clear()
        reader.read([4])
        assert len(gate.log) == arrays
        assert all(line.startswith("GET") for line in gate.log)


def test_s3_that_answers_500_503_and_half_a_body_is_asked_again(world, server):
    gate, options = server
    gate.faulty = "/c/"
    reader = world.open(URL, targets="hidden", storage_options=options)
    reader.read([0])
    gate.faults[:] = [
        Answer(status="500 Internal Server Error"),
        Answer(status="503 Slow Down"),
        HalfBody(),
        HalfBody(),
    ]
    assert equal(hidden_of(reader), expected(world))
    assert not gate.faults


def test_http_that_stays_broken_is_an_error_not_data(world, tmp_path):
    world.build(str(tmp_path), units=2)
    with serve(files(tmp_path)) as (gate, url):
        reader = world.open(url, targets="hidden")
        assert equal(hidden_of(reader), expected(world))
        gate.faulty = "/c/"
        gate.faults[:] = [HalfBody(), Answer(status="500 Oops")]
        assert equal(hidden_of(reader), expected(world))
        gate.faults[:] = [Answer(status="503 Busy")] * 50
        with pytest.raises(UserError, match=r"503.*after 5 attempts.*check the network"):
            reader.read([0])
        gate.faults[:] = [Answer(status="403 Forbidden")] * 50
        with pytest.raises(UserError):
            reader.read([0])


def test_http_is_read_only_and_names_what_is_missing_or_short(world, tmp_path):
    world.build(str(tmp_path), units=2)
    shard = tmp_path / "targets/hidden/000001/states/c/0/0"
    whole = shard.read_bytes()
    with serve(files(tmp_path)) as (_, url):
        with pytest.raises(UserError):
            create(url + "/new", {"a": 1})
        with pytest.raises(UserError, match="cannot be listed"):
            verify(url)
        shard.write_bytes(whole[:100])
        with pytest.raises(DamagedError, match=r"000001/states/c/0/0.*shorter"):
            hidden_of(world.open(url, targets="hidden"))
        shard.unlink()
        with pytest.raises(DamagedError, match=r"000001/states/c/0/0.*missing"):
            hidden_of(world.open(url, targets="hidden"))
        with pytest.raises(UserError, match="no identity"):
            world.open(url + "/elsewhere", targets=None)


def test_a_server_without_ranges_is_an_error(world, tmp_path):
    world.build(str(tmp_path), units=1)
    application = files(tmp_path)

    def whole(environ: dict[str, Any], start: Any) -> Any:
        if "/c/" in environ["PATH_INFO"]:
            environ.pop("HTTP_RANGE", None)
        return application(environ, start)

    with serve(whole) as (_, url), pytest.raises(UserError, match="does not honour byte ranges"):
        world.open(url, targets="hidden").read([4], max_completion_tokens=3)


def test_two_builds_into_one_place(world, server):
    options = server[1]
    create("s3://caches/two", {"tokenizer": {"fingerprint": "a"}}, storage_options=options)
    with pytest.raises(IdentityError, match=r"tokenizer.fingerprint"):
        create("s3://caches/two", {"tokenizer": {"fingerprint": "b"}}, storage_options=options)
    assert not open_place("s3://caches/two", options).create("identity.json", b"x")


SCRIPT = """
import pickle, sys
reader = pickle.load(sys.stdin.buffer)
print(sum(int(s.token_ids.sum()) for s in reader.read_tokens(range(len(reader)))))
"""


def test_a_reader_reopens_in_another_process(world, server):
    reader = world.open(URL, targets=None, storage_options=server[1], codec_factory=codec_from_config)
    done = subprocess.run([sys.executable, "-c", SCRIPT], input=pickle.dumps(reader), capture_output=True, check=True)
    assert int(done.stdout) == sum(int(s.token_ids.sum()) for n in range(2) for s in world.sequences(n))


def forked_child(reader: Reader, queue: Any) -> None:
    queue.put(hidden_of(reader))


def test_a_forked_child_uses_its_parents_reader(world, server):
    reader = world.open(URL, targets="hidden", storage_options=server[1])
    hidden_of(reader)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    worker = context.Process(target=forked_child, args=(reader, queue))
    worker.start()
    try:
        assert equal(queue.get(timeout=60), expected(world))
    finally:
        worker.join(10)
        worker.kill()


def test_a_disk_cache_saves_requests_stays_bounded_and_heals(world, server, tmp_path):
    gate, options = server
    cache = DiskCache(folder=str(tmp_path / "kept"), max_bytes=1 << 20)

    def fresh() -> Reader:
        return world.open(URL, targets="hidden", storage_options=options, disk_cache=cache)

    assert equal(hidden_of(fresh()), expected(world))
    gate.log.clear()
    assert equal(hidden_of(pickle.loads(pickle.dumps(fresh()))), expected(world))
    assert not [line for line in gate.log if "/c/" in line]
    for file in Path(cache.folder).rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[:-1] + b"?")
    assert equal(hidden_of(fresh()), expected(world))
    rng = np.random.default_rng(0)
    for i in range(60):
        cache.put(key_of("made up", i), rng.bytes(50_000))
    total = sum(path.stat().st_size for path in Path(cache.folder).rglob("*") if path.is_file())
    assert total <= cache.max_bytes * 1.05


def test_a_damaged_reply_is_not_kept_beyond_the_read_that_met_it(world, server, tmp_path):
    options, name = server[1], "targets/hidden/000001/states/c/0/0"
    place, cache = open_place(URL, options), DiskCache(folder=str(tmp_path / "kept"), max_bytes=1 << 24)
    reader = world.open(URL, targets="hidden", storage_options=options, disk_cache=cache)
    sound = place.read(name)
    try:
        place.write({name: bytes([sound[0], sound[1] ^ 1]) + sound[2:]})
        for _ in range(2):
            with pytest.raises(DamagedError, match=r"000001/states.*checksum"):
                hidden_of(reader)
    finally:
        place.write({name: sound})
    assert equal(hidden_of(reader), expected(world))
    server[0].log.clear()
    assert equal(hidden_of(reader), expected(world))
    assert not server[0].log  # the sound bytes are kept


def test_a_disk_cache_that_cannot_be_written_costs_a_warning_and_no_read(world, server, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    cache = DiskCache(folder=str(tmp_path / "file" / "kept"), max_bytes=1 << 20)
    reader = world.open(URL, targets="hidden", storage_options=server[1], disk_cache=cache)
    for _ in range(2):
        assert equal(hidden_of(reader), expected(world))
    (warning,) = [record.getMessage() for record in caplog.records if record.name == "logitcache.store"]
    assert warning.startswith(f"nothing is kept on disk: keep what was read in {cache.folder}")


def test_credentials_are_never_shown(world):
    url = "http://me:hunter2@127.0.0.1:1/cache?X-Amz-Signature=abc"
    with pytest.raises(UserError) as raised:
        world.open(url, targets=None)
    assert "hunter2" not in str(raised.value)
    assert "abc" not in str(raised.value)
    assert redact("a 'http://h/x?sig=1' b") == "a 'http://h/x?...' b"


def test_a_store_that_asks_for_credentials_that_nobody_set_is_asked_once(server, tmp_path, monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(remote, "FIRST_WAIT_S", 60)
    place = open_place(URL, {"client_kwargs": server[1]["client_kwargs"]})
    for ask in (
        lambda: place.read("identity.json"),
        lambda: place.read_ranges([ByteRange("identity.json", 0, 1)]),
        lambda: place.write({"x": b"1"}),
        lambda: place.create("x", b"1"),
        lambda: list(place.sizes("")),
    ):
        with pytest.raises(UserError, match=f"reach {URL}: Unable to locate credentials; set your credentials"):
            ask()


def test_an_unknown_protocol_is_one_line():
    with pytest.raises(UserError, match="Protocol not known"):
        create("zzz://x", {"a": 1}, codec_factory=plain_codec)
