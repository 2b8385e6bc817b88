"""What the project asks of its kernels, beside what was measured."""

from __future__ import annotations

from typing import Any

from tools.bench.result import at_least, at_most

FLOOR_GOAL = {"fp32": 1.15, "bf16": 1.35}
NEAR_GOAL = 2.0


def goals(found: dict[str, Any]) -> list[dict[str, Any]]:
    """One entry for each figure; those against Liger only where it ran."""
    listed: list[dict[str, Any]] = []
    for dtype, limit in FLOOR_GOAL.items():
        exact, memory = found["exact"][dtype], found["memory"][dtype]
        seconds, peaks = exact["seconds_s"], memory["peak_extra_bytes"]
        for name in ("forward", "reverse", "mixed", "frozen_head_forward"):
            ratio = exact["over_floor_ratio"][f"native_{name}"]
            listed.append(
                at_most(f"{dtype} {name.replace('_', ' ')}: time over the matrix products alone", limit, ratio, "times")
            )
        listed.append(
            at_most(f"{dtype}: peak extra memory over plain torch's", 0.05, peaks["native"] / peaks["plain"], "times")
        )
        growth = memory["native_many_rows_peak_extra_bytes"] / peaks["native"]
        listed.append(
            at_most(
                f"{dtype}: peak extra memory, {memory['many_rows']} rows over {memory['rows']}", 1.1, growth, "times"
            )
        )
        if "liger" in peaks:
            for name in ("forward", "reverse"):
                speed = seconds[f"liger_{name}"] / seconds[f"native_{name}"]
                listed.append(at_least(f"{dtype} {name}: Liger's time over ours", 1.4, speed, "times"))
            listed.append(at_most(f"{dtype}: memory over Liger's", 0.25, peaks["native"] / peaks["liger"], "times"))
        for name in ("top_k_forward", "top_k_reverse"):
            ratio = found["sparse"][dtype]["over_cross_entropy_ratio"][name]
            listed.append(at_most(f"{dtype} {name.replace('_', ' ')}: time over cross-entropy", 1.05, ratio, "times"))
    for entry in found["precision"]:
        ours, plain = entry["errors"]["native"], entry["errors"]["plain"]
        worst = max(ours[key] / max(plain[key], 1e-9) for key in ours if "gradient" in key)
        what = f"{entry['dtype']} {entry['objective']}, KL {entry['kl_nats']:.0e} nats"
        listed.append(
            at_most(
                f"{what}: gradient error over plain torch's",
                1.0 if entry["dtype"] == "fp32" else NEAR_GOAL,
                worst,
                "times",
            )
        )
        key = "loss_relative_error"
        listed.append(
            at_most(f"{what}: loss error over plain torch's", NEAR_GOAL, ours[key] / max(plain[key], 1e-9), "times")
        )
    return listed
