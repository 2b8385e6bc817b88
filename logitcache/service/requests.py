"""What a client may ask for, as JSON: the only thing of a client's that the server ever interprets.

Guarantees: a request that parses names a cache and a tier (never a path), lies within the limits, and says of which
content it speaks: a server that has another manifest by then refuses it, so a stream is never continued on other data.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from logitcache.errors import UserError
from logitcache.scoring import FullVocabRequest, HiddenStateRequest, SampledRequest, TargetRequest, TopKRequest

MAX_REQUEST_BYTES = 1 << 20
MAX_SEQUENCES = 1 << 16
"""In one request; a client cuts longer ones up."""


@dataclass(frozen=True, kw_only=True)
class RowsRequest:
    """Sequences by index, with a tier's targets or none, cut to a window as `Reader.read` does.

    Attributes:
        cache: its name in the catalogue.
        manifest: digest of its content.
        tier: None for tokens alone.
        indices: in the order they are wanted; one may come twice.
        first: completion token where each window starts.
        limit: rows of a window; None for all that follow.
        encoded: send the codec's own arrays, for the client to decode.
    """

    cache: str
    manifest: str
    tier: str | None
    indices: Sequence[int]
    first: int = 0
    limit: int | None = None
    encoded: bool = False


@dataclass(frozen=True, kw_only=True)
class AllRequest:
    """Every sequence in order, whole and decoded: a flight's ticket, for clients that know nothing of requests."""

    cache: str
    manifest: str
    tier: str | None


@dataclass(frozen=True, kw_only=True)
class SamplesRequest:
    """The table of all sequences."""

    cache: str
    manifest: str


@dataclass(frozen=True, kw_only=True)
class SharedRequest:
    """One array that a tier's codec keeps once."""

    cache: str
    manifest: str
    tier: str
    array: str


@dataclass(frozen=True, kw_only=True)
class HeadRequest:
    """One array of a teacher's output head: `weight` or `bias`."""

    teacher: str
    digest: str
    array: str


@dataclass(frozen=True, kw_only=True)
class ScoreRequest:
    """What a teacher shall say of the sequences that follow in the exchange.

    Attributes:
        teacher: its name in the catalogue.
        digest: of what the server said of it (`logitcache.service.teachers`), so that no other one answers.
        want: the kind of targets.
    """

    teacher: str
    digest: str
    want: TargetRequest


Request = RowsRequest | AllRequest | SamplesRequest | SharedRequest | HeadRequest
_KINDS: dict[str, type[Request]] = {
    "rows": RowsRequest,
    "all": AllRequest,
    "samples": SamplesRequest,
    "shared": SharedRequest,
    "head": HeadRequest,
}
_WANTS: dict[str, type[TargetRequest]] = {
    "topk": TopKRequest,
    "hidden": HiddenStateRequest,
    "full": FullVocabRequest,
    "sampled": SampledRequest,
}
_MOST_KEPT = 1 << 24


def to_bytes(request: Request) -> bytes:
    """A request as the ticket of `do_get`."""
    kind = next(name for name, cls in _KINDS.items() if isinstance(request, cls))
    return json.dumps({"get": kind, **vars(request)}, separators=(",", ":")).encode()


def parse_request(data: bytes) -> Request:
    """The request in a ticket. Raises UserError unless it is one, with every field and no other."""
    fields = parse_object(data)
    kind = fields.pop("get", None)
    cls = _KINDS.get(kind) if isinstance(kind, str) else None
    if cls is None:
        raise malformed(f"get is not one of {', '.join(_KINDS)}")
    if fields.keys() != cls.__dataclass_fields__.keys():
        raise malformed(f"{kind} takes exactly {', '.join(cls.__dataclass_fields__)}")
    _check_names(fields, may_miss="tier" if cls in (RowsRequest, AllRequest) else None)
    if cls is not RowsRequest:
        return cls(**fields)
    indices = fields["indices"]
    if not isinstance(indices, list) or len(indices) > MAX_SEQUENCES or not all(_count(item) for item in indices):
        raise malformed(f"indices are not a list of at most {MAX_SEQUENCES:,} counts")
    if not _count(fields["first"]) or not (fields["limit"] is None or _count(fields["limit"])):
        raise malformed("first and limit are not counts")
    if not isinstance(fields["encoded"], bool):
        raise malformed("encoded is not true or false")
    return RowsRequest(**{**fields, "indices": tuple(indices)})


def score_to_bytes(request: ScoreRequest) -> bytes:
    """A request to score as the command of `do_exchange`."""
    want = {"kind": kind_of(request.want), **vars(request.want)}
    return json.dumps({**vars(request), "want": want}, separators=(",", ":")).encode()


def parse_score(data: bytes) -> ScoreRequest:
    """The request in a command. Raises UserError unless it is one, with every field and no other."""
    fields = parse_object(data)
    if fields.keys() != ScoreRequest.__dataclass_fields__.keys():
        raise malformed(f"to score takes exactly {', '.join(ScoreRequest.__dataclass_fields__)}")
    _check_names(fields)
    return ScoreRequest(**{**fields, "want": _parse_want(fields["want"])})


def kind_of(want: TargetRequest) -> str:
    """The kind of targets that a request asks for."""
    return next(kind for kind, cls in _WANTS.items() if isinstance(want, cls))


def parse_object(data: bytes) -> dict[str, Any]:
    """A JSON object from a client. Raises UserError unless it is one of an acceptable size."""
    if len(data) > MAX_REQUEST_BYTES:
        raise malformed(f"{len(data):,} bytes are more than {MAX_REQUEST_BYTES:,}")
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise malformed("it is not JSON") from error
    if not isinstance(value, dict):
        raise malformed("it is not a JSON object")
    return value


def is_name(value: Any) -> bool:
    """Whether a JSON value is text that can be told again; half of a surrogate pair is not."""
    return isinstance(value, str) and value.encode(errors="ignore").decode() == value


def malformed(found: str) -> UserError:
    """The error for a request that is none."""
    return UserError("a request", found, "use a client of this version")


def _parse_want(want: Any) -> TargetRequest:
    cls = _WANTS.get(str(want.get("kind"))) if isinstance(want, dict) else None
    if cls is None or want.keys() - {"kind"} != cls.__dataclass_fields__.keys():
        raise malformed(f"want is not one of {', '.join(_WANTS)} with its fields")
    values = {name: value for name, value in want.items() if name != "kind"}
    for name, value in values.items():
        if name in ("max_k", "samples"):
            if not _count(value) or not 1 <= value <= _MOST_KEPT:
                raise malformed(f"{name} is not a count of 1 or more")
        elif type(value) not in (int, float) or not 0 <= value <= 1:
            raise malformed(f"{name} is not a probability")
    return cls(**values)


def _check_names(fields: Mapping[str, Any], *, may_miss: str | None = None) -> None:
    for name, value in fields.items():
        if name not in ("cache", "manifest", "tier", "array", "teacher", "digest"):
            continue
        if value is None and name != may_miss:
            raise malformed(f"{name} is missing")
        if value is not None and not is_name(value):
            raise malformed(f"{name} is not a name")


def _count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 62
