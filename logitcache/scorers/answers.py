"""What a server answered, taken for nothing until it was looked at.

Guarantees: what is returned has the types and the ranges that it is said to have; everything else is an `OddAnswer`
that says in words what was there instead.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from logitcache.records import FinishReason

Row = tuple[NDArray[np.int64], NDArray[np.float64]]
"""Ids and log-probabilities of one position, likeliest first."""

_ABOVE_ZERO = 1e-4
"""Nats that rounding may lift a log-probability above 0: float32 normalisation is off by about 1e-5."""
_ABOVE_ONE = 1e-3
"""Mass beyond 1 that rounding may give to the entries of a row together."""


class OddAnswer(Exception):
    """An answer that no vLLM server gives: what was found in it."""


def served_models(answer: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The cards of `/v1/models` by the models' names."""
    cards = answer.get("data")
    if not isinstance(cards, list) or not all(
        isinstance(card, dict) and isinstance(card.get("id"), str) for card in cards
    ):
        raise OddAnswer("no list of models")
    return {card["id"]: card for card in cards}


def one_choice(answer: Mapping[str, Any]) -> dict[str, Any]:
    """The first choice of `/v1/completions`."""
    choices = answer.get("choices")
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        raise OddAnswer("no choice")
    choice: dict[str, Any] = choices[0]
    return choice


def completion(
    choice: Mapping[str, Any], *, vocab_size: int, max_tokens: int, stop_ids: Collection[int]
) -> tuple[list[int], FinishReason]:
    """The tokens of a completion, and why it ended: at a stop token, which is its last, or at `max_tokens`."""
    ids = choice.get("token_ids")
    if not isinstance(ids, list) or not ids:
        raise OddAnswer("no token ids")
    if not all(type(ident) is int and 0 <= ident < vocab_size for ident in ids):
        raise OddAnswer(f"token ids that are none of the {vocab_size}")
    match choice.get("finish_reason"):
        case "stop" if len(ids) <= max_tokens and ids[-1] in stop_ids:
            return ids, FinishReason.STOP
        case "length" if len(ids) == max_tokens:
            return ids, FinishReason.LENGTH
        case reason:
            found = f"{len(ids)} tokens of at most {max_tokens}, the last {ids[-1]}, and finish_reason {_shown(reason)}"
            raise OddAnswer(found)


def top_rows(choice: Mapping[str, Any], tokens: list[int], *, prompt_tokens: int, vocab_size: int) -> list[Row]:
    """A row for each of `tokens`, which end the sequence that `prompt_tokens` begin; each holds its own token."""
    rows, length = choice.get("prompt_logprobs"), prompt_tokens + len(tokens)
    if not isinstance(rows, list) or len(rows) != length:
        found = f"{len(rows)} rows" if isinstance(rows, list) else "no rows"
        raise OddAnswer(f"{found} of log-probabilities for {length} tokens")
    parsed = [_row(row, vocab_size) for row in rows[prompt_tokens:]]
    for (ids, _), token in zip(parsed, tokens, strict=True):
        if token not in ids:
            raise OddAnswer(f"no log-probability of token {token}")
    return parsed


def _row(row: object, vocab_size: int) -> Row:
    if not isinstance(row, dict) or not row:
        raise OddAnswer("a row without log-probabilities")
    ids = np.array([_token(name, vocab_size) for name in row], np.int64)
    log_probs = np.array([_log_prob(entry) for entry in row.values()], np.float64)
    if not np.isfinite(log_probs).all():
        raise OddAnswer("log-probabilities that are not finite numbers")
    if (largest := log_probs.max()) > _ABOVE_ZERO:
        raise OddAnswer(f"a log-probability of {largest:.4g}, above 0")
    if (mass := np.exp(log_probs).sum()) > 1 + _ABOVE_ONE:
        raise OddAnswer(f"a row whose probabilities sum to {mass:.4g}")
    order = np.lexsort((ids, -log_probs))
    return ids[order], np.minimum(log_probs[order], 0.0)


def _token(name: str, vocab_size: int) -> int:
    if len(name) > 18 or not name.isdecimal() or name != str(int(name)):
        raise OddAnswer(f"a log-probability of {_shown(name)}, which is no token id")
    if int(name) >= vocab_size:
        raise OddAnswer(f"probability of id {name}, beyond the {vocab_size} tokens")
    return int(name)


def _log_prob(entry: object) -> float:
    value = entry.get("logprob") if isinstance(entry, dict) else None
    return float(value) if isinstance(value, int | float) and abs(value) < 1e300 else np.nan


def _shown(value: object) -> str:
    return repr(value)[:40]
