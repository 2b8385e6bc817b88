"""The `logitcache` command: prepare problems; build, look at, check and serve caches.

Guarantees: exit code 0 only when what was asked is done; an error is one line on standard error that says what was
asked, what was found and what to do. Engines are imported by the commands that need one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from logitcache.append import all_units
from logitcache.cluster import RayCluster
from logitcache.console import Progress, answer, command_line, leave, leave_at_once, parse_worker, run_command
from logitcache.errors import UserError, require
from logitcache.jobs import BuildRequest, build_cache, describe, score_cache
from logitcache.prepare import PrepareRequest
from logitcache.prepare import prepare as prepare_problems
from logitcache.prompts import PromptStyle
from logitcache.scoring import Sampling
from logitcache.service.settings import Load, Service
from logitcache.store.verify import Report

app = command_line("logitcache", __doc__)

Flat = Parameter(name="*")
_SHARED = Parameter(group="On several machines")


@app.command
def build(
    request: Annotated[BuildRequest, Flat],
    *,
    sampling: Annotated[Sampling, Parameter(name="*", group="Sampling")] = Sampling(),  # noqa: B008 (frozen)
    style: Annotated[PromptStyle, Parameter(name="*", group="Prompts")] = PromptStyle(),  # noqa: B008 (frozen)
    worker: Annotated[str, _SHARED] = "1/1",
    cluster: Annotated[Literal["ray"] | None, _SHARED] = None,
    workers: Annotated[int | None, _SHARED] = None,
    gpus_per_worker: Annotated[float | None, _SHARED] = None,
    address: Annotated[str | None, _SHARED] = None,
    json: bool = False,
) -> None:
    """Run a teacher over problems and keep its completions and what it thought of every token.

    Costs one generation and one scoring of every completion by the teacher. --max-new-tokens is short by default, for a
    first try. Interrupted at any moment, the same command goes on where it stopped and ends in the same bytes. Several
    workers, on any machines, each run this command with their own `--worker`; the one that finds nothing missing any
    more seals the cache.

    Example: logitcache build --teacher Qwen/Qwen3-4B --problems deepscaler.parquet --out runs/cache

    Args:
        request: what to build.
        sampling: how completions are drawn.
        style: how a problem is put to the teacher.
        worker: this worker of so many, such as `2/8`.
        cluster: `ray` spreads the units over a Ray cluster instead, and does lost ones again.
        workers: engines at a time on the cluster; 1 by default.
        gpus_per_worker: GPUs that each of them takes; 0 by default.
        address: of a running Ray cluster; one is started on this machine by default.
        json: print one JSON object.
    """
    number, of = parse_worker(worker)
    if cluster and of > 1:
        asked = f"--worker {worker} with --cluster {cluster}"
        raise UserError(asked, "the cluster shares the units out itself", "leave one of them out")
    ray = _cluster(cluster, workers=workers, gpus_per_worker=gpus_per_worker, address=address)
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
    answer(told, _lines(told), as_json=json)


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
    """Say what a cache holds, and how near the teacher that is; reads no targets.

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
    answer({"sound": report.sound, **asdict(report), "damage": damage}, _verdict(url, report), as_json=json)
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
        out: the file, ending in .parquet: a path, or any fsspec URL that can be written.
        to: the format.
        targets: the tier to put beside the tokens; none by default.
        json: print one JSON object.
    """
    from logitcache.store.export import export_parquet

    require(out.endswith(f".{to}"), f"--out ending in .{to}", out, "rename it")
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
    drain_s: float = 30.0,
    json: bool = False,
) -> None:
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
        drain_s: seconds that streams under way may take to end after SIGTERM.
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

    sent = run_server(
        urls or (),
        service,
        teachers=lambda: [offer_teacher(model, dtype=dtype, engine=engine) for model in teacher or ()],
        limits=Limits(streams=streams, drain_s=drain_s),
        ready=ready,
    )
    if not sent:
        leave_at_once(1)  # pyarrow's exit function waits for streams whose clients do not read


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
    answer(found, _lines(found), as_json=json)
    return 1 if found["errors"] else 0


def main() -> None:
    """Entry point."""
    resume = "what was committed stays, and the same command goes on from there"
    leave(run_command(app, after_interrupt=resume))


def _cluster(cluster: str | None, **options: Any) -> RayCluster | None:
    given = {name: value for name, value in options.items() if value is not None}
    if cluster is not None:
        return RayCluster(**{"workers": 1, **given})
    if given:
        asked = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise UserError(asked, "there is no cluster to use", "add --cluster ray, or leave it out")
    return None


def _lines(found: Mapping[str, Any]) -> str:
    shown = {name: f"{value:.4g}" if isinstance(value, float) else value for name, value in found.items()}
    return "\n".join(f"{name:18}{value}" for name, value in shown.items())


def _verdict(url: str, report: Report) -> str:
    lines = [f"{damage.name}: {damage.found}" for damage in report.damage]
    checked = f"{report.parts:,} parts, {report.objects:,} objects, {report.nbytes / 1e6:,.1f} MB read and checked"
    if report.sound and not report.sealed:
        state = f"sound, but not sealed: {checked}" if report.parts else "not sealed, and nothing is committed"
        return f"{state}; the command that builds it goes on and seals it"
    if report.sound:
        return f"sound: {checked}"
    advice = f"logitcache verify {url} --repair, then the command that built it"
    if report.repaired:
        advice = "undone; run the command that built it, which redoes only that"
    return "\n".join([*lines, f"damaged, {len(lines)} objects: {checked}; {advice}"])


def cache_summary(found: dict[str, Any]) -> str:
    """What `describe` or a build returns, for people."""
    teacher, spent = found["teacher"], found["flops"]
    width = 2 + max(map(len, ["targets", *(tier["asked"] for tier in found["targets"].values())]))
    lines = [
        f"{'sealed' if found['sealed'] else 'unsealed'} cache of {teacher['name']} ({teacher['dtype']}), "
        f"vocabulary {teacher['vocab_size']:,}",
        " + ".join(f"{item['count']:,}" for item in [found["problems"], *found["appended"]]) + " problems",
        f"{found['sequences']:,} sequences, {found['tokens']:,} tokens, {found['completion_tokens']:,} of completions",
        f"{spent['generate'] / 1e12:.2f} TFLOPs to generate, {spent['score'] / 1e12:.2f} to score",
        f"{'targets':{width}}{'MB':>10}{'kept once MB':>14}{'bytes/token':>13}{'mean KL, nats':>15}{'p99':>10}",
    ]
    for tier in found["targets"].values():
        kl = tier["kl_nats"]
        fidelity = f"{'not measured':>15}" if kl is None else f"{kl['mean']:15.2e}{kl['p99']:10.2e}"
        size = f"{tier['bytes'] / 1e6:10.2f}{tier['shared_bytes'] / 1e6:14.2f}"
        per_token = tier["bytes_per_token"] or float("nan")
        lines.append(f"{tier['asked']:{width}}{size}{per_token:13.1f}{fidelity}")
        if tier["units"] < found["units"]:
            lines.append(f"  {tier['units']:,} of {found['units']:,} units with sequences have it")
        if (engine := tier["engine_kl_nats"]) is not None:
            forward, reverse = engine["forward"], engine["reverse"]
            told = f"{forward['mean']:.2e} nats, reverse {reverse['mean']:.2e} ({forward['samples']} tokens)"
            lines.append(f"  KL(transformers in float32, the scoring engine): {told}")
    if usage := found.get("usage"):
        joules = "" if usage["joules"] is None else f", {usage['joules']:,.0f} J"
        lines.append(f"this command took {usage['seconds']:,.1f} s{joules}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
