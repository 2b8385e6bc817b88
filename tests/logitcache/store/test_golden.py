"""Tiny caches of format version 1, kept as bytes: every later version must read them.

`v1` has codecs that only tests know, and arrays of many kinds; `python -m tests.logitcache.store.test_golden` made it.
`v1-codecs` has a tier of every codec that builds write; `python -m tests.golden.make_v1_codecs` did. Neither is made
again.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest

from logitcache import open_cache
from logitcache.append import all_units
from logitcache.errors import UserError
from logitcache.jobs import describe
from logitcache.store import open_store, verify
from tests.golden.make_v1_codecs import TIERS, read
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


CODECS = GOLDEN.parent / "v1-codecs"
CODECS_DIGEST = "9618c6b05875aba9a477acde19fcb87b6dc6bc6fc9bbbafd25431fcb9b28aa22"


def test_the_codecs_of_version_1_stay_readable():
    assert open_cache(str(CODECS), targets=None).manifest.digest == CODECS_DIGEST
    found = read(str(CODECS))
    with np.load(CODECS.with_suffix(".npz"), allow_pickle=False) as kept:
        assert kept.keys() == found.keys()
        for name, values in kept.items():
            assert values.dtype == found[name].dtype, name
            if values.dtype.kind == "f":
                np.testing.assert_allclose(found[name], values, rtol=1e-6, atol=1e-6, err_msg=name)
            else:
                np.testing.assert_array_equal(found[name], values, name)
    report = verify(str(CODECS), deep=True)
    assert report.sound
    assert report.parts == 2 * (1 + len(TIERS))
    assert describe(str(CODECS))["appended"][0]["count"] == 1


def test_a_cache_that_no_build_made_is_one_line_where_a_build_is_needed():
    with pytest.raises(UserError, match=r"codec of tier topk .* KeyError 'min_probability'; open it with the codec_f"):
        open_cache(str(GOLDEN), targets="topk").read([0])
    with pytest.raises(UserError, match="its identity names no prompts, problems, sampling"):
        describe(str(GOLDEN))
    with pytest.raises(UserError, match="its identity names no problems"):
        all_units(open_store(str(GOLDEN)))


if __name__ == "__main__":
    TINY.build(str(GOLDEN), units=2)
    print(TINY.open(str(GOLDEN), targets=None).manifest.digest, {tier: values_of(tier) for tier in VALUES})
