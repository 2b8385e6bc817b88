"""One BLAS thread, where bytes of a cache follow from a matrix product.

OpenBLAS divides a product by its threads, and its last bits with it: a codec fitted on two cores would differ from one
fitted on sixteen, and workers of one build would disagree.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

from threadpoolctl import ThreadpoolController

_LIMITED = threading.RLock()
"""The limit is the process's: who would lift it must not be inside another's."""


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """Within it, numpy's products give the same bits on every machine with this BLAS. Others who want it wait."""
    with _LIMITED, _controller().limit(limits=1, user_api="blas"):
        yield


@cache
def _controller() -> ThreadpoolController:
    return ThreadpoolController()
