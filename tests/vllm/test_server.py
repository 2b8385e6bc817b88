"""A real vLLM server on loopback with the embedded teacher: agreement with the reference, and its death."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("vllm", reason="needs the vLLM environment: make vllm")

from logitcache import open_cache
from logitcache.errors import UserError
from logitcache.problems import Problem
from logitcache.prompts import PromptStyle, render_prompts
from logitcache.records import FinishReason, TokenSequence, TopKTargets
from logitcache.scorers.endpoint import Endpoint
from logitcache.scorers.hf import HFEngine, load_engine, load_tokenizer
from logitcache.scorers.vllm_http import HTTPEngine, connect
from logitcache.scoring import Prompt, Sampling, TopKRequest

START_S = 240.0
"""A start takes about 20 s of an idle machine."""


@dataclass(frozen=True, kw_only=True)
class Server:
    """A running server and its process."""

    url: str
    process: subprocess.Popen[bytes]

    @property
    def endpoint(self) -> Endpoint:
        return Endpoint(url=self.url, model="teacher", attempts=3, longest_pause_s=0.1, timeout_s=60.0)


@pytest.fixture(scope="module")
def server(embedded_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(embedded_dir)]
    command += ["--served-model-name", "teacher", "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32"]
    command += ["--max-logprobs", "64", "--max-model-len", "512", "--kv-cache-memory-bytes", str(1 << 28)]
    environment = {**os.environ, "VLLM_NO_USAGE_STATS": "1", "OMP_NUM_THREADS": "1"}
    log = tmp_path_factory.mktemp("server") / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, "--enforce-eager"], env=environment, stdout=output, stderr=output, start_new_session=True
        )
    found = Server(url=f"http://127.0.0.1:{port}", process=process)
    try:
        wait_for(found, log)
        yield found
    finally:
        stop(process)


def wait_for(server: Server, log: Path) -> None:
    end = time.monotonic() + START_S
    while True:
        try:
            server.endpoint.context_tokens()
            return
        except UserError:
            if server.process.poll() is not None or time.monotonic() > end:
                pytest.fail(f"the server did not start:\n{log.read_text()[-3000:]}")
            time.sleep(0.5)


def stop(process: subprocess.Popen[bytes]) -> None:
    """The server and the workers it started: they share its process group."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.fixture(scope="module")
def engine(server: Server, embedded_dir: Path) -> HTTPEngine:
    return connect(server.endpoint, embedded_dir)


@pytest.fixture(scope="module")
def reference(embedded_dir: Path) -> HFEngine:
    return load_engine(embedded_dir, dtype="float32")


@pytest.fixture(scope="module")
def prompts(embedded_dir: Path) -> list[Prompt]:
    problems = [Problem(id=f"p{n}", text=f"What is {n} + {3 * n}?", answer="") for n in (1, 20, 300)]
    return render_prompts(load_tokenizer(embedded_dir), problems, PromptStyle(instruction=""))


@pytest.fixture(scope="module")
def rollouts(engine: HTTPEngine, prompts: list[Prompt]) -> list[TokenSequence]:
    return engine.generate(prompts, Sampling(max_new_tokens=24, samples_per_problem=2, seed=3))


def test_completions_keep_order_seeds_and_stop_rules(
    engine: HTTPEngine, prompts: list[Prompt], rollouts: list[TokenSequence]
) -> None:
    assert [r.problem_id for r in rollouts] == [p.problem_id for p in prompts for _ in range(2)]
    assert len({r.seed for r in rollouts}) == 6
    again = engine.generate(prompts, Sampling(max_new_tokens=24, samples_per_problem=2, seed=3))
    assert [r.sample_id for r in again] == [r.sample_id for r in rollouts]
    stop = int(rollouts[0].completion_ids[5])
    stopped = replace(engine, stop_ids=frozenset({stop})).generate(
        prompts[:1], Sampling(max_new_tokens=24, samples_per_problem=2, seed=3)
    )[0]
    assert stopped.finish_reason is FinishReason.STOP
    first = rollouts[0].completion_ids.tolist()
    assert stopped.completion_ids.tolist() == first[: first.index(stop) + 1]


def test_greedy_completions_are_those_of_the_reference(
    engine: HTTPEngine, reference: HFEngine, prompts: list[Prompt]
) -> None:
    greedy = Sampling(max_new_tokens=12, temperature=0.0)
    assert [r.sample_id for r in engine.generate(prompts, greedy)] == [
        r.sample_id for r in reference.generate(prompts, greedy)
    ]


def test_targets_agree_with_the_reference(
    engine: HTTPEngine, reference: HFEngine, rollouts: list[TokenSequence]
) -> None:
    want = [TopKRequest(max_k=32), TopKRequest(max_k=32, min_probability=1e-2)]
    for ours, theirs in zip(engine.score(rollouts, want), reference.score(rollouts, want), strict=True):
        for a, b in zip(ours, theirs, strict=True):
            assert isinstance(b, TopKTargets)
            assert np.array_equal(a.row_splits, b.row_splits)
            same = a.ids == b.ids  # the 32nd and 33rd likeliest may be too close to call
            assert same.mean() > 0.98
            assert np.abs(a.log_probs - b.log_probs)[same].max() < 1e-3
            assert np.abs(a.token_log_prob - b.token_log_prob).max() < 1e-3
            # vLLM normalises in float32: its probabilities sum to 1 within about 1e-5, and so are its tails
            assert np.abs(np.exp(a.tail_log_mass) - np.exp(b.tail_log_mass)).max() < 5e-5


