"""A tier: one kind of targets for the same sequences, with what its codec keeps once.

`tier.json` is written after the shared arrays and commits them. Guarantees: a tier has one configuration and one set of
shared arrays for good, since parts are decoded with them; another one under the same name is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from logitcache.codecs.codec import Codec
from logitcache.errors import IdentityError, UserError
from logitcache.store import layout
from logitcache.store.envelope import canonical, digest_of, seal
from logitcache.store.fetch import Rows, fetch_envelope, fetch_rows
from logitcache.store.part import Record, encode_group, group_metadata, shared_spec
from logitcache.store.place import Place, Source

CodecFactory = Callable[[dict[str, Any], Mapping[str, NDArray[Any]]], Codec]
"""Rebuilds a codec from its config and shared arrays: `logitcache.codecs.codec_from_config`, or one with more kinds."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Tier:
    """What `tier.json` says.

    Attributes:
        name: of the tier.
        kind: of its targets: `topk`, `hidden`, ...
        asked: what the builder was asked for, of which the codec is the outcome; JSON.
        config: JSON from which, with the shared arrays, its codec is rebuilt.
        shared: the record of those arrays.
        digest: SHA-256 of the body.
    """

    name: str
    kind: str
    asked: dict[str, Any]
    config: dict[str, Any]
    shared: Record
    digest: str

    def codec(self, source: Source, factory: CodecFactory) -> Codec:
        """The codec, its shared arrays read and checked.

        Raises:
            DamagedError: the arrays are not what was committed.
            UserError: the factory makes no codec of them and the config.
        """
        shared = self.shared_arrays(source)
        try:
            return factory(self.config, shared)
        except (KeyError, TypeError, ValueError) as error:
            found = f"this version makes no codec of its configuration: {type(error).__name__} {error}"
            do = "open it with the codec_factory of whoever wrote it, or with a newer logitcache"
            raise UserError(f"the codec of tier {self.name} in {source.shown}", found, do) from error

    def shared_arrays(self, source: Source) -> dict[str, NDArray[Any]]:
        """The arrays that the tier keeps once, by name. Raises DamagedError."""
        arrays = self.shared.arrays
        values = fetch_rows(source, [Rows(array, 0, array.spec.shape[0]) for array in arrays.values()])
        return dict(zip(arrays, values, strict=True))


@dataclass(frozen=True, kw_only=True, eq=False)
class EncodedTier:
    """A tier ready to be stored.

    Attributes:
        name: of the tier.
        objects: of its shared arrays, by name in the cache.
        data: its `tier.json`.
        digest: SHA-256 of that object's body.
    """

    name: str
    objects: Mapping[str, bytes]
    data: bytes
    digest: str


def encode_tier(name: str, codec: Codec, asked: Mapping[str, Any]) -> EncodedTier:
    """A codec's tier. Raises UserError for a config that JSON cannot say."""
    group = layout.shared_group(layout.check_name("a tier", name))
    arrays = [(layout.check_name("an array", key), value, shared_spec(value)) for key, value in codec.shared.items()]
    part = encode_group(group, arrays, {}, {}, {})
    body = {
        "format_version": layout.FORMAT_VERSION,
        "kind": codec.kind,
        "asked": dict(asked),
        "config": codec.config,
        "shared": part.record.to_json(),
    }
    try:
        return EncodedTier(name=name, objects=part.objects, data=seal(body), digest=digest_of(body))
    except ValueError as error:
        raise UserError(f"the configuration of tier {name}", str(error), "give plain, finite JSON") from error


def read_tier(source: Source, name: str) -> Tier | None:
    """A committed tier; None if there is none of that name."""
    sealed = fetch_envelope(source, layout.tier_record(name))
    if sealed is None:
        return None
    try:
        body = sealed.body
        shared = Record.from_json(layout.shared_group(name), body["shared"])
        asked, config = dict(body.get("asked", {})), dict(body["config"])
        return Tier(name=name, kind=str(body["kind"]), asked=asked, config=config, shared=shared, digest=sealed.digest)
    except (KeyError, TypeError, ValueError) as error:
        raise layout.damaged(source.shown, layout.tier_record(name), str(error)) from error


def commit_tier(place: Place, tier: EncodedTier) -> None:
    """Commit a tier where there is none of that name.

    Objects are created one after another and never replaced, so that of two workers that calibrated differently one
    gets all of them.

    Raises:
        IdentityError: another calibration was begun or committed at this moment.
    """
    place.write({f"{layout.tier_group(tier.name)}/zarr.json": group_metadata()})
    for name, data in {**tier.objects, layout.tier_record(tier.name): tier.data}.items():
        if not place.create(name, data) and place.read(name) != data:
            found = f"{name} is there already, of another calibration"
            mend = f"run it again to take that up; if no other worker made it, delete {layout.shared_group(tier.name)}"
            raise IdentityError(f"create tier {tier.name} in {place.shown}", found, mend)


def require_same_codec(source: Source, tier: Tier, codec: Codec) -> None:
    """Raise IdentityError unless kind, configuration and shared arrays of the codec are the tier's."""
    if (tier.kind, canonical(tier.config)) != (codec.kind, canonical(codec.config)):
        found = f"it was made with {canonical(tier.config).decode()}"
        asked = f"tier {tier.name} of {source.shown} with {canonical(codec.config).decode()}"
        raise IdentityError(asked, found, "use that, or give the new tier another name")
    theirs, ours = tier.shared_arrays(source), codec.shared
    if theirs.keys() != ours.keys() or not all(_same(theirs[name], ours[name]) for name in ours):
        found = "it was made with other shared arrays"
        raise IdentityError(f"tier {tier.name} of {source.shown}", found, "use its codec, or give it another name")


def _same(one: NDArray[Any], other: NDArray[Any]) -> bool:
    return one.dtype == other.dtype and np.array_equal(one, other)


def list_tiers(place: Place) -> list[str]:
    """The names of the committed tiers."""
    return tiers_among(name for name, _ in place.sizes(layout.TARGETS))


def tiers_among(names: Iterable[str]) -> list[str]:
    """The names of the tiers that these objects commit."""
    paths = [name.split("/") for name in names if name.startswith(f"{layout.TARGETS}/")]
    return sorted({path[1] for path in paths if len(path) == 3 and path[2] == "tier.json"})
