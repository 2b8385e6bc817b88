"""From a spec to a codec: what has to be learnt of the teacher first is learnt from a sample of its states.

Guarantees: deterministic in (spec, teacher, sample). Where a fidelity is asked for (`max_kl`), it is judged on
sequences that were held out of the fit, by an upper confidence bound of the mean KL: `topk` by that of the forward KL,
`hidden` by the worse of both directions. Otherwise the whole sample is fitted on.
"""

from __future__ import annotations

import numpy as np

from logitcache.codecs.calibration import Calibration, upper_bound
from logitcache.codecs.codec import Codec
from logitcache.codecs.dense import DenseHead
from logitcache.codecs.fidelity import Gauge
from logitcache.codecs.fit_prior import fit_prior, gather, popularity
from logitcache.codecs.fit_transform import fit_basis, with_step
from logitcache.codecs.full_vocab import FullVocabCodec
from logitcache.codecs.hidden_state import HiddenStateCodec
from logitcache.codecs.sampled import SampledCodec
from logitcache.codecs.search import Dial, coarsest_within
from logitcache.codecs.specs import FullVocabSpec, HiddenSpec, SampledSpec, TargetSpec, TopKSpec
from logitcache.codecs.topk import TopKCodec
from logitcache.codecs.topk_values import RootGrid, likeliest, matching_step
from logitcache.codecs.transform import TransformCodec
from logitcache.scoring import SampledRequest, TopKRequest

_ROWS_PER_CHUNK = 1024


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
    request = TopKRequest(max_k=min(spec.k, head.head.vocab_size), min_probability=p, mass=spec.mass)
    seen = gather(head, sample, request)
    step = matching_step(p) if spec.step is None else spec.step
    splits = np.searchsorted(seen.rows, np.arange(len(sample) + 1))
    others = np.delete(seen.log_probs, likeliest(seen.log_probs, splits, seen.rows))
    return TopKCodec(
        prior=fit_prior(seen),
        request=request,
        step=step,
        levels=RootGrid(offset=p**0.5, step=step).centroids(others),
        tail_nats=seen.tail_nats,
        entry_chunk=_entry_chunk(len(seen.ids) / len(sample)),
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
