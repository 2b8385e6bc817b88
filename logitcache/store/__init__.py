"""The store: where a teacher's targets lie, so that nothing is lost and nothing false is read (docs/format.md).

`create` or `open_store` to write, `open_cache` to read.
"""

from __future__ import annotations

from logitcache.store.appended import AppendedSet
from logitcache.store.check import Damage
from logitcache.store.commits import Committed
from logitcache.store.disk_cache import DiskCache
from logitcache.store.export import export_parquet
from logitcache.store.manifest import Manifest, TierSummary
from logitcache.store.merge import merge
from logitcache.store.opening import create, open_cache, open_store
from logitcache.store.reader import Reader
from logitcache.store.verify import Report, verify
from logitcache.store.writer import Store

__all__ = [
    "AppendedSet",
    "Committed",
    "Damage",
    "DiskCache",
    "Manifest",
    "Reader",
    "Report",
    "Store",
    "TierSummary",
    "create",
    "export_parquet",
    "merge",
    "open_cache",
    "open_store",
    "verify",
]
