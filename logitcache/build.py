"""Building a cache: a teacher writes completions and what it thought of every token of them.

Guarantees: the work is cut into units that depend on nothing but the identity; a unit that was committed is never
done again; a build that was killed anywhere and run again ends in the same bytes as one that was not. Encoding and
writing of one unit overlap with the teacher's work on the next.

Deliberately not here: which engine the teacher runs in, and how anything is stored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from logitcache import flops
from logitcache.codecs import Calibration, Codec, TargetSpec, TopKSpec, calibrate
from logitcache.codecs.calibrate import fit_topk_to_targets, topk_request
from logitcache.codecs.dense import DenseHead, spread
from logitcache.codecs.fidelity import Gauge
from logitcache.codecs.quantize import as_float32
from logitcache.records import Head, HiddenStateTargets, TeacherTargets, TokenSequence, TopKTargets
from logitcache.scoring import Generator, HiddenStateRequest, Prompt, SampledRequest, Sampling, Scorer
from logitcache.store.commits import Committed
from logitcache.store.writer import Store

CALIBRATION_ROWS = 16_384
"""Rows of the first unit that a codec is calibrated on, at most."""
FIDELITY_ROWS = 32
"""Rows of every part on which the KL between the teacher and what decoding returns is measured."""


class Engine(Scorer, Generator, Protocol):
    """A teacher that both writes and scores."""


@dataclass(frozen=True, kw_only=True)
class Unit:
    """One deterministic piece of the work: a name that sorts in order, and its prompts."""

    name: str
    prompts: tuple[Prompt, ...]


def unit_name(number: int) -> str:
    """The name of a unit by its number; names sort as numbers do."""
    return f"{number:08d}"


def cut_into_units(prompts: Sequence[Prompt], prompts_per_unit: int, *, first: int = 0) -> list[Unit]:
    """Consecutive slices of the prompts, named by their number; the first has number `first`."""
    slices = [prompts[start : start + prompts_per_unit] for start in range(0, len(prompts), prompts_per_unit)]
    return [Unit(name=unit_name(number), prompts=tuple(part)) for number, part in enumerate(slices, first)]


def share_of(units: Sequence[Unit], worker: int, workers: int) -> list[Unit]:
    """The units of one worker of several: every `workers`-th, so that all finish at about the same time."""
    return list(units[worker::workers])


def require_same_tiers(store: Store, specs: Iterable[TargetSpec]) -> None:
    """Raise IdentityError if a tier that is there was made for another spec than the one asked for now."""
    have = store.tiers()
    for spec in specs:
        if spec.kind in have:
            store.require_asked(spec.kind, asdict(spec))


def missing_units(committed: Committed, units: Sequence[Unit], tiers: Iterable[str]) -> list[Unit]:
    """Those of the units that lack their sequences or one of the tiers."""
    complete = set(committed.sequences).intersection(*(committed.targets.get(tier, ()) for tier in tiers))
    return [unit for unit in units if unit.name not in complete]


Comparison = Callable[[Sequence[TokenSequence], Sequence[NDArray[np.float32]], Head], dict[str, list[float]]]
"""KL per row in nats between a scorer and a reference, by direction; of sequences, the scorer's states and its head."""

Scored = tuple[Unit, list[TokenSequence], list[tuple[TeacherTargets, ...]]]


