"""One HTTP server that speaks vLLM's dialect of OpenAI's completions: asked patiently, but not for ever.

Guarantees: at most `concurrency` requests are under way; a request that finds no answer is repeated with growing random
pauses, `attempts` times in all, and then is an error; an answer in another model's name is an error at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

import httpx2
from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, wait_random_exponential

from logitcache.errors import UserError, require
from logitcache.store.place import redact

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
        timeout_s: the longest silence of the server that is not yet a failure.
        longest_pause_s: between two attempts.
        api_key: sent as a bearer token.
    """

    url: str
    model: str
    concurrency: int = 16
    attempts: int = 6
    timeout_s: float = 300.0
    longest_pause_s: float = 30.0
    api_key: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        require(self.url.startswith(("http://", "https://")), "a server's URL, http:// or https://", redact(self.url))
        require(self.concurrency >= 1 and self.attempts >= 1, "at least one attempt of one request", self)

    @property
    def shown(self) -> str:
        """The URL without credentials."""
        return redact(self.url)

    @cached_property
    def _client(self) -> httpx2.Client:
        return httpx2.Client(
            base_url=self.url.rstrip("/"),
            headers={} if self.api_key is None else {"Authorization": f"Bearer {self.api_key}"},
            timeout=self.timeout_s,
            limits=httpx2.Limits(max_connections=self.concurrency),
        )

    def context_tokens(self) -> int:
        """The served model's context. Raises UserError if the server is not there or serves something else."""
        served = {card["id"]: card for card in self._ask("GET", "/v1/models", None)["data"]}
        card = served.get(self.model)
        if card is None or not isinstance(card.get("max_model_len"), int):
            found = f"it serves {', '.join(served) or 'nothing'}" if card is None else "it states no context length"
            raise UserError(
                f"model {self.model} at {self.shown}", found, "name a model that a vLLM server serves there"
            )
        return int(card["max_model_len"])

    def complete(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """The one choice of a completion. Raises UserError when the server does not give it."""
        answer = self._ask("POST", "/v1/completions", {"model": self.model, **body})
        if answer.get("model") != self.model:
            raise UserError(
                f"model {self.model} at {self.shown}", f"{answer.get('model')} answered", "point at the right server"
            )
        choice: dict[str, Any] = answer["choices"][0]
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

    def _ask(self, method: str, path: str, body: Mapping[str, Any] | None) -> dict[str, Any]:
        retrying = Retrying(
            retry=retry_if_exception_type((httpx2.TransportError, _Passing)),
            stop=stop_after_attempt(self.attempts),
            wait=wait_random_exponential(multiplier=0.5, max=self.longest_pause_s),
            reraise=True,
        )
        try:
            answer: dict[str, Any] = retrying(self._once, method, path, body)
        except (httpx2.TransportError, _Passing) as error:
            raise UserError(
                f"an answer from {self.shown}",
                f"none in {self.attempts} attempts ({redact(str(error)) or type(error).__name__})",
                "see that the server is up, then run the command again",
            ) from error
        return answer

    def _once(self, method: str, path: str, body: Mapping[str, Any] | None) -> dict[str, Any]:
        response = self._client.request(method, path, json=body)
        if response.status_code in _PASSING:
            raise _Passing(f"status {response.status_code}")
        if response.status_code != 200:
            raise UserError(
                f"{path} at {self.shown}",
                f"status {response.status_code}: {_reason(response)}",
                "ask for what the server allows",
            )
        try:
            answer: dict[str, Any] = response.json()
        except ValueError as error:
            raise UserError(
                f"{path} at {self.shown}", "an answer that is not JSON", "point at a vLLM server"
            ) from error
        return answer


def _reason(response: httpx2.Response) -> str:
    try:
        error = response.json()["error"]
        return str(error["message"] if isinstance(error, dict) else error)[:500]
    except (ValueError, KeyError, TypeError):
        return response.text[:200]
