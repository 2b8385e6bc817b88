"""What every reader must do, whatever it reads from."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np


def assert_serves_many_threads(reader: Any) -> None:
    """Sixteen shuffled reads by eight threads give each sequence's hidden states as one thread alone reads them."""
    n = len(reader)
    alone = [item.targets.hidden for item in reader.read(range(n))]
    orders = [np.random.default_rng(seed).permutation(n) for seed in range(16)]
    with ThreadPoolExecutor(8) as pool:
        for order, items in zip(orders, pool.map(reader.read, orders), strict=True):
            assert all(np.array_equal(item.targets.hidden, alone[i]) for i, item in zip(order, items, strict=True))
