"""The `logitcache` command: build, look at and check caches.

Guarantees: exit code 0 only when what was asked is done; an error is one line on standard error that says what was
asked, what was found and what to do. Engines are imported by the commands that need one.
"""

from __future__ import annotations

from typing import Annotated, Any

from cyclopts import App, Parameter

from logitcache.console import answer, run_command
from logitcache.errors import UserError
from logitcache.jobs import BuildRequest, build_cache, describe
from logitcache.prompts import PromptStyle
from logitcache.scoring import Sampling

app = App(name="logitcache", help=__doc__.splitlines()[0], version_flags=[])

Flat = Parameter(name="*")


@app.command
def build(
    request: Annotated[BuildRequest, Flat],
    *,
    sampling: Annotated[Sampling, Flat] = Sampling(),  # noqa: B008 (frozen)
    style: Annotated[PromptStyle, Flat] = PromptStyle(),  # noqa: B008 (frozen)
    worker: str = "1/1",
    json: bool = False,
) -> None:
    """Run a teacher over problems and keep its completions and what it thought of every token.

    Costs one generation and one scoring of every completion by the teacher. Interrupted at any moment, the same command
    goes on where it stopped and ends in the same bytes. Several workers, on any machines, each run this command with
    their own `--worker`; the one that finds nothing missing any more seals the cache.

    Example: logitcache build --teacher Qwen/Qwen3-4B --problems deepscaler.parquet --out runs/cache

    Args:
        request: what to build.
        sampling: how completions are drawn.
        style: how a problem is put to the teacher.
        worker: this worker of so many, such as `2/8`.
        json: print one JSON object.
    """
    number, workers = _worker(worker)
    built = build_cache(request, sampling=sampling, style=style, worker=number, workers=workers)
    answer(built, cache_summary(built), as_json=json)


@app.command
def info(url: str, /, *, json: bool = False) -> None:
    """Say what a cache holds; reads its manifest only.

    Example: logitcache info runs/demo/cache

    Args:
        url: the cache.
        json: print one JSON object.
    """
    found = describe(url)
    answer(found, cache_summary(found), as_json=json)


@app.command
def seal(url: str, /, *, units: int | None = None, json: bool = False) -> None:
    """Publish the manifest of everything that is committed.

    Example: logitcache seal runs/demo/cache

    Args:
        url: the cache.
        units: how many units there must be; all that are committed by default.
        json: print one JSON object.
    """
    from logitcache.store import open_store

    open_store(url).seal(units=units)
    found = describe(url)
    answer(found, cache_summary(found), as_json=json)


def main() -> None:
    """Entry point."""
    raise SystemExit(run_command(app))


def _worker(text: str) -> tuple[int, int]:
    number, _, workers = text.partition("/")
    if not (number.isdecimal() and workers.isdecimal() and 1 <= int(number) <= int(workers)):
        raise UserError(f"--worker {text}", "not a worker of several", "write it as 1/4 for the first of four")
    return int(number) - 1, int(workers)


def cache_summary(found: dict[str, Any]) -> str:
    """What `describe` returns, for people."""
    teacher, spent = found["teacher"], found["flops"]
    lines = [
        f"{'sealed' if found['sealed'] else 'unsealed'} cache of {teacher['name']} ({teacher['dtype']}), "
        f"vocabulary {teacher['vocab_size']:,}",
        f"{found['sequences']:,} sequences, {found['tokens']:,} tokens, {found['completion_tokens']:,} of completions",
        f"{spent['generate'] / 1e12:.2f} TFLOPs to generate, {spent['score'] / 1e12:.2f} to score",
        f"{'targets':10}{'MB':>10}{'bytes/token':>14}{'mean KL, nats':>16}{'p99':>12}",
    ]
    for name, tier in found["targets"].items():
        kl = tier["kl_nats"] or {"mean": float("nan"), "p99": float("nan")}
        per_token = tier["bytes_per_token"] or float("nan")
        lines.append(f"{name:10}{tier['bytes'] / 1e6:10.2f}{per_token:14.1f}{kl['mean']:16.2e}{kl['p99']:12.2e}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
