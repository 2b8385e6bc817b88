"""A server that is attacked, and one that is killed: `python -m tools.bench.service_faults [--quick] [--json PATH]`.

The storm is of calls, and of bytes on the socket, that are malformed, truncated, oversized or without a right to be
there, in random order, at a server of a cache and a teacher that lets in who has a token. Each must end in an error
that the server wrote or, for bare bytes, in a connection that is closed; none may say where anything lies.

The kills are SIGKILL, each at a random moment after a read began, at a server whose cache the real training loop reads
through one epoch. What the loop was given and lost is compared with a run from the same cache on a disk.
"""

from __future__ import annotations

import random
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from logitcache.jobs import BuildRequest, build_cache
from logitcache.prompts import PromptStyle
from logitcache.records import ScoredSequence
from logitcache.scoring import Sampling
from logitcache.service.scorer import open_scorer
from logitcache.store import open_cache
from tools.bench.result import at_least, at_most, keep, options
from tools.bench.service import memory, serving
from tools.bench.service_kills import kills
from tools.bench.service_storm import Storm
from tools.bench.tiny import tiny_teacher
from trainer.settings import BatchPlan

PROBLEMS = Path(__file__).parents[1] / "demo" / "problems.jsonl"
TOKEN = "a-token-for-the-benchmark"


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much to try."""

    requests: int
    kills: int
    problems: int
    samples_per_problem: int
    new_tokens: int
    batch: int


FULL = Size(requests=10_000, kills=20, problems=192, samples_per_problem=2, new_tokens=32, batch=8)
QUICK = Size(requests=200, kills=2, problems=16, samples_per_problem=1, new_tokens=16, batch=4)


def storm(folder: Path, place: str, requests: int) -> dict[str, Any]:
    """What became of the requests, and of the server's memory and its answers to who may ask."""
    (folder / "tokens").write_text(f"{TOKEN} *\n")
    teacher = ("--teacher", f"tiny={folder / 'teacher'}", "--dtype", "float32", "--tokens", str(folder / "tokens"))
    with serving(place, *teacher) as server:
        allowed = {"token": TOKEN}
        reader: Any = open_cache(f"{server.location}/cache", targets="hidden", storage_options=allowed)
        scorer = open_scorer(f"{server.location}#tiny", storage_options=allowed)
        sent = Storm(reader=reader, scorer=scorer, secret=str(folder), rng=random.Random(0))
        before, seen = server.rss_bytes(), []
        for number in range(requests):
            sent.request()
            if number % max(1, requests // 100) == 0:
                seen.append(server.rss_bytes())
        local = open_cache(place, targets="hidden")
        everything = range(len(local))
        well = [
            _bits(one) == _bits(two) for one, two in zip(local.read(everything), reader.read(everything), strict=True)
        ]
        return {
            "requests": sent.sent,
            "answered": sent.answered,
            "missed": sent.missed,
            "leaks": sent.leaks,
            "sequences_read_afterwards": sum(well),
            "sequences": len(local),
            "rss_before_bytes": before,
            **memory(seen),
        }


def _bits(item: ScoredSequence) -> list[Any]:
    return [getattr(value, "tobytes", lambda value=value: value)() for value in vars(item.targets).values()]


def main() -> None:
    """Entry point."""
    chosen = options("service_faults", __doc__.splitlines()[0])
    size = QUICK if chosen.quick else FULL
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tiny_teacher(folder / "teacher")
        request = BuildRequest(
            problems=str(PROBLEMS),
            out=str(folder / "cache"),
            teacher=str(folder / "teacher"),
            targets="hidden",
            limit=size.problems,
            dtype="float32",
        )
        sampling = Sampling(max_new_tokens=size.new_tokens, samples_per_problem=size.samples_per_problem)
        build_cache(request, sampling=sampling, style=PromptStyle())
        plan = BatchPlan(sequences=size.batch, max_completion_tokens=size.new_tokens, micro_batch_tokens=4096)
        figures = {
            "storm": storm(folder, request.out, size.requests),
            "kills": kills(folder / "teacher", request.out, plan, size.kills),
        }
    keep(
        chosen,
        config={"teacher": "random Llama, 2 layers, width 64", "pyarrow": pa.__version__, **vars(size)},
        figures=figures,
        goals=_goals(figures, size),
    )


def _goals(figures: dict[str, Any], size: Size) -> list[dict[str, Any]]:
    storm, kills = figures["storm"], figures["kills"]
    requests = sum(storm["requests"].values())
    return [
        at_least("malformed, truncated, oversized, unauthenticated requests", size.requests, requests, "requests"),
        at_least("of those, answered with an error", 1.0, sum(storm["answered"].values()) / requests, "of all"),
        at_most("answers that tell a path", 0, len(storm["leaks"]), "answers"),
        at_most("the server's memory meanwhile: growth", 0.05, storm["rss_growth"], "of itself"),
        at_least(
            "sequences read after it, bit for bit",
            1.0,
            storm["sequences_read_afterwards"] / storm["sequences"],
            "of all",
        ),
        at_least("kill -9 and restart during an epoch", size.kills, kills["kills"], "kills"),
        at_least(
            "sequences given exactly once in it", 1.0, kills["sequences_given_once"] / kills["sequences"], "of all"
        ),
        at_least("reads in the order of a local run", 1.0, kills["reads_in_order"] / kills["steps"], "of all"),
        at_least(
            "losses and gradients bit-identical to a local run",
            1.0,
            kills["identical_steps"] / kills["steps"],
            "of all",
        ),
    ]


if __name__ == "__main__":
    main()
