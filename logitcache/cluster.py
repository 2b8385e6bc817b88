"""A build on many machines: Ray places workers, each holds one engine, units go to whoever is free.

Guarantees: what is built does not depend on who builds it: the sealed cache has the bytes that one process writes with
the same engine and seeds. A worker that dies is started again and its unit is done again, from what was committed;
after `attempts` deaths the build ends in an error. Workers tell each other nothing.

Deliberately not here: the division of one model over several GPUs, which is the engine's own.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import ceil
from typing import Any

from logitcache.build import Build, Unit
from logitcache.errors import UserError, require

MakeBuild = Callable[[Callable[[int], None]], Build]
"""Loads an engine and returns the build it works for; picklable, and given what to call as sequences are done."""


@dataclass(frozen=True, kw_only=True)
class RayCluster:
    """Where to run, and what each worker needs.

    Attributes:
        workers: engines at a time.
        cpus_per_worker: cores for each.
        gpus_per_worker: GPUs for each: a share of one, or a whole number, over which vLLM divides the model.
        address: of a running Ray cluster, `auto` for the one of this machine; None starts one here.
        attempts: how often a unit is begun before its worker's death is taken for its fault.
    """

    workers: int
    cpus_per_worker: float = 1.0
    gpus_per_worker: float = 0.0
    address: str | None = None
    attempts: int = 3

    def __post_init__(self) -> None:
        require(self.workers >= 1, "--workers, at least 1", self.workers)
        require(self.cpus_per_worker >= 0 and self.gpus_per_worker >= 0, "CPUs and GPUs of a worker", self)
        whole = self.gpus_per_worker <= 1 or self.gpus_per_worker % 1 == 0
        require(whole, "--gpus-per-worker, a whole number above 1", self.gpus_per_worker)
        require(self.attempts >= 1, "at least one attempt", self.attempts)

    @property
    def devices_per_worker(self) -> int:
        """Devices that an engine runs on."""
        return max(1, int(self.gpus_per_worker))


def build_on_ray(
    make: MakeBuild, share: Sequence[Unit], cluster: RayCluster, *, on_units: Callable[[int], None]
) -> None:
    """Do what is missing of these units; returns when all are committed.

    Args:
        make: called once in each worker.
        share: the units to do; the first one is done alone if the codecs are not calibrated yet.
        cluster: where.
        on_units: called here with the number of units that were just done.

    Raises:
        UserError: Ray is not installed, the cluster is too small, a worker failed, or died too often.
    """
    if not share:
        return
    with _Session(cluster) as session:
        # The first unit calibrates the codecs, once; all at once would each do it and all but one in vain.
        session.run(make, share[:1], on_units)
        session.run(make, share[1:], on_units)


class _Worker:
    """What runs in a worker's process. The engine is loaded by the first unit, so that its errors are that unit's."""

    def __init__(self, make: MakeBuild) -> None:
        self._make = make

    @cached_property
    def _build(self) -> Build:
        return self._make(lambda _: None)

    def run(self, unit: Unit) -> None:
        self._build.run([unit])


class _Session:
    """A connection to Ray for the length of one build, and the workers it holds."""

    def __init__(self, cluster: RayCluster) -> None:
        self._cluster, self._workers = cluster, list[Any]()

    def __enter__(self) -> _Session:
        ray, cluster = _ray(), self._cluster
        self._ours = not ray.is_initialized()
        if self._ours and cluster.address is None:
            cpus = ceil(cluster.workers * cluster.cpus_per_worker)
            ray.init(address="local", num_cpus=cpus, include_dashboard=False, log_to_driver=False)
        elif self._ours:
            try:
                ray.init(address=cluster.address, log_to_driver=False)
            except (ConnectionError, ValueError) as error:
                raise UserError(
                    f"Ray at {cluster.address}", str(error), "start it, or leave the address out"
                ) from error
        self._require_room()
        return self

    def __exit__(self, *_: object) -> None:
        ray = _ray()
        for worker in self._workers:
            ray.kill(worker)
        if self._ours:
            ray.shutdown()

    def run(self, make: MakeBuild, units: Sequence[Unit], on_units: Callable[[int], None]) -> None:
        """All of these units, each on the next free worker."""
        from ray.exceptions import RayActorError, RayTaskError
        from ray.util import ActorPool

        while len(self._workers) < min(self._cluster.workers, len(units)):
            self._workers.append(self._remote().remote(make))
        pool: Any = ActorPool(self._workers)
        try:
            for _ in pool.map_unordered(lambda worker, unit: worker.run.remote(unit), units):
                on_units(1)
        except RayTaskError as error:
            if isinstance(error.cause, UserError):
                raise error.cause from None
            raise UserError(
                "a build on Ray",
                f"a worker failed ({type(error.cause).__name__}: {error.cause})",
                "--debug shows where; what was committed stays",
            ) from error
        except RayActorError as error:
            raise UserError(
                "a build on Ray",
                f"a worker died {self._cluster.attempts} times ({str(error).splitlines()[0]})",
                "see Ray's logs (memory?), then run the command again: what was committed stays",
            ) from error

    def _remote(self) -> Any:
        retries = self._cluster.attempts - 1
        options = {"num_cpus": self._cluster.cpus_per_worker, "num_gpus": self._cluster.gpus_per_worker}
        return _ray().remote(max_restarts=retries, max_task_retries=retries, **options)(_Worker)

    def _require_room(self) -> None:
        have, cluster = _ray().cluster_resources(), self._cluster
        for name, each in (("CPU", cluster.cpus_per_worker), ("GPU", cluster.gpus_per_worker)):
            if each * cluster.workers > have.get(name, 0.0):
                raise UserError(
                    f"{cluster.workers} workers of {each:g} {name}",
                    f"the cluster has {have.get(name, 0.0):g} {name}",
                    "ask for fewer workers",
                )


def _ray() -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError as error:
        raise UserError("--cluster ray", "Ray is not installed", "pip install 'logitcache[cluster]'") from error
    return ray
