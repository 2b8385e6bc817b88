"""Load for a server: many students that read at once, each from a connection of its own, and what they waited.

Guarantees: a read that fails is counted and named, not hidden. The students are threads of one process, whose own work
(decoding, where they do that) is in their waits.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from logitcache.errors import UserError
from logitcache.service.settings import Load
from logitcache.store import open_cache


@dataclass(kw_only=True)
class _Seen:
    waits_s: list[float] = field(default_factory=list)
    tokens: int = 0
    errors: list[str] = field(default_factory=list)


def run_load(
    url: str, load: Load, *, targets: str | None = None, storage_options: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Load a server; rates, waits and errors.

    Args:
        url: of a served cache.
        load: what to load it with.
        targets: the tier to read, by name or kind; None for tokens alone.
        storage_options: as of `open_cache`.

    Raises:
        UserError: no such cache or tier, no answer at the start.
    """
    options = {**(storage_options or {}), "decoded": load.decoded}
    readers: list[Any] = [open_cache(url, targets=targets, storage_options=options) for _ in range(load.clients)]
    reads = [reader.read_tokens if targets is None else reader.read for reader in readers]
    for read in reads:
        read([0])  # a codec that is fetched once
    seen = [_Seen() for _ in readers]
    started = time.monotonic()

    def student(number: int) -> None:
        rng, mine = np.random.default_rng([load.seed, number]), seen[number]
        time.sleep(float(rng.uniform(0, load.pause_s)))
        while time.monotonic() < started + load.seconds:
            indices = rng.integers(0, len(readers[number]), load.sequences)
            asked = time.monotonic()
            try:
                found = reads[number](indices)
            except UserError as error:
                mine.errors.append(str(error))
                continue
            mine.waits_s.append(time.monotonic() - asked)
            mine.tokens += sum(len(item if targets is None else item.sequence) for item in found)
            time.sleep(load.pause_s)

    threads = [threading.Thread(target=student, args=(number,), daemon=True) for number in range(load.clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return _summary(seen, time.monotonic() - started)


def _summary(seen: list[_Seen], seconds: float) -> dict[str, Any]:
    waits = np.array([wait for each in seen for wait in each.waits_s])
    errors = [error for each in seen for error in each.errors]
    return {
        "seconds": seconds,
        "reads": len(waits),
        "errors": len(errors),
        "first_error": errors[0] if errors else None,
        "clients_served": sum(bool(each.waits_s) for each in seen),
        "tokens_per_s": sum(each.tokens for each in seen) / seconds,
        "wait_p50_s": float(np.percentile(waits, 50)) if len(waits) else None,
        "wait_p99_s": float(np.percentile(waits, 99)) if len(waits) else None,
    }
