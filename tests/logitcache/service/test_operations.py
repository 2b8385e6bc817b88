"""Running it: what is sealed meanwhile, metrics and health, several servers, and rows kept on a client's disk."""

from __future__ import annotations

import json
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.flight as flight
import pytest
import s3fs

from logitcache.cli import app
from logitcache.errors import IdentityError, UserError
from logitcache.service.access import Tokens
from logitcache.service.catalogue import Catalogue
from logitcache.service.load import run_load
from logitcache.service.metrics import Metrics, metrics_at
from logitcache.service.requests import RowsRequest, to_bytes
from logitcache.service.server import CacheServer
from logitcache.service.settings import Load
from logitcache.store import DiskCache, open_cache
from tests.logitcache.service.conftest import Service
from tests.logitcache.service.test_reader import same
from tests.logitcache.store.conftest import World
from tests.logitcache.store.plain_codecs import counting_codec
from tools.bench.loopback import s3

Serve = Callable[[Catalogue], str]


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Starts a server of a catalogue; its address."""
    servers: list[CacheServer] = []

    def start(catalogue: Catalogue) -> str:
        servers.append(CacheServer("grpc://127.0.0.1:0", catalogue))
        return f"grpc://127.0.0.1:{servers[-1].port}"

    yield start
    for server in servers:
        server.shutdown()


def opened(url: str, **options: Any) -> Any:
    return open_cache(url, targets="topk", codec_factory=counting_codec, storage_options={"patience_s": 5.0, **options})


def test_a_cache_that_is_sealed_anew_is_taken_up_and_the_old_one_goes_on(
    world: World, tmp_path: Path, serve: Serve
) -> None:
    place = str(tmp_path / "cache")
    world.build(place, units=1)
    catalogue = Catalogue([place], codec_factory=counting_codec)
    location = serve(catalogue)
    before = opened(f"{location}/cache")
    indices = list(range(len(before))) * 200
    request = RowsRequest(cache="cache", manifest=str(before.manifest.digest), tier="topk", indices=tuple(indices))
    stream = flight.FlightClient(location).do_get(flight.Ticket(to_bytes(request)))
    rows = stream.read_chunk().data.num_rows
    assert catalogue.refresh() == []
    world.build(place, units=3)
    assert catalogue.refresh() == ["cache"]
    after = opened(f"{location}/cache")
    assert len(after) == 3 * len(before)
    assert rows + sum(chunk.data.num_rows for chunk in stream) == len(indices)
    assert all(map(same, before.read(range(6)), after.read(range(6))))
    Path(place, "manifest.json").write_bytes(b"{}")
    assert catalogue.refresh() == []
    assert len(after.read([0])) == 1


def test_what_was_there_long_ago_is_let_go(
    world: World, tmp_path: Path, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("logitcache.service.catalogue.CONTENTS", 2)
    place = str(tmp_path / "cache")
    world.build(place, units=1)
    catalogue = Catalogue([place], codec_factory=counting_codec)
    first = opened(f"{serve(catalogue)}/cache")
    for units in (2, 3):
        assert len(first.read([0])) == 1
        world.build(place, units=units)
        assert catalogue.refresh() == ["cache"]
    with pytest.raises(IdentityError, match="open it again"):
        first.read([0])


def test_caches_of_a_folder_are_found(place: str, tmp_path: Path, serve: Serve) -> None:
    (tmp_path / "unsealed").mkdir()
    (tmp_path / "note.txt").write_text("")
    catalogue = Catalogue([f"{tmp_path}/*"], codec_factory=counting_codec)
    location = serve(catalogue)
    assert list(catalogue) == []
    shutil.copytree(place, tmp_path / "late")
    assert catalogue.refresh() == ["late"]
    assert len(opened(f"{location}/late").read([3])) == 1
    with pytest.raises(UserError, match="none of that name"):
        opened(f"{location}/unsealed")


def test_a_bucket_is_looked_into_anew_and_its_absence_ends_nothing(
    place: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with s3() as (_, options):
        endpoint = options["client_kwargs"]["endpoint_url"]
        for name, value in (("ACCESS_KEY_ID", "test"), ("SECRET_ACCESS_KEY", "test"), ("ENDPOINT_URL", endpoint)):
            monkeypatch.setenv(f"AWS_{name}", value)
        monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
        elsewhere = s3fs.S3FileSystem(skip_instance_cache=True, use_listings_cache=False)
        elsewhere.put(f"{place}/", "caches/folder/one/", recursive=True)
        catalogue = Catalogue(["s3://caches/folder/*"], codec_factory=counting_codec)
        elsewhere.put(f"{place}/", "caches/folder/two/", recursive=True)
        assert catalogue.refresh() == ["two"]
        catalogue._contents.pop("two")  # what is served is read with retries, which take their time
        catalogue._contents.pop("one")
    assert catalogue.refresh() == []
    assert "not taken up" in caplog.text
    assert catalogue.refresh() == []
    assert caplog.text.count("not taken up") == 1


def test_a_teacher_keeps_its_name(place: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    catalogue = Catalogue([f"{tmp_path}/*"], codec_factory=counting_codec)
    catalogue.reserve(["teacher"])
    shutil.copytree(place, tmp_path / "teacher")
    shutil.copytree(place, tmp_path / "cache")
    assert catalogue.refresh() == ["cache"]
    assert catalogue.refresh() == []
    assert ["a teacher has its name" in getattr(record, "error", "") for record in caplog.records] == [True]
    for names in (["cache"], ["other", "other"]):
        with pytest.raises(UserError, match="that name is taken"):
            catalogue.reserve(names)


def test_who_is_not_let_in_is_counted_and_in_the_log(
    place: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "tokens").write_text("a-token-for-everything *\n")
    metrics, tokens = Metrics(), Tokens.read(tmp_path / "tokens")
    server = CacheServer("grpc://127.0.0.1:0", Catalogue([place]), metrics=metrics, tokens=tokens)
    caplog.set_level("INFO", "logitcache.service")
    with pytest.raises(UserError, match="no token that it knows"):
        opened(f"grpc://127.0.0.1:{server.port}/cache", token="a-token-that-is-wrong")
    assert (
        metrics.registry.get_sample_value("logitcache_requests_total", {"call": "do_action", "outcome": "refused"}) == 1
    )
    told = [(record.message, getattr(record, "request", "")) for record in caplog.records]
    assert told == [("refused", "do_action")]
    assert "a-token" not in str([vars(record) for record in caplog.records])
    server.shutdown()


def test_metrics_and_health(place: str) -> None:
    metrics, draining = Metrics(), [False]
    server = CacheServer("grpc://127.0.0.1:0", Catalogue([place], codec_factory=counting_codec), metrics=metrics)
    with metrics_at("127.0.0.1:0", metrics, lambda: draining[0]) as address:
        reader = opened(f"grpc://127.0.0.1:{server.port}/cache")
        reader.read([0, 1])
        with pytest.raises(UserError):
            opened(f"grpc://127.0.0.1:{server.port}/secret-name")
        sent = 'logitcache_requests_total{call="stream",outcome="ok"} 2.0'  # rows, and an array of the codec
        until = time.monotonic() + 5
        while sent not in (text := _get(f"http://{address}/metrics")):  # counted just after its last row
            assert time.monotonic() < until, text
        assert 'logitcache_requests_total{call="do_action",outcome="refused"} 1.0' in text
        assert 'logitcache_turns{call="do_get",state="taken"} 0.0' in text
        assert "secret-name" not in text
        assert place not in text
        assert _get(f"http://{address}/healthz") == "serving\n"
        draining[0] = True
        for path, code in (("healthz", 503), ("", 404)):
            with pytest.raises(urllib.error.HTTPError) as caught:
                _get(f"http://{address}/{path}")
            assert caught.value.code == code
        with pytest.raises(UserError, match="metrics at"), metrics_at(address, metrics, lambda: False):
            pass
    server.shutdown()


def _get(url: str) -> str:
    with urllib.request.urlopen(url, timeout=5) as answer:
        return str(answer.read().decode())


def test_another_server_goes_on_where_one_fails(place: str, free_port: int, service: Service) -> None:
    dead, alive = f"127.0.0.1:{free_port}", service.location.removeprefix("grpc://")
    reader = opened(f"grpc://{dead},{alive}/cache")
    local = service.local("topk")
    assert all(map(same, reader.read(range(18)), local.read(range(18))))
    with pytest.raises(UserError, match=f"{dead} or grpc://{dead}"):
        opened(f"grpc://{dead},{dead}/cache", patience_s=0.3)
    for bad in ("grpc://a:1,/cache", "grpc://,a:1/cache", "grpc://a:1, b:2/cache"):
        with pytest.raises(UserError, match="grpc://HOST:PORT/NAME"):
            opened(bad)


@pytest.mark.parametrize("decoded", [False, True])
def test_rows_are_kept_on_disk(service: Service, tmp_path: Path, decoded: bool) -> None:
    cache = DiskCache(folder=str(tmp_path), max_bytes=8 << 20)
    window = {"first_completion_token": 1, "max_completion_tokens": 30}
    local = service.local("topk")
    first = service.remote("topk", decoded=decoded, disk_cache=cache)
    assert all(map(same, first.read([4, 0, 4, 9], **window), local.read([4, 0, 4, 9], **window)))
    first.connection.ask(lambda client, options: None)
    gone = service.remote("topk", decoded=decoded, disk_cache=cache, patience_s=0.2)
    assert gone.head is None
    object.__setattr__(gone.connection, "locations", ("grpc://127.0.0.1:1",))
    gone.connection._clients.clear()
    assert all(map(same, gone.read([9, 4], **window), local.read([9, 4], **window)))
    with pytest.raises(UserError, match="no answer"):
        gone.read([9, 4])  # another window
    for file in tmp_path.rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[:-1] + b"?")
    again = service.remote("topk", decoded=decoded, disk_cache=cache)
    assert all(map(same, again.read([9, 4], **window), local.read([9, 4], **window)))


def test_a_disk_that_cannot_keep_stops_no_read(
    service: Service, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    expected = service.local("topk").read(range(4))
    for folder in (tmp_path / "file", tmp_path / "file" / "folder", Path("/proc/nothing")):
        caplog.clear()
        reader = service.remote("topk", disk_cache=DiskCache(folder=str(folder), max_bytes=1 << 20))
        assert all(map(same, reader.read(range(4)), expected))
        assert caplog.text.count("nothing is kept on disk") == 1
    reader = service.remote("topk", disk_cache=DiskCache(folder=str(tmp_path / "kept"), max_bytes=1 << 20))
    reader.read(range(4))
    for kept in [path for path in (tmp_path / "kept").rglob("*") if path.is_file()]:
        kept.unlink()
        kept.mkdir()
    assert all(map(same, reader.read(range(4)), expected))


def test_the_environment_names_a_disk_cache(
    service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, world: World
) -> None:
    kept = tmp_path / "kept"
    monkeypatch.setenv("LOGITCACHE_DISK_CACHE", str(kept))
    service.local("topk").read([0])
    assert not kept.exists()
    service.remote("topk").read([0, 1])
    served = sum(path.is_file() for path in kept.rglob("*"))
    assert served == 2
    world.build("memory://in-the-environment", units=1)
    open_cache("memory://in-the-environment", targets="topk", codec_factory=counting_codec).read([0])
    assert sum(path.is_file() for path in kept.rglob("*")) > served
    for size in ("much", "nan", "inf", "0"):
        monkeypatch.setenv("LOGITCACHE_DISK_CACHE_GB", size)
        with pytest.raises(UserError, match=r"LOGITCACHE_DISK_CACHE_GB|a disk cache"):
            service.remote(None)


@pytest.mark.parametrize("command", ["info", "verify", "seal"])
def test_a_served_cache_is_managed_where_it_lies(command: str) -> None:
    with pytest.raises(UserError, match="give the URL where the cache itself lies"):
        app([command, "grpc://127.0.0.1:1/cache"], result_action="return_value")


def test_a_load_counts_what_it_read_and_what_failed(service: Service, capsys: pytest.CaptureFixture[str]) -> None:
    for bad in ({"clients": 0}, {"seconds": 0.0}, {"pause_s": -1.0}):
        with pytest.raises(UserError, match="--"):
            Load(**bad)
    with pytest.raises(UserError, match="none of that name"):
        run_load(f"{service.location}/nothing", Load(clients=2))
    url = f"{service.location}/cache"
    assert app(["bench-serve", url, "--clients", "3", "--seconds", "0.3", "--json"], result_action="return_value") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["clients_served"] == 3
    assert found["errors"] == 0
    assert found["tokens_per_s"] > 0
    assert 0 < found["wait_p50_s"] <= found["wait_p99_s"]
