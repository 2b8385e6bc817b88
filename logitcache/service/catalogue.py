"""The caches that a server offers, by name: the one place where a name becomes something that is read.

Guarantees: what is served is one sealed content, named by its manifest's digest, from start to end; clients choose
among names that were fixed when the server started, so nothing they send reaches a file system.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from logitcache.codecs import codec_from_config
from logitcache.errors import IdentityError, UserError
from logitcache.service.undecoded import undecoded
from logitcache.store import Reader, layout, open_cache
from logitcache.store.envelope import unseal
from logitcache.store.opening import SERVED
from logitcache.store.tiers import CodecFactory


@dataclass(frozen=True, kw_only=True, eq=False)
class Served:
    """One cache.

    Attributes:
        name: in the catalogue.
        tokens: its reader without targets.
        codec_factory: rebuilds the codecs of its tiers.
        envelopes: `identity.json` and `manifest.json` as they are stored, which a client checks as a reader does.
    """

    name: str
    tokens: Reader
    codec_factory: CodecFactory
    envelopes: tuple[bytes, bytes]
    _readers: dict[tuple[str, bool], Reader] = field(default_factory=dict, init=False, repr=False)
    _lock: threading.RLock = field(default_factory=threading.RLock, init=False, repr=False)

    def reader(self, tier: str | None, *, encoded: bool = False) -> Reader:
        """The reader of a tier that is there, one for all requests; of tokens alone for None."""
        if tier is None:
            return self.tokens
        with self._lock:
            if (tier, encoded) not in self._readers:
                factory = self._undecoded(tier) if encoded else self.codec_factory
                self._readers[tier, encoded] = replace(self.tokens, tier=tier, codec_factory=factory)
            return self._readers[tier, encoded]

    def tier_record(self, tier: str) -> bytes:
        """A tier's `tier.json` as it is stored."""
        return self.tokens.source.read(layout.tier_record(tier))

    def _undecoded(self, tier: str) -> CodecFactory:
        codec = self.reader(tier).codec  # one codec for both readers: a head may take a gigabyte
        assert codec is not None
        packed = undecoded(codec)
        return lambda config, shared: packed


def open_catalogue(places: Sequence[str], *, codec_factory: CodecFactory = codec_from_config) -> dict[str, Served]:
    """Caches by name.

    Args:
        places: URLs, each alone, to be named by its last part, or as `NAME=URL`.
        codec_factory: rebuilds the codecs of their tiers.

    Raises:
        UserError: a place without a sealed cache, a name that is none, or one that comes twice.
    """
    served: dict[str, Served] = {}
    for place in places:
        name, url = _named(place)
        if name in served:
            raise UserError(f"serve {place}", f"{name} is served already", "name one of them: NAME=URL")
        if url.startswith(SERVED):
            raise UserError(f"serve {place}", "it is served already", "give the URL where the cache lies")
        served[name] = _open(name, url, codec_factory)
    if not served:
        raise UserError("serve caches", "none is named", "give the URL of at least one")
    return served


def _open(name: str, url: str, codec_factory: CodecFactory) -> Served:
    tokens = open_cache(url, targets=None, codec_factory=codec_factory)
    envelopes = (tokens.source.read(layout.IDENTITY), tokens.source.read(layout.MANIFEST))
    if unseal(envelopes[1]).digest != tokens.manifest.digest:
        raise UserError(f"serve {url}", "it was sealed anew just now", "start the server again")
    return Served(name=name, tokens=tokens, codec_factory=codec_factory, envelopes=envelopes)


def unknown_cache(name: str) -> UserError:
    """The error for a cache that is not there, or not for this caller."""
    return UserError(f"cache {name[:80]}", "this server has none of that name for you", "list_flights says which")


def other_content(name: str) -> UserError:
    """The error for a request that speaks of another content than the one served."""
    return IdentityError(f"cache {name}", "the server has another content by now", "open it again")


def _named(place: str) -> tuple[str, str]:
    name, separator, url = place.partition("=")
    if not separator or "/" in name:
        name, url = place.rstrip("/").rpartition("/")[2], place
    return layout.check_name("a cache", name), url
