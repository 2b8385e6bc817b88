"""The `logitcache` command: prepare problems; build, look at, check and serve caches.

Guarantees: exit code 0 only when what was asked is done; an error is one line on standard error that says what was
asked, what was found and what to do. Engines are imported by the commands that need one.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any, Literal

from cyclopts import App, Parameter

from logitcache.append import all_units
from logitcache.cluster import RayCluster
from logitcache.console import Progress, answer, leave, run_command
from logitcache.errors import UserError
from logitcache.jobs import BuildRequest, build_cache, describe, score_cache
from logitcache.prepare import PrepareRequest
from logitcache.prepare import prepare as prepare_problems
from logitcache.prompts import PromptStyle
from logitcache.scoring import Sampling
from logitcache.service.settings import Load, Service
from logitcache.store.verify import Report

app = App(name="logitcache", help=__doc__.splitlines()[0], version_flags=[])

Flat = Parameter(name="*")


@app.command
def build(
    request: Annotated[BuildRequest, Flat],
    *,
    sampling: Annotated[Sampling, Flat] = Sampling(),  # noqa: B008 (frozen)
    style: Annotated[PromptStyle, Flat] = PromptStyle(),  # noqa: B008 (frozen)
    worker: str = "1/1",
    cluster: Literal["ray"] | None = None,
    workers: int = 1,
    gpus_per_worker: float = 0.0,
    address: str | None = None,
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
        cluster: `ray` spreads the units over a Ray cluster instead, and does lost ones again.
        workers: engines at a time on the cluster.
        gpus_per_worker: GPUs that each of them takes.
        address: of a running Ray cluster; one is started on this machine by default.
        json: print one JSON object.
    """
    number, of = _worker(worker)
    ray = RayCluster(workers=workers, gpus_per_worker=gpus_per_worker, address=address) if cluster else None
    built = build_cache(request, sampling=sampling, style=style, worker=number, workers=of, cluster=ray)
    answer(built, cache_summary(built), as_json=json)


@app.command
def prepare(request: Annotated[PrepareRequest, Flat], *, json: bool = False) -> None:
    """Make a raw problem set fit for training: no repeats, and nothing that an evaluation set asks.

    Costs seconds. What was left out, and why, goes into a `.dropped.jsonl` file beside the kept problems.

    Example: logitcache prepare --problems raw.parquet --against math500.parquet --out train.parquet

    Args:
        request: what to prepare.
        json: print one JSON object.
    """
    told = prepare_problems(request)
    answer(told, "\n".join(f"{name:18}{value}" for name, value in told.items()), as_json=json)


@app.command
def score(
    url: str, /, *, targets: str, teacher: str = "embedded", compare_engines: bool = True, json: bool = False
) -> None:
    """Add a tier to a cache by scoring the sequences that are there.

    Costs one scoring of every completion by the teacher, and no generation. Interrupted, the same command goes on.

    Example: logitcache score runs/demo/cache --targets hidden:max-kl=2e-3

    Args:
        url: the cache.
        targets: the tiers to add, as for `build`.
        teacher: the model that built the cache; `embedded` is SmolLM2-135M-Instruct.
        compare_engines: as for `build`.
        json: print one JSON object.
    """
    scored = score_cache(url, teacher=teacher, targets=targets, compare_engines=compare_engines)
    answer(scored, cache_summary(scored), as_json=json)


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


@app.command
def verify(url: str, /, *, deep: bool = False, repair: bool = False, json: bool = False) -> int:
    """Check that every object is what was committed: exit code 0 sound, 1 damaged, 2 not a cache.

    Costs a listing and the parts' records; with `--deep` one read of every byte.

    Example: logitcache verify runs/demo/cache --deep

    Args:
        url: the cache.
        deep: read and check every byte, not only presence, sizes and records.
        repair: undo the commit of what is damaged; the command that built the cache then redoes exactly that.
        json: print one JSON object.
    """
    from logitcache.store.verify import verify as check

    with Progress("verify", 1, "parts") as progress:
        report = check(url, deep=deep, repair=repair, progress=progress.reach)
    damage = [{"object": item.name, "found": item.found} for item in report.damage]
    answer({**asdict(report), "damage": damage}, _verdict(url, report), as_json=json)
    return 0 if report.sound else 1


