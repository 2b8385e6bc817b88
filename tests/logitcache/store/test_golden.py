"""A tiny cache of format version 1, kept as bytes: every later version must read it.

Made once by `python -m tests.logitcache.store.test_golden`; never again for this version.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from logitcache.store import verify
from tests.logitcache.store.conftest import World

GOLDEN = Path(__file__).parents[2] / "golden" / "v1"
TINY = World(lengths=((3, 5), (1, 0), (2, 7)))


DIGEST = "9a4d6d96607453ce161efe6f78be357cda7c35f09c609d973e6f11b9f6eea94b"
VALUES = {
    "hidden": "1a478c22903af25f9863552a592f02e1a4d5641cb721ed50819246d165d9d3e9",
    "topk": "5fa1f6a5e8da76030e3ef975d73db5a1e6ad92a754606a165ae9a375e724b17c",
}
"""SHA-256 of everything that reading returns."""


def values_of(tier: str) -> str:
    digest = hashlib.sha256()
    reader = TINY.open(str(GOLDEN), targets=tier, tokenizer="tok0")
    for item in reader.read(range(len(reader))):
        for name, value in [*vars(item.sequence).items(), *vars(item.targets).items()]:
            digest.update(f"{name} {value.dtype} {value.shape}".encode() if hasattr(value, "dtype") else name.encode())
            digest.update(value.tobytes() if hasattr(value, "dtype") else str(value).encode())
    return digest.hexdigest()


def test_version_1_stays_readable():
    assert TINY.open(str(GOLDEN), targets=None).manifest.digest == DIGEST
    assert {tier: values_of(tier) for tier in VALUES} == VALUES
    report = verify(str(GOLDEN), deep=True)
    assert report.sound
    assert report.parts == 6


if __name__ == "__main__":
    TINY.build(str(GOLDEN), units=2)
    print(TINY.open(str(GOLDEN), targets=None).manifest.digest, {tier: values_of(tier) for tier in VALUES})
