"""Shuffled epochs from an S3 server on loopback, near and 20 ms away: requests, and how much latency is left to see."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from statistics import median
from time import perf_counter
from typing import Any

from logitcache.store import Reader, open_cache
from tools.bench import loopback
from tools.bench.store_data import make, shuffled_batches, write_cache

LATENCY_S = 0.020
BATCH, THREADS, EPOCHS = 16, 4, 3
PER_PART = 4
"""Few, so that a batch's sequences come from many parts, as they do in a cache of any size."""


def remote(tier: str, tokens: int) -> dict[str, Any]:
    """Requests and seconds of a shuffled epoch, read by a few threads as a loader does."""
    made = make(tier, tokens)
    epochs: dict[str, dict[str, float]] = {}
    with loopback.s3_elsewhere() as server:
        write_cache(made, "s3://caches/bench", per_part=PER_PART, storage_options=server.options)
        for name, latency_s in (("near", 0.0), ("far", LATENCY_S)):
            reader = open_cache("s3://caches/bench", targets=tier, storage_options=server.options)
            epochs[name] = _epochs(reader, server, latency_s)
    near, far, sequences = epochs["near"], epochs["far"], len(made.sequences)
    parts = -(-sequences // PER_PART)
    asked_s = far["warm_requests"] * LATENCY_S
    return {
        "sequences": sequences,
        "requests_per_sequence": far["warm_requests"] / sequences,
        "index_requests_per_part": (far["cold_requests"] - far["warm_requests"]) / parts,
        "epoch_s": near["warm_s"],
        "epoch_with_20ms_s": far["warm_s"],
        "latency_of_all_requests_s": asked_s,
        "latency_not_hidden": (far["warm_s"] - near["warm_s"]) / asked_s,
    }


def _epochs(reader: Reader, server: loopback.Away, latency_s: float) -> dict[str, float]:
    """Requests of a first epoch, which reads the part indexes too; requests and seconds of the ones after it."""
    server.requests(latency_s)
    with ThreadPoolExecutor(THREADS) as pool:

        def epoch(seed: int) -> float:
            start = perf_counter()
            for _ in pool.map(reader.read, shuffled_batches(len(reader), BATCH, seed)):
                pass
            return perf_counter() - start

        epoch(0)
        cold = server.requests(latency_s)
        seconds = [epoch(seed) for seed in range(1, EPOCHS + 1)]
    return {"cold_requests": cold, "warm_s": median(seconds), "warm_requests": server.requests(latency_s) / EPOCHS}
