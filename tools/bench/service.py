"""What the service costs: `python -m tools.bench.service [--quick] [--json PATH] [--soak SECONDS]`.

A server in a process of its own, on loopback, and a cache of made-up numbers of real sizes (`tools.bench.store_data`).
One student's rates stand beside those of a reader of the same cache on disk, interleaved, to the same end: targets in
the student's hands. `decoded`: the server decodes; `encoded`: targets travel as they are stored, and the student
decodes. Then 64 students at once, as fast as they can (`crowd`) and at the pace of training (`paced`: together a half
of what the crowd got); then as many for the soak, while the server's memory is watched.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from logitcache.service.load import run_load
from logitcache.service.settings import Load
from logitcache.store import open_cache
from tools.bench.result import at_least, at_most, keep, options
from tools.bench.store_data import make, shuffled_batches, write_cache
from tools.bench.timing import interleaved

BATCH = 32
CLIENTS = 64
IN_A_READ = 4
"""Sequences in a read of one of many students."""


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much to measure."""

    tokens: dict[str, int]
    rounds: int
    load_s: float
    soak_s: float


FULL = Size(tokens={"topk": 1_000_000, "hidden": 200_000}, rounds=7, load_s=30.0, soak_s=600.0)
QUICK = Size(tokens={"topk": 100_000, "hidden": 40_000}, rounds=2, load_s=3.0, soak_s=6.0)


@dataclass(frozen=True, kw_only=True)
class Running:
    """A server: its process, and the address of what it serves."""

    pid: int
    location: str

    def rss_bytes(self) -> int:
        """Memory that the process holds now."""
        pages = int(Path(f"/proc/{self.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")


def start_server(*arguments: str) -> tuple[subprocess.Popen[str], str]:
    """`logitcache serve` with these arguments, once it takes requests: its process and its address."""
    command = [sys.executable, "-m", "logitcache.cli", "serve", *arguments, "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout is not None
    return process, json.loads(process.stdout.readline())["location"]


@contextmanager
def serving(*arguments: str) -> Iterator[Running]:
    """`logitcache serve` with these arguments, at a free port."""
    process, location = start_server(*arguments, "--port", "0")
    try:
        yield Running(pid=process.pid, location=location)
    finally:
        process.terminate()
        process.wait(60)


def rates(place: str, url: str, tier: str, rounds: int) -> dict[str, float]:
    """Million tokens a second of one student: from disk, and through the server."""
    readers = {
        "local": open_cache(place, targets=tier),
        "decoded": open_cache(url, targets=tier, storage_options={"decoded": True}),
        "encoded": open_cache(url, targets=tier),
    }
    batches = shuffled_batches(len(readers["local"]), BATCH, 0)
    tokens = sum(map(len, readers["local"].read_tokens(range(len(readers["local"])))))
    subjects = {
        name: (lambda reader=reader: [len(reader.read(batch)) for batch in batches]) for name, reader in readers.items()
    }
    seconds = {name: median(values) for name, values in interleaved(subjects, rounds).items()}
    return {
        **{f"{name}_mtok_per_s": tokens / value / 1e6 for name, value in seconds.items()},
        **{f"{name}_over_local": seconds["local"] / seconds[name] for name in ("decoded", "encoded")},
    }


def crowds(url: str, tier: str, seconds: float) -> dict[str, Any]:
    """One student's waits; those of many, as fast as they can and paced."""

    def load(clients: int, pause_s: float = 0.0) -> dict[str, Any]:
        plan = Load(clients=clients, seconds=seconds, sequences=IN_A_READ, pause_s=pause_s)
        return run_load(url, plan, targets=tier)

    one, crowd = load(1), load(CLIENTS)
    pause_s = 2 * CLIENTS * crowd["seconds"] / max(1, crowd["reads"])
    paced = load(CLIENTS, pause_s)
    return {
        "one": one,
        "crowd": crowd,
        "paced": {**paced, "pause_s": pause_s},
        "crowd_p99_over_one": crowd["wait_p99_s"] / one["wait_p99_s"],
        "paced_p99_over_one": paced["wait_p99_s"] / one["wait_p99_s"],
    }


def soak(server: Running, url: str, tier: str, seconds: float) -> dict[str, Any]:
    """The server's memory, looked at a hundred times while many read."""
    seen: list[int] = []
    done = threading.Event()

    def watch() -> None:
        while not done.wait(seconds / 100):
            seen.append(server.rss_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    found = run_load(url, Load(clients=CLIENTS, seconds=seconds, sequences=IN_A_READ), targets=tier)
    done.set()
    watcher.join()
    return {**found, **memory(seen)}


def memory(seen: Sequence[int]) -> dict[str, float]:
    """Of a server's memory, looked at in even steps: what is loaded once is there after a quarter of them."""
    quarter = max(1, len(seen) // 4)
    second, last = median(seen[quarter : 2 * quarter] or seen), median(seen[-quarter:])
    return {
        "rss_peak_bytes": max(seen),
        "rss_second_quarter_bytes": second,
        "rss_last_quarter_bytes": last,
        "rss_growth": last / second - 1,
    }


def main() -> None:
    """Entry point."""
    chosen = options("service", __doc__.splitlines()[0], _soak_option)
    size = QUICK if chosen.quick else FULL
    soak_s = size.soak_s if chosen.soak is None else chosen.soak
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        places = {tier: f"{folder}/{tier}" for tier in size.tokens}
        for tier, tokens in size.tokens.items():
            write_cache(make(tier, tokens), places[tier], per_part=64)
        with serving(*places.values()) as server:
            for tier, place in places.items():
                figures[tier] = rates(place, f"{server.location}/{tier}", tier, size.rounds)
                print(tier, {name: round(value, 3) for name, value in figures[tier].items()}, flush=True)
            url = f"{server.location}/topk"
            figures["crowds"] = crowds(url, "topk", size.load_s)
            started = time.monotonic()
            figures["soak"] = soak(server, url, "topk", soak_s)
            print(f"soak: {time.monotonic() - started:.0f} s", flush=True)
    config = {"batch": BATCH, "clients": CLIENTS, "in_a_read": IN_A_READ, "soak_s": soak_s, **vars(size)}
    keep(chosen, config=config, figures=figures, goals=_goals(figures))


def _soak_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--soak", type=float, metavar="SECONDS", help="how long many read at the end (default: 600)")


def _goals(figures: dict[str, Any]) -> list[dict[str, Any]]:
    goals = []
    for tier in ("topk", "hidden"):
        goals += [
            at_least(f"{tier}, decoded by the server: rate", 0.6, figures[tier]["decoded_over_local"], "local's"),
            at_least(f"{tier}, still encoded, decoded here: rate", 0.9, figures[tier]["encoded_over_local"], "local's"),
        ]
    loads = [figures["crowds"]["crowd"], figures["crowds"]["paced"], figures["soak"]]
    return [
        *goals,
        at_least("clients served, of 64", CLIENTS, min(load["clients_served"] for load in loads), "clients"),
        at_most("errors of 64 clients", 0, sum(load["errors"] for load in loads), "errors"),
        at_most("64 clients, all they can: p99 wait", 20, figures["crowds"]["crowd_p99_over_one"], "one's"),
        at_most("64 clients, half of that: p99 wait", 20, figures["crowds"]["paced_p99_over_one"], "one's"),
        at_most("the server's memory over the soak: growth", 0.05, figures["soak"]["rss_growth"], "of itself"),
    ]


if __name__ == "__main__":
    main()