@app.command
def merge(sources: list[str], /, *, out: str, json: bool = False) -> None:
    """Bring parts of one build that lie in several places into one, and seal it when nothing is missing.

    Costs one read and one write of every part. Interrupted, the same command goes on.

    Example: logitcache merge s3://bucket/worker-1 s3://bucket/worker-2 --out runs/cache

    Args:
        sources: caches of one identity, sealed or not.
        out: an empty place, or a cache of that identity.
        json: print one JSON object.
    """
    from logitcache.store.merge import merge as gather

    with Progress("merge", 1, "parts") as progress:
        store = gather(sources, out, progress=progress.reach)
    units = len(all_units(store))
    if len(store.committed().sequences) == units:
        store.seal(units=units)
    merged = describe(out)
    answer(merged, cache_summary(merged), as_json=json)


@app.command
def export(
    url: str, /, *, out: str, to: Literal["parquet"] = "parquet", targets: str | None = None, json: bool = False
) -> None:
    """Write a cache as one Parquet file, decoded, for tools that know nothing of it.

    Costs one read and decoding of everything; the file is many times larger than the cache.

    Example: logitcache export runs/demo/cache --to parquet --out demo.parquet --targets topk

    Args:
        url: a sealed cache.
        out: the file: a path, or any fsspec URL that can be written.
        to: the format.
        targets: the tier to put beside the tokens; none by default.
        json: print one JSON object.
    """
    from logitcache.store.export import export_parquet

    with Progress("export", 1, "sequences") as progress:
        sequences = export_parquet(url, targets, out, progress=progress.reach)
    answer({"out": out, "format": to, "sequences": sequences}, f"{out}: {sequences:,} sequences", as_json=json)


@app.command
def serve(
    urls: list[str] | None = None,
    /,
    *,
    service: Annotated[Service, Flat] = Service(),  # noqa: B008 (frozen)
    teacher: Annotated[list[str] | None, Parameter(negative="")] = None,
    dtype: str = "bfloat16",
    engine: Literal["transformers", "vllm"] = "transformers",
    streams: int = 16,
    json: bool = False,
) -> int:
    """Let students elsewhere read caches, and have a teacher score for them, over Arrow Flight, until SIGTERM.

    Costs one core for each student that reads as fast as it can, less where the student decodes; a teacher costs one
    scoring of what students write. A student opens `grpc://HOST:PORT/NAME` where it would open a cache's URL, and
    `grpc://HOST:PORT#NAME` where it would name a teacher, with its token in LOGITCACHE_TOKEN. What is sealed meanwhile
    is taken up. The exit code is 0 if every stream was sent.

    Example: logitcache serve runs/demo/cache math=s3://bucket/cache --teacher embedded --host 0.0.0.0 --tokens t.txt

    Args:
        urls: sealed caches, named by the last part of their URL, or as NAME=URL; 'FOLDER/*' is all that a folder holds.
        service: how it is reached and what it keeps.
        teacher: models that score for students, named by the last part of their name, or as NAME=MODEL.
        dtype: the precision that teachers compute in, bfloat16 or float32: that of the cache's build.
        engine: that runs teachers.
        streams: sent at once, and calls to teachers at once; more wait.
        json: print one JSON object once requests are taken.
    """
    try:
        from logitcache.service.limits import Limits
        from logitcache.service.offer import offer_teacher
        from logitcache.service.run import run_server
    except ImportError as error:
        raise UserError("serve", str(error), "pip install 'logitcache[service]'") from error

    def ready(location: str) -> None:
        answer({"location": location}, f"serving at {location}; Ctrl-C ends it", as_json=json)

    limits = Limits(streams=streams)
    teachers = [offer_teacher(model, dtype=dtype, engine=engine) for model in teacher or ()]
    return 0 if run_server(urls or (), service, teachers=teachers, limits=limits, ready=ready) else 1


