"""Builds on a real local Ray: the same bytes as one process, whatever happens to the workers."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from logitcache.cluster import RayCluster
from logitcache.errors import UserError
from logitcache.jobs import BuildRequest, build_cache
from logitcache.prompts import PromptStyle
from logitcache.scoring import Sampling
from logitcache.store import open_store

ray = pytest.importorskip("ray", reason="needs the extra `cluster`")

pytestmark = pytest.mark.slow

SAMPLING, STYLE = Sampling(max_new_tokens=24, samples_per_problem=2), PromptStyle(instruction="")
UNITS = 8


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayCluster]:
    """Three workers on a Ray of this test's own, whatever the number of cores."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    environment = {"env_vars": {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}}
    ray.init(address="local", num_cpus=3, include_dashboard=False, log_to_driver=False, runtime_env=environment)
    yield RayCluster(workers=3)
    ray.shutdown()


@pytest.fixture(scope="module")
def problems(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("problems") / "p.jsonl"
    rows = [{"id": f"p{n}", "problem": f"add {n} and {n * n}"} for n in range(2 * UNITS)]
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


def request(tiny_dir: Path, problems: Path, out: Path) -> BuildRequest:
    return BuildRequest(
        problems=str(problems),
        out=str(out),
        teacher=str(tiny_dir),
        targets="topk,hidden",
        dtype="float32",
        problems_per_unit=2,
    )


@pytest.fixture(scope="module")
def alone(tiny_dir: Path, problems: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Every file of the cache that one process builds."""
    out = tmp_path_factory.mktemp("alone") / "cache"
    build_cache(request(tiny_dir, problems, out), sampling=SAMPLING, style=STYLE)
    return files(out)


def files(cache: Path) -> dict[str, bytes]:
    return {str(file.relative_to(cache)): file.read_bytes() for file in cache.rglob("*") if file.is_file()}


def title(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.NoSuchProcess):
        return str(process.name())
    return ""


def kill_one_when(done: int, out: Path, killed: list[int]) -> None:
    """Kill a worker's process as soon as `done` units are committed."""
    end = time.monotonic() + 600
    while time.monotonic() < end:
        try:
            committed = len(open_store(str(out)).committed().sequences)
        except UserError:
            committed = 0
        busy = [child for child in psutil.Process().children(recursive=True) if "_Worker" in title(child)]
        if committed >= done and busy:
            busy[-1].kill()
            killed.append(busy[-1].pid)
            return
        time.sleep(0.05)


def test_a_killed_worker_changes_nothing(
    tiny_dir: Path, problems: Path, tmp_path: Path, cluster: RayCluster, alone: dict[str, bytes]
) -> None:
    out, killed = tmp_path / "cache", list[int]()
    killer = threading.Thread(target=kill_one_when, args=(3, out, killed))
    killer.start()
    built = build_cache(request(tiny_dir, problems, out), sampling=SAMPLING, style=STYLE, cluster=cluster)
    killer.join()
    assert len(killed) == 1
    assert built["sealed"]
    assert files(out) == alone


def test_appended_problems_are_those_of_one_process(
    tiny_dir: Path, problems: Path, tmp_path: Path, cluster: RayCluster, alone: dict[str, bytes]
) -> None:
    more, built = tmp_path / "more.jsonl", list[dict[str, bytes]]()
    rows = [{"id": f"q{n}", "problem": f"subtract {n} from {n * n}"} for n in range(5)]
    more.write_text("\n".join(map(json.dumps, rows)))
    for workers in (None, cluster):
        out = tmp_path / str(len(built))
        for name, content in alone.items():
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            (out / name).write_bytes(content)
        wants = replace(request(tiny_dir, more, out), append=True)
        told = build_cache(wants, sampling=SAMPLING, style=STYLE, cluster=workers)
        assert (told["sealed"], told["units"], told["sequences"]) == (True, UNITS + 3, 2 * (2 * UNITS + 5))
        built.append(files(out))
    assert built[0] == built[1]


def test_a_worker_that_always_dies_ends_the_build(tiny_dir: Path, problems: Path, cluster: RayCluster) -> None:
    from logitcache.build import Build, Unit
    from logitcache.cluster import build_on_ray

    def make(_: object) -> Build:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError

    twice = RayCluster(workers=1, attempts=2)
    with pytest.raises(UserError, match="a worker died 2 times"):
        build_on_ray(make, [Unit(name="00000000", prompts=())], twice, on_units=lambda _: None)


def test_what_a_worker_refuses_is_said_here(
    tiny_dir: Path, problems: Path, tmp_path: Path, cluster: RayCluster
) -> None:
    too_long = Sampling(max_new_tokens=600)
    with pytest.raises(UserError, match="the model's context holds 512") as caught:
        build_cache(request(tiny_dir, problems, tmp_path / "c"), sampling=too_long, style=STYLE, cluster=cluster)
    assert type(caught.value) is UserError


def test_a_worker_that_fails_otherwise_is_one_line(cluster: RayCluster) -> None:
    from logitcache.build import Build, Unit
    from logitcache.cluster import build_on_ray

    def make(_: object) -> Build:
        raise ZeroDivisionError("nobody's fault")

    unit = Unit(name="00000000", prompts=())
    with pytest.raises(UserError, match=r"a worker failed \(ZeroDivisionError: nobody's fault\)") as caught:
        build_on_ray(make, [unit], RayCluster(workers=1), on_units=lambda _: None)
    assert "\n" not in str(caught.value)


def test_more_workers_than_the_cluster_has_room_for(
    tiny_dir: Path, problems: Path, tmp_path: Path, cluster: RayCluster
) -> None:
    wants = request(tiny_dir, problems, tmp_path / "c")
    for crowd, found in (
        (RayCluster(workers=4), "4 workers of 1 CPU: the cluster has 3 CPU"),
        (RayCluster(workers=1, gpus_per_worker=1), "1 workers of 1 GPU: the cluster has 0 GPU"),
    ):
        with pytest.raises(UserError, match=found):
            build_cache(wants, sampling=SAMPLING, style=STYLE, cluster=crowd)
