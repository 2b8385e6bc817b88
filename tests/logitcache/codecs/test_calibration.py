"""What is held out to judge a fidelity, and how sure the judgement is."""

from __future__ import annotations

import numpy as np
import pytest
from threadpoolctl import ThreadpoolController

from logitcache.codecs import Calibration, calibrate, parse_targets
from logitcache.codecs.calibration import JUDGED_ROWS, upper_bound
from logitcache.codecs.dense import DenseHead
from logitcache.codecs.fidelity import Gauge
from logitcache.errors import UserError
from logitcache.records import Head


def sample(sequence: np.ndarray) -> Calibration:
    rows = len(sequence)
    hidden = np.arange(rows, dtype=np.float32)[:, None]
    return Calibration(hidden=hidden, token_ids=np.arange(rows, dtype=np.int32), sequence=sequence)


@pytest.mark.parametrize("sequence", [[0], [0, 1, 0], [1, 1, 0]])
def test_too_few_rows_and_rows_out_of_order_are_refused(sequence: list[int]) -> None:
    with pytest.raises(UserError, match="calibration sample"):
        sample(np.array(sequence))


def test_whole_sequences_are_held_out_from_all_over_the_sample() -> None:
    whole = sample(np.arange(40_000) // 500)
    fitting, judges = whole.fitting, whole.held_out
    assert set(fitting.sequence.tolist()).isdisjoint(judges.sequence.tolist())
    assert len(judges) == JUDGED_ROWS
    assert len(np.unique(judges.sequence)) == 20
    assert len(fitting) == 30_000


@pytest.mark.parametrize("rows", [2, 3, 50])
def test_a_single_sequence_gives_its_last_rows(rows: int) -> None:
    whole = sample(np.zeros(rows, np.int64))
    assert whole.held_out.token_ids[-1] == rows - 1
    assert whole.fitting.token_ids[-1] < whole.held_out.token_ids[0]


def test_the_bound_is_above_the_true_mean_where_rows_of_a_sequence_are_alike() -> None:
    rng, sequences, rows = np.random.default_rng(0), 10, 100
    sequence = np.arange(sequences * rows) // rows
    above = alone = 0
    for _ in range(400):
        of_sequence = rng.gamma(4, 1 / 4, sequences)
        values = of_sequence[sequence] * rng.exponential(size=len(sequence))
        above += upper_bound(values, sequence) >= 1
        alone += upper_bound(values, np.arange(len(values))) >= 1
    assert above >= 0.88 * 400  # skewed values and ten draws: short of the 97% that normal ones would give
    assert alone < 0.75 * 400  # what taking every row for a draw would promise and not keep


def test_the_bound_of_equal_values_is_their_value() -> None:
    assert upper_bound(np.full(6, 0.25), np.array([0, 0, 1, 1, 1, 2])) == pytest.approx(0.25)


def test_a_codec_does_not_depend_on_how_many_threads_blas_has() -> None:
    rng = np.random.default_rng(0)
    teacher = DenseHead(Head(weight=rng.normal(size=(4_000, 64)).astype(np.float32)))
    whole = Calibration(
        hidden=rng.normal(size=(300, 64)).astype(np.float32),
        token_ids=rng.integers(0, 4_000, 300).astype(np.int32),
        sequence=np.arange(300) // 60,
    )
    made = []
    for threads in (1, 2):
        with ThreadpoolController().limit(limits=threads, user_api="blas"):
            codecs = [calibrate(spec, teacher, whole) for spec in parse_targets("topk,hidden:step=0.05")]
            kl = Gauge(codecs[0], teacher).measure(whole.hidden).forward.tobytes()
        shared = [{name: value.tobytes() for name, value in codec.shared.items()} for codec in codecs]
        made.append((kl, shared, [codec.config for codec in codecs]))
    assert made[0] == made[1]
