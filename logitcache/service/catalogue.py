"""The caches that a server offers, by name: the one place where a name becomes something that is read.

Guarantees: what a request reads is one sealed content, named by its manifest's digest; a cache that is sealed anew is
taken up by `refresh`, and whoever reads what it was goes on with that. Clients choose among names that the server
found, so nothing they send reaches a file system.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from fsspec.core import url_to_fs

from logitcache.codecs import codec_from_config
from logitcache.errors import IdentityError, UserError
from logitcache.service.refusals import LOG
from logitcache.service.undecoded import undecoded
from logitcache.store import Reader, layout, open_cache
from logitcache.store.envelope import unseal
from logitcache.store.opening import SERVED
from logitcache.store.place import redact
from logitcache.store.tiers import CodecFactory

FOLDER = "/*"
"""How a place ends that is a folder of caches."""
CONTENTS = 8
"""Of a cache that grows, the contents that can be read: who opened an older one opens it again."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Served:
    """One content of a cache.

    Attributes:
        name: in the catalogue.
        url: where it lies.
        tokens: its reader without targets.
        codec_factory: rebuilds the codecs of its tiers.
        envelopes: `identity.json` and `manifest.json` as they are stored, which a client checks as a reader does.
    """

    name: str
    url: str
    tokens: Reader
    codec_factory: CodecFactory
    envelopes: tuple[bytes, bytes]
    _readers: dict[tuple[str, bool], Reader] = field(default_factory=dict, init=False, repr=False)
    _lock: threading.RLock = field(default_factory=threading.RLock, init=False, repr=False)

    @property
    def digest(self) -> str:
        """Of its manifest."""
        return str(self.tokens.manifest.digest)

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


class Catalogue:
    """The caches of a server, by name, each with the contents that it had since the server started. Thread-safe.

    Args:
        places: URLs, each alone, to be named by its last part, or as `NAME=URL`; `FOLDER/*` is every sealed cache
            that lies, or comes to lie, in a folder.
        codec_factory: rebuilds the codecs of their tiers.

    Raises:
        UserError: a place without a sealed cache, a name that is none, or one that comes twice.
    """

    def __init__(self, places: Sequence[str], *, codec_factory: CodecFactory = codec_from_config) -> None:
        self._codec_factory = codec_factory
        self._folders = [place.removesuffix("*") for place in places if place.endswith(FOLDER)]
        self._contents: dict[str, OrderedDict[str, Served]] = {}
        self._unfit: dict[str, str] = {}
        self._reserved: frozenset[str] = frozenset()
        for place in places:
            if place.endswith(FOLDER):
                continue
            name, url = _named(place)
            if name in self._contents:
                raise UserError(f"serve {place}", f"{name} is served already", "name one of them: NAME=URL")
            if url.startswith(SERVED):
                raise UserError(f"serve {place}", "it is served already", "give the URL where the cache lies")
            self._take_up(_open(name, url, codec_factory))
        for folder in self._folders:
            _sealed_in(folder)
        self._look_into_folders()

    def __iter__(self) -> Iterator[Served]:
        return iter([next(reversed(contents.values())) for contents in list(self._contents.values())])

    def get(self, name: str, digest: str | None = None) -> Served | None:
        """The content of a cache with that digest, or its newest; None if it is not, or no longer, there."""
        contents = self._contents.get(name)
        if contents is None:
            return None
        return next(reversed(contents.values())) if digest is None else contents.get(digest)

    def reserve(self, names: Sequence[str]) -> None:
        """Take up no cache of these names, which teachers have. Raises UserError if one comes twice or has a cache."""
        for name in names:
            if names.count(name) > 1 or name in self._contents:
                raise UserError(f"serve teacher {name}", "that name is taken", "name one of them: NAME=MODEL")
        self._reserved = frozenset(names)

    def refresh(self) -> list[str]:
        """Take up what was sealed since; the names of those caches. Streams of what was there go on."""
        before = {served.name: served.digest for served in self}
        for served in self:
            with self._noting(served.tokens.source.shown):
                if served.tokens.source.read(layout.MANIFEST) != served.envelopes[1]:
                    self._take_up(_open(served.name, served.url, self._codec_factory))
        self._look_into_folders()
        return [served.name for served in self if before.get(served.name) != served.digest]

    def _look_into_folders(self) -> None:
        for folder in self._folders:
            with self._noting(folder):
                for url in _sealed_in(folder):
                    name = url.rpartition("/")[2]
                    if name not in self._contents:
                        with self._noting(url):
                            if name in self._reserved:
                                raise UserError(f"serve {url}", "a teacher has its name", "name the teacher NAME=MODEL")
                            self._take_up(_open(layout.check_name("a cache", name), url, self._codec_factory))

    def _take_up(self, served: Served) -> None:
        contents = OrderedDict(self._contents.get(served.name, {}))
        contents[served.digest] = served
        contents.move_to_end(served.digest)
        while len(contents) > CONTENTS:
            contents.popitem(last=False)
        self._contents[served.name] = contents  # replaced as a whole: requests read it meanwhile

    @contextmanager
    def _noting(self, what: str) -> Iterator[None]:
        """What cannot be taken up is said once, and the server goes on with what it has."""
        try:
            yield
            self._unfit.pop(what, None)
        except Exception as error:  # of whatever library reads the store: none may end a server that others read from
            if self._unfit.get(what) != str(error):
                LOG.warning(
                    "not taken up", extra={"error": str(error)}, exc_info=not isinstance(error, UserError | OSError)
                )
            self._unfit[what] = str(error)


def _sealed_in(folder: str) -> list[str]:
    """URLs of the sealed caches in a folder."""
    try:
        files, path = url_to_fs(folder)
        files.invalidate_cache()  # an object store's listing is remembered, with what was not there yet
        if not files.isdir(path):
            raise FileNotFoundError("there is no such folder")
        found = files.glob(f"{path.rstrip('/')}/*/{layout.MANIFEST}")
        return sorted(files.unstrip_protocol(str(name)).removesuffix(f"/{layout.MANIFEST}") for name in found)
    except Exception as error:  # each store has its own
        raise UserError(f"serve {redact(folder)}*", redact(str(error)), "give a folder that can be listed") from error


def _open(name: str, url: str, codec_factory: CodecFactory) -> Served:
    tokens = open_cache(url, targets=None, codec_factory=codec_factory)
    envelopes = (tokens.source.read(layout.IDENTITY), tokens.source.read(layout.MANIFEST))
    if unseal(envelopes[1]).digest != tokens.manifest.digest:
        raise UserError(f"serve {url}", "it was sealed anew just now", "start the server again")
    return Served(name=name, url=url, tokens=tokens, codec_factory=codec_factory, envelopes=envelopes)


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
