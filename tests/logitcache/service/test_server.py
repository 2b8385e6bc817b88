"""The server's side: the catalogue, who may read, limits, and whatever bytes a stranger sends."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.flight as flight
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from logitcache.errors import DamagedError, UserError
from logitcache.service.access import Tokens
from logitcache.service.catalogue import Catalogue
from logitcache.service.limits import Limits, Turns
from logitcache.service.refusals import Refusal, from_flight
from logitcache.service.requests import MAX_REQUEST_BYTES, RowsRequest, parse_request, to_bytes
from logitcache.service.run import run_server
from logitcache.service.server import CacheServer
from logitcache.service.settings import Service as Settings
from logitcache.store import open_cache
from tests.logitcache.service.conftest import Service, Start
from tests.logitcache.store.plain_codecs import counting_codec, plain_codec

ALL, ONE = "a-token-for-everything", "a-token-for-other-alone"
ROWS: dict[str, Any] = {
    "get": "rows",
    "cache": "cache",
    "manifest": "m",
    "tier": "topk",
    "indices": [0],
    "first": 0,
    "limit": None,
    "encoded": False,
}


@pytest.fixture
def token_file(tmp_path: Path) -> Path:
    path = tmp_path / "tokens"
    path.write_text(f"# who\n{ALL} *\n\n{ONE} other  # one\n")
    return path


def client(service: Service) -> flight.FlightClient:
    return flight.FlightClient(service.location)


def refusal(call: Any) -> UserError:
    """What a call is refused with; it must say nothing of the server's insides."""
    with pytest.raises((flight.FlightError, pa.ArrowException)) as caught:
        call()
    assert "Traceback" not in str(caught.value)
    assert ".py" not in str(caught.value)
    error = from_flight(caught.value)
    assert error is not None, caught.value
    return error


def test_the_catalogue_says_what_there_is(service: Service) -> None:
    local = service.local("hidden")
    infos = list(client(service).list_flights())
    assert [tuple(info.descriptor.path) for info in infos] == [
        (name, *tier) for name in (b"cache", b"other") for tier in ((), (b"hidden",), (b"topk",))
    ]
    info = client(service).get_flight_info(flight.FlightDescriptor.for_path("cache", "hidden"))
    assert info.total_records == len(local)
    facts = json.loads(info.app_metadata)
    assert facts["manifest"] == local.manifest.digest
    assert facts["identity"] == local.manifest.identity
    assert facts["kind"] == "hidden"
    assert facts["completion_tokens"] == local.manifest.totals["completion_tokens"]
    assert info.schema.field("hidden").type == pa.large_list(pa.list_(pa.uint16(), 6))
    assert client(service).get_schema(flight.FlightDescriptor.for_path("cache", "hidden")).schema == info.schema


def test_any_flight_client_reads_it(service: Service) -> None:
    request = RowsRequest(
        cache="cache", manifest=str(service.local(None).manifest.digest), tier="topk", indices=(4, 0), limit=3
    )
    table = client(service).do_get(flight.Ticket(to_bytes(request))).read_all()
    assert table["index"].to_pylist() == [4, 0]
    assert table["completion_tokens"].to_pylist() == [3, 3]
    assert table["sample_id"][1].as_py() == service.local(None).read_tokens([0])[0].sample_id
    for path in (("cache",), ("cache", "hidden")):
        info = client(service).get_flight_info(flight.FlightDescriptor.for_path(*path))
        whole = client(service).do_get(info.endpoints[0].ticket).read_all()
        assert whole.schema == info.schema
        assert whole["index"].to_pylist() == list(range(18))


def test_all_is_asked_for_by_name() -> None:
    for change in ({"cache": "\ud800"}, {"tier": 3}, {"manifest": None}, {"indices": [0]}):
        with pytest.raises(UserError, match="a request"):
            parse_request(json.dumps({"get": "all", "cache": "c", "manifest": "m", "tier": None} | change).encode())


