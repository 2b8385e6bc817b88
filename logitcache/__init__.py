"""An offline cache of a teacher's next-token distributions.

`open_cache(url, targets=...)` is the way in, `Batches` what training takes from it; `logitcache --help` lists the
commands.
"""

from logitcache.errors import DamagedError, IdentityError, UserError
from logitcache.loader import Batches
from logitcache.store import open_cache

__all__ = ["Batches", "DamagedError", "IdentityError", "UserError", "open_cache"]
