"""The main path: create, write, commit, seal, open, read; and what is refused on the way."""

from __future__ import annotations

import dataclasses
import json
import pickle
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from logitcache.errors import DamagedError, IdentityError, UserError
from logitcache.records import FinishReason, HiddenStateTargets, ScoredSequence, TokenSequence, TopKTargets
from logitcache.store import create
from logitcache.store.envelope import Sealed, seal, unseal
from logitcache.store.manifest import Manifest
from logitcache.store.part_index import PartCache, PartLoader
from tests.logitcache.readers import assert_serves_many_threads
from tests.logitcache.store.plain_codecs import counting_codec, plain_codec


def same_sequence(one: TokenSequence, other: TokenSequence) -> bool:
    plain = ("prompt_tokens", "origin", "sample_id", "problem_id", "finish_reason", "seed")
    equal = all(getattr(one, name) == getattr(other, name) for name in plain)
    return equal and one.token_ids.dtype == np.int32 and np.array_equal(one.token_ids, other.token_ids)


def same_targets(one: Any, other: Any) -> bool:
    fields = vars(one)
    return type(one) is type(other) and all(
        np.array_equal(value, getattr(other, name)) for name, value in fields.items()
    )


def test_what_is_written_is_read_in_any_order(world, url):
    world.build(url, units=3)
    reader = world.open(url, targets="hidden", tokenizer="tok0")
    b = len(world.lengths)
    wanted = [s for n in range(3) for s in world.sequences(n)]
    states = [t for n in range(3) for t in world.hidden_targets(n)]
    order = np.random.default_rng(0).permutation(3 * b).tolist()
    assert len(reader) == 3 * b
    for i, got in zip(order, reader.read(order), strict=True):
        assert same_sequence(got.sequence, wanted[i])
        assert isinstance(got.targets, HiddenStateTargets)
        assert np.array_equal(got.targets.hidden, states[i].hidden)
    assert reader.head is not None
    assert reader.head.fingerprint == world.head.fingerprint
    for i, sequence in enumerate(world.open(url, targets=None).read_tokens(range(3 * b))):
        assert same_sequence(sequence, wanted[i])


def test_topk_targets_are_what_the_codec_alone_would_return(world, url):
    world.build(url, units=2)
    reader = world.open(url, targets="topk")
    codec = world.topk
    expected = []
    for n in range(2):
        for targets in world.topk_targets(n):
            expected.append(codec.decode(codec.encode([targets]).arrays))
    for got, want in zip(reader.read(range(len(reader))), expected, strict=True):
        assert isinstance(got.targets, TopKTargets)
        assert same_targets(got.targets, want)


WINDOWS = [(0, 0), (0, 3), (0, 1500), (2, None), (1, 1), (890, 40), (5000, 7)]


@pytest.mark.parametrize("factory", [plain_codec, counting_codec])
@pytest.mark.parametrize("tier", ["hidden", "topk"])
def test_a_window_is_that_slice_of_the_whole(world, tmp_path, tier, factory):
    world.build(str(tmp_path / "cache"), units=1)
    reader = world.open(str(tmp_path / "cache"), targets=tier, codec_factory=factory)
    whole = reader.read(range(len(reader)))
    for first, limit in WINDOWS:
        cut = reader.read(range(len(reader)), first_completion_token=first, max_completion_tokens=limit)
        for full, part in zip(whole, cut, strict=True):
            check_window(full, part, first, limit)


def check_window(full: ScoredSequence, part: ScoredSequence, first: int, limit: int | None) -> None:
    rows = len(full.targets)
    stop = rows if limit is None else min(rows, first + limit)
    start = min(first, stop)
    prefix = full.sequence.prompt_tokens + start
    assert part.sequence.prompt_tokens == prefix
    assert np.array_equal(part.sequence.token_ids, full.sequence.token_ids[: prefix + stop - start])
    assert part.sequence.sample_id == full.sequence.sample_id
    assert len(part.targets) == stop - start
    assert (part.sequence.finish_reason is FinishReason.LENGTH) or stop == rows
    if isinstance(full.targets, HiddenStateTargets):
        assert np.array_equal(part.targets.hidden, full.targets.hidden[start:stop])
        return
    splits = full.targets.row_splits
    assert np.array_equal(part.targets.entropy, full.targets.entropy[start:stop])
    assert np.array_equal(part.targets.ids, full.targets.ids[splits[start] : splits[stop]])
    assert np.array_equal(part.targets.row_splits, splits[start : stop + 1] - splits[start])