def test_health(service: Service) -> None:
    (result,) = client(service).do_action(flight.Action("health", b""))
    assert json.loads(result.body.to_pybytes()) == {"status": "serving"}


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"get": "file"}, "get is not one of"),
        ({"get": ["rows"]}, "get is not one of"),
        ({"path": "/etc/passwd"}, "takes exactly"),
        ({"cache": None}, "cache is missing"),
        ({"cache": 1}, "cache is not a name"),
        ({"manifest": None}, "manifest is missing"),
        ({"tier": ["topk"]}, "tier is not a name"),
        ({"cache": "\ud800"}, "cache is not a name"),
        ({"tier": "top\udcffk"}, "tier is not a name"),
        ({"indices": 3}, "not a list"),
        ({"indices": [True]}, "not a list"),
        ({"indices": [-1]}, "not a list"),
        ({"indices": [0.5]}, "not a list"),
        ({"indices": [1 << 62]}, "not a list"),
        ({"indices": [0] * ((1 << 16) + 1)}, "not a list"),
        ({"first": -1}, "not counts"),
        ({"limit": "3"}, "not counts"),
        ({"encoded": 1}, "not true or false"),
    ],
)
def test_a_request_is_exactly_one(change: dict[str, Any], found: str) -> None:
    parse_request(json.dumps(ROWS).encode())
    with pytest.raises(UserError, match=found):
        parse_request(json.dumps(ROWS | change).encode())


@pytest.mark.parametrize(
    "data", [b"", b"\xff", b"[]", b"1" * 5000, b"[" * 100_000, b'{"get":NaN}', b" " * (MAX_REQUEST_BYTES + 1)]
)
def test_what_is_no_request_is_refused(data: bytes) -> None:
    with pytest.raises(UserError, match="a request"):
        parse_request(data)


def test_requests_for_what_is_not_there(service: Service) -> None:
    server, digest = client(service), service.local(None).manifest.digest
    for change, found in [
        ({"cache": "../cache"}, "none of that name"),
        ({"manifest": "0"}, "another content"),
        ({"tier": "full"}, "it has hidden, topk"),
        ({"indices": [18]}, "18 is asked for"),
    ]:
        ticket = flight.Ticket(json.dumps(ROWS | {"manifest": digest} | change).encode())
        assert found in str(refusal(lambda ticket=ticket: server.do_get(ticket).read_all()))
    shared = {"get": "shared", "cache": "cache", "manifest": digest, "tier": "topk", "array": "rows"}
    assert "no such array" in str(refusal(lambda: server.do_get(flight.Ticket(json.dumps(shared).encode())).read_all()))
    for path in ((), ("nothing",), ("cache", "full"), ("cache", "topk", "x")):
        refusal(lambda path=path: server.get_flight_info(flight.FlightDescriptor.for_path(*path)))
    for kind, body in (
        ("stop", b""),
        ("cache", b"{}"),
        ("cache", b'{"cache":1}'),
        ("tier", b'{"cache":"cache"}'),
        ("cache", b'{"cache":"\\ud800"}'),
    ):
        refusal(lambda kind=kind, body=body: list(server.do_action(flight.Action(kind, body))))


def test_it_is_read_only(service: Service) -> None:
    descriptor, schema = flight.FlightDescriptor.for_path("cache"), pa.schema({"a": pa.int64()})

    def put() -> None:
        writer, _ = client(service).do_put(descriptor, schema)
        writer.close()

    assert "serves caches to read" in str(refusal(put))
    _, reader = client(service).do_exchange(descriptor)
    assert "a request" in str(refusal(reader.read_all))


