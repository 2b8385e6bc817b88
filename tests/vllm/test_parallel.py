"""A model divided over two devices (here two processes on one CPU), alone and in a worker on Ray."""

from __future__ import annotations

import contextlib
import json
import os
import threading
from pathlib import Path

import numpy as np
import psutil
import pytest

pytest.importorskip("vllm", reason="needs the vLLM environment: make vllm")
pytest.importorskip("ray", reason="needs the extra `cluster`")

import ray

from logitcache import open_cache
from logitcache.cluster import RayCluster
from logitcache.errors import UserError
from logitcache.jobs import BuildRequest, build_cache
from logitcache.problems import Problem
from logitcache.prompts import PromptStyle, render_prompts
from logitcache.records import HiddenStateTargets
from logitcache.scorers.hf import HFEngine, load_engine, load_tokenizer
from logitcache.scorers.vllm_load import load_vllm_engine
from logitcache.scoring import HiddenStateRequest, Prompt, Sampling, TopKRequest

SAMPLING, STYLE = Sampling(max_new_tokens=20, samples_per_problem=2, seed=5), PromptStyle(instruction="")
UNBOUND = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
"""vLLM binds each worker to a NUMA node of its own, of which there may be one only."""


@pytest.fixture(scope="module")
def reference(tiny_dir: Path) -> HFEngine:
    return load_engine(tiny_dir, dtype="float32")


def test_two_workers_write_and_score_what_the_reference_does(
    tiny_dir: Path, reference: HFEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in UNBOUND.items():
        monkeypatch.setenv(name, value)
    problems = [Problem(id=f"p{n}", text="add " + "1 + " * n, answer="") for n in (20, 1, 9)]
    prompts = render_prompts(load_tokenizer(tiny_dir), problems, STYLE)
    engine = load_vllm_engine(tiny_dir, dtype="float32", tensor_parallel=2)
    try:
        assert len(engine.engine.collective_rpc("logitcache_forget")) == 2
        both = engine.generate_scored(prompts, SAMPLING, [HiddenStateRequest()])
        sequences = [sequence for sequence, _ in both]
        assert [s.sample_id for s in sequences] == [s.sample_id for s in reference.generate(prompts, SAMPLING)]
        again, truth = (each.score(sequences, [HiddenStateRequest()]) for each in (engine, reference))
        for (_, (one,)), (two,), (exact,) in zip(both, again, truth, strict=True):
            assert isinstance(one, HiddenStateTargets)
            assert isinstance(two, HiddenStateTargets)
            assert isinstance(exact, HiddenStateTargets)
            assert np.abs(one.hidden - exact.hidden).max() < 1e-4
            assert np.abs(two.hidden - exact.hidden).max() < 1e-4
        (worker,) = [child for child in psutil.Process().children() if "Worker_TP1" in " ".join(child.cmdline())]
        worker.kill()
        worker.wait()
        for call in (lambda: engine.generate(prompts, SAMPLING), lambda: engine.score(sequences, [TopKRequest()])):
            with pytest.raises(UserError, match="a step of the vLLM engine: it failed"):
                call()
    finally:
        engine.close()


def workers_seen(done: threading.Event, titles: set[str]) -> None:
    while not done.wait(0.1):
        for child in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                titles.add(" ".join(child.cmdline()))


def test_a_worker_with_two_gpus_divides_its_model(tiny_dir: Path, reference: HFEngine, tmp_path: Path) -> None:
    """Ray is told of GPUs that are not there; vLLM's CPU build takes their number alone."""
    problems, out = tmp_path / "p.jsonl", tmp_path / "cache"
    problems.write_text("\n".join(json.dumps({"problem": f"add {n} and {n}"}) for n in range(2)))
    wants = BuildRequest(
        problems=str(problems),
        out=str(out),
        teacher=str(tiny_dir),
        targets="hidden",
        dtype="float32",
        generator="vllm",
        scorer="vllm",
        compare_engines=False,
    )
    done, titles = threading.Event(), set[str]()
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray.init(
        address="local",
        num_cpus=1,
        num_gpus=2,
        include_dashboard=False,
        log_to_driver=False,
        runtime_env={"env_vars": UNBOUND},
    )
    watcher = threading.Thread(target=workers_seen, args=(done, titles))
    watcher.start()
    try:
        two = RayCluster(workers=1, gpus_per_worker=2)
        assert build_cache(wants, sampling=SAMPLING, style=STYLE, cluster=two)["sealed"]
    finally:
        done.set()
        watcher.join()
        ray.shutdown()
    assert {rank for rank in (0, 1) if any(f"Worker_TP{rank}" in title for title in titles)} == {0, 1}, titles
    kept = [scored.sequence for scored in open_cache(str(out), targets="hidden").read(range(4))]
    prompts = [
        Prompt(problem_id=s.problem_id, token_ids=tuple(s.token_ids[: s.prompt_tokens].tolist())) for s in kept[::2]
    ]
    assert [s.sample_id for s in kept] == [s.sample_id for s in reference.generate(prompts, SAMPLING)]
