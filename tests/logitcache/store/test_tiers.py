"""A part belongs to the calibration that encoded it: under another one it would decode to other numbers."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from logitcache import open_cache
from logitcache.codecs import TopKCodec, VocabularyPrior, uniform_prior
from logitcache.codecs.topk_values import RootGrid
from logitcache.errors import DamagedError, IdentityError
from logitcache.records import TopKTargets
from logitcache.scoring import TopKRequest
from logitcache.store import Store, create, merge, open_store, verify
from logitcache.store.envelope import seal, unseal
from logitcache.store.local import LocalPlace
from tests.logitcache.store.conftest import IDENTITY, VOCAB, World

SMALL = World(lengths=((3, 5), (7, 40)))
UNITS = ("000000", "000001")


def calibrated(order: int) -> TopKCodec:
    """A codec whose configuration is always the same, and whose ranks are drawn."""
    request, flat = TopKRequest(max_k=20, min_probability=1e-3), uniform_prior(VOCAB)
    ranks = np.random.default_rng(order).permutation(VOCAB).astype(np.uint32)
    return TopKCodec(
        prior=VocabularyPrior(token_of_rank=ranks, log_shapes=flat.log_shapes, evidence=flat.evidence),
        request=request,
        step=0.01,
        levels=RootGrid(offset=request.min_probability**0.5, step=0.01).midpoints(),
    )


def build(where: str, codec: TopKCodec) -> Store:
    """What a build does: the tier first, then what is missing."""
    store = create(where, IDENTITY)
    if "topk" not in store.tiers():
        store.create_tier("topk", codec)
    codec, committed = store.tier_codec("topk"), store.committed()
    for number, unit in enumerate(UNITS):
        if unit not in committed.sequences:
            store.write_sequences(unit, SMALL.sequences(number))
        if unit not in committed.targets["topk"]:
            store.write_targets(unit, "topk", codec, SMALL.topk_targets(number))
    store.seal(units=len(UNITS))
    return store


def ids_of(where: str, **options: Any) -> list[np.ndarray]:
    reader = open_cache(where, targets="topk", **options)
    targets = [item.targets for item in reader.read(range(len(reader)))]
    assert all(isinstance(item, TopKTargets) for item in targets)
    return [item.ids for item in targets]


def flip(file: Path, at: int = 30) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)


def test_targets_of_a_codec_with_other_shared_arrays_are_refused(url):
    store = build(url, calibrated(1))
    again = open_store(url)
    with pytest.raises(IdentityError, match=r"tier topk of .* made with other shared arrays"):
        again.write_targets(UNITS[0], "topk", calibrated(2), SMALL.topk_targets(0))
    with pytest.raises(IdentityError, match="made with other shared arrays"):
        store.create_tier("topk", calibrated(2))
    again.write_targets(UNITS[0], "topk", calibrated(1), SMALL.topk_targets(0))
    store.create_tier("topk", calibrated(1))


@pytest.mark.parametrize("damaged", ["shared/token_of_rank/c/0", "shared/levels/zarr.json", "tier.json"])
@pytest.mark.parametrize("sealed", [True, False])
def test_parts_never_meet_another_calibration(tmp_path, objects_of, damaged, sealed):
    where = str(tmp_path)
    build(where, calibrated(1))
    if not sealed:
        (tmp_path / "manifest.json").unlink()
    before = objects_of(where)
    flip(tmp_path / "targets/topk" / damaged)
    report = verify(where, deep=True, repair=True)
    assert {item.undo for item in report.damage} == {"targets/topk/tier.json"}
    with pytest.raises(IdentityError, match=r"2 parts were encoded with another calibration; .* delete targets/topk"):
        build(where, calibrated(2))
    assert open_store(where).tiers() == []
    store = create(where, IDENTITY)
    store.create_tier("topk", calibrated(1))  # the very same calibration mends it, to the byte
    assert objects_of(where) == before
    shutil.rmtree(tmp_path / "targets/topk")  # what the error proposes
    build(where, calibrated(2))
    assert verify(where, deep=True).sound
    assert all(map(np.array_equal, ids_of(where), [t.ids for n in range(2) for t in SMALL.topk_targets(n)]))


def test_a_part_under_another_tier_is_damage_wherever_it_is_met(tmp_path):
    one, other = tmp_path / "one", tmp_path / "other"
    for place, order in ((one, 1), (other, 2)):
        build(str(place), calibrated(order))
    for name in ("tier.json", "shared"):
        source, target = other / "targets/topk" / name, one / "targets/topk" / name
        shutil.copytree(source, target, dirs_exist_ok=True) if source.is_dir() else shutil.copy(source, target)
    (one / "manifest.json").unlink()
    with pytest.raises(DamagedError, match=r"000000/record.json.*encoded with tier"):
        open_store(str(one)).seal()
    with pytest.raises(DamagedError, match=r"000000/record.json.*encoded with tier"):
        ids_of(str(one), committed=True)
    names = {item.name for item in verify(str(one), repair=True).damage}
    assert names == {f"targets/topk/{unit}/record.json" for unit in UNITS}
    build(str(one), calibrated(2))  # scored again under the tier that is there
    assert verify(str(one), deep=True).sound


def test_a_reader_checks_a_part_against_the_tier_that_the_manifest_names(tmp_path):
    where = str(tmp_path)
    build(where, calibrated(1))
    record = tmp_path / "targets/topk/000001/record.json"
    body = unseal(record.read_bytes()).body
    record.write_bytes(seal(body | {"tier": "0" * 64}))
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(DamagedError, match=r"000001/record.json.*encoded with tier 000000000000"):
        ids_of(where, committed=True)
    record.write_bytes(seal(body | {"tier": "short"}))
    with pytest.raises(DamagedError, match=r"000001/record.json"):
        ids_of(where, committed=True)


def test_parts_from_before_records_named_their_tier_are_read(tmp_path):
    where = str(tmp_path)
    store = build(where, calibrated(1))
    want = ids_of(where)
    for unit in UNITS:
        record = tmp_path / "targets/topk" / unit / "record.json"
        body = unseal(record.read_bytes()).body
        assert body.pop("tier") == store.seal().tiers["topk"].digest
        record.write_bytes(seal(body))
    store.seal()
    assert all(map(np.array_equal, ids_of(where), want))
    assert verify(where, deep=True).sound
    flip(tmp_path / "targets/topk/shared/levels/c/0")
    verify(where, deep=True, repair=True)
    with pytest.raises(IdentityError, match="another calibration"):  # the manifest still says which it was
        build(where, calibrated(2))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Slow(LocalPlace):
    """A worker whose rival does everything between its look and its first object."""

    rival: list[TopKCodec]

    def create(self, name: str, data: bytes) -> bool:
        while self.rival:
            create(self.root, IDENTITY).create_tier("topk", self.rival.pop())
        return super().create(name, data)


@pytest.mark.parametrize("rival", [1, 2])
def test_of_two_first_workers_one_makes_the_tier_and_the_other_is_told(tmp_path, rival):
    where = str(tmp_path)
    store = create(where, IDENTITY)
    slow = dataclasses.replace(store, place=Slow(root=where, rival=[calibrated(rival)]))
    if rival == 1:
        slow.create_tier("topk", calibrated(1))
    else:
        with pytest.raises(IdentityError, match="of another calibration; run it again to take that up"):
            slow.create_tier("topk", calibrated(1))
    assert verify(where, deep=True).sound
    codec = store.tier_codec("topk")
    assert isinstance(codec, TopKCodec)
    assert np.array_equal(codec.prior.token_of_rank, calibrated(rival).prior.token_of_rank)


def test_a_calibration_that_was_killed_half_way_is_not_mixed_with_another(tmp_path):
    where = str(tmp_path)
    build(str(tmp_path / "whole"), calibrated(2))
    store = create(where + "/half", IDENTITY)
    shutil.copytree(tmp_path / "whole/targets/topk/shared", tmp_path / "half/targets/topk/shared")
    with pytest.raises(IdentityError, match="if no other worker made it, delete targets/topk/shared"):
        store.create_tier("topk", calibrated(1))
    store.create_tier("topk", calibrated(2))
    assert verify(store.place.shown, deep=True).sound


def test_merging_keeps_each_part_with_its_tier(tmp_path, objects_of):
    one, other = (str(tmp_path / name) for name in ("one", "other"))
    build(one, calibrated(1))
    merge([one], str(tmp_path / "into")).seal()
    assert objects_of(str(tmp_path / "into")) == objects_of(one)
    build(other, calibrated(2))
    with pytest.raises(IdentityError, match="another configuration"):
        merge([other], str(tmp_path / "into"))
