"""An offline cache of a teacher's next-token distributions.

`open_cache(url, targets=...)` is the way in; `logitcache --help` lists the commands.
"""

from logitcache.errors import DamagedError, IdentityError, UserError
from logitcache.store import open_cache

__all__ = ["DamagedError", "IdentityError", "UserError", "open_cache"]
