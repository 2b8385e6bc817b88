"""JSON objects that carry their own digest (docs/format.md, section 3).

An envelope is the ASCII text `{"sha256":"<64 hex digits>","body":<body>}` and a newline; the digest is of the body's
bytes exactly as they stand, so that a reader in any language checks it without re-serialising. Guarantees: `unseal`
returns what `seal` was given or raises ValueError; the same value always gives the same bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection
from typing import Any, NamedTuple

_HEAD, _MIDDLE, _TAIL = b'{"sha256":"', b'","body":', b"}\n"
_BODY_AT = len(_HEAD) + 64 + len(_MIDDLE)


class Sealed(NamedTuple):
    """A body and the digest of its bytes."""

    body: Any
    digest: str


def canonical(value: Any) -> bytes:
    """Compact ASCII JSON with sorted keys. Raises ValueError for NaN, infinity and what JSON cannot say."""
    try:
        return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")
    except TypeError as error:
        raise ValueError(str(error)) from error


def digest_of(value: Any) -> str:
    """SHA-256 of a value's canonical bytes, hex."""
    return hashlib.sha256(canonical(value)).hexdigest()


def seal(body: Any) -> bytes:
    """The envelope of a body."""
    data = canonical(body)
    return b"".join((_HEAD, hashlib.sha256(data).hexdigest().encode(), _MIDDLE, data, _TAIL))


def unseal(data: bytes) -> Sealed:
    """The body of an envelope. Raises ValueError if a byte is not as it was sealed."""
    digest, body = data[len(_HEAD) : len(_HEAD) + 64], data[_BODY_AT : -len(_TAIL)]
    if data != b"".join((_HEAD, digest, _MIDDLE, body, _TAIL)):
        raise ValueError("not an envelope")
    if hashlib.sha256(body).hexdigest().encode() != digest:
        raise ValueError("its digest does not match")
    try:
        return Sealed(json.loads(body), digest.decode())
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def differences(old: Any, new: Any, *, options: Collection[str] = (), path: str = "") -> list[str]:
    """Where two parsed JSON values differ, and how: `sampling.seed: 5 there, 6 asked`.

    What is missing is as good as null. The values of the objects named in `options` are a command line's options of
    the same names, and are followed by them: `sampling.seed: 5 there, 6 asked (--seed)`.
    """
    if isinstance(old, dict) and isinstance(new, dict):
        found = []
        for name in sorted(old.keys() | new.keys()):
            place = f"{path}.{name}" if path else name
            shown = f" (--{name.replace('_', '-')})" if path in options else ""
            below = differences(old.get(name), new.get(name), options=options, path=place)
            found += [f"{difference}{shown}" for difference in below]
        return found
    if old == new:
        return []
    there, asked = (json.dumps(value)[:80] for value in (old, new))
    return [f"{path}: {there} there, {asked} asked"]
