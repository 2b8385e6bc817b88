"""Grids: the few scalar quantisers that every codec shares, each with a bound that the tests hold it to.

All are pure numpy, vectorised, and free of state. Values outside a grid's stated range are an error of
the caller, who has checked for NaN and infinity (`require_finite`).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from logitcache.errors import UserError

ROOT_STEP = 1 / 64
"""Step of the root grid, in root nats."""

LOG_ODDS_STEP = 1 / 16
"""Step of the log-odds grid, in nats."""

_LOG_ODDS_ORIGIN = 3.0
_LOG_ODDS_LIMIT = 2000.0
_NO_MASS = np.int16(-32768)


def require_finite(name: str, values: NDArray[Any]) -> None:
    """Raise UserError when a teacher's values hold a NaN or an infinity."""
    if not np.isfinite(values).all():
        bad = int(np.count_nonzero(~np.isfinite(values)))
        raise UserError(f"finite {name} from the teacher", f"{bad} NaN or infinite values", "score the unit again")


def bf16_bits(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Round float32 to the nearest bfloat16, ties to even, and return its bits; finite input of any shape.

    Raises UserError for values that would round to infinity.
    """
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)
    if ((rounded & 0x7FFF) >= 0x7F80).any():
        raise UserError("values that bfloat16 can hold", "NaN, infinity or an overflow", "score the unit again")
    return rounded


def bf16_values(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    """The float32 values of bfloat16 bits: exact."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def as_float32(values: NDArray[np.uint16] | NDArray[np.float32]) -> NDArray[np.float32]:
    """Float32 of an array that is float32 already or holds bfloat16 bits."""
    return bf16_values(values.view(np.uint16)) if values.dtype == np.uint16 else values.astype(np.float32, copy=False)


def encode_root(values: NDArray[np.float32]) -> NDArray[np.int16]:
    """Nonnegative nats on a grid uniform in the root: |sqrt(decoded) - sqrt(value)| <= ROOT_STEP / 2.

    So the error is at most sqrt(x) / 64 + 1 / 16384 nats: below 0.2% of a nat near 0.01, 1.6% near 1. Range: 0 to
    262,000 nats; tiny negative rounding (log-probabilities of 1) reads as 0.
    """
    root = np.sqrt(np.maximum(values, 0).astype(np.float64))
    return np.minimum(np.rint(root / ROOT_STEP), 32767).astype(np.int16)


def decode_root(codes: NDArray[np.int16]) -> NDArray[np.float32]:
    """Nats of root-grid codes."""
    return (np.square(codes.astype(np.float64) * ROOT_STEP)).astype(np.float32)


def encode_log_odds(log_mass: NDArray[np.float32]) -> NDArray[np.int16]:
    """A log-probability mass on a grid uniform in log m / (1 - m): within LOG_ODDS_STEP / 2 there.

    So log m is within 1/32 nat times (1 - m), and log (1 - m) within 1/32 nat times m: both sides stay tight. The
    codes of common masses (4e-6 to 0.95) are 0 to 255; no mass at all (-inf) has a code of its own.
    """
    mass = np.minimum(log_mass.astype(np.float64), -1e-15)
    with np.errstate(divide="ignore"):
        odds = np.clip(mass - np.log(-np.expm1(mass)), -_LOG_ODDS_LIMIT, _LOG_ODDS_LIMIT)
    codes = np.rint((_LOG_ODDS_ORIGIN - odds) / LOG_ODDS_STEP).astype(np.int16)
    return np.where(np.isneginf(log_mass), _NO_MASS, codes)


def decode_log_odds(codes: NDArray[np.int16]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(log m, log (1 - m)) in nats, each float64, for codes of `encode_log_odds`; (-inf, 0) for no mass."""
    odds = _LOG_ODDS_ORIGIN - codes.astype(np.float64) * LOG_ODDS_STEP
    none = codes == _NO_MASS
    log_mass = np.where(none, -np.inf, -np.logaddexp(0.0, -odds))
    log_rest = np.where(none, 0.0, -np.logaddexp(0.0, odds))
    return log_mass, log_rest


def zigzag(values: NDArray[np.int16]) -> NDArray[np.int16]:
    """Small signed numbers as small nonnegative ones: 0, -1, 1, -2 become 0, 1, 2, 3; |values| < 16,384."""
    return np.where(values < 0, -2 * values - 1, 2 * values).astype(np.int16)


def unzigzag(codes: NDArray[np.int16]) -> NDArray[np.int16]:
    """The inverse of `zigzag`."""
    return (codes >> 1) ^ -(codes & 1)