def test_the_manifest_pools_facts_and_counts(world, url):
    manifest = world.build(url, units=3).seal()
    per_unit = sum(p + c for p, c in world.lengths), sum(c for _, c in world.lengths)
    assert manifest.totals == {
        "sequences": 3 * len(world.lengths),
        "tokens": 3 * per_unit[0],
        "completion_tokens": 3 * per_unit[1],
    }
    assert manifest.flops == {"generate": 300, "score": 120}
    values = [0.01, 0.02, 0.02, 0.02, 0.03, 0.02]
    kl = manifest.tiers["hidden"].kl_nats
    assert kl["mean"] == pytest.approx(np.mean(values))
    assert kl["p99"] == pytest.approx(np.percentile(values, 99))
    again = world.open(url, targets=None).manifest
    assert again.digest == world.open(url, targets="topk").manifest.digest
    assert again.to_json() == manifest.to_json()


def test_flops_are_whole_numbers_beyond_what_a_float_counts(world, url):
    store = world.start(url)
    for number in range(2):
        store.write_sequences(world.unit(number), world.sequences(number), {"flops": {"generate": 10**18 + 1}})
    store.seal(tiers=[])
    assert world.open(url, targets=None).manifest.flops == {"generate": 2 * 10**18 + 2}


def test_a_manifest_that_has_flops_as_floats_stays_readable(world, url):
    body = world.build(url, units=1).seal().to_json()
    older = Manifest.from_sealed(unseal(seal(body | {"flops": {"generate": 1338825728.0}})))
    assert json.dumps(older.flops) == '{"generate": 1338825728}'
    with pytest.raises(ValueError, match="of another type"):
        Manifest.from_sealed(Sealed(body | {"flops": {"generate": float("inf")}}, "0"))


def test_sealing_twice_and_building_elsewhere_give_the_same_bytes(world, url, tmp_path, objects_of):
    store = world.build(url, units=2)
    before = objects_of(url)
    store.seal()
    assert objects_of(url) == before
    world.build(str(tmp_path / "other"), units=2)
    assert objects_of(str(tmp_path / "other")) == before


def test_samples_need_no_tokens(world, url):
    world.build(url, units=2)
    table = world.open(url, targets=None).samples(["problem_id", "completion_tokens"])
    want = [f"p{n}-{b}" for n in range(2) for b in range(len(world.lengths))]
    assert table["problem_id"].to_pylist() == want
    assert table["completion_tokens"].to_pylist() == 2 * [c for _, c in world.lengths]


def test_an_unsealed_cache_is_read_only_on_request(world, url):
    store = world.start(url)
    world.write_unit(store, 0)
    store.write_sequences(world.unit(1), world.sequences(1))
    with pytest.raises(UserError, match=r"not sealed; 2 units.*committed=True"):
        world.open(url, targets=None)
    assert len(world.open(url, targets=None, committed=True)) == 2 * len(world.lengths)
    reader = world.open(url, targets="topk", committed=True)
    assert len(reader) == len(world.lengths)
    assert len(reader.read([4])[0].targets) == 900
    committed = store.committed()
    assert committed.sequences == ("000000", "000001")
    assert committed.targets == {"hidden": ("000000",), "topk": ("000000",)}


def test_sealing_refuses_what_is_missing(world, url):
    store = world.start(url)
    with pytest.raises(UserError, match="0 units"):
        store.seal()
    world.write_unit(store, 0)
    with pytest.raises(UserError, match="1 units are committed, not 2"):
        store.seal(units=2)
    store.write_sequences(world.unit(1), world.sequences(1))
    with pytest.raises(UserError, match="tier hidden lacks 1 of 2 units, 000001 first"):
        store.seal(units=2)
    assert store.seal(units=2, tiers=[]).tiers == {}


def test_a_tier_is_added_by_rescoring(world, url):
    store = create(url, {"tokenizer": {"fingerprint": "x"}})
    store.write_sequences("0", world.sequences(0))
    digest = store.seal().digest
    later = world.reopen(url)
    later.create_tier("states", world.hidden)
    assert len(later.read_sequences("0")) == len(world.lengths)
    assert all(same_sequence(*pair) for pair in zip(later.read_sequences("0"), world.sequences(0), strict=True))
    later.write_targets("0", "states", later.tier_codec("states"), world.hidden_targets(0))
    later.seal()
    reader = world.open(url, targets="hidden")
    assert reader.tier == "states"
    assert reader.manifest.digest != digest


def test_a_reader_pickles_and_serves_many_threads(world, url):
    world.build(url, units=3)
    reader = world.open(url, targets="hidden", index_memory_bytes=1)
    if not url.startswith("memory"):
        reader = pickle.loads(pickle.dumps(reader))
    assert_serves_many_threads(reader)


def test_another_identity_is_refused_and_the_difference_named(world, url):
    world.build(url, units=1)
    identity = {
        "teacher": {"name": "table", "fingerprint": "t1", "vocab_size": 97},
        "tokenizer": {"fingerprint": "tok0"},
    }
    with pytest.raises(IdentityError, match=r'another teacher.fingerprint: "t0" there, "t1" asked'):
        create(url, identity)
    with pytest.raises(IdentityError, match="the cache's is tok0"):
        world.open(url, targets=None, tokenizer="other")
    other = world.hidden.__class__(head=world.head.__class__(weight=world.head.weight + np.uint16(1)))
    with pytest.raises(IdentityError):
        world.reopen(url).create_tier("hidden", other)
    with pytest.raises(IdentityError):
        world.reopen(url).write_targets("000000", "hidden", other, world.hidden_targets(0))