def test_tokens_open_what_they_name(start: Start, token_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    service = start(tokens=Tokens.read(token_file))
    for token in (None, "", "wrong", ALL + "x", ALL[:-1]):
        with pytest.raises(UserError, match="no token that it knows"):
            service.remote(None, token=token)
    with pytest.raises(UserError, match="printable ASCII"):
        service.remote(None, token="tökèn" * 5)
    assert len(service.remote(None, token=ALL)) == 18
    with pytest.raises(UserError, match="none of that name for you"):
        service.remote(None, token=ONE)
    monkeypatch.setenv("LOGITCACHE_TOKEN", ONE)
    assert len(open_cache(f"{service.location}/other", targets="topk", codec_factory=counting_codec).read([0])) == 1
    options = flight.FlightCallOptions(headers=[(b"authorization", f"Bearer {ONE}".encode())])
    listed = list(client(service).list_flights(options=options))
    assert {info.descriptor.path[0] for info in listed} == {b"other"}
    assert "no token" in str(refusal(lambda: list(client(service).do_action(flight.Action("health", b"")))))


def self_signed() -> tuple[bytes, bytes]:
    """A certificate for 127.0.0.1 and its key, PEM."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "tests")])
    now, hour = datetime.now(UTC), timedelta(hours=1)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number(), now - hour, now + hour)
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), critical=False)
        .sign(key, SHA256())
    )
    pem, plain = serialization.Encoding.PEM, serialization.NoEncryption()
    return certificate.public_bytes(pem), key.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain)


def test_tls_reads_what_it_trusts_and_nothing_else(
    start: Start, token_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    certificate, key = self_signed()
    (tmp_path / "roots.pem").write_bytes(certificate)
    (tmp_path / "others.pem").write_bytes(self_signed()[0])
    service = start(tls=(certificate, key), tokens=Tokens.read(token_file))
    assert service.location.startswith("grpc+tls://")
    reader = service.remote("topk", tls_roots=tmp_path / "roots.pem", token=ALL)
    assert len(reader.read([0, 5])) == 2
    plain = Service(place=service.place, location=service.location.replace("+tls", ""))
    cases: list[tuple[Service, dict[str, Any]]] = [
        (service, {}),
        (service, {"tls_roots": tmp_path / "others.pem"}),
        (plain, {}),
    ]
    for other, options in cases:
        with pytest.raises(UserError, match="no answer"):
            other.remote(None, token=ALL, patience_s=0.3, **options)
    (tmp_path / "key.pem").write_bytes(key)
    for bad in ("nothing", "key.pem"):
        with pytest.raises(UserError, match="give a PEM file"):
            service.remote(None, tls_roots=tmp_path / bad)
    monkeypatch.setenv("LOGITCACHE_TLS_ROOTS", str(tmp_path / "others.pem"))
    with pytest.raises(UserError, match=r"certificate verify failed.*check its certificate"):
        service.remote(None, token=ALL, patience_s=0.3)
    monkeypatch.setenv("LOGITCACHE_TLS_ROOTS", str(tmp_path / "roots.pem"))
    assert len(service.remote(None, token=ALL)) == 18


@pytest.mark.parametrize(
    "text", ["", "# nothing", "short *", "a-token-of-enough-letters", "a-tökèn-of-enough-letters *"]
)
def test_a_token_file_that_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "tokens").write_text(text)
    with pytest.raises(UserError, match="tokens in"):
        Tokens.read(tmp_path / "tokens")


def test_what_may_not_be_served(place: str, tmp_path: Path, free_port: int) -> None:
    for host in ("0.0.0.0", "::", "192.0.2.1", "example.org"):
        with pytest.raises(UserError, match="give --tokens"):
            run_server([place], Settings(host=host, port=free_port))
    with pytest.raises(UserError, match="a port"):
        run_server([place], Settings(port=70_000))
    with pytest.raises(UserError, match="no identity"):
        run_server([str(tmp_path)], Settings(port=free_port))
    with pytest.raises(UserError, match="served already"):
        Catalogue([place, place])
    with pytest.raises(UserError, match="a name for a cache"):
        Catalogue([f".hidden={place}"])
    with pytest.raises(UserError, match="the URL where the cache lies"):
        Catalogue(["grpc://127.0.0.1:1/cache"])
    with pytest.raises(UserError, match="no cache and no teacher"):
        run_server([], Settings(port=free_port))
    with pytest.raises(UserError, match="no such folder"):
        Catalogue([f"{tmp_path}/nothing/*"])
    with pytest.raises(UserError, match="free HOST:PORT"):
        run_server([place], Settings(port=0, metrics="127.0.0.1:none"))
    for option, values in {
        "scores_gb": ("nan", "inf", "0", "1e300"),
        "reload_s": ("nan", "inf", "-1", "1e300"),
        "gather_s": ("nan", "inf", "-1"),
    }.items():
        for value in values:
            with pytest.raises(UserError, match=f"--{option.replace('_', '-')}"):
                Settings(**{option: float(value)})
    for limit in ({"streams": 0}, {"drain_s": float("nan")}, {"drain_s": float("inf")}):
        with pytest.raises(UserError, match=r"got \S+; choose"):
            Limits(**limit)
    (tmp_path / "file").write_text("")
    for scores in (tmp_path / "file", Path("/proc/nothing")):
        with pytest.raises(UserError, match="a folder that can be written"):
            run_server([place], Settings(port=0, scores=scores), teachers=lambda: pytest.fail("it was loaded"))
    with pytest.raises(UserError, match="certificate and key"):
        Settings(tls_key=tmp_path / "key.pem")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", free_port))
        taken.listen()
        with pytest.raises(UserError, match="another --port"):
            run_server([place], Settings(port=free_port))


def test_a_damaged_cache_is_an_error_that_names_no_object(
    world: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    world.build(str(tmp_path / "cache"), units=1)
    server = CacheServer("grpc://127.0.0.1:0", Catalogue([str(tmp_path / "cache")], codec_factory=counting_codec))
    service = Service(place=str(tmp_path / "cache"), location=f"grpc://127.0.0.1:{server.port}")
    reader = service.remote("topk")
    assert reader.codec is not None
    shard = next((tmp_path / "cache" / "targets" / "topk" / "000000" / "ids").rglob("c/*"))
    shard.write_bytes(shard.read_bytes()[::-1])
    with pytest.raises(DamagedError, match="whose log names the object") as caught:
        reader.read(range(6))
    assert str(tmp_path) not in str(caught.value)
    assert any("verify" in getattr(record, "error", "") for record in caplog.records)
    shard.unlink()
    with pytest.raises(UserError) as caught_too:
        reader.read(range(6))
    assert str(tmp_path) not in str(caught_too.value)
    server.shutdown()


def test_turns_are_bounded_and_end() -> None:
    turns = Turns(Limits(streams=1, queue_s=0.05))
    with turns.turn():
        with pytest.raises(Refusal, match="busy"), turns.turn():
            pass
        assert not turns.drain(time.monotonic() + 0.05)
    with pytest.raises(Refusal, match="shutting down"), turns.turn():
        pass
    assert turns.drain(time.monotonic())


def test_the_queue_is_bounded() -> None:
    turns = Turns(Limits(streams=1, queue=1, queue_s=5.0))
    refused: list[str] = []

    def wait() -> None:
        with turns.turn():
            pass

    with turns.turn():
        waiting = threading.Thread(target=wait)
        waiting.start()
        while not turns.waiting:
            time.sleep(0.001)
        with pytest.raises(Refusal, match="busy"), turns.turn():
            refused.append("was given a turn")
    waiting.join()
    assert refused == []


def test_who_came_first_is_served_first_and_none_is_served_after_the_end() -> None:
    turns, served = Turns(Limits(streams=1, queue_s=5.0)), []

    def wait(number: int) -> None:
        with suppress(Refusal), turns.turn():
            served.append(number)
            if number == 3:
                turns.close()

    threads = [threading.Thread(target=wait, args=(number,)) for number in range(6)]
    with turns.turn():
        for number, thread in enumerate(threads):
            thread.start()
            while turns.waiting <= number:
                time.sleep(0.001)
    for thread in threads:
        thread.join()
    assert served == [0, 1, 2, 3]
    assert turns.drain(time.monotonic())


def test_a_codec_that_cannot_count_is_sent_decoded(place: str) -> None:
    server = CacheServer("grpc://127.0.0.1:0", Catalogue([place], codec_factory=plain_codec))
    url = f"grpc://127.0.0.1:{server.port}/cache"
    with pytest.raises(UserError, match="open it with decoded=True"):
        open_cache(url, targets="topk", codec_factory=plain_codec).read([0])
    decoded = open_cache(url, targets="topk", codec_factory=plain_codec, storage_options={"decoded": True})
    assert len(decoded.read([4], first_completion_token=3, max_completion_tokens=5)[0].targets) == 5
    server.shutdown()


def test_many_clients_share_few_turns(start: Start) -> None:
    service = start(limits=Limits(streams=2))
    expected = [item.targets.hidden.tobytes() for item in service.local("hidden").read(range(18))]
    found: list[bool] = []

    def read() -> None:
        items = service.remote("hidden", patience_s=30.0).read(range(18))
        found.append([item.targets.hidden.tobytes() for item in items] == expected)

    threads = [threading.Thread(target=read) for _ in range(32)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 32


def test_a_stream_that_takes_too_long_goes_on_in_another(start: Start) -> None:
    service = start(limits=Limits(stream_s=1e-9))
    with pytest.raises(UserError, match="longer than the server allows"):
        service.remote("topk", patience_s=0.5).read([0])


def test_a_client_that_goes_gives_its_turn_back(start: Start) -> None:
    service = start(limits=Limits(streams=1, queue_s=5.0))
    request = RowsRequest(
        cache="cache", manifest=str(service.local(None).manifest.digest), tier="topk", indices=(5,) * 4000
    )
    stream = client(service).do_get(flight.Ticket(to_bytes(request)))
    stream.read_chunk()
    stream.cancel()
    del stream
    assert len(service.remote("topk", patience_s=10.0).read([0])) == 1


def test_sigterm_ends_it_once_streams_are_sent(place: str, spawn: Any, free_port: int) -> None:
    process = spawn()
    digest = str(open_cache(place, targets=None).manifest.digest)
    request = RowsRequest(cache="cache", manifest=digest, tier="topk", indices=(5,) * 1000)
    server = flight.FlightClient(f"grpc://127.0.0.1:{free_port}")
    stream = server.do_get(flight.Ticket(to_bytes(request)))
    rows = stream.read_chunk().data.num_rows
    process.terminate()
    rows += sum(chunk.data.num_rows for chunk in stream)
    assert rows == 1000
    assert process.wait(20) == 0
    log = [json.loads(line) for line in process.stderr.read().splitlines()]
    assert [line["event"] for line in log] == ["serving", "sent", "stopping"]
    assert log[2]["drained"]


def test_a_client_that_stops_reading_is_not_waited_for(place: str) -> None:
    options = ["--port", "0", "--drain-s", "1", "--json"]
    command = [sys.executable, "-m", "logitcache.cli", "serve", place, *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert process.stdout is not None
        location = json.loads(process.stdout.readline())["location"]
        digest = str(open_cache(place, targets=None).manifest.digest)
        request = RowsRequest(cache="cache", manifest=digest, tier=None, indices=(5,) * 60_000)
        stream = flight.FlightClient(location).do_get(flight.Ticket(to_bytes(request)))
        stream.read_chunk()
        process.terminate()
        assert process.wait(10) == 1
    finally:
        process.kill()
        process.communicate()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(exclude_categories=()), max_size=9),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(list(ROWS)), inner, max_size=8),
    max_leaves=12,
)
TICKETS = st.binary(max_size=200) | JSON.map(lambda value: json.dumps(value).encode())
NEARLY = st.dictionaries(st.sampled_from(list(ROWS)), JSON, max_size=2).map(
    lambda change: json.dumps(ROWS | change).encode()
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(ticket=TICKETS | NEARLY)
def test_no_ticket_does_harm(service: Service, ticket: bytes) -> None:
    refused = refusal(lambda: client(service).do_get(flight.Ticket(ticket)).read_all())
    assert service.place not in str(refused)
    refused = refusal(lambda: list(client(service).do_action(flight.Action("cache", ticket))))
    assert service.place not in str(refused)


PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
SETTINGS = b"\x00\x00\x00\x04\x00\x00\x00\x00\x00"


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    data=st.binary(max_size=300), start=st.sampled_from([b"", PREFACE, PREFACE + SETTINGS, b"GET / HTTP/1.1\r\n\r\n"])
)
def test_no_bytes_on_the_socket_do_harm(service: Service, data: bytes, start: bytes) -> None:
    host, _, port = service.location.removeprefix("grpc://").rpartition(":")
    answer = b""
    with socket.create_connection((host, int(port)), timeout=2) as raw, suppress(OSError):
        raw.sendall(start + data)
        raw.shutdown(socket.SHUT_WR)
        raw.settimeout(0.02)
        answer = raw.recv(1 << 16)
    assert service.place.encode() not in answer


def test_the_server_is_well_after_all_that(service: Service) -> None:
    ticket = flight.Ticket(b"x" * (8 << 20))
    assert "more than" in str(refusal(lambda: client(service).do_get(ticket).read_all()))
    assert len(service.remote("hidden").read(range(18))) == 18
