"""Damage is always found, never read, and mended to the same bytes."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from logitcache.errors import DamagedError, UserError
from logitcache.store import create, layout, verify
from logitcache.store.envelope import seal, unseal
from tests.logitcache.store.conftest import IDENTITY, World
from tests.logitcache.store.plain_codecs import plain_codec

SMALL = World(lengths=((3, 5), (1, 0), (7, 40), (5, 600)))


def everything(where: str) -> list[bytes]:
    """Every number that a reader returns of both tiers."""
    found = []
    for tier in ("hidden", "topk"):
        reader = SMALL.open(where, targets=tier)
        for item in reader.read(range(len(reader))):
            values = [*vars(item.sequence).values(), *vars(item.targets).values()]
            found += [v.tobytes() if isinstance(v, np.ndarray) else str(v).encode() for v in values]
    return found


def rebuild(where: str) -> None:
    """What a build does when it is run again."""
    store = SMALL.start(where)
    for number in range(2):
        SMALL.write_unit(store, number)
    store.seal(units=2)


def flip(files: list[Path], rng: np.random.Generator) -> str:
    file = files[rng.integers(len(files))]
    data = bytearray(file.read_bytes())
    data[rng.integers(len(data))] ^= 1 << int(rng.integers(8))
    file.write_bytes(data)
    return f"flip in {file.name}"


def truncate(files: list[Path], rng: np.random.Generator) -> str:
    file = files[rng.integers(len(files))]
    data = file.read_bytes()
    file.write_bytes(data[: rng.integers(len(data))])
    return f"truncate {file.name}"


def extend(files: list[Path], rng: np.random.Generator) -> str:
    file = files[rng.integers(len(files))]
    file.write_bytes(file.read_bytes() + rng.bytes(9))
    return f"extend {file.name}"


def delete(files: list[Path], rng: np.random.Generator) -> str:
    file = files[rng.integers(len(files))]
    file.unlink()
    return f"delete {file.name}"


def swap(files: list[Path], rng: np.random.Generator) -> str:
    while True:
        one, other = (files[i] for i in rng.integers(0, len(files), 2))
        if (mine := one.read_bytes()) != (theirs := other.read_bytes()):
            one.write_bytes(theirs)
            other.write_bytes(mine)
            return f"swap {one} and {other}"


DAMAGES: list[Callable[..., str]] = [flip, truncate, extend, delete, swap]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda d: d.__name__)
def test_any_damage_is_found_never_read_and_mended(tmp_path, damage, objects_of):
    where = str(tmp_path / "cache")
    SMALL.build(where, units=2)
    before, values = objects_of(where), everything(where)
    for seed in range(12):
        files = sorted(path for path in Path(where).rglob("*") if path.is_file())
        what = damage(files, np.random.default_rng(seed))
        with suppress(UserError):  # damage that a read does not meet is left to verify
            assert everything(where) == values, what
        report = verify(where, deep=True, repair=True)
        assert not report.sound, what
        rebuild(where)
        assert objects_of(where) == before, what
        assert verify(where, deep=True).sound


def test_a_sound_cache_is_sound_and_untouched(world, url, objects_of):
    world.build(url, units=2)
    before = objects_of(url)
    for deep in (False, True):
        report = verify(url, deep=deep, repair=True)
        assert report.sound
        assert report.sealed
        assert not report.repaired
        assert report.parts == 6
        assert report.objects == len(before)
    assert report.nbytes > 10_000
    assert objects_of(url) == before


def test_a_shallow_check_finds_what_a_listing_shows(tmp_path):
    SMALL.build(str(tmp_path), units=2)
    shard = tmp_path / "targets/hidden/000001/states/c/0/0"
    shard.write_bytes(shard.read_bytes()[:-1])
    (tmp_path / "sequences/000000/samples.parquet").unlink()
    names = {item.name: item.undo for item in verify(str(tmp_path)).damage}
    assert names == {
        "targets/hidden/000001/states/c/0/0": "targets/hidden/000001/record.json",
        "sequences/000000/samples.parquet": "sequences/000000/record.json",
    }


def test_a_repaired_part_can_be_read_around_and_the_manifest_stays(tmp_path):
    where = str(tmp_path)
    SMALL.build(where, units=2)
    digest = SMALL.open(where, targets=None).manifest.digest
    (tmp_path / "targets/hidden/000001/states/c/0/0").unlink()
    assert verify(where, repair=True).repaired
    reader = SMALL.open(where, targets="hidden")
    assert reader.manifest.digest == digest
    assert len(reader.read(range(4))) == 4
    with pytest.raises(DamagedError, match=r"targets/hidden/000001/record.json.*missing.*verify .* --repair"):
        reader.read([4])
    SMALL.write_unit(SMALL.reopen(where), 1)
    assert len(reader.read([4])) == 1


def test_progress_is_told(tmp_path):
    SMALL.build(str(tmp_path), units=2)
    told: list[tuple[int, int]] = []
    verify(str(tmp_path), progress=lambda done, total: told.append((done, total)))
    assert told == [(n, 6) for n in range(1, 7)]


def test_nothing_there_is_not_damage(tmp_path):
    with pytest.raises(UserError, match="no cache there"):
        verify(str(tmp_path))


def rewritten(path: Path, change: Callable[[Any], None]) -> None:
    """A liar's envelope: changed, and sealed again."""
    body = unseal(path.read_bytes()).body
    change(body)
    path.write_bytes(seal(body))