def test_wrong_requests_are_one_line(world, url):
    store = world.build(url, units=1)
    with pytest.raises(UserError, match="no identity"):
        world.open(url + "-not-there", targets=None)
    with pytest.raises(UserError, match=r"hidden \(hidden\), topk \(topk\)"):
        world.open(url, targets="full")
    reader = world.open(url, targets="hidden")
    with pytest.raises(UserError, match="indices of 6 sequences"):
        reader.read([6])
    with pytest.raises(UserError, match="targets=None"):
        world.open(url, targets=None).read([0])
    with pytest.raises(UserError, match="other bytes"):
        store.write_sequences("000000", world.sequences(1))
    with pytest.raises(UserError, match="not committed"):
        store.write_targets("000009", "hidden", world.hidden, world.hidden_targets(0))
    with pytest.raises(UserError, match="5 targets"):
        store.write_targets("000000", "hidden", world.hidden, world.hidden_targets(0)[:-1])
    with pytest.raises(UserError, match="a name for a unit"):
        store.write_sequences("../x", world.sequences(1))
    store.write_sequences("000000", world.sequences(0), {"flops": {"generate": 100.0}})


def test_a_token_that_the_teacher_does_not_have_is_never_committed(world, url):
    store = world.start(url)
    good, last = world.sequences(0)[0], world.sequences(0)[2]
    ids = last.token_ids.copy()
    ids[-1] = 97
    with pytest.raises(UserError, match="write sequences of unit 0: token id 97 is beyond the teacher's 97 tokens"):
        store.write_sequences("0", [good, dataclasses.replace(last, token_ids=ids)])
    assert store.committed().sequences == ()
    ids[-1] = 96
    store.write_sequences("0", [good, dataclasses.replace(last, token_ids=ids)])


def test_facts_must_be_json(world, url):
    store = world.start(url)
    with pytest.raises(UserError, match="finite JSON"):
        store.write_sequences("0", world.sequences(0), {"wall": float("nan")})
    assert store.committed().sequences == ()


def test_a_place_that_holds_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="not empty and not a cache"):
        create(str(tmp_path), {"a": 1})
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]
    with pytest.raises(UserError, match="write"):
        create(str(tmp_path / "thesis.tex" / "cache"), {"a": 1})


def test_units_without_sequences_and_sequences_of_one_token(world, url):
    store = world.start(url)
    store.write_sequences("0", [])
    store.write_sequences("1", world.sequences(0)[1:2])
    for unit, hidden, topk in (("0", [], []), ("1", world.hidden_targets(0)[1:2], world.topk_targets(0)[1:2])):
        store.write_targets(unit, "hidden", world.hidden, hidden)
        store.write_targets(unit, "topk", world.topk, topk)
    store.seal()
    for tier in ("hidden", "topk"):
        (item,) = world.open(url, targets=tier).read([0])
        assert len(item.sequence) == 1
        assert len(item.targets) == 0


def test_a_very_long_sequence(world, url):
    long = world.__class__(lengths=((10, 100_000),))
    long.build(url, units=1)
    reader = world.open(url, targets="hidden")
    (item,) = reader.read([0], first_completion_token=70_000, max_completion_tokens=10)
    assert np.array_equal(item.targets.hidden, long.hidden_targets(0)[0].hidden[70_000:70_010])


def test_index_memory_is_bounded_and_a_part_is_read_once(world, tmp_path):
    small = world.__class__(lengths=((2, 3), (1, 4)))
    small.build(str(tmp_path), units=20)
    reader = small.open(str(tmp_path), targets="topk")
    loads: list[int] = []

    @dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
    class Counted(PartLoader):
        def load(self, parts):
            loads.extend(parts)
            return super().load(parts)

    loader = reader._loader(tokens_only=False)
    counted = Counted(**{item.name: getattr(loader, item.name) for item in dataclasses.fields(loader)})
    cache = PartCache(counted, 1 << 30)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: cache.get(range(20)), range(8)))
    assert sorted(loads) == list(range(20))
    one = cache.get([0])[0].memory_bytes
    bounded = PartCache(counted, 5 * one)
    for part in [*range(20), *range(20)]:
        assert len(bounded.get([part])[part].samples) == 2
        assert sum(future.result().memory_bytes for future in bounded._kept.values()) <= 5 * one + one
    (tmp_path / "sequences/000003/record.json").unlink()
    for _ in range(2):
        with pytest.raises(DamagedError):
            PartCache(counted, 1 << 30).get([2, 3])
