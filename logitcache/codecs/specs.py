"""What a user asks to keep, as small types, and the short text form of it on a command line.

Guarantees: a spec is valid once built, and `parse_targets` either returns specs or raises one
`UserError` that lists what exists. Nothing here has seen a teacher: turning a spec into a codec is
`logitcache.codecs.calibrate`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from logitcache.errors import UserError

MAX_KEPT = 32_767
"""Most entries a row can keep: the count is an int16 on disk."""

MAX_DRAWS = 255
"""Most draws a row can have: a count is eight bits on disk."""


def _check(condition: bool, asked: str, found: object) -> None:
    if not condition:
        raise UserError(asked, f"got {found}", "see docs/codecs.md for the range")


@dataclass(frozen=True, kw_only=True)
class TopKSpec:
    """`topk`: the likeliest tokens of each row, as many as the row needs.

    Attributes:
        p: keep tokens with at least this probability; 0 keeps `k` tokens in every row.
        mass: stop once this much probability is kept (nucleus); 1 does not stop.
        k: keep at most this many.
        step: of the root-probability grid; None lets the threshold decide it (`topk_values.matching_step`).
        max_kl: nats; choose `p` for this mean forward KL on held-out tokens, instead of naming it.
    """

    kind: ClassVar[str] = "topk"
    p: float = 3e-4
    mass: float = 1.0
    k: int = 1024
    step: float | None = None
    max_kl: float | None = None

    def __post_init__(self) -> None:
        _check(0 <= self.p < 1, "topk:p=, a probability of 0 to 1", self.p)
        _check(0 < self.mass <= 1, "topk:mass=, a probability above 0", self.mass)
        _check(1 <= self.k <= MAX_KEPT, f"topk:k=, 1 to {MAX_KEPT} tokens", self.k)
        _check(self.step is None or 0.003 <= self.step <= 0.1, "topk:step=, 0.003 to 0.1", self.step)
        _check(self.max_kl is None or 0 < self.max_kl < math.inf, "topk:max-kl=, nats above 0", self.max_kl)


@dataclass(frozen=True, kw_only=True)
class HiddenSpec:
    """`hidden`: the state after the final norm.

    Attributes:
        step: quantisation step of the transform-coded form, in root nats; None keeps bfloat16 states.
        max_kl: nats; choose `step` for this mean KL, the worse of both directions, on held-out tokens.
    """

    kind: ClassVar[str] = "hidden"
    step: float | None = None
    max_kl: float | None = None

    def __post_init__(self) -> None:
        _check(self.step is None or 0 < self.step < math.inf, "hidden:step=, root nats above 0", self.step)
        _check(self.max_kl is None or 0 < self.max_kl < math.inf, "hidden:max-kl=, nats above 0", self.max_kl)
        _check(self.step is None or self.max_kl is None, "hidden:step= or hidden:max-kl=", "both")


@dataclass(frozen=True, kw_only=True)
class FullVocabSpec:
    """`full`: every log-probability, on a grid of `step` nats (for small vocabularies and short windows)."""

    kind: ClassVar[str] = "full"
    step: float = 1 / 64

    def __post_init__(self) -> None:
        _check(1 / 1024 <= self.step <= 1, "full:step=, 1/1024 to 1 nat", self.step)


@dataclass(frozen=True, kw_only=True)
class SampledSpec:
    """`sampled`: `n` draws from each row, as ids with counts (unbiased for forward KL only)."""

    kind: ClassVar[str] = "sampled"
    n: int = 64

    def __post_init__(self) -> None:
        _check(1 <= self.n <= MAX_DRAWS, f"sampled:n=, 1 to {MAX_DRAWS} draws", self.n)


TargetSpec = TopKSpec | HiddenSpec | FullVocabSpec | SampledSpec

_KINDS: dict[str, type[TargetSpec]] = {spec.kind: spec for spec in (TopKSpec, HiddenSpec, FullVocabSpec, SampledSpec)}
_EXAMPLE = "topk:k=64,p=1e-4,hidden"


def parse_targets(text: str) -> list[TargetSpec]:
    """Read `kind[:key=value]...` items separated by commas; an item that is only `key=value` continues the last.

    `topk:k=64,hidden`, `topk:k=64,p=1e-4,hidden:max-kl=2e-3` and `topk:k=64:p=1e-4` are all understood.

    Raises:
        UserError: an unknown kind or key, a value that is no number, a kind asked for twice, nothing at all.
    """
    found: dict[str, dict[str, Any]] = {}
    current: str | None = None
    for item in filter(None, (part.strip() for part in text.split(","))):
        kind, *pairs = item.split(":")
        if "=" in kind:
            if current is None:
                raise UserError(f"--targets {text}", f"{kind!r} names no kind", f"start with one, as in {_EXAMPLE}")
            pairs = [kind, *pairs]
        else:
            current = _new_kind(kind.strip(), found, text)
        for pair in pairs:
            key, value = _read_pair(current, pair, text)
            found[current][key] = value
    if not found:
        raise UserError("--targets", "nothing was named", f"name at least one of {', '.join(_KINDS)}: {_EXAMPLE}")
    return [_KINDS[kind](**options) for kind, options in found.items()]


def _new_kind(kind: str, found: dict[str, dict[str, Any]], text: str) -> str:
    if kind not in _KINDS:
        raise UserError(f"--targets {text}", f"there is no kind {kind!r}", f"choose from {', '.join(_KINDS)}")
    if kind in found:
        raise UserError(f"--targets {text}", f"{kind} is named twice", "keep one tier of each kind in a cache")
    found[kind] = {}
    return kind


def _read_pair(kind: str, pair: str, text: str) -> tuple[str, int | float]:
    key, _, value = (part.strip() for part in pair.partition("="))
    name = key.replace("-", "_")
    types = {field.name: str(field.type) for field in fields(_KINDS[kind])}
    if name not in types:
        options = ", ".join(option.replace("_", "-") for option in types)
        raise UserError(f"--targets {text}", f"{kind} has no option {key!r}", f"choose from {options}")
    try:
        return name, int(value) if types[name] == "int" else float(value)
    except ValueError:
        number = "a whole number" if types[name] == "int" else "a number"
        raise UserError(f"--targets {text}", f"{key}={value!r} is not {number}", f"write {key}=NUMBER") from None
