"""What the project asks of its kernels, beside what was measured."""

from __future__ import annotations

from typing import Any

FLOOR_GOAL = {"fp32": 1.15, "bf16": 1.35}
NEAR_GOAL = 2.0


def goals(found: dict[str, Any], with_liger: bool) -> list[dict[str, Any]]:
    """One entry for each figure; `measured` is None where Liger was absent."""
    listed: list[dict[str, Any]] = []

    def at_most(what: str, goal: float, measured: float | None) -> None:
        holds = measured is not None and measured <= goal
        listed.append({"what": what, "goal": f"at most {goal}", "measured": measured, "holds": holds})

    def at_least(what: str, goal: float, measured: float | None) -> None:
        holds = measured is not None and measured >= goal
        listed.append({"what": what, "goal": f"at least {goal}", "measured": measured, "holds": holds})

    for dtype, limit in FLOOR_GOAL.items():
        exact, memory = found["exact"][dtype], found["memory"][dtype]
        seconds, peaks = exact["seconds_s"], memory["peak_extra_bytes"]
        for name in ("forward", "reverse", "mixed", "frozen_head_forward"):
            ratio = exact["over_floor_ratio"][f"native_{name}"]
            at_most(f"{dtype} {name.replace('_', ' ')}: time over the matrix products alone", limit, ratio)
        at_most(f"{dtype}: peak extra memory over plain torch's", 0.05, peaks["native"] / peaks["plain"])
        growth = memory["native_many_rows_peak_extra_bytes"] / peaks["native"]
        at_most(f"{dtype}: peak extra memory, {memory['many_rows']} rows over {memory['rows']}", 1.1, growth)
        for name in ("forward", "reverse"):
            speed = seconds[f"liger_{name}"] / seconds[f"native_{name}"] if with_liger else None
            at_least(f"{dtype} {name}: Liger's time over ours", 1.4, speed)
        at_most(f"{dtype}: memory over Liger's", 0.25, peaks["native"] / peaks["liger"] if with_liger else None)
        for name in ("top_k_forward", "top_k_reverse"):
            ratio = found["sparse"][dtype]["over_cross_entropy_ratio"][name]
            at_most(f"{dtype} {name.replace('_', ' ')}: time over cross-entropy", 1.05, ratio)
    for entry in found["precision"]:
        ours, plain = entry["errors"]["native"], entry["errors"]["plain"]
        worst = max(ours[key] / max(plain[key], 1e-9) for key in ours if "gradient" in key)
        what = f"{entry['dtype']} {entry['objective']}, KL {entry['kl_nats']:.0e} nats"
        at_most(f"{what}: gradient error over plain torch's", 1.0 if entry["dtype"] == "fp32" else NEAR_GOAL, worst)
        key = "loss_relative_error"
        at_most(f"{what}: loss error over plain torch's", NEAR_GOAL, ours[key] / max(plain[key], 1e-9))
    return listed