def packed(*values: int) -> str:
    return base64.b64encode(np.array(values, "<i8").tobytes()).decode()


LIES: dict[str, Callable[[Any], Any]] = {
    "counts": lambda m: m["parts"].update(sequences=packed(5, 4)),
    "overflow": lambda m: m["parts"].update(tokens=packed(1 << 62, 1 << 62)),
    "negative": lambda m: m["parts"].update(tokens=packed(-1, 3)),
    "columns": lambda m: m["parts"].update(sequences=packed(4)),
    "order": lambda m: m["parts"].update(units=["000001", "000000"]),
    "escape": lambda m: m["parts"].update(units=["..", "x"]),
    "types": lambda m: m.update(parts=[1]),
    "base64": lambda m: m["parts"].update(record_sha256="!!"),
    "totals": lambda m: m["totals"].update(tokens=7),
}


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES.keys())
def test_a_manifest_that_lies_is_refused(tmp_path, lie):
    SMALL.build(str(tmp_path), units=2)
    rewritten(tmp_path / "manifest.json", lie)
    with pytest.raises(DamagedError, match=r"manifest.json"):
        SMALL.open(str(tmp_path), targets=None)


def test_a_manifest_with_honest_sums_that_its_parts_contradict(tmp_path):
    SMALL.build(str(tmp_path), units=2)
    rewritten(tmp_path / "manifest.json", lambda m: m["parts"].update(sequences=packed(3, 5)))
    with pytest.raises(DamagedError, match="the manifest says"):
        SMALL.open(str(tmp_path), targets=None).read_tokens([0])


@pytest.mark.parametrize("name", ["manifest.json", "identity.json"])
def test_a_newer_format_is_refused(tmp_path, name):
    SMALL.build(str(tmp_path), units=2)
    rewritten(tmp_path / name, lambda body: body.update(format_version=2))
    with pytest.raises(UserError, match=r"has format version 2, not 1; upgrade logitcache"):
        SMALL.open(str(tmp_path), targets=None)


RECORD_LIES: dict[str, Callable[[Any], Any]] = {
    "shape": lambda r: r["arrays"]["token_ids"].update(shape=[1 << 40]),
    "absurd": lambda r: r["arrays"]["token_ids"].update(shape=[1 << 60]),
    "chunk": lambda r: r["arrays"]["token_ids"].update(chunk_shape=[1 << 30]),
    "size": lambda r: r["arrays"]["token_ids"]["shards"][0].update(size=1 << 40),
    "codec": lambda r: r["arrays"]["token_ids"].update(compression=[{"name": "lzma"}]),
    "blosc": lambda r: r["arrays"]["token_ids"]["compression"][0].update(configuration={"x": 1}),
    "samples": lambda r: r["objects"]["samples.parquet"].update(size=1 << 47),
    "missing": lambda r: r["arrays"].pop("token_ids"),
    "group": lambda r: r.update(group="sequences/000001"),
    "version": lambda r: r.update(format_version=9),
}


