"""Who may use what: bearer tokens from a file, each with the caches and teachers it opens.

Guarantees: a token is compared in constant time with every token there is; neither a log nor an error shows one. A
caller without a right to a name learns no more than if there were nothing of that name.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.flight as flight

from logitcache.errors import UserError
from logitcache.service.refusals import LOG, to_flight

RIGHTS = "rights"
"""The key of the middleware that knows a caller's rights."""
ANY = "*"
_SHORTEST = 16


@dataclass(frozen=True, kw_only=True)
class Rights:
    """The names of caches that a caller may read, and of teachers that may score for it; None for all."""

    names: frozenset[str] | None

    def may_use(self, name: str) -> bool:
        """Whether that one is among them."""
        return self.names is None or name in self.names


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """Rights by the SHA-256 of a token."""

    rights: Mapping[bytes, Rights]

    @classmethod
    def read(cls, path: Path) -> Tokens:
        """From a file with a line `TOKEN NAME...` for each, where `*` is every name and `#` starts a comment.

        Raises UserError for a file that is not so, or for a token of fewer than 16 characters.
        """
        try:
            lines = path.read_text().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"tokens in {path}", type(error).__name__, "give a text file that can be read") from error
        rights: dict[bytes, Rights] = {}
        for number, line in enumerate(lines, 1):
            token, *names = line.partition("#")[0].split() or [""]
            if not token:
                continue
            if len(token) < _SHORTEST or not token.isascii() or not names:
                found = f"line {number} is not a token of {_SHORTEST} characters or more and its names"
                raise UserError(f"tokens in {path}", found, "write `TOKEN NAME...`, or `TOKEN *`")
            rights[_digest(token)] = Rights(names=None if ANY in names else frozenset(names))
        if not rights:
            raise UserError(f"tokens in {path}", "there is none", "write a line `TOKEN *`")
        return cls(rights=rights)

    def of(self, token: str) -> Rights | None:
        """The rights of a token; None if it is not one."""
        digest, found = _digest(token), None
        for known, rights in self.rights.items():
            if hmac.compare_digest(known, digest):
                found = rights
        return found


class Caller(flight.ServerMiddleware):
    """The caller of one request, once let in."""

    def __init__(self, rights: Rights) -> None:
        self.rights = rights


class Gate(flight.ServerMiddlewareFactory):
    """Lets requests in: those with a token where there are tokens, and all where there are none.

    Args:
        tokens: that there are; None lets everyone in.
        refused: told the call of each request that is not let in.
    """

    def __init__(self, tokens: Tokens | None, refused: Callable[[str], None] = lambda call: None) -> None:
        self._tokens, self._refused = tokens, refused

    def start_call(self, info: Any, headers: Mapping[str, Any]) -> Caller:
        """See `flight.ServerMiddlewareFactory`."""
        if self._tokens is None:
            return Caller(Rights(names=None))
        values = headers.get("authorization") or [""]
        scheme, _, token = str(values[0]).partition(" ")
        rights = self._tokens.of(token.strip()) if scheme.lower() == "bearer" else None
        if rights is None:
            error = UserError("read from this server", "no token that it knows", "set LOGITCACHE_TOKEN to one")
            call = info.method.name.lower()
            LOG.info("refused", extra={"request": call, "error": str(error)})
            self._refused(call)
            raise to_flight(error, flight.FlightUnauthenticatedError)
        return Caller(rights)


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode(errors="replace")).digest()
