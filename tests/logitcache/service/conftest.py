"""A cache of the store's small world, a server of it in this process, and servers in processes that can be killed."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from logitcache.service.access import Tokens
from logitcache.service.catalogue import Catalogue
from logitcache.service.limits import Limits
from logitcache.service.server import CacheServer
from logitcache.store import DiskCache, Reader, open_cache
from tests.logitcache.store.conftest import World
from tests.logitcache.store.plain_codecs import counting_codec

SCRIPT = """
import functools, sys
from logitcache.service.run import run_server
from logitcache.service.settings import Service
from tests.logitcache.store.plain_codecs import counting_codec
_, place, port = sys.argv
ready = functools.partial(print, flush=True)
service = Service(port=int(port), reload_s=0.2)
raise SystemExit(not run_server([place], service, codec_factory=counting_codec, ready=ready))
"""


@dataclass(frozen=True, kw_only=True)
class Service:
    """A server in this process, and how to read what it serves."""

    place: str
    location: str

    def local(self, targets: str | None) -> Reader:
        return open_cache(self.place, targets=targets, codec_factory=counting_codec)

    def remote(
        self, targets: str | None, *, decoded: bool = False, disk_cache: DiskCache | None = None, **options: Any
    ) -> Any:
        return open_cache(
            f"{self.location}/cache",
            targets=targets,
            codec_factory=counting_codec,
            storage_options={"decoded": decoded, "patience_s": 5.0, **options},
            disk_cache=disk_cache,
        )


Start = Callable[..., Service]


@pytest.fixture(scope="session")
def world() -> World:
    return World()


@pytest.fixture(scope="session")
def place(world: World, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("served") / "cache"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda descriptor: None)
        world.build(str(path), units=3)
    return str(path)


@pytest.fixture
def start(place: str) -> Iterator[Start]:
    """Starts servers of the cache."""
    servers: list[CacheServer] = []

    def serve(*, tokens: Tokens | None = None, limits: Limits = Limits(), tls: Any = None) -> Service:  # noqa: B008
        caches = Catalogue([place, f"other={place}"], codec_factory=counting_codec)
        scheme = "grpc" if tls is None else "grpc+tls"
        server = CacheServer(f"{scheme}://127.0.0.1:0", caches, tokens=tokens, limits=limits, tls=tls)
        servers.append(server)
        return Service(place=place, location=f"{scheme}://127.0.0.1:{server.port}")

    yield serve
    for server in servers:
        server.shutdown()


@pytest.fixture
def service(start: Start) -> Service:
    return start()


@pytest.fixture
def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@pytest.fixture
def spawn(place: str, free_port: int) -> Iterator[Callable[[], subprocess.Popen[str]]]:
    """Starts the server in a process of its own, at the same address each time."""
    running: list[subprocess.Popen[str]] = []
    root = Path(__file__).parents[3]

    def serve() -> subprocess.Popen[str]:
        command = [sys.executable, "-c", SCRIPT, place, str(free_port)]
        pipe = subprocess.PIPE
        environment = {**os.environ, "PYTHONPATH": str(root)}
        process = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, cwd=root, env=environment)
        running.append(process)
        assert process.stdout is not None
        assert process.stdout.readline().strip() == f"grpc://127.0.0.1:{free_port}"
        return process

    yield serve
    for process in running:
        process.kill()
        process.communicate()
