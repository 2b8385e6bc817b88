"""Servers that misbehave: each is a real one on loopback, and each ends in an answer or in one clear error."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from logitcache import open_cache
from logitcache.errors import UserError
from logitcache.jobs import BuildRequest, build_cache
from logitcache.prompts import PromptStyle
from logitcache.records import FinishReason, Origin, TokenSequence, TopKTargets
from logitcache.scorers.choose import Served, load_teacher, teacher_identity
from logitcache.scorers.endpoint import Endpoint
from logitcache.scorers.vllm_http import HTTPEngine
from logitcache.scoring import HiddenStateRequest, Prompt, Sampling, TopKRequest

MODELS: Any = {"data": [{"id": "teacher", "max_model_len": 64}]}


def rows_for(body: dict[str, Any]) -> list[dict[str, Any] | None]:
    """What a model of five tokens says that always gives token i the probability (i + 1) / 15."""
    row = {str(i): {"logprob": float(np.log((i + 1) / 15))} for i in (4, 3, 2)}
    rows: list[dict[str, Any] | None] = [None]
    for token in body["prompt"][1:]:
        rows.append({**row, str(token): {"logprob": float(np.log((token + 1) / 15))}})
    return rows


def good(body: dict[str, Any]) -> tuple[int, Any]:
    if "prompt_logprobs" in body:
        return 200, {"model": "teacher", "choices": [{"prompt_logprobs": rows_for(body)}]}
    written = [body["seed"] % 5, 3, 4]
    return 200, {"model": "teacher", "choices": [{"token_ids": written, "finish_reason": "length"}]}


@dataclass(kw_only=True)
class Stage:
    """A server on loopback that answers completions by `play`, and remembers what it saw."""

    play: Callable[[dict[str, Any]], tuple[int, Any]] = good
    models: Any = field(default_factory=lambda: MODELS)
    keys: list[str | None] = field(default_factory=list)
    bodies: list[dict[str, Any]] = field(default_factory=list)
    under_way: int = 0
    most_under_way: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)


@pytest.fixture
def stage() -> Stage:
    return Stage()


@pytest.fixture
def url(stage: Stage) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            stage.keys.append(self.headers["Authorization"])
            self.reply(200, stage.models)

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with stage.lock:
                stage.bodies.append(body)
                stage.keys.append(self.headers["Authorization"])
                stage.under_way += 1
                stage.most_under_way = max(stage.most_under_way, stage.under_way)
            try:
                answer = stage.play(body)
            finally:
                with stage.lock:
                    stage.under_way -= 1
            self.reply(*answer)

        def reply(self, status: int, value: Any) -> None:
            data = value if isinstance(value, bytes) else json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    class Quiet(ThreadingHTTPServer):
        def handle_error(self, request: Any, client_address: Any) -> None:
            """A client that hangs up, or a play that dies, is what these tests are about."""

    server = Quiet(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def engine_at(url: str, **options: Any) -> HTTPEngine:
    endpoint = Endpoint(
        url=url, model="teacher", **{"attempts": 3, "longest_pause_s": 0.05, "timeout_s": 5.0, **options}
    )
    return HTTPEngine(
        endpoint=endpoint, vocab_size=5, stop_ids=frozenset({0}), tokenizer_fingerprint="f", context_tokens=64
    )


def sequence(*token_ids: int, prompt: int = 1) -> TokenSequence:
    return TokenSequence(
        token_ids=np.array(token_ids, np.int32),
        prompt_tokens=prompt,
        origin=Origin.CORPUS,
        sample_id="s",
        problem_id="p",
        finish_reason=FinishReason.GIVEN,
    )


def test_rows_tail_and_realised_token(url: str) -> None:
    requests = [TopKRequest(max_k=3), TopKRequest(max_k=3, mass=0.3), TopKRequest(max_k=3, min_probability=0.25)]
    ((full, nucleus, threshold),) = engine_at(url).score([sequence(1, 4, 0, prompt=1)], requests)
    assert isinstance(full, TopKTargets)
    assert full.ids.tolist() == [2, 3, 4, 2, 3, 4]
    assert np.exp(full.log_probs) == pytest.approx(np.array([3, 4, 5, 3, 4, 5]) / 15)
    assert np.exp(full.tail_log_mass) == pytest.approx(np.array([3, 3]) / 15)
    assert np.exp(full.token_log_prob) == pytest.approx(np.array([5, 1]) / 15)
    assert np.isnan(full.entropy).all()
    assert nucleus.ids.tolist() == [4, 4]
    assert threshold.ids.tolist() == [3, 4, 3, 4]


def test_a_sequence_without_completion_is_not_even_asked_for(url: str, stage: Stage) -> None:
    ((targets,),) = engine_at(url).score([sequence(1, 2, prompt=2)], [TopKRequest()])
    assert len(targets) == 0
    assert stage.bodies == []


def test_what_a_server_cannot_give_is_refused(url: str, stage: Stage) -> None:
    engine = engine_at(url)
    with pytest.raises(UserError, match=r"HiddenState from http.*a server gives top-k and nothing else"):
        engine.score([sequence(1, 2)], [HiddenStateRequest()])
    with pytest.raises(UserError, match="the output head from http"):
        _ = engine.head
    with pytest.raises(UserError, match="context holds 63"):
        engine.score([sequence(*[1] * 64)], [TopKRequest()])
    with pytest.raises(UserError, match="beyond the teacher's 5 tokens"):
        engine.score([sequence(1, 5)], [TopKRequest()])
    assert stage.bodies == []


def test_a_server_that_is_busy_for_a_while_is_asked_again(url: str, stage: Stage) -> None:
    def busy_twice(body: dict[str, Any]) -> tuple[int, Any]:
        return good(body) if len(stage.bodies) > 2 else (503, {"error": "busy"})

    stage.play = busy_twice
    assert len(engine_at(url).score([sequence(1, 2)], [TopKRequest(max_k=3)])) == 1
    assert len(stage.bodies) == 3


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        ((500, {}), "none in 3 attempts .status 500"),
        ((400, {"error": {"message": "k is above --max-logprobs"}}), "status 400: k is above --max-logprobs"),
        ((200, b"<html>"), "an answer with no JSON object"),
        ((200, b"[" * 100_000), "an answer with no JSON object"),
        ((200, [1]), "an answer with no JSON object"),
        ((200, {"model": "teacher"}), "an answer with no choice"),
        ((200, {"model": "teacher", "choices": []}), "an answer with no choice"),
        ((200, {"model": "teacher", "choices": [7]}), "an answer with no choice"),
        ((401, {"error": "no key"}), "status 401: no key; set LOGITCACHE_API_KEY"),
        ((200, {"model": "impostor", "choices": [{}]}), "impostor answered"),
        ((200, {"model": "teacher", "choices": [{}]}), "gave no rows of log-probabilities"),
    ],
)
def test_an_answer_that_is_none(url: str, stage: Stage, answer: tuple[int, Any], found: str) -> None:
    stage.play = lambda body: answer
    with pytest.raises(UserError, match=found):
        engine_at(url).score([sequence(1, 2)], [TopKRequest()])
    assert len(stage.bodies) == (3 if answer[0] == 500 else 1)


@pytest.mark.parametrize(
    ("row", "found"),
    [
        ({"4": {"logprob": float("nan")}, "2": {"logprob": -1.0}}, "not finite"),
        ({"7": {"logprob": -0.1}, "2": {"logprob": -1.0}}, "probability of id 7, beyond the 5 tokens"),
        ({"4": {"logprob": -0.1}}, "no log-probability of token 2"),
        (None, "a row without log-probabilities"),
        ({}, "a row without log-probabilities"),
        ([{"logprob": -0.1}], "a row without log-probabilities"),
        ({"token_id:2": {"logprob": -0.1}}, "'token_id:2', which is no token id"),
        ({"02": {"logprob": -0.1}}, "'02', which is no token id"),
        ({"-2": {"logprob": -0.1}}, "'-2', which is no token id"),
        ({"9" * 5000: {"logprob": -0.1}}, "which is no token id"),
        ({"2": {"logprob": "-0.1"}}, "not finite numbers"),
        ({"2": {}}, "not finite numbers"),
        ({"2": -0.1}, "not finite numbers"),
        ({"2": {"logprob": -(10**400)}}, "not finite numbers"),
        ({"2": {"logprob": 0.7}}, "a log-probability of 0.7, above 0"),
        ({"2": {"logprob": -0.01}, "4": {"logprob": -0.01}}, "a row whose probabilities sum to 1.98"),
    ],
)
def test_rows_that_make_no_sense(url: str, stage: Stage, row: Any, found: str) -> None:
    stage.play = lambda body: (200, {"model": "teacher", "choices": [{"prompt_logprobs": [None, row]}]})
    with pytest.raises(UserError, match=f"scores for problem p: .*{found}"):
        engine_at(url).score([sequence(1, 2)], [TopKRequest()])


@pytest.mark.parametrize(
    ("choice", "found"),
    [
        ({"token_ids": [4, 3, 3], "finish_reason": None}, "3 tokens of at most 3, the last 3, and finish_reason None"),
        ({"token_ids": [4, 3, 3]}, "finish_reason None"),
        ({"token_ids": [4, 3, 3], "finish_reason": "repetition"}, "finish_reason 'repetition'"),
        ({"token_ids": [4, 3, 3], "finish_reason": "stop"}, "the last 3, and finish_reason 'stop'"),
        (
            {"token_ids": [4, 3], "finish_reason": "length"},
            "2 tokens of at most 3, the last 3, and finish_reason 'length'",
        ),
        ({"token_ids": [4] * 50, "finish_reason": "length"}, "50 tokens of at most 3"),
        ({"token_ids": [4] * 50 + [0], "finish_reason": "stop"}, "51 tokens of at most 3"),
        ({"token_ids": [4, 5, 3], "finish_reason": "length"}, "token ids that are none of the 5"),
        ({"token_ids": [4, -1, 3], "finish_reason": "length"}, "token ids that are none of the 5"),
        ({"token_ids": [4, True, 3], "finish_reason": "length"}, "token ids that are none of the 5"),
        ({"token_ids": "433", "finish_reason": "length"}, "no token ids"),
        ({"finish_reason": "length"}, "no token ids"),
    ],
)
def test_completions_that_make_no_sense(url: str, stage: Stage, choice: dict[str, Any], found: str) -> None:
    stage.play = lambda body: (200, {"model": "teacher", "choices": [choice]})
    with pytest.raises(UserError, match=f"a completion of problem p: .* gave .*{found}"):
        engine_at(url).generate([Prompt(problem_id="p", token_ids=(1, 2))], Sampling(max_new_tokens=3))
    assert len(stage.bodies) == 1


def test_a_request_that_the_server_aborted_is_sent_again(url: str, stage: Stage) -> None:
    def abort_once(body: dict[str, Any]) -> tuple[int, Any]:
        aborted = {"model": "teacher", "choices": [{"token_ids": [4], "finish_reason": "abort"}]}
        return good(body) if len(stage.bodies) > 1 else (200, aborted)

    stage.play = abort_once
    prompts, sampling = [Prompt(problem_id="p", token_ids=(1, 2))], Sampling(max_new_tokens=3)
    assert engine_at(url).generate(prompts, sampling)[0].completion_tokens == 3
    assert len(stage.bodies) == 2
    stage.play = lambda body: (200, {"model": "teacher", "choices": [{"token_ids": [], "finish_reason": "abort"}]})
    with pytest.raises(UserError, match=r"none in 3 attempts \(the server aborted the request"):
        engine_at(url).generate(prompts, sampling)


@pytest.mark.parametrize("rest", [0.3, 0.30001])
def test_a_tail_that_rounding_hides_is_as_large_as_the_rounding(url: str, stage: Stage, rest: float) -> None:
    row = {"4": {"logprob": float(np.log(0.7))}, "2": {"logprob": float(np.log(rest))}}
    stage.play = lambda body: (200, {"model": "teacher", "choices": [{"prompt_logprobs": [None, row]}]})
    ((targets,),) = engine_at(url).score([sequence(1, 2)], [TopKRequest()])
    assert np.exp(targets.tail_log_mass) == pytest.approx([2**-16])


def test_a_server_that_hangs_is_given_up(url: str, stage: Stage) -> None:
    def hang(body: dict[str, Any]) -> tuple[int, Any]:
        time.sleep(1)
        return good(body)

    stage.play = hang
    start = time.monotonic()
    with pytest.raises(UserError, match=r"none in 2 attempts \(.*timed out"):
        engine_at(url, attempts=2, timeout_s=0.2).score([sequence(1, 2)], [TopKRequest()])
    with pytest.raises(UserError, match=r"none in [12] attempts \(.*timed out"):
        engine_at(url, attempts=9, timeout_s=0.2, patience_s=0.3).score([sequence(1, 2)], [TopKRequest()])
    assert time.monotonic() - start < 20  # loaded machines are slow, but do not wait for ever


def test_a_server_that_is_not_there() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://user:secret@127.0.0.1:{taken.getsockname()[1]}"
    with pytest.raises(UserError, match=r"none in 3 attempts .*refused") as caught:
        engine_at(url).score([sequence(1, 2)], [TopKRequest()])
    assert "secret" not in str(caught.value)


def test_a_server_that_dies_between_requests_loses_nothing_silently(url: str, stage: Stage) -> None:
    def die(body: dict[str, Any]) -> tuple[int, Any]:
        if len(stage.bodies) > 4:
            raise ConnectionAbortedError
        return good(body)

    stage.play = die
    done: list[int] = []
    engine = engine_at(url, concurrency=2)
    counting = HTTPEngine(**{**vars(engine), "on_sequences": done.append})
    with pytest.raises(UserError, match="none in 3 attempts"):
        counting.score([sequence(1, 2)] * 40, [TopKRequest()])
    assert len(done) < 6


def test_a_build_whose_server_dies_goes_on_to_the_same_bytes(
    url: str, stage: Stage, tiny_dir: Path, tmp_path: Path
) -> None:
    problems = tmp_path / "p.jsonl"
    problems.write_text("".join(json.dumps({"problem": f"What is {n}?"}) + "\n" for n in range(6)))

    def build(out: Path) -> dict[str, Any]:
        teacher = f"{url}#teacher"
        request = BuildRequest(
            problems=str(problems),
            out=str(out),
            teacher=str(tiny_dir),
            targets="topk:k=3",
            problems_per_unit=2,
            generator=teacher,
            scorer=teacher,
        )
        return build_cache(request, sampling=Sampling(max_new_tokens=3), style=PromptStyle())

    def die(body: dict[str, Any]) -> tuple[int, Any]:
        return good(body) if len(stage.bodies) <= 9 else (400, {"error": "gone"})

    whole = build(tmp_path / "whole")
    stage.bodies.clear()
    stage.play = die
    with pytest.raises(UserError, match="status 400: gone"):
        build(tmp_path / "cache")
    parts = len(list((tmp_path / "cache").rglob("record.json")))
    stage.play = good
    assert 0 < parts < len(list((tmp_path / "whole").rglob("record.json")))
    assert build(tmp_path / "cache") | {"usage": None} == whole | {"usage": None}
    assert content(tmp_path / "cache") == content(tmp_path / "whole")
    assert whole["targets"]["topk"]["kl_nats"] is whole["targets"]["topk"]["engine_kl_nats"] is None

    for sample in open_cache(str(tmp_path / "cache"), targets="topk").read(range(6)):
        assert isinstance(sample.targets, TopKTargets)
        assert sample.targets.ids.tolist() == [2, 3, 4] * 3
        assert np.exp(sample.targets.log_probs) == pytest.approx(np.array([3, 4, 5] * 3) / 15, abs=0.01)
        assert np.exp(sample.targets.tail_log_mass) == pytest.approx(np.full(3, 0.2), abs=0.005)
        assert np.isnan(sample.targets.entropy).all()


def content(cache: Path) -> dict[str, bytes]:
    return {str(file.relative_to(cache)): file.read_bytes() for file in cache.rglob("*") if file.is_file()}


def test_no_more_requests_at_once_than_allowed_and_the_order_stays(url: str, stage: Stage) -> None:
    def slow(body: dict[str, Any]) -> tuple[int, Any]:
        time.sleep(0.02 * (len(stage.bodies) % 3))
        return good(body)

    stage.play = slow
    sequences = [sequence(*[1] * (2 + n)) for n in range(20)]
    scored = engine_at(url, concurrency=3).score(sequences, [TopKRequest(max_k=3)])
    assert [len(targets) for (targets,) in scored] == list(range(1, 21))
    assert 1 < stage.most_under_way <= 3


def test_the_context_comes_from_the_model_that_was_asked_for(url: str) -> None:
    assert Endpoint(url=url, model="teacher").context_tokens() == 64
    with pytest.raises(UserError, match=r"model other at .*: it serves teacher"):
        Endpoint(url=url, model="other").context_tokens()
    with pytest.raises(UserError, match="a server's URL"):
        Endpoint(url="localhost:8000", model="teacher")
    with pytest.raises(UserError, match="a server at http://h:port"):
        Endpoint(url="http://h:port", model="teacher")


@pytest.mark.parametrize("models", [{"ok": True}, [1], {"data": ["teacher"]}, {"data": {"id": 3}}, {"data": [{}]}])
def test_a_list_of_models_that_is_none(url: str, stage: Stage, models: Any) -> None:
    stage.models = models
    with pytest.raises(UserError, match=r"/v1/models at http.*: an answer with no"):
        Endpoint(url=url, model="teacher").context_tokens()


def test_the_key_reaches_the_server_and_nothing_else(
    url: str, stage: Stage, tiny_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    served, key = Served(url=url, model="teacher"), "sk-very-secret"

    def load() -> Any:
        return load_teacher(served, served, tiny_dir, dtype="float32", on_sequences=lambda _: None)

    monkeypatch.delenv("LOGITCACHE_API_KEY", raising=False)
    load().score([sequence(1, 2)], [TopKRequest(max_k=3)])
    assert stage.keys == [None, None]
    monkeypatch.setenv("LOGITCACHE_API_KEY", key)
    engine = load()
    engine.score([sequence(1, 2)], [TopKRequest(max_k=3)])
    assert stage.keys[2:] == [f"Bearer {key}"] * 2
    assert key not in f"{engine} {teacher_identity(served, served)}"
    stage.play = lambda body: (403, {"error": {"message": f"Incorrect API key provided: {key}"}})
    with pytest.raises(UserError, match=r"status 403: .*provided: \.\.\.; set LOGITCACHE_API_KEY"):
        engine.score([sequence(1, 2)], [TopKRequest(max_k=3)])
    monkeypatch.setenv("LOGITCACHE_API_KEY", f"{key}\n")
    with pytest.raises(UserError, match="LOGITCACHE_API_KEY: got what no header can hold") as caught:
        load()
    assert key not in str(caught.value)
