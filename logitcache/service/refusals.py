"""Errors between server and client: one line that a person reads, and nothing of the server's insides.

Guarantees: what leaves the server is a `UserError` written for the one who asks; anything else (a damaged chunk's name,
a path, a traceback) goes to the server's log alone. A client raises the very error that the server meant.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pyarrow.flight as flight

from logitcache.errors import DamagedError, IdentityError, UserError

LOG = logging.getLogger("logitcache.service")
_KINDS = {cls.__name__: cls for cls in (UserError, DamagedError, IdentityError)}


class Refusal(Exception):
    """An error that the client may read.

    Args:
        error: what to tell it.
        status: the Flight error that carries it.
    """

    def __init__(self, error: UserError, status: Callable[..., flight.FlightError] = flight.FlightServerError) -> None:
        super().__init__(str(error))
        self.error, self.status = error, status


@contextmanager
def refusing(what: str, peer: str) -> Iterator[None]:
    """Whatever is raised inside becomes an error for the client, and a line in the log."""
    try:
        yield
    except Refusal as refusal:
        LOG.info("refused", extra={"request": what, "peer": peer, "error": str(refusal.error)})
        raise to_flight(refusal.error, refusal.status) from None
    except DamagedError as error:
        LOG.error("damaged", extra={"request": what, "peer": peer, "error": str(error)})
        told: UserError = DamagedError(
            what, "stored bytes are damaged", "tell who runs the server, whose log names the object"
        )
        raise to_flight(told, flight.FlightServerError) from None
    except Exception:
        LOG.exception("failed", extra={"request": what, "peer": peer})
        told = UserError(what, "the server could not do it", "tell who runs the server, whose log says why")
        raise to_flight(told, flight.FlightServerError) from None


def to_flight(error: UserError, status: Callable[..., flight.FlightError]) -> flight.FlightError:
    """A Flight error that carries one of ours."""
    kind = next(name for name, cls in reversed(_KINDS.items()) if isinstance(error, cls))
    fields = {"error": kind, "asked": error.asked, "found": error.found, "do": error.do}
    return status(str(error), extra_info=json.dumps(fields).encode())


def from_flight(error: Exception) -> UserError | None:
    """The error of ours that a Flight error carries; None if the server did not write it."""
    try:
        fields = json.loads(getattr(error, "extra_info", None) or b"")
        cls = _KINDS[fields["error"]]
        return cls(*(str(fields[name])[:1000] for name in ("asked", "found", "do")))
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
