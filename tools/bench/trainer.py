"""What a training step costs: against plain cross-entropy, against TRL's GKD trainer, and waiting for data.

    python -m tools.bench.trainer [--quick] [--json PATH] [--data DIR]

Everything is real: DeepScaleR problems, the embedded teacher's completions and its top-k and hidden tiers in a cache
made for the occasion, a student of 20 of its 30 layers, bfloat16 autocast over float32 weights. What is compared runs
in turn, round after round, and the median of the rounds' ratios counts. TRL is no requirement of this project: where it
cannot be imported, the benchmark says how to get it before any work.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from logitcache.embedded import embedded_teacher_dir
from logitcache.store import open_cache
from tools.bench.result import at_least, at_most, keep, options
from trainer.prune import pruned_student

GET_TRL = (
    "pip install --no-deps --target DIR trl==1.16.0 datasets multiprocess dill xxhash pandas httpx httpcore sniffio, "
    "then run it with PYTHONPATH=DIR"
)


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much of it: problems, a step's sequences, window, layers, rounds, steps of a peer's round and of waiting."""

    problems: int
    sequences: int
    window: int
    layers: int
    rounds: int
    steps: int
    waiting_steps: int


FULL = Size(problems=48, sequences=16, window=96, layers=20, rounds=4, steps=2, waiting_steps=20)
QUICK = Size(problems=32, sequences=4, window=16, layers=2, rounds=1, steps=2, waiting_steps=4)


def main() -> None:
    """Build, measure and keep."""
    chosen = options("trainer", __doc__)
    if importlib.util.find_spec("trl") is None:
        sys.exit(f"error: TRL's GKD trainer: trl is not installed; {GET_TRL}")
    size = QUICK if chosen.quick else FULL
    with tempfile.TemporaryDirectory() as place:
        work = Path(place)
        _prepare(work, chosen.data, size)
        step = _child("trainer_step", work, size.sequences, size.window, size.rounds)
        peers = [_peers(work, size) for _ in range(max(1, size.rounds // 2))]
        rollouts = _child("trainer_rollouts", work, size.sequences, size.window, size.rounds)
        wait = _data_wait(work, size)
    keep(
        chosen,
        config=asdict(size),
        figures={"step": step, "peers": peers, "rollouts": rollouts, "data_wait": wait},
        goals=[
            at_most("step from the top-k tier over a cross-entropy step", 1.05, step["topk_over_ce"], "times"),
            at_most(
                "step from the top-k tier over a fused cross-entropy step",
                1.05, step["topk_over_fused_ce"], "times",
            ),
            at_most(
                "step from the hidden tier over a cross-entropy step and the head's products",
                1.05, step["hidden_over_ce_and_head"], "times",
            ),
            at_most(
                "step from the hidden tier over a fused cross-entropy step and the head's products",
                1.05, step["hidden_over_fused_ce_and_head"], "times",
            ),
            at_most("share of a step spent waiting for data", 0.02, wait["share"], "of the step"),
            *_peer_goals(peers),
            at_most("rollouts with a growing cache over a static one", 1, 1 / rollouts["static_over_dynamic"], "times"),
            at_most("rollouts with a growing cache over a paged one", 1, 1 / rollouts["paged_over_dynamic"], "times"),
        ],
    )  # fmt: skip


def _peer_goals(rounds: list[dict[str, Any]]) -> list[dict[str, Any]]:
    apart = max(abs(one[name]["first_loss_nats"] / one["gkd"]["first_loss_nats"] - 1) for one in rounds for name in one)
    goals = [at_most("first step's loss against TRL's GKD trainer, relative difference", 0.01, apart, "of the loss")]
    for name, words in (("live", "teacher in memory"), ("cached", "from the cache")):
        rate = median(one[name]["tokens_per_s"] / one["gkd"]["tokens_per_s"] for one in rounds)
        memory = median(one[name]["peak_bytes"] / one["gkd"]["peak_bytes"] for one in rounds)
        goals.append(at_least(f"tokens/s over TRL's GKD trainer, {words}", 2, rate, "times"))
        goals.append(at_most(f"peak memory over TRL's GKD trainer, {words}", 0.5, memory, "times"))
    return goals


def _prepare(work: Path, data: Path, size: Size) -> None:
    """The cache, the student, and the tokens of one step for those who do not read caches."""
    build = ["--problems", str(data / "deepscaler.parquet"), "--limit", str(size.problems), "--targets", "topk,hidden"]
    build += ["--max-new-tokens", str(size.window), "--problems-per-unit", "32", "--out", str(work / "cache")]
    _run("logitcache.cli", "build", "--teacher", "embedded", *build)
    pruned_student(embedded_teacher_dir(), work / "student", layers=range(size.layers))
    sequences = open_cache(str(work / "cache"), targets=None).read_tokens(range(size.sequences))
    tokens = [{"ids": one.token_ids.tolist(), "prompt_tokens": one.prompt_tokens} for one in sequences]
    (work / "tokens.json").write_text(json.dumps(tokens))


def _peers(work: Path, size: Size) -> dict[str, Any]:
    """One round: each in a process of its own, so that its peak memory is its own."""
    names = ("gkd", "live", "cached", "gkd_checkpointing")
    return {name: _child("trainer_peer", work, name, size.steps) for name in names}


def _data_wait(work: Path, size: Size) -> dict[str, Any]:
    """Of a real run from the command line, its first step left out: seconds of each, and of them waiting for text."""
    out = work / "run"
    shape = ["--steps", str(size.waiting_steps + 1), "--sequences", str(size.sequences), "--window", str(size.window)]
    _run("trainer.cli", "distill", str(work / "cache"), "--student", str(work / "student"), "--out", str(out), *shape)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()][1:]
    shutil.rmtree(out)
    drawn, steps_s = ([line[name] for line in lines] for name in ("draw_s", "step_s"))
    return {"draw_s": drawn, "step_s": steps_s, "share": sum(drawn) / sum(steps_s)}


def _child(name: str, *arguments: object) -> Any:
    """What another part of this benchmark prints: one JSON object, on the last line."""
    return json.loads(_run(f"tools.bench.{name}", *map(str, arguments)).splitlines()[-1])


def _run(module: str, *arguments: str) -> str:
    done = subprocess.run([sys.executable, "-m", module, *arguments], stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout


if __name__ == "__main__":
    main()
