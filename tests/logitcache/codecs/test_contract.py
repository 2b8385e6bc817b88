"""What every codec owes, whatever it keeps."""

from __future__ import annotations

import dataclasses
import json
from itertools import pairwise

import numpy as np
import pytest

from logitcache.codecs import Axis, Codec, codec_from_config
from logitcache.codecs.codec import CountsEntries
from logitcache.errors import UserError
from logitcache.records import FullVocabTargets, HiddenStateTargets, TeacherTargets, TopKTargets
from tests.logitcache.codecs.conftest import MakeTargets


def same(left: TeacherTargets, right: TeacherTargets) -> bool:
    return type(left) is type(right) and all(
        np.array_equal(getattr(left, field.name), getattr(right, field.name)) for field in dataclasses.fields(left)
    )


def test_arrays_are_what_the_layouts_say(codec: Codec, make: MakeTargets) -> None:
    parts = [make(codec, 0, 7), make(codec, 7, 7), make(codec, 7, 40)]
    encoded = codec.encode(parts)
    assert list(encoded.arrays) == list(codec.layouts)
    assert encoded.entries_per_sequence.dtype == np.int64
    for name, layout in codec.layouts.items():
        array = encoded.arrays[name]
        assert array.dtype.name == layout.dtype
        assert array.shape[1:] == layout.item_shape
        assert len(layout.chunk_shape) == array.ndim
        assert len(array) == (40 if layout.axis is Axis.ROW else encoded.entries_per_sequence.sum())


def test_config_and_shared_rebuild_the_codec(codec: Codec, make: MakeTargets) -> None:
    encoded = codec.encode([make(codec, 0, 50)])
    again = codec_from_config(json.loads(json.dumps(codec.config)), dict(codec.shared))
    assert again.config == codec.config
    assert again.request == codec.request
    assert again.layouts == codec.layouts
    assert same(again.decode(encoded.arrays), codec.decode(encoded.arrays))


def test_a_batch_is_its_sequences_one_after_another(codec: Codec, make: MakeTargets) -> None:
    bounds = (0, 3, 3, 20, 64)
    parts = [make(codec, start, stop) for start, stop in pairwise(bounds)]
    whole = codec.encode(parts)
    for name, array in whole.arrays.items():
        np.testing.assert_array_equal(array, np.concatenate([codec.encode([part]).arrays[name] for part in parts]))
    assert all(array.tobytes() == whole.arrays[name].tobytes() for name, array in codec.encode(parts).arrays.items())


def test_a_run_of_rows_decodes_by_itself_from_read_only_views(codec: Codec, make: MakeTargets) -> None:
    arrays = dict(codec.encode([make(codec, 0, 64)]).arrays)
    ends = np.zeros(65, np.int64)
    if isinstance(codec, CountsEntries):
        ends[1:] = np.cumsum(codec.entries_per_row(arrays))
    kept = {Axis.ROW: slice(10, 30), Axis.ENTRY: slice(ends[10], ends[30])}
    window = {name: arrays[name][kept[layout.axis]] for name, layout in codec.layouts.items()}
    for view in window.values():
        view.flags.writeable = False
    whole, part = codec.decode(arrays), codec.decode(window)
    for field in dataclasses.fields(whole):
        if field.name == "row_splits":
            np.testing.assert_array_equal(np.diff(getattr(part, field.name)), np.diff(ends)[10:30])
        elif field.name != "head_fingerprint":
            axis = Axis.ENTRY if field.name in ("ids", "counts", "log_probs") and ends[-1] else Axis.ROW
            np.testing.assert_array_equal(getattr(part, field.name), getattr(whole, field.name)[kept[axis]])


def test_no_rows_and_no_sequences(codec: Codec, make: MakeTargets) -> None:
    for parts in ([], [make(codec, 5, 5)], [make(codec, 5, 5)] * 2):
        encoded = codec.encode(parts)
        assert len(encoded.entries_per_sequence) == len(parts)
        assert all(len(array) == 0 for array in encoded.arrays.values())
        assert len(codec.decode(encoded.arrays)) == 0


def test_another_kind_is_refused(codec: Codec) -> None:
    other: TeacherTargets = FullVocabTargets(log_probs=np.zeros((1, 3), np.float32))
    if codec.kind == "full":
        other = HiddenStateTargets(hidden=np.zeros((1, 3), np.float32), head_fingerprint="")
    with pytest.raises(UserError, match="another kind"):
        codec.encode([other])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_refused(codec: Codec, make: MakeTargets, bad: float) -> None:
    good = make(codec, 0, 9)
    for field in dataclasses.fields(good):
        values = getattr(good, field.name)
        no_tail = field.name == "tail_log_mass" and bad == -np.inf  # which means that nothing is left over
        if not isinstance(values, np.ndarray) or values.dtype != np.float32 or no_tail:
            continue
        spoilt = values.copy()
        spoilt[len(spoilt) // 2] = bad
        with pytest.raises(UserError):
            codec.encode([dataclasses.replace(good, **{field.name: spoilt})])


def test_ids_beyond_the_vocabulary_are_refused(codec: Codec, make: MakeTargets) -> None:
    good = make(codec, 0, 9)
    if not hasattr(good, "ids"):
        pytest.skip("this kind names no ids")
    for wrong in (-1, 97, 1 << 30):
        ids = good.ids.copy()
        ids[-1] = wrong
        with pytest.raises(UserError, match="below 97"):
            codec.encode([dataclasses.replace(good, ids=ids)])


def test_the_head_reads_what_is_decoded(codec: Codec, make: MakeTargets) -> None:
    decoded = codec.decode(codec.encode([make(codec, 0, 9)]).arrays)
    if isinstance(decoded, HiddenStateTargets):
        assert codec.head is not None
        assert decoded.head_fingerprint == codec.head.fingerprint
    else:
        assert codec.head is None
        assert not isinstance(decoded, TopKTargets) or (np.diff(decoded.row_splits) >= 1).all()
