"""One HTTP server that speaks vLLM's dialect of OpenAI's completions: asked patiently, but not for ever.

Guarantees: at most `concurrency` requests are under way; a request that finds no answer, or was aborted, is repeated
with growing random pauses, `attempts` times in all and for `patience_s`, and then is an error; an answer in another
model's name, or one that makes no sense, is an error at once. The key is in no message.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

import httpx2
from tenacity import (
    Retrying,
    retry_if_exception_type,
    stop_after_attempt,
    stop_before_delay,
    wait_random_exponential,
)

from logitcache.errors import UserError, require
from logitcache.scorers.answers import OddAnswer, one_choice, served_models
from logitcache.store.place import redact

KEY_VARIABLE = "LOGITCACHE_API_KEY"
"""The environment variable with the key of an endpoint."""
_GREETING_S = 10.0
"""The longest wait for a connection, and for a server to say what it serves: neither takes long where it is up."""
_NO_ENTRY = frozenset({401, 403})
"""Status codes that ask for a key."""
_PASSING = frozenset({408, 425, 429, 500, 502, 503, 504})
"""Status codes that another attempt may cure."""

_Task = TypeVar("_Task")
_Result = TypeVar("_Result")


class _Passing(Exception):
    """An answer that another attempt may better."""


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """Where a teacher is served, and how hard to try.

    Attributes:
        url: the server's root, without `/v1`.
        model: the name the server must answer to.
        concurrency: requests under way at once.
        attempts: how often a request is sent before it counts as lost.
        timeout_s: the longest silence of the server that is not yet a failure: a long completion is one silence.
        patience_s: no further attempt begins after it.
        longest_pause_s: between two attempts.
        api_key: sent as a bearer token.
    """

    url: str
    model: str
    concurrency: int = 16
    attempts: int = 6
    timeout_s: float = 300.0
    patience_s: float = 450.0
    longest_pause_s: float = 30.0
    api_key: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        require(self.url.startswith(("http://", "https://")), "a server's URL, http:// or https://", redact(self.url))
        try:
            httpx2.URL(self.url)
        except httpx2.InvalidURL as error:
            raise UserError(f"a server at {redact(self.url)}", str(error), "check the URL") from error
        sendable = re.fullmatch(r"[!-~]*", self.api_key or "")
        require(bool(sendable), KEY_VARIABLE, "what no header can hold", "set it to the key alone")
        require(self.concurrency >= 1 and self.attempts >= 1, "at least one attempt of one request", self)

    @property
    def shown(self) -> str:
        """The URL without credentials."""
        return redact(self.url)

    @cached_property
    def _client(self) -> httpx2.Client:
        return httpx2.Client(
            base_url=self.url.rstrip("/"),
            headers={"Authorization": f"Bearer {self.api_key}"} if self.api_key else {},
            limits=httpx2.Limits(max_connections=self.concurrency),
        )

    def context_tokens(self) -> int:
        """The served model's context. Raises UserError if the server is not there or serves something else."""
        served = self._ask("GET", "/v1/models", None, served_models, min(self.timeout_s, _GREETING_S))
        card = served.get(self.model)
        if card is None or not isinstance(card.get("max_model_len"), int):
            found = f"it serves {', '.join(served) or 'nothing'}" if card is None else "it states no context length"
            raise UserError(
                f"model {self.model} at {self.shown}", found, "name a model that a vLLM server serves there"
            )
        return int(card["max_model_len"])

    def complete(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """The one choice of a completion. Raises UserError when the server does not give it."""
        return self._ask("POST", "/v1/completions", {"model": self.model, **body}, self._choice, self.timeout_s)

    def _choice(self, answer: Mapping[str, Any]) -> dict[str, Any]:
        if answer.get("model") != self.model:
            raise UserError(
                f"model {self.model} at {self.shown}", f"{answer.get('model')} answered", "point at the right server"
            )
        choice = one_choice(answer)
        if choice.get("finish_reason") == "abort":
            raise _Passing("the server aborted the request")
        return choice

    def for_all(self, tasks: Iterable[_Task], work: Callable[[_Task], _Result]) -> Iterator[_Result]:
        """`work` of every task, `concurrency` at a time, in order. The first failure drops what has not begun."""
        pool = ThreadPoolExecutor(max_workers=self.concurrency, thread_name_prefix="endpoint")
        try:
            futures: list[Future[_Result]] = [pool.submit(work, task) for task in tasks]
            for future in futures:
                yield future.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _ask(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None,
        read: Callable[[Mapping[str, Any]], _Result],
        timeout_s: float,
    ) -> _Result:
        """What `read` makes of the answer; `OddAnswer` is not tried again."""
        retrying = Retrying(
            retry=retry_if_exception_type((httpx2.RequestError, _Passing)),
            stop=stop_after_attempt(self.attempts) | stop_before_delay(self.patience_s),
            wait=wait_random_exponential(multiplier=0.5, max=self.longest_pause_s),
            reraise=True,
        )
        timeout = httpx2.Timeout(timeout_s, connect=min(timeout_s, _GREETING_S))
        try:
            return retrying(lambda: read(self._once(method, path, body, timeout)))
        except OddAnswer as odd:
            raise UserError(f"{path} at {self.shown}", f"an answer with {odd}", "point at a vLLM server") from odd
        except (httpx2.RequestError, _Passing) as error:
            raise UserError(
                f"an answer from {self.shown}",
                f"none in {retrying.statistics['attempt_number']} attempts "
                f"({redact(str(error)) or type(error).__name__})",
                "see that the server is up, then run the command again",
            ) from error

    def _once(
        self, method: str, path: str, body: Mapping[str, Any] | None, timeout: httpx2.Timeout
    ) -> Mapping[str, Any]:
        response = self._client.request(method, path, json=body, timeout=timeout)
        if response.status_code in _PASSING:
            raise _Passing(f"status {response.status_code}")
        if response.status_code != 200:
            do = f"set {KEY_VARIABLE}" if response.status_code in _NO_ENTRY else "ask for what the server allows"
            raise UserError(f"{path} at {self.shown}", f"status {response.status_code}: {self._reason(response)}", do)
        try:
            answer = response.json()
        except (ValueError, RecursionError):
            answer = None
        if not isinstance(answer, dict):
            raise OddAnswer("no JSON object")
        return answer

    def _reason(self, response: httpx2.Response) -> str:
        try:
            error = response.json()["error"]
            text = str(error["message"] if isinstance(error, dict) else error)
        except (ValueError, KeyError, TypeError, RecursionError):
            text = response.text
        return (text.replace(self.api_key, "...") if self.api_key else text)[:500]
