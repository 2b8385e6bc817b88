"""What is asked of a cluster and cannot be, refused before Ray or an engine is started."""

from __future__ import annotations

from pathlib import Path

import pytest

from logitcache.cli import app
from logitcache.cluster import RayCluster
from logitcache.errors import UserError
from logitcache.jobs import BuildRequest, build_cache
from logitcache.prompts import PromptStyle
from logitcache.scoring import Sampling


def test_a_share_of_a_cluster(tmp_path: Path) -> None:
    words = ["build", "--problems", "p.jsonl", "--out", str(tmp_path / "c"), "--cluster", "ray", "--worker", "2/8"]
    with pytest.raises(UserError, match="--worker 2/8 with --cluster ray: the cluster shares the units out itself"):
        app(words, exit_on_error=False)


@pytest.mark.parametrize(("gpus", "devices"), [(0.0, 1), (0.5, 1), (1.0, 1), (2.0, 2)])
def test_devices_of_a_worker(gpus: float, devices: int) -> None:
    assert RayCluster(workers=1, gpus_per_worker=gpus).devices_per_worker == devices


def test_gpus_that_no_engine_divides(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--gpus-per-worker, a whole number above 1: got 1\.5"):
        RayCluster(workers=1, gpus_per_worker=1.5)
    wants, two = BuildRequest(problems="p.jsonl", out=str(tmp_path / "c")), RayCluster(workers=1, gpus_per_worker=2)
    with pytest.raises(UserError, match="2 GPUs for one engine: vllm alone divides a model"):
        build_cache(wants, sampling=Sampling(), style=PromptStyle(), cluster=two)
    assert not (tmp_path / "c").exists()
