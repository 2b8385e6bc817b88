"""What the project asks of its codecs, beside what was measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tools.bench.result import at_most

CODED = "hidden:max-kl=2e-3"
REVERSE = {"student": (CODED,), "near_student": (CODED, "hidden:step=0.005", "hidden")}
"""Whose reverse-KL gradient is judged, and from which tiers. The nearer a student is, the smaller the gradient that a
tier's error is compared with.
"""


def goals(plain: Mapping[str, Any], peaked: Mapping[str, Any], raw_state_bytes: float) -> list[dict[str, Any]]:
    """The codec rows of the project's table."""
    listed = []
    for peer, bound in (
        ("Megatron-LM top-64 bf16", 0.36),
        ("Megatron-LM top-128 bf16", 0.36),
        ("DistillKit recommended k=128", 0.22),
    ):
        ours = _leanest(plain, plain[peer]["forward_kl_mean_nats"])
        listed.append(
            at_most(f"top-k at {peer}'s mean KL", bound, ours / plain[peer]["bytes_per_token"], "of its bytes")
        )
    listed.append(at_most("peaked: top-k at a mean KL of 3e-3 nats", 10, _leanest(peaked, 3e-3), "bytes a token"))
    coded, bf16 = plain[CODED], plain["hidden"]
    worst = max(coded["forward_kl_mean_nats"], coded["reverse_kl_mean_nats"])
    listed += [
        at_most("hidden, transform-coded: mean KL, worse direction", 2e-3, worst, "nats"),
        at_most("hidden, transform-coded, there", 0.25, coded["bytes_per_token"] / raw_state_bytes, "of bf16's bytes"),
        at_most("hidden bf16: mean KL, worse direction", 5e-5,
                max(bf16["forward_kl_mean_nats"], bf16["reverse_kl_mean_nats"]), "nats"),
    ]  # fmt: skip
    for student, tiers in REVERSE.items():
        reverse, away = f"{student}_reverse_gradient_relative_error", plain[f"{student}_kl_mean_nats"]
        sparse = plain["topk:p=1e-3"][reverse]
        listed += [
            at_most(f"reverse-KL gradient of a student {away:.2g} nats away, {tier}", 0.1, plain[tier][reverse],
                    f"relative error (top-k p=1e-3: {sparse:.2f})")
            for tier in tiers
        ]  # fmt: skip
    return listed


def _leanest(figures: Mapping[str, Any], kl_nats: float) -> float:
    """Bytes a token of the leanest top-k setting whose mean KL is at most that; infinite if none is."""
    return min(
        (
            found["bytes_per_token"]
            for name, found in figures.items()
            if name.startswith("topk") and found["forward_kl_mean_nats"] <= kl_nats
        ),
        default=float("inf"),
    )
