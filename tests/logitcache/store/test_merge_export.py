"""Merging what was built apart, and exporting to Parquet."""

from __future__ import annotations

import resource
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from logitcache.errors import DamagedError, IdentityError, UserError
from logitcache.store import AppendedSet, create, export_parquet, merge
from tests.logitcache.store.conftest import World
from tests.logitcache.store.plain_codecs import plain_codec


def halves(world: World, tmp_path) -> list[str]:
    """Two caches of one identity, units 0 and 2, and unit 1."""
    urls = []
    for name, units in (("even", (0, 2)), ("odd", (1,))):
        store = world.start(str(tmp_path / name))
        for number in units:
            world.write_unit(store, number)
        urls.append(str(tmp_path / name))
    return urls


def test_merging_gives_the_bytes_of_one_build(world, url, tmp_path, objects_of):
    urls = halves(world, tmp_path)
    merge(urls, url).seal(units=3)
    world.build(str(tmp_path / "whole"), units=3)
    assert objects_of(url) == objects_of(str(tmp_path / "whole"))
    merge(urls, url)
    merge([url], str(tmp_path / "odd")).seal(units=3)
    assert objects_of(str(tmp_path / "odd")) == objects_of(url)


def test_merging_refuses_what_does_not_fit(world, tmp_path):
    urls = halves(world, tmp_path)
    other = create(str(tmp_path / "other"), {"x": 1}, codec_factory=plain_codec)
    with pytest.raises(IdentityError, match="built with other settings"):
        merge([*urls, other.place.shown], str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="no source"):
        merge([], str(tmp_path / "out"))
    clash = world.start(str(tmp_path / "clash"))
    clash.write_sequences(world.unit(1), world.sequences(5))
    with pytest.raises(UserError, match=r"sequences/000001 .* other bytes"):
        merge([urls[1], str(tmp_path / "clash")], str(tmp_path / "out"))
    shard = tmp_path / "even/sequences/000002/token_ids/c/0"
    shard.write_bytes(shard.read_bytes()[::-1])
    with pytest.raises(DamagedError, match="000002/token_ids"):
        merge(urls[:1], str(tmp_path / "out2"))


def test_conflicting_problem_sets_are_refused_before_anything_is_written(world, tmp_path, objects_of):
    one, other, into = (str(tmp_path / name) for name in ("one", "other", "into"))
    for where, sha256 in ((one, "a"), (other, "b"), (into, "b")):
        store = world.start(where)
        world.write_unit(store, 0)
        store.append(AppendedSet(count=5, sha256=sha256, first_unit=1, units=1))
    before = objects_of(into)
    for sources, out in (([one, other], str(tmp_path / "new")), ([one], into)):
        with pytest.raises(IdentityError, match="other problems were appended to them"):
            merge(sources, out, codec_factory=plain_codec)
    assert not (tmp_path / "new").exists()
    assert objects_of(into) == before
    world.build(str(tmp_path / "plain"), units=1)  # a beginning of the longer list is no conflict
    assert len(merge([str(tmp_path / "plain"), other], str(tmp_path / "new")).appended()) == 1


@pytest.mark.parametrize("remote_out", [False, True])
def test_an_export_holds_what_the_reader_returns(world, url, tmp_path, remote_out):
    world.build(url, units=2)
    for tier in ("hidden", "topk"):
        out = f"memory://export-{tier}/x.parquet" if remote_out else str(tmp_path / f"{tier}.parquet")
        assert export_parquet(url, tier, out, codec_factory=plain_codec) == 12
        if remote_out:
            continue
        rows = pq.read_table(out).to_pylist()
        for row, item in zip(rows, world.open(url, targets=tier).read(range(12)), strict=True):
            assert row["sample_id"] == item.sequence.sample_id
            assert row["token_ids"] == item.sequence.token_ids.tolist()
            if tier == "hidden":
                assert row["hidden"] == item.targets.hidden.tolist()
                continue
            splits = item.targets.row_splits
            assert row["entropy"] == item.targets.entropy.tolist()
            ids = [part.tolist() for part in np.split(item.targets.ids, splits[1:-1])] if len(item.targets) else []
            assert row["ids"] == ids
    assert sorted(p.name for p in tmp_path.iterdir() if p.suffix == ".parquet" or p.name.startswith("tmp")) == (
        [] if remote_out else ["hidden.parquet", "topk.parquet"]
    )


def test_an_export_of_tokens_alone_and_into_nowhere(world, tmp_path):
    world.build(str(tmp_path / "c"), units=1)
    assert export_parquet(str(tmp_path / "c"), None, str(tmp_path / "t.parquet")) == 6
    assert "token_ids" in pq.read_table(tmp_path / "t.parquet").column_names
    with pytest.raises(UserError, match="no folder"):
        export_parquet(str(tmp_path / "c"), None, str(tmp_path / "no" / "t.parquet"))
    told: list[tuple[int, int]] = []
    for out, why in ((tmp_path / "c", "it is a folder"), (Path("/proc/t.parquet"), "write t.parquet in /proc")):
        with pytest.raises(UserError, match=why):
            export_parquet(str(tmp_path / "c"), None, str(out), progress=lambda *now: told.append(now))
    assert not told  # before anything is decoded


def test_an_export_to_a_disk_that_takes_no_more_is_one_line_and_leaves_nothing(world, tmp_path):
    where, out = str(tmp_path / "c"), tmp_path / "out" / "t.parquet"
    world.build(where, units=1)
    out.parent.mkdir()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(UserError, match=r"write t.parquet in .*/out: .*File too large; make it writable or free"):
            export_parquet(where, "hidden", str(out), codec_factory=plain_codec)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(out.parent.iterdir()) == []
