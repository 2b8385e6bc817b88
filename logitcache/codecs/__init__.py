"""Codecs: which numbers a tier keeps. `docs/codecs.md` says what each costs and what it returns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from numpy.typing import NDArray

from logitcache.codecs.calibrate import calibrate
from logitcache.codecs.calibration import Calibration
from logitcache.codecs.codec import ArrayLayout, Axis, Codec, Encoded
from logitcache.codecs.fidelity import Fidelity, Gauge, measured_kl
from logitcache.codecs.full_vocab import FullVocabCodec
from logitcache.codecs.hidden_state import HiddenStateCodec
from logitcache.codecs.prior import VocabularyPrior, spread_tail, tail_shapes, uniform_prior
from logitcache.codecs.sampled import SampledCodec
from logitcache.codecs.specs import (
    FullVocabSpec,
    HiddenSpec,
    SampledSpec,
    TargetSpec,
    TopKSpec,
    parse_targets,
)
from logitcache.codecs.topk import TopKCodec
from logitcache.codecs.transform import TransformCodec
from logitcache.errors import UserError

__all__ = [
    "ArrayLayout",
    "Axis",
    "Calibration",
    "Codec",
    "Encoded",
    "Fidelity",
    "FullVocabCodec",
    "FullVocabSpec",
    "Gauge",
    "HiddenSpec",
    "HiddenStateCodec",
    "SampledCodec",
    "SampledSpec",
    "TargetSpec",
    "TopKCodec",
    "TopKSpec",
    "TransformCodec",
    "VocabularyPrior",
    "calibrate",
    "codec_from_config",
    "measured_kl",
    "parse_targets",
    "spread_tail",
    "tail_shapes",
    "uniform_prior",
]


def codec_from_config(config: Mapping[str, Any], shared: Mapping[str, NDArray[Any]]) -> Codec:
    """The codec that wrote a tier, from what the tier keeps beside its data.

    Raises:
        UserError: a kind or form this version does not know.
        IdentityError: shared arrays that are not those the tier was written with.
    """
    match config:
        case {"kind": "topk"}:
            return TopKCodec.from_config(config, shared)
        case {"kind": "hidden", "form": "bfloat16"}:
            return HiddenStateCodec.from_config(config, shared)
        case {"kind": "hidden", "form": "transform"}:
            return TransformCodec.from_config(config, shared)
        case {"kind": "full"}:
            return FullVocabCodec.from_config(config)
        case {"kind": "sampled"}:
            return SampledCodec.from_config(config, shared)
        case _:
            found = f"kind {config.get('kind')!r}, form {config.get('form')!r}"
            raise UserError("a tier this version can read", found, "use a newer logitcache")
