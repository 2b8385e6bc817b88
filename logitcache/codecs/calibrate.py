"""From a spec to a codec: what has to be learnt of the teacher first is learnt from a sample of its states.

Guarantees: deterministic in (spec, teacher, sample). Where a fidelity is asked for (`max_kl`), it is judged on
sequences that were held out of the fit, by an upper confidence bound of the mean KL: `topk` by that of the forward KL,
`hidden` by the worse of both directions. Otherwise the whole sample is fitted on.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from logitcache.codecs.blas import one_blas_thread
from logitcache.codecs.calibration import Calibration, upper_bound
from logitcache.codecs.codec import Codec
from logitcache.codecs.dense import DenseHead
from logitcache.codecs.entries import joined, joined_splits, row_of_entry
from logitcache.codecs.fidelity import Gauge
from logitcache.codecs.fit_prior import fit_prior, gather, popularity, prior_of_kept
from logitcache.codecs.fit_transform import fit_basis, with_step
from logitcache.codecs.full_vocab import FullVocabCodec
from logitcache.codecs.hidden_state import HiddenStateCodec
from logitcache.codecs.prior import VocabularyPrior
from logitcache.codecs.sampled import SampledCodec
from logitcache.codecs.search import Dial, coarsest_within
from logitcache.codecs.specs import FullVocabSpec, HiddenSpec, SampledSpec, TargetSpec, TopKSpec
from logitcache.codecs.topk import TopKCodec
from logitcache.codecs.topk_values import RootGrid, likeliest, matching_step
from logitcache.codecs.transform import TransformCodec
from logitcache.errors import UserError
from logitcache.records import TopKTargets
from logitcache.scoring import SampledRequest, TopKRequest

_ROWS_PER_CHUNK = 1024


@one_blas_thread()
def calibrate(spec: TargetSpec, teacher: DenseHead, sample: Calibration) -> Codec:
    """The codec that a spec asks for, fitted to the teacher whose output head that is.

    Raises:
        UserError: a fidelity that no setting reaches; states that are not finite.
    """
    match spec:
        case TopKSpec(max_kl=None):
            return fit_topk(spec, spec.p, teacher, sample)
        case TopKSpec(max_kl=max_kl):
            return _topk_within(spec, float(max_kl or 0), teacher, sample)
        case HiddenSpec(step=None, max_kl=None):
            return HiddenStateCodec(head=teacher.head)
        case HiddenSpec(step=None, max_kl=max_kl):
            return _transform_within(float(max_kl or 0), teacher, sample)
        case HiddenSpec(step=step):
            return with_step(fit_basis(teacher, sample.hidden), float(step or 0), teacher.head)
        case FullVocabSpec(step=step):
            return FullVocabCodec(vocab_size=teacher.head.vocab_size, step=step)
        case SampledSpec(n=n):
            return _fit_sampled(n, teacher, sample)


def fit_topk(spec: TopKSpec, p: float, head: DenseHead, sample: Calibration) -> TopKCodec:
    """A top-k codec with threshold `p` whose prior, levels and chunk size fit the sample."""
    request = topk_request(spec, p, head.head.vocab_size)
    seen = gather(head, sample, request)
    splits = np.searchsorted(seen.rows, np.arange(len(sample) + 1))
    return _topk(spec, request, fit_prior(seen), seen.log_probs, splits, seen.tail_nats)


def topk_request(spec: TopKSpec, p: float, vocab_size: int) -> TopKRequest:
    """What a scorer is asked for when the threshold is `p`."""
    return TopKRequest(max_k=min(spec.k, vocab_size), min_probability=p, mass=spec.mass)


def fit_topk_to_targets(spec: TopKSpec, vocab_size: int, targets: Sequence[TopKTargets]) -> TopKCodec:
    """A top-k codec fitted to what a scorer gave for `topk_request`, where that is all that it can give.

    Less than `calibrate` makes of states: a single tail shape, and no fidelity that could be judged.

    Raises:
        UserError: targets without rows.
    """
    splits = joined_splits(targets)
    if len(splits) == 1:
        raise UserError("a calibration sample of 1 row or more", "none", "score a larger first unit")
    ids, log_probs = joined(targets, "ids", np.int32), joined(targets, "log_probs", np.float32)
    request, prior = topk_request(spec, spec.p, vocab_size), prior_of_kept(ids, vocab_size)
    return _topk(spec, request, prior, log_probs, splits, tail_nats=0.0)


def _topk(
    spec: TopKSpec,
    request: TopKRequest,
    prior: VocabularyPrior,
    log_probs: NDArray[np.float32],
    splits: NDArray[np.int64],
    tail_nats: float,
) -> TopKCodec:
    """The codec whose levels and chunk size fit kept entries: their log-probs float32[E], their rows' splits."""
    counts = np.diff(splits)
    step = matching_step(request.min_probability) if spec.step is None else spec.step
    others = np.delete(log_probs, likeliest(log_probs, splits, row_of_entry(splits)))
    return TopKCodec(
        prior=prior,
        request=request,
        step=step,
        levels=RootGrid(offset=request.min_probability**0.5, step=step).centroids(others),
        tail_nats=tail_nats,
        entry_chunk=_entry_chunk(len(log_probs) / len(counts)),
    )


def _entry_chunk(entries_per_row: float) -> int:
    """Entries in an inner chunk: what about 1,024 rows keep, to the nearest power of two."""
    return int(2 ** np.rint(np.log2(_ROWS_PER_CHUNK * entries_per_row)))


def _topk_within(spec: TopKSpec, max_kl: float, teacher: DenseHead, sample: Calibration) -> TopKCodec:
    fitting, judges = sample.fitting, sample.held_out

    def attempt(p: float) -> tuple[TopKCodec, float]:
        codec = fit_topk(spec, p, teacher, fitting)
        return codec, upper_bound(Gauge(codec, teacher).measure(judges.hidden).forward, judges.sequence)

    # The KL of a threshold p grows as p to about the power 1/2 to 1.
    dial = Dial(start=max(max_kl / 10, 1e-5), lowest=1e-6, highest=0.1, exponent=0.6)
    return coarsest_within(dial, max_kl, attempt, f"topk with k={spec.k}, mass={spec.mass:g} at {max_kl:g} nats")


def _transform_within(max_kl: float, teacher: DenseHead, sample: Calibration) -> TransformCodec:
    basis, judges = fit_basis(teacher, sample.fitting.hidden), sample.held_out

    def attempt(step: float) -> tuple[TransformCodec, float]:
        codec = with_step(basis, step, teacher.head)
        found = Gauge(codec, teacher).measure(judges.hidden)
        return codec, max(upper_bound(kl, judges.sequence) for kl in (found.forward, found.reverse))

    dial = Dial(start=0.2 * max_kl**0.5, lowest=1e-4, highest=1.0, exponent=2.0)
    return coarsest_within(dial, max_kl, attempt, f"hidden at {max_kl:g} nats")


def _fit_sampled(samples: int, head: DenseHead, sample: Calibration) -> SampledCodec:
    request = TopKRequest(max_k=head.head.vocab_size, min_probability=1 / (2 * samples))
    seen = gather(head, sample, request)
    return SampledCodec(
        token_of_rank=popularity(seen),
        request=SampledRequest(samples=samples),
        entry_chunk=_entry_chunk(min(samples, 1.5 * len(seen.ids) / len(sample))),
    )
