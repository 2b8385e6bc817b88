"""Bytes of a tier, from what this repository measured; what was not measured is said to be so.

Guarantees: every figure is one of `tools/bench/results/codecs.json`, of which `python -m tools.render` puts a part
beside this module, for an installed package has no benchmarks; it says how it was carried over to another teacher; no
measurement is made up.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from logitcache.codecs import parse_targets
from logitcache.errors import UserError
from logitcache.flops import ModelShape

MEASUREMENTS = "tools/bench/results/codecs.json"
"""Where the figures are from, in the repository."""
TIERS = "tiers.json"
"""Where they are here."""
PLAIN, PEAKED = "plain", "peaked"
"""SmolLM2-135M's own distributions, and the same with sharpened logits: a stand-in for a strong, sure teacher."""


@dataclass(frozen=True, kw_only=True)
class Storage:
    """Of one tier; None is not measured.

    Attributes:
        bytes_per_token: by distribution.
        kept_once_bytes: the head, and whatever else a tier keeps once, with a head in float32.
        basis: how the figures came about.
    """

    bytes_per_token: dict[str, float | None]
    kept_once_bytes: float | None
    basis: str

    def total_bytes(self, tokens: int) -> dict[str, float | None]:
        """Of so many completion tokens, by distribution."""
        once = self.kept_once_bytes
        return {
            name: None if each is None or once is None else each * tokens + once
            for name, each in self.bytes_per_token.items()
        }


def kind_of_tier(word: str) -> str:
    """The kind of one tier, such as `hidden` of `hidden:max-kl=2e-3`; UserError for any other than one tier."""
    specs = parse_targets(word)
    if len(specs) != 1:
        raise UserError(f"the tier {word}", f"it is {len(specs)} of them", "give them one by one")
    return specs[0].kind


def measured(distribution: str, word: str) -> dict[str, Any] | None:
    """The kept figures of a tier, whichever way its options are written, or None."""
    wanted = parse_targets(word)
    for name, figures in _results()["figures"].get(distribution, {}).items():
        if parse_targets(name) == wanted:
            return dict(figures)
    return None


def storage(teacher: ModelShape, word: str) -> Storage:
    """What a tier of this teacher takes.

    Hidden states are scaled by the teacher's width. Other tiers are not scaled at all: their bytes follow the teacher's
    entropy, which no configuration tells, so both distributions are given.
    """
    kind, config = kind_of_tier(word), _results()["config"]
    found = {name: figures for name in (PLAIN, PEAKED) if (figures := measured(name, word)) is not None}
    if not found:
        return Storage(bytes_per_token=dict.fromkeys((PLAIN, PEAKED)), kept_once_bytes=None, basis="not measured")
    width, vocab = teacher.hidden / config["width"], teacher.vocab / config["vocab_size"]
    scale = width if kind == "hidden" else 1.0
    basis = f"{MEASUREMENTS}: {config['teacher']}"
    kept_once = next(iter(found.values()))["kept_once_bytes"]
    return Storage(
        bytes_per_token={
            name: found[name]["bytes_per_token"] * scale if name in found else None for name in (PLAIN, PEAKED)
        },
        kept_once_bytes=kept_once * vocab * scale,
        basis=f"{basis}, scaled by width" if kind == "hidden" else f"{basis}, not scaled",
    )


@cache
def _results() -> dict[str, Any]:
    results: dict[str, Any] = json.loads(files(__package__).joinpath(TIERS).read_text())
    return results