@pytest.mark.parametrize("lie", RECORD_LIES.values(), ids=RECORD_LIES.keys())
def test_a_record_that_lies_is_refused(tmp_path, lie):
    """Even where no manifest vouches for it, as in a cache that is not sealed."""
    store = SMALL.start(str(tmp_path))
    SMALL.write_unit(store, 0)
    rewritten(tmp_path / "sequences/000000/record.json", lie)
    with pytest.raises(DamagedError, match="sequences/000000"):
        SMALL.open(str(tmp_path), targets=None, committed=True).read_tokens([0])


def test_a_shard_whose_blosc_header_asks_for_a_gigabyte_allocates_nothing(tmp_path):
    """Chunk checksum, shard index and record all agree: only the header lies."""
    import google_crc32c

    store = SMALL.start(str(tmp_path))
    SMALL.write_unit(store, 0)
    shard = tmp_path / "sequences/000000/token_ids/c/0"
    data = bytearray(shard.read_bytes())
    record = tmp_path / "sequences/000000/record.json"
    table = unseal(record.read_bytes()).body["arrays"]["token_ids"]["shards"][0]
    (nbytes,) = np.frombuffer(base64.b64decode(table["chunk_nbytes"]), "<u4").tolist()
    data[4:8] = (1 << 30).to_bytes(4, "little")
    crc = google_crc32c.value(bytes(data[: nbytes - 4]))
    data[nbytes - 4 : nbytes] = crc.to_bytes(4, "little")
    shard.write_bytes(data)
    packed_crc = base64.b64encode(crc.to_bytes(4, "little")).decode()
    rewritten(record, lambda body: body["arrays"]["token_ids"]["shards"][0].update(chunk_crc32c=packed_crc))
    with pytest.raises(DamagedError, match="1073741824 found"):
        SMALL.open(str(tmp_path), targets=None, committed=True).read_tokens([0])


def test_envelopes_are_json_that_carries_its_digest():
    data = seal({"b": [1, 2.5], "a": "é"})
    assert json.loads(data)["body"] == {"a": "é", "b": [1, 2.5]}
    assert unseal(data).body == {"a": "é", "b": [1, 2.5]}
    for at in range(len(data)):
        with pytest.raises(ValueError, match=r"digest|envelope"):
            unseal(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
    with pytest.raises(ValueError, match="JSON compliant"):
        seal({"x": float("inf")})
    deep = b"[" * 100_000
    with pytest.raises(ValueError):
        unseal(seal(1).replace(b"1}", deep))


def test_a_lost_identity_is_taken_up_by_the_same_build_only(tmp_path, objects_of):
    where = str(tmp_path)
    SMALL.build(where, units=2)
    before = objects_of(where)
    (tmp_path / layout.IDENTITY).unlink()
    with pytest.raises(UserError, match="not empty"):
        create(where, {**IDENTITY, "x": 1}, codec_factory=plain_codec)
    rebuild(where)
    assert objects_of(where) == before


def test_an_identity_from_elsewhere_is_not_made_the_caches_own(tmp_path):
    where = str(tmp_path / "cache")
    SMALL.write_unit(SMALL.start(where), 0)
    create(str(tmp_path / "other"), {"x": 1})
    (tmp_path / "cache/identity.json").write_bytes((tmp_path / "other/identity.json").read_bytes())
    report = verify(where, repair=True)
    assert [item.name for item in report.damage] == ["identity.json"]
    with pytest.raises(UserError, match="not empty"):
        create(where, {"x": 1})
    assert SMALL.start(where).committed().sequences == ("000000",)
    assert verify(where, deep=True).sound


def test_what_cannot_be_read_is_not_called_damage(tmp_path):
    """Else a repair would remove what is sound but out of reach, or newer than this version."""
    SMALL.build(str(tmp_path), units=2)
    rewritten(tmp_path / "manifest.json", lambda body: body.update(format_version=2))
    with pytest.raises(UserError, match="format version 2") as raised:
        verify(str(tmp_path), repair=True)
    assert not isinstance(raised.value, DamagedError)
    assert (tmp_path / "manifest.json").exists()
