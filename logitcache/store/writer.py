"""Writes a cache: one part at a time, by any number of workers that never speak to each other.

Guarantees: a part is there whole or not at all, whenever the writer dies; a committed part never changes; a part that a
dead writer left half-written is overwritten. Nothing but a part's own objects is written for it, so workers need no
lock; two that write the same unit must make the same bytes, and where they do not the checksums tell.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from logitcache.codecs import codec_from_config
from logitcache.codecs.codec import Codec
from logitcache.errors import IdentityError, UserError
from logitcache.pickling import as_arguments
from logitcache.records import TeacherTargets, TokenSequence
from logitcache.store import layout
from logitcache.store.appended import AppendedSet, all_appended, append_set
from logitcache.store.commits import Committed, consolidate, list_committed, require_parts_of
from logitcache.store.envelope import canonical, digest_of
from logitcache.store.fetch import Rows, fetch_objects, fetch_rows
from logitcache.store.manifest import Manifest
from logitcache.store.part import (
    SAMPLES,
    EncodedPart,
    Record,
    encode_sequences,
    encode_targets,
)
from logitcache.store.part_index import read_record
from logitcache.store.place import Place
from logitcache.store.reader import Reader
from logitcache.store.samples import Samples
from logitcache.store.tiers import (
    CodecFactory,
    Tier,
    commit_tier,
    encode_tier,
    list_tiers,
    read_tier,
    require_same_codec,
)


@dataclass(frozen=True, kw_only=True, eq=False)
class Store:
    """A cache that can be added to; see `create` and `open_store`.

    Attributes:
        place: where it lies.
        identity: of the build, as it was given to `create`.
        codec_factory: rebuilds codecs of tiers.
    """

    place: Place
    identity: Mapping[str, Any]
    codec_factory: CodecFactory = codec_from_config
    _own: dict[str, tuple[str, Codec]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __reduce__(self) -> tuple[Any, ...]:
        return as_arguments(self)

    def committed(self) -> Committed:
        """Units and tiers that are committed now."""
        return list_committed(self.place)

    def write_sequences(
        self, unit: str, sequences: Sequence[TokenSequence], facts: Mapping[str, Any] | None = None
    ) -> None:
        """Commit a unit's sequences. Committing the same again does nothing.

        Args:
            unit: names ascend in the order of the sequences: zero-padded numbers.
            sequences: any number, none included.
            facts: what was measured; deterministic JSON. `flops` {phase: operations} is summed by `seal`.

        Raises:
            UserError: the unit is committed with other bytes, or a token is none of the teacher's, or the place cannot
                be written.
        """
        layout.check_name("a unit", unit)
        self._require_known_tokens(unit, sequences)
        self._commit(encode_sequences(unit, sequences, facts or {}))

    def read_sequences(self, unit: str) -> list[TokenSequence]:
        """A committed unit's sequences, to score them. Raises UserError if it is not committed, DamagedError."""
        record, samples = self._unit(unit)
        (tokens,) = fetch_rows(self.place, [Rows(record.arrays["token_ids"], 0, record.counts["tokens"])])
        bounds = samples.offsets.tolist()
        return [
            samples.sequence(b, tokens[bounds[b] : bounds[b + 1]], int(samples.prompt_tokens[b]))
            for b in range(len(samples))
        ]

    def problem_ids(self, units: Sequence[str]) -> list[str]:
        """The problem of each sequence of these committed units, in order. Raises DamagedError."""
        manifest = consolidate(self.place, self.committed(), units, [])
        reader = Reader(source=self.place, manifest=manifest, identity=self.identity, tier=None)
        return list(reader.samples(["problem_id"])["problem_id"].to_pylist())

    def appended(self) -> tuple[AppendedSet, ...]:
        """The problem sets that were appended after the identity's. Raises DamagedError."""
        return all_appended(self.place, digest_of(self.identity))

    def append(self, wanted: AppendedSet) -> None:
        """Append a problem set after the last one; the same again does nothing.

        Raises:
            IdentityError: another worker appended another set at this moment.
        """
        before = [item for item in self.appended() if item.first_unit < wanted.first_unit]
        append_set(self.place, digest_of(self.identity), len(before) + 1, wanted)

    def tiers(self) -> list[str]:
        """Names of the committed tiers."""
        return list_tiers(self.place)

    def create_tier(self, name: str, codec: Codec, asked: Mapping[str, Any] | None = None) -> None:
        """Commit a tier's configuration and shared arrays; the same again does nothing.

        Args:
            name: of the tier.
            codec: what it keeps.
            asked: what the codec is the outcome of, to tell a later build that asks for something else; JSON.

        Raises:
            IdentityError: the tier exists with another codec, or parts are there that another codec encoded.
        """
        existing = read_tier(self.place, name)
        if existing is not None:
            require_same_codec(self.place, existing, codec)
            return
        tier = encode_tier(name, codec, asked or {})
        require_parts_of(self.place, tier)
        commit_tier(self.place, tier)

    def tier_codec(self, name: str) -> Codec:
        """The codec of a committed tier. Raises UserError if there is none of that name."""
        tier = self._tier(name)
        codec = tier.codec(self.place, self.codec_factory)
        self._own[name] = (tier.digest, codec)
        return codec

    def require_asked(self, name: str, asked: Mapping[str, Any]) -> None:
        """Raise IdentityError unless the committed tier was made for what is asked now."""
        was = self._tier(name).asked
        if canonical(was) != canonical(dict(asked)):
            raise IdentityError(
                f"tier {name} of {self.place.shown} with {canonical(dict(asked)).decode()}",
                f"it was made with {canonical(was).decode()}",
                "ask for that, or build in another place",
            )

    def write_targets(
        self,
        unit: str,
        tier: str,
        codec: Codec,
        targets: Sequence[TeacherTargets],
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        """Commit a unit's targets in a tier, one for each of its committed sequences, in their order.

        Args:
            unit: a unit with committed sequences.
            tier: a committed tier.
            codec: the tier's.
            targets: TeacherTargets of B sequences.
            facts: as for `write_sequences`; `kl_nats`, a list of measured values, is pooled by `seal`.

        Raises:
            IdentityError: the codec is not the tier's.
            UserError: the sequences are not committed, or the targets are not theirs, or what `encode` raises.
        """
        digest = self._require_own(tier, codec)
        _, samples = self._unit(unit)
        want, have = np.diff(samples.row_offsets), np.array([len(item) for item in targets], np.int64)
        if not np.array_equal(want, have):
            found = f"{len(have)} targets with {have.sum()} rows for {len(want)} sequences with {want.sum()}"
            raise UserError(f"targets of unit {unit}", found, "score the unit's own sequences, in order")
        self._commit(encode_targets(layout.targets_part(tier, unit), digest, codec, targets, facts or {}))

    def seal(self, *, units: int | None = None, tiers: Sequence[str] | None = None) -> Manifest:
        """Publish the manifest of everything committed, replacing an earlier one.

        Args:
            units: how many there must be; None for all that are committed, appended sets whole.
            tiers: which to publish; None for all. Each must have every unit.

        Raises:
            UserError: a unit or a unit's targets are missing.
        """
        committed = list_committed(self.place)
        chosen = sorted(committed.targets) if tiers is None else list(tiers)
        if sets := self.appended():
            units = sets[-1].first_unit + sets[-1].units
        _require_complete(self.place.shown, committed, units, chosen)
        manifest = consolidate(self.place, committed, committed.sequences, chosen)
        self.place.write({layout.MANIFEST: manifest.data()})
        return manifest

    def _require_known_tokens(self, unit: str, sequences: Sequence[TokenSequence]) -> None:
        """Once committed, such a token could never be scored: the unit would be stuck."""
        vocab_size = self.identity.get("teacher", {}).get("vocab_size")
        highest = max((int(sequence.token_ids.max()) for sequence in sequences), default=0)
        if vocab_size is not None and highest >= vocab_size:
            found = f"token id {highest} is beyond the teacher's {vocab_size} tokens"
            raise UserError(f"write sequences of unit {unit}", found, "use the teacher's own tokenizer")

    def _commit(self, part: EncodedPart) -> None:
        name, data = layout.record_of(part.record.group), part.record_data
        try:
            existing = self.place.read(name)
        except FileNotFoundError:
            self.place.write(part.objects)
            self.place.write({name: data})
            return
        if existing != data:
            found = "it is committed already, with other bytes"
            mend = f"run `logitcache verify {self.place.shown}`; build other data in another place"
            raise UserError(f"write {part.record.group} in {self.place.shown}", found, mend)

    def _unit(self, unit: str) -> tuple[Record, Samples]:
        group = layout.sequences_part(unit)
        try:
            data = self.place.read(layout.record_of(group))
        except FileNotFoundError as error:
            asked = f"sequences of unit {unit} in {self.place.shown}"
            raise UserError(asked, "they are not committed", "write them first") from error
        record = read_record(self.place, group, data)
        (table,) = fetch_objects(self.place, [(f"{group}/{SAMPLES}", record.objects[SAMPLES])])
        return record, Samples.decode(table)

    def _tier(self, name: str) -> Tier:
        tier = read_tier(self.place, name)
        if tier is None:
            have = ", ".join(self.tiers()) or "no tier"
            raise UserError(f"tier {name} of {self.place.shown}", f"it has {have}", "create the tier first")
        return tier

    def _require_own(self, name: str, codec: Codec) -> str:
        """The tier's digest, once the codec is its own: read from it, or found equal once."""
        tier = self._tier(name)
        digest, known = self._own.get(name, ("", None))
        if known is not codec or digest != tier.digest:
            require_same_codec(self.place, tier, codec)
            self._own[name] = (tier.digest, codec)
        return tier.digest


def _require_complete(shown: str, committed: Committed, units: int | None, tiers: Sequence[str]) -> None:
    asked = f"seal {shown}"
    have = len(committed.sequences)
    if not have or (units is not None and have != units):
        expected = "at least one" if units is None else str(units)
        raise UserError(asked, f"{have} units are committed, not {expected}", "run the build again: it resumes")
    for tier in tiers:
        if tier not in committed.targets:
            raise UserError(asked, f"there is no tier {tier}", f"name one of {', '.join(committed.targets) or 'none'}")
        missing = sorted(set(committed.sequences) - set(committed.targets[tier]))
        if missing:
            found = f"tier {tier} lacks {len(missing)} of {have} units, {missing[0]} first"
            raise UserError(asked, found, "run the build again: it resumes")