@dataclass(frozen=True, kw_only=True, eq=False)
class Build:
    """A build under way: its teacher, its store and what is to be kept.

    Attributes:
        engine: the teacher.
        shape: of the teacher, for the FLOPs that every part records.
        store: where parts are committed.
        units: all units of the build, not only this worker's: the first one calibrates the codecs.
        specs: the tiers to write, each named by its kind.
        sampling: how completions are drawn.
        compare: measures the scores of the cache's first unit against a reference engine; None where the engine is that
            reference, or shows no states, or nobody wants to know.
        shows_states: whether the engine gives hidden states and its head. Where it does not, a codec is fitted to the
            targets themselves, and no KL is measured.
    """

    engine: Engine
    shape: flops.ModelShape
    store: Store
    units: Sequence[Unit]
    specs: Sequence[TargetSpec]
    sampling: Sampling
    compare: Comparison | None = None
    shows_states: bool = True

    def run(self, share: Sequence[Unit]) -> None:
        """Do what is missing of these units, and commit each part as soon as it is whole."""
        codecs, committed = self._codecs(), self.store.committed()
        missing = missing_units(committed, share, codecs)
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="writer") as writer:
            pending: Future[None] | None = None
            for scored in self._scored(missing, codecs, committed):
                if pending is not None:
                    pending.result()
                pending = writer.submit(self._write_targets, scored, codecs, committed, self._compared(scored))
            if pending is not None:
                pending.result()

    def _scored(self, units: Iterable[Unit], codecs: Mapping[str, Codec], committed: Committed) -> Iterator[Scored]:
        # Every tier is asked for even where only one is missing: a part made again gets the bytes of the first time.
        want = [codec.request for codec in codecs.values()]
        if self.shows_states:
            want.append(HiddenStateRequest())
        for unit in units:
            sequences = self._sequences(unit, committed)
            yield unit, sequences, self.engine.score(sequences, want)

    def _sequences(self, unit: Unit, committed: Committed) -> list[TokenSequence]:
        if unit.name in committed.sequences:
            return self.store.read_sequences(unit.name)
        sequences = self.engine.generate(unit.prompts, self.sampling)
        prefill, decode = flops.generate(
            self.shape, [s.prompt_tokens for s in sequences], [s.completion_tokens for s in sequences]
        )
        self.store.write_sequences(unit.name, sequences, {"flops": {"generate": prefill + decode}})
        return sequences

    def _codecs(self) -> dict[str, Codec]:
        """Each tier's codec: the committed one, or one calibrated on the first unit and committed now."""
        have = self.store.tiers()
        new = [spec for spec in self.specs if spec.kind not in have]
        for spec, codec in zip(new, self._fitted(new), strict=True):
            self.store.create_tier(spec.kind, codec, asdict(spec))
        return {spec.kind: self.store.tier_codec(spec.kind) for spec in self.specs}

    @cached_property
    def _teacher(self) -> DenseHead:
        """The teacher's head in float32, laid out once for calibration and for every measurement."""
        return DenseHead(self.engine.head)

    def _fitted(self, specs: Sequence[TargetSpec]) -> Iterator[Codec]:
        if not specs:
            return
        sequences = self._calibration_sequences()
        if self.shows_states:
            sample = self._calibration(sequences)
            yield from (calibrate(spec, self._teacher, sample) for spec in specs)
        else:
            yield from (self._fitted_to_targets(spec, sequences) for spec in specs)

    def _fitted_to_targets(self, spec: TargetSpec, sequences: Sequence[TokenSequence]) -> Codec:
        assert isinstance(spec, TopKSpec)
        vocab_size = self.store.identity["teacher"]["vocab_size"]
        scored = self.engine.score(sequences, [topk_request(spec, spec.p, vocab_size)])
        return fit_topk_to_targets(spec, vocab_size, [item for (item,) in scored if isinstance(item, TopKTargets)])

    def _calibration(self, sequences: Sequence[TokenSequence]) -> Calibration:
        hidden = np.concatenate([_states(targets) for targets in self.engine.score(sequences, [HiddenStateRequest()])])
        ids = [sequence.completion_ids for sequence in sequences]
        numbers = np.repeat(np.arange(len(ids)), [len(item) for item in ids])
        return Calibration(hidden=hidden, token_ids=np.concatenate(ids), sequence=numbers)

    def _calibration_sequences(self) -> list[TokenSequence]:
        kept: list[TokenSequence] = []
        for sequence in self._sequences(self.units[0], self.store.committed()):
            if sum(earlier.completion_tokens for earlier in kept) < CALIBRATION_ROWS:
                kept.append(sequence)
        return kept

    def _compared(self, scored: Scored) -> dict[str, Any]:
        """Facts of the cache's first unit. Not in the writer's thread: a reference computes after the teacher."""
        unit, sequences, targets = scored
        if self.compare is None or unit.name != unit_name(0):
            return {}
        states = [_states(item) for item in targets]
        return {"engine_kl_nats": self.compare(sequences, states, self.engine.head)}

    def _write_targets(
        self, scored: Scored, codecs: Mapping[str, Codec], committed: Committed, compared: Mapping[str, Any]
    ) -> None:
        unit, sequences, targets = scored
        sample = self._measured_states(targets)
        for position, (tier, codec) in enumerate(codecs.items()):
            if unit.name in committed.targets.get(tier, ()):
                continue
            facts = {"flops": self._score_flops(tier, sequences, codecs), "kl_nats": self._kl_nats(codec, sample)}
            targets_of_tier = [item[position] for item in targets]
            self.store.write_targets(unit.name, tier, codec, targets_of_tier, {**facts, **compared})

    def _measured_states(self, targets: Sequence[tuple[TeacherTargets, ...]]) -> NDArray[np.float32] | None:
        if not self.shows_states:
            return None
        return spread(np.concatenate([_states(item) for item in targets]), FIDELITY_ROWS)

    def _kl_nats(self, codec: Codec, sample: NDArray[np.float32] | None) -> list[float]:
        # Draws are no distribution: they are unbiased, and have no KL of their own.
        if sample is None or isinstance(codec.request, SampledRequest):
            return []
        return Gauge(codec, self._teacher).measure(sample).forward.tolist()

    def _score_flops(
        self, tier: str, sequences: Sequence[TokenSequence], codecs: Mapping[str, Codec]
    ) -> dict[str, int]:
        """The scoring pass is charged once, to the first tier by name of those that it filled."""
        if tier != min(codecs):
            return {"score": 0}
        needs_head = any(not isinstance(codec.request, HiddenStateRequest) for codec in codecs.values())
        rows = sum(sequence.completion_tokens for sequence in sequences) if needs_head else 0
        return {"score": flops.forward(self.shape, [len(sequence) - 1 for sequence in sequences], head_rows=rows)}


def _states(targets: Sequence[TeacherTargets]) -> NDArray[np.float32]:
    """float32[C, D]: the hidden states, which are asked for last."""
    hidden = targets[-1]
    assert isinstance(hidden, HiddenStateTargets)
    return as_float32(hidden.hidden)
