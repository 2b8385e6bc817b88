"""A tier: one kind of targets for the same sequences, with what its codec keeps once.

`tier.json` is written after the shared arrays and commits them. Guarantees: a tier has one configuration for good;
another one under the same name is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from logitcache.codecs.codec import Codec
from logitcache.errors import IdentityError, UserError
from logitcache.store import layout
from logitcache.store.envelope import canonical, seal
from logitcache.store.fetch import Rows, fetch_envelope, fetch_rows
from logitcache.store.part import EncodedPart, Record, encode_group, group_metadata, shared_spec
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
        """The codec, its shared arrays read and checked. Raises DamagedError, or what the factory raises."""
        arrays = self.shared.arrays
        values = fetch_rows(source, [Rows(array, 0, array.spec.shape[0]) for array in arrays.values()])
        return factory(self.config, dict(zip(arrays, values, strict=True)))


def encode_tier(name: str, codec: Codec, asked: Mapping[str, Any]) -> tuple[EncodedPart, bytes]:
    """A tier's shared arrays, and its `tier.json`. Raises UserError for a config that JSON cannot say."""
    group = f"{layout.tier_group(layout.check_name('a tier', name))}/{layout.SHARED}"
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
        return part, seal(body)
    except ValueError as error:
        raise UserError(f"the configuration of tier {name}", str(error), "give plain, finite JSON") from error


def read_tier(source: Source, name: str) -> Tier | None:
    """A committed tier; None if there is none of that name."""
    sealed = fetch_envelope(source, layout.tier_record(name))
    if sealed is None:
        return None
    try:
        body = sealed.body
        shared = Record.from_json(f"{layout.tier_group(name)}/{layout.SHARED}", body["shared"])
        asked, config = dict(body.get("asked", {})), dict(body["config"])
        return Tier(name=name, kind=str(body["kind"]), asked=asked, config=config, shared=shared, digest=sealed.digest)
    except (KeyError, TypeError, ValueError) as error:
        raise layout.damaged(source.shown, layout.tier_record(name), str(error)) from error


def write_tier(place: Place, name: str, codec: Codec, asked: Mapping[str, Any]) -> Tier:
    """Commit a tier, or find it committed with the very same codec. Raises IdentityError for another one."""
    part, data = encode_tier(name, codec, asked)
    existing = read_tier(place, name)
    if existing is None:
        group = {f"{layout.tier_group(name)}/zarr.json": group_metadata()}
        place.write({**group, **part.objects})
        place.write({layout.tier_record(name): data})
        existing = read_tier(place, name)
    if existing is None or canonical(existing.shared.to_json()) != canonical(part.record.to_json()):
        raise IdentityError(
            f"tier {name} of {place.shown}", "it was made with other shared arrays", "give it another name"
        )
    check_codec(place.shown, existing, codec)
    return existing


def check_codec(shown: str, tier: Tier, codec: Codec) -> None:
    """Raise IdentityError unless the codec is configured as the tier is."""
    if (tier.kind, canonical(tier.config)) != (codec.kind, canonical(codec.config)):
        found = f"it was made with {canonical(tier.config).decode()}"
        asked = f"tier {tier.name} of {shown} with {canonical(codec.config).decode()}"
        raise IdentityError(asked, found, "use that, or give the new tier another name")


def list_tiers(place: Place) -> list[str]:
    """The names of the committed tiers."""
    return tiers_among(name for name, _ in place.sizes(layout.TARGETS))


def tiers_among(names: Iterable[str]) -> list[str]:
    """The names of the tiers that these objects commit."""
    paths = [name.split("/") for name in names if name.startswith(f"{layout.TARGETS}/")]
    return sorted({path[1] for path in paths if len(path) == 3 and path[2] == "tier.json"})