@app.command(name="bench-serve")
def bench_serve(
    url: str,
    /,
    *,
    load: Annotated[Load, Flat] = Load(),  # noqa: B008 (frozen)
    targets: str | None = None,
    json: bool = False,
) -> int:
    """Load a server with students that read at once: rates, waits and errors; exit code 0 if there was no error.

    Costs what that many students cost the server, for `--seconds`.

    Example: logitcache bench-serve grpc://127.0.0.1:8815/cache --targets topk --clients 64

    Args:
        url: a served cache; its token is in LOGITCACHE_TOKEN.
        load: what to load it with.
        targets: the tier to read; tokens alone by default.
        json: print one JSON object.
    """
    from logitcache.service.load import run_load

    found = run_load(url, load, targets=targets)
    answer(found, "\n".join(f"{name:18}{value}" for name, value in found.items()), as_json=json)
    return 1 if found["errors"] else 0


def main() -> None:
    """Entry point."""
    resume = "what was committed stays, and the same command goes on from there"
    leave(run_command(app, after_interrupt=resume))


def _worker(text: str) -> tuple[int, int]:
    number, _, workers = text.partition("/")
    if not (number.isdecimal() and workers.isdecimal() and 1 <= int(number) <= int(workers)):
        raise UserError(f"--worker {text}", "not a worker of several", "write it as 1/4 for the first of four")
    return int(number) - 1, int(workers)


def _verdict(url: str, report: Report) -> str:
    lines = [f"{damage.name}: {damage.found}" for damage in report.damage]
    checked = f"{report.parts:,} parts, {report.objects:,} objects, {report.nbytes / 1e6:,.1f} MB read and checked"
    if report.sound:
        return f"sound: {checked}"
    advice = f"logitcache verify {url} --repair, then the command that built it"
    if report.repaired:
        advice = "undone; run the command that built it, which redoes only that"
    return "\n".join([*lines, f"damaged, {len(lines)} objects: {checked}; {advice}"])


def cache_summary(found: dict[str, Any]) -> str:
    """What `describe` returns, for people."""
    teacher, spent = found["teacher"], found["flops"]
    lines = [
        f"{'sealed' if found['sealed'] else 'unsealed'} cache of {teacher['name']} ({teacher['dtype']}), "
        f"vocabulary {teacher['vocab_size']:,}",
        " + ".join(f"{item['count']:,}" for item in [found["problems"], *found["appended"]]) + " problems",
        f"{found['sequences']:,} sequences, {found['tokens']:,} tokens, {found['completion_tokens']:,} of completions",
        f"{spent['generate'] / 1e12:.2f} TFLOPs to generate, {spent['score'] / 1e12:.2f} to score",
        f"{'targets':10}{'MB':>10}{'bytes/token':>14}{'mean KL, nats':>16}{'p99':>12}",
    ]
    for name, tier in found["targets"].items():
        kl = tier["kl_nats"]
        fidelity = f"{'not measured':>16}" if kl is None else f"{kl['mean']:16.2e}{kl['p99']:12.2e}"
        per_token = tier["bytes_per_token"] or float("nan")
        lines.append(f"{name:10}{tier['bytes'] / 1e6:10.2f}{per_token:14.1f}{fidelity}")
        if tier["units"] < found["units"]:
            lines.append(f"{'':10}{tier['units']:,} of {found['units']:,} units with sequences have it")
        if (engine := tier["engine_kl_nats"]) is not None:
            forward, reverse = engine["forward"], engine["reverse"]
            told = f"{forward['mean']:.2e} nats, reverse {reverse['mean']:.2e} ({forward['samples']} tokens)"
            lines.append(f"{'':10}KL(transformers in float32, the scoring engine): {told}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