def test_more_than_the_server_allows_is_refused_by_it(engine: HTTPEngine, rollouts: list[TokenSequence]) -> None:
    with pytest.raises(UserError, match=r"status 400.*64"):
        engine.score(rollouts[:1], [TopKRequest(max_k=65)])


def build(server: Server, problems: Path, out: Path, *options: str) -> list[str]:
    teacher = f"{server.url}#teacher"
    command = [sys.executable, "-m", "logitcache.cli", "build", "--problems", str(problems), "--out", str(out)]
    command += ["--generator", teacher, "--scorer", teacher, "--targets", "topk:k=32,p=1e-3", "--dtype", "float32"]
    return [*command, "--max-new-tokens", "16", "--problems-per-unit", "2", "--json", *options]


def test_a_cache_is_built_from_a_server_alone_and_trains(
    server: Server, engine: HTTPEngine, tiny_dir: Path, tmp_path: Path
) -> None:
    problems, whole, killed = tmp_path / "p.jsonl", tmp_path / "whole", tmp_path / "killed"
    problems.write_text("\n".join(json.dumps({"problem": f"What is {n} + {3 * n}?"}) for n in range(8)))
    done = subprocess.run(build(server, problems, whole), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["sealed"]
    assert told["teacher"]["engine"] == {"name": "http", "model": "teacher"}
    assert told["targets"]["topk"]["kl_nats"] is None
    assert told["targets"]["topk"]["engine_kl_nats"] is None

    samples = open_cache(str(whole), targets="topk").read(list(range(8)))
    exact = engine.score([s.sequence for s in samples], [TopKRequest(max_k=32, min_probability=1e-3)])
    for sample, (theirs,) in zip(samples, exact, strict=True):
        ours = sample.targets
        assert isinstance(ours, TopKTargets)
        assert np.array_equal(ours.ids, theirs.ids)
        cell = 0.6 * 1e-3**0.5
        assert np.abs(np.exp(ours.log_probs / 2) - np.exp(theirs.log_probs / 2)).max() < 2 * cell
        assert np.abs(np.exp(ours.tail_log_mass) - np.exp(theirs.tail_log_mass)).max() < 0.01
        assert np.abs(np.exp(ours.token_log_prob) - np.exp(theirs.token_log_prob)).max() < 0.02
        assert np.isnan(ours.entropy).all()

    process = subprocess.Popen(build(server, problems, killed), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not list(killed.rglob("record.json")):
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert len(list(killed.rglob("record.json"))) < 8
    done = subprocess.run(build(server, problems, killed), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert files(killed) == files(whole)

    train = [sys.executable, "-m", "trainer.cli", "distill", str(whole), "--student", str(tiny_dir), "--json"]
    train += ["--out", str(tmp_path / "run"), "--steps", "2", "--sequences", "2", "--window", "12"]
    train += ["--precision", "float32", "--held-out-share", "0.4"]
    trained = subprocess.run(train, capture_output=True, text=True, check=False)
    assert trained.returncode == 0, trained.stderr
    held_out = json.loads(trained.stdout)["held_out"]
    assert held_out["forward_kl_nats_coarse"]["after"] < held_out["forward_kl_nats_coarse"]["before"]

    score = [sys.executable, "-m", "logitcache.cli", "score", str(whole), "--targets", "hidden"]
    refused = subprocess.run(score, capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    assert "a server scored it" in refused.stderr


def test_a_cluster_asks_a_server_and_needs_no_weights(
    server: Server, embedded_dir: Path, tiny_dir: Path, tmp_path: Path
) -> None:
    """Two workers on a real Ray; what is on this machine of the teacher is its tokenizer and its configuration."""
    problems, out, known = tmp_path / "p.jsonl", tmp_path / "cache", tmp_path / "known"
    problems.write_text("\n".join(json.dumps({"problem": f"What is {n} + {n}?"}) for n in range(6)))
    load_tokenizer(embedded_dir).save_pretrained(known)
    for name in ("config.json", "generation_config.json"):
        shutil.copy(embedded_dir / name, known)
    ray = ("--cluster", "ray", "--workers", "2", "--teacher", str(known))
    done = subprocess.run(build(server, problems, out, *ray), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert (told["sealed"], told["sequences"], told["units"]) == (True, 6, 3)
    assert told["teacher"]["fingerprint"].startswith("unseen:")
    for scored in open_cache(str(out), targets="topk").read(range(6)):
        assert len(scored.targets) == scored.sequence.completion_tokens > 0

    live = [sys.executable, "-m", "trainer.cli", "distill", str(out), "--student", str(tiny_dir), "--prefix", "student"]
    live += ["--teacher", str(embedded_dir), "--out", str(tmp_path / "run"), "--held-out-share", "0.4"]
    refused = subprocess.run(live, capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    assert "the cache was built by known, unseen:" in refused.stderr


def files(cache: Path) -> dict[str, bytes]:
    return {str(file.relative_to(cache)): file.read_bytes() for file in cache.rglob("*") if file.is_file()}


def test_another_name_is_refused(server: Server, embedded_dir: Path) -> None:
    with pytest.raises(UserError, match=r"model student at .*: it serves teacher"):
        connect(replace(server.endpoint, model="student"), embedded_dir)


def test_the_death_of_the_server_is_an_error(server: Server, engine: HTTPEngine, rollouts: list[TokenSequence]) -> None:
    """Last of this module: nothing lives after it."""
    stop(server.process)
    with pytest.raises(UserError, match="none in 3 attempts"):
        engine.score(rollouts, [TopKRequest()])
