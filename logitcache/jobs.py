"""Whole jobs, assembled from names: what the commands run, callable from Python with the same arguments.

Guarantees: what can be refused is refused before the teacher is loaded or a byte is written, save what only the teacher
can tell.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from logitcache import flops
from logitcache.append import all_units, append_problems, open_first, open_to_append
from logitcache.build import Build, Comparison, Unit, cut_into_units, missing_units, require_same_tiers, share_of
from logitcache.cluster import RayCluster, build_on_ray
from logitcache.codecs import TargetSpec, parse_targets
from logitcache.console import Progress, note
from logitcache.errors import UserError, require
from logitcache.identity import (
    model_display_name,
    require_same_teacher,
    resolve_model,
    tokenizer_fingerprint,
    weights_fingerprint,
)
from logitcache.problems import Problem, load_problems, problems_digest
from logitcache.prompts import PromptStyle, prompts_identity, render_prompts
from logitcache.scorers.choose import (
    EngineName,
    Served,
    load_teacher,
    parse_engine,
    require_divisible,
    require_servable,
    scorer_of,
    teacher_identity,
)
from logitcache.scoring import DTYPES, Sampling
from logitcache.store import Store, open_cache, open_store
from logitcache.store.place import Place
from logitcache.store.tiers import read_tier
from logitcache.usage import Stopwatch

UNSEEN = "unseen:"
"""Begins the fingerprint of a teacher whose weights were on a server alone: the rest is of its configuration."""

_IDENTITY = ("teacher", "tokenizer", "prompts", "problems", "sampling")


@dataclass(frozen=True, kw_only=True)
class BuildRequest:
    """What to build, in words: the options of `logitcache build`.

    Attributes:
        problems: Parquet, JSON or JSONL with a column `problem` and, if it likes, `id` (any fsspec URL), or a hub
            dataset id. A build needs no answers.
        out: where the cache goes: a path, or any fsspec URL that can be written.
        teacher: a transformers model id or directory; `embedded` is SmolLM2-135M-Instruct. Where servers both write and
            score, the directory needs no weights, and the cache says that nobody saw them.
        targets: what is kept, such as `topk:p=3e-4,hidden` or `hidden:max-kl=2e-3`.
        limit: use only the first so many problems.
        dtype: the precision the teacher computes in, bfloat16 or float32.
        problems_per_unit: problems in one part of the cache; a killed build repeats at most one part.
        generator: the engine that writes: transformers, vllm, or a server's `http://host:port#model`.
        scorer: the engine that scores, likewise; a server gives `topk` without entropies, and no KL can be measured.
        append: add the problems that the cache at `out` lacks to those it has; all else must be as it was built.
        compare_engines: where the scorer is not transformers, measure on the first unit how far its distributions are
            from those of transformers in float32, for the manifest. Loads the teacher once more, on the CPU.
    """

    problems: str
    out: str
    teacher: str = "embedded"
    targets: str = "topk,hidden"
    limit: int | None = None
    dtype: str = "bfloat16"
    problems_per_unit: int = 64
    generator: str = "transformers"
    scorer: str = "transformers"
    append: bool = False
    compare_engines: Annotated[bool, Parameter(negative="--no-compare-engines")] = True

    def __post_init__(self) -> None:
        require(self.dtype in DTYPES, f"--dtype, {' or '.join(DTYPES)}", self.dtype)
        require(self.problems_per_unit >= 1, "--problems-per-unit, at least 1", self.problems_per_unit)
        _, scorer = self.engines
        if isinstance(scorer, Served):
            require_servable(parse_targets(self.targets))

    @property
    def engines(self) -> tuple[EngineName, EngineName]:
        """The generator and the scorer."""
        return parse_engine(self.generator, "--generator"), parse_engine(self.scorer, "--scorer")


def build_cache(
    request: BuildRequest,
    *,
    sampling: Sampling,
    style: PromptStyle,
    worker: int = 0,
    workers: int = 1,
    cluster: RayCluster | None = None,
) -> dict[str, Any]:
    """Build a cache, or this worker's share of it, here or on a cluster, and seal it when nothing is missing any more.

    Returns:
        What `describe` says of the cache, and `usage`: seconds, and joules where they are counted, of this command.
        They are not in the cache, whose bytes do not depend on how its build went.

    Raises:
        UserError: something asked for cannot be had; nothing that was committed is lost.
        IdentityError: `out` holds a cache of another build.
    """
    devices = cluster.devices_per_worker if cluster else 1
    require_divisible(request.engines, devices)
    usage = Stopwatch.started()
    specs = parse_targets(request.targets)
    problems = load_problems(request.problems, limit=request.limit)
    model_dir = _teacher_dir(request)
    shape = flops.ModelShape.of(model_dir)

    from logitcache.scorers.hf import load_tokenizer

    tokenizer = load_tokenizer(model_dir)
    identity = _identity(request, model_dir, tokenizer, problems, sampling, style)
    store = (open_to_append if request.append else open_first)(request.out, identity)
    require_same_tiers(store, specs)
    tiers, first = [spec.kind for spec in specs], 0
    if request.append:
        problems, first = append_problems(store, problems, tiers)
    units = cut_into_units(render_prompts(tokenizer, problems, style), request.problems_per_unit, first=first)
    share = missing_units(store.committed(), share_of(units, worker, workers), tiers)
    if share:
        job = _Job(
            engines=request.engines,
            dtype=request.dtype,
            model_dir=model_dir,
            shape=shape,
            store=store,
            units=units,
            specs=specs,
            sampling=sampling,
            compare_engines=request.compare_engines,
            devices=devices,
        )
        _run(job, share, request.out, cluster)
    else:
        note(f"nothing is missing in {request.out}: it is done already")
    everything = all_units(store)
    if not missing_units(store.committed(), everything, tiers):
        store.seal(units=len(everything))
    return describe(request.out) | {"usage": usage.stopped()}


def score_cache(url: str, *, teacher: str, targets: str, compare_engines: bool = True) -> dict[str, Any]:
    """Add tiers to a cache by scoring what is there, without generating again; see `logitcache score --help`.

    Returns:
        As `build_cache`.

    Raises:
        IdentityError: `teacher` is not the cache's.
        UserError: no cache there, or one whose build or append is not finished, or a tier that exists and was asked for
            with another configuration.
    """
    usage = Stopwatch.started()
    specs = parse_targets(targets)
    tiers = [spec.kind for spec in specs]
    store = open_store(url)
    committed, units = store.committed(), all_units(store)
    if missing := missing_units(committed, units, set(committed.targets).difference(tiers)):
        found = f"{len(missing)} of {len(units)} units are not built yet"
        raise UserError(f"score {store.place.shown}", found, "run the build again to finish it first")
    built_by = store.identity["teacher"]
    model_dir = resolve_model(teacher)
    require_same_teacher(url, built_by, model_dir)
    shape = flops.ModelShape.of(model_dir)
    require_same_tiers(store, specs)
    share = missing_units(committed, units, tiers)
    if share:
        scorer = scorer_of(built_by["engine"])
        job = _Job(
            engines=(scorer, scorer),
            dtype=built_by["dtype"],
            model_dir=model_dir,
            shape=shape,
            store=store,
            units=units,
            specs=specs,
            sampling=Sampling(**store.identity["sampling"]),
            compare_engines=compare_engines,
        )
        sequences = len(open_cache(url, targets=None, committed=True))
        note(f"{len(share)} of {len(units)} units to score, {sequences} sequences, in {url}")
        with Progress("score", sequences, "sequences") as progress:
            job(progress.add).run(share)
    store.seal(units=len(units))
    return describe(url) | {"usage": usage.stopped()}


def describe(url: str) -> dict[str, Any]:
    """What a cache holds, as `logitcache info --json` prints it. Raises UserError where there is none."""
    from logitcache.store.commits import consolidate_tier, list_committed, read_identity, read_manifest
    from logitcache.store.place import open_place

    place = open_place(url)
    sealed = read_manifest(place) is not None
    if sealed:
        reader = open_cache(url, targets=None)
        manifest, identity = reader.manifest, reader.identity
        partial = dict.fromkeys(manifest.tiers, manifest)
    else:
        (identity, _), committed = read_identity(place), list_committed(place)
        manifest = consolidate_tier(place, committed, None)
        partial = {name: consolidate_tier(place, committed, name) for name in committed.targets}
    if lacking := [name for name in _IDENTITY if name not in identity]:
        found = f"its identity names no {', '.join(lacking)}: logitcache build did not make it"
        raise UserError(f"describe {place.shown}", found, "read it with logitcache.open_cache")
    return {
        "format_version": 1,
        "sealed": sealed,
        "digest": manifest.digest,
        **{name: identity[name] for name in _IDENTITY},
        "appended": [asdict(item) for item in manifest.appended],
        "units": len(manifest.units),
        "sequences": manifest.totals["sequences"],
        "tokens": manifest.totals["tokens"],
        "completion_tokens": manifest.totals["completion_tokens"],
        "flops": {"generate": manifest.flops.get("generate", 0), "score": manifest.flops.get("score", 0)},
        "targets": {
            name: {
                "codec": tier.kind,
                "asked": _asked(place, name),
                "units": len(found.units),
                "bytes": tier.nbytes,
                "shared_bytes": tier.shared_nbytes,
                "bytes_per_token": tier.bytes_per_token,
                "kl_nats": tier.kl_nats,
                "engine_kl_nats": tier.engine_kl_nats,
            }
            for name, found in partial.items()
            for tier in [found.tiers[name]]
        },
    }


def _asked(place: Place, name: str) -> str:
    """A tier as `--targets` asks for it, every setting written out."""
    tier = read_tier(place, name)
    if tier is None:
        return name
    given = {key.replace("_", "-"): value for key, value in tier.asked.items() if value is not None}
    return ":".join([tier.kind, *(f"{key}={value}" for key, value in given.items())])


@dataclass(frozen=True, kw_only=True, eq=False)
class _Job:
    """A build before its engine is loaded: what can be sent to another process."""

    engines: tuple[EngineName, EngineName]
    dtype: str
    model_dir: Path
    shape: flops.ModelShape
    store: Store
    units: Sequence[Unit]
    specs: Sequence[TargetSpec]
    sampling: Sampling
    compare_engines: bool
    devices: int = 1

    def __call__(self, on_sequences: Callable[[int], None]) -> Build:
        generator, scorer = self.engines
        shows_states = not isinstance(scorer, Served)
        engine = load_teacher(
            generator, scorer, self.model_dir, dtype=self.dtype, on_sequences=on_sequences, devices=self.devices
        )
        return Build(
            engine=engine,
            shape=self.shape,
            store=self.store,
            units=self.units,
            specs=self.specs,
            sampling=self.sampling,
            compare=self._comparison() if shows_states and scorer != "transformers" else None,
            shows_states=shows_states,
        )

    def _comparison(self) -> Comparison | None:
        if not self.compare_engines:
            return None
        from logitcache.scorers.compare import compare_with_reference

        return partial(compare_with_reference, self.model_dir)


def _run(job: _Job, share: Sequence[Unit], out: str, cluster: RayCluster | None) -> None:
    sequences = sum(len(unit.prompts) for unit in share) * job.sampling.samples_per_problem
    note(f"{len(share)} of {len(job.units)} units to build, {sequences} sequences, in {out}")
    if cluster is not None:
        with Progress("build", len(share), "units") as progress:
            build_on_ray(job, share, cluster, on_units=progress.add)
        return
    # Each sequence counts twice, once generated and once scored.
    with Progress("build", 2 * sequences, "sequences") as progress:
        job(progress.add).run(share)


def _teacher_dir(request: BuildRequest) -> Path:
    """Where the teacher is. Where servers alone run it, a directory with its tokenizer and configuration is enough."""
    directory = Path(request.teacher).expanduser()
    if all(isinstance(engine, Served) for engine in request.engines) and (directory / "config.json").is_file():
        return directory
    return resolve_model(request.teacher)


def _identity(
    request: BuildRequest,
    model_dir: Path,
    tokenizer: Any,
    problems: Sequence[Problem],
    sampling: Sampling,
    style: PromptStyle,
) -> dict[str, Any]:
    """All that decides a build's bytes; no path, user or credential is in it."""
    vocabulary, digest = tokenizer.get_vocab(), weights_fingerprint(model_dir)
    return {
        "teacher": {
            "name": model_display_name(request.teacher),
            "fingerprint": digest if any(model_dir.glob("*.safetensors")) else f"{UNSEEN}{digest}",
            "vocab_size": max(vocabulary.values()) + 1,
            "dtype": request.dtype,
            "engine": teacher_identity(*request.engines),
        },
        "tokenizer": {"fingerprint": tokenizer_fingerprint(vocabulary)},
        "prompts": prompts_identity(tokenizer, style),
        "problems": {
            "count": len(problems),
            "sha256": problems_digest(problems),
            "per_unit": request.problems_per_unit,
        },
        "sampling": asdict(sampling),
    }
