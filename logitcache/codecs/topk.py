"""`topk`: the likeliest tokens of each row, their tail, and three numbers that are always kept.

Guarantees, for finite targets with at least one kept token a row: `decode` returns the same ids, and
    - root probabilities in the teacher's own cell of the uniform root grid, so within `step` of the teacher's;
      except the likeliest token's, which is 1 - tail - all the others (renormalised in the rare row where that
      would not leave it the likeliest);
    - tail log-odds within half a step (`quantize.encode_log_odds`), -inf exactly;
    - the realised token's log-prob and the entropy within the root grid's bounds (`quantize.encode_root`); an entropy
      that the teacher could not tell, NaN, as NaN.
Two arrays: four int16 a row, one uint32 a kept token. Rank order is not stored (it follows from the values),
nor is anything that the other numbers say: the likeliest token's probability, a realised log-prob that is the
likeliest token's, an entropy that is the head's own.
Not here: choosing which tokens to keep (the scorer does, as `request` says), and any byte codec.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from logitcache.codecs import entries as packed
from logitcache.codecs.codec import ArrayLayout, Axis, Encoded
from logitcache.codecs.prior import VocabularyPrior
from logitcache.codecs.quantize import (
    ROOT_STEP,
    decode_log_odds,
    decode_root,
    encode_log_odds,
    encode_root,
    require_finite,
    unzigzag,
    zigzag,
)
from logitcache.codecs.topk_values import MAX_CODE, HeadValues, Levels, RootGrid, head_values, likeliest
from logitcache.errors import UserError
from logitcache.records import TeacherTargets, TopKTargets
from logitcache.scoring import TopKRequest

ROWS, ENTRIES = "rows", "entries"
_COUNT, _TAIL, _TOKEN, _ENTROPY = range(4)
_UNKNOWN = np.int16(-1)
"""In the entropy's column, whose codes are 0 or more."""
_BITS, _BYTES = packed.planes(8, "bitshuffle"), packed.planes(4, "shuffle")


@dataclass(frozen=True, kw_only=True, eq=False)
class TopKCodec:
    """Top-k with tail, adaptive per row.

    Attributes:
        prior: names ids by popularity, and spreads the tail (`spread_tail(targets, codec.prior)`).
        request: which tokens the scorer keeps.
        step: of the root-probability grid, whose offset is the root of `request.min_probability`.
        levels: float32[256], the probability that each code decodes to.
        tail_nats: mean entropy of a tail's own distribution, nats: an entropy is stored as the difference from it.
        entry_chunk: entries in an inner chunk, about as many as 1,024 rows keep.
    """

    prior: VocabularyPrior
    request: TopKRequest
    step: float
    levels: NDArray[np.float32]
    tail_nats: float = 0.0
    entry_chunk: int = 32_768

    kind = "topk"
    head = None

    def __post_init__(self) -> None:
        if self.prior.vocab_size > packed.MAX_VOCAB:
            raise UserError(f"at most {packed.MAX_VOCAB} tokens", f"{self.prior.vocab_size}", "use a hidden tier")
        if self.levels.shape != (MAX_CODE + 1,):
            raise UserError(f"{MAX_CODE + 1} levels", f"{list(self.levels.shape)}", "calibrate again")
        if not self.grid.reaches:
            raise UserError("a step whose 255 cells reach probability 1/2", f"{self.step}", "use 0.003 or more")

    @property
    def grid(self) -> RootGrid:
        """The cells that probabilities are told apart by."""
        return RootGrid(offset=self.request.min_probability**0.5, step=self.step)

    @property
    def layouts(self) -> Mapping[str, ArrayLayout]:
        """`rows` int16[C, 4] (count, tail, token log-prob, entropy) and `entries` uint32[E]."""
        chunk, entries = (1024, 4), (self.entry_chunk,)
        return {
            ROWS: ArrayLayout(axis=Axis.ROW, dtype="int16", chunk_shape=chunk, item_shape=(4,), compression=_BITS),
            ENTRIES: ArrayLayout(axis=Axis.ENTRY, dtype="uint32", chunk_shape=entries, compression=_BYTES),
        }

    @property
    def config(self) -> dict[str, Any]:
        """JSON."""
        return {
            "kind": self.kind,
            "min_probability": self.request.min_probability,
            "mass": self.request.mass,
            "max_k": self.request.max_k,
            "step": self.step,
            "tail_nats": self.tail_nats,
            "entry_chunk": self.entry_chunk,
        }

    @property
    def shared(self) -> Mapping[str, NDArray[Any]]:
        """The prior's arrays and `levels`."""
        return self.prior.arrays | {"levels": self.levels}

    @classmethod
    def from_config(cls, config: Mapping[str, Any], shared: Mapping[str, NDArray[Any]]) -> TopKCodec:
        """Rebuild from `config` and `shared`."""
        request = {name: config[name] for name in ("min_probability", "mass", "max_k")}
        return cls(
            prior=VocabularyPrior.from_arrays(shared),
            request=TopKRequest(**request),
            step=config["step"],
            levels=shared["levels"],
            tail_nats=config["tail_nats"],
            entry_chunk=config["entry_chunk"],
        )

    def encode(self, targets: Sequence[TeacherTargets]) -> Encoded:
        """Pack B sequences; see `Codec.encode`."""
        parts = packed.of_kind(targets, TopKTargets)
        batch = _checked(parts)
        rows = np.zeros((len(batch), 4), np.int16)
        rows[:, _COUNT] = np.diff(batch.row_splits)
        rows[:, _TAIL] = encode_log_odds(batch.tail_log_mass)
        entries = self._pack(batch)
        tail = _places(rows)
        _, _, values = self._head(rows, tail, entries)
        wanted = np.minimum(encode_root(-batch.token_log_prob), 32_766) + 1
        apart = np.sqrt(-values.top) - np.sqrt(np.maximum(-batch.token_log_prob, 0))
        rows[:, _TOKEN] = np.where(np.abs(apart) <= ROOT_STEP / 2, 0, wanted)
        if np.isnan(batch.entropy).any():
            rows[:, _ENTROPY] = _UNKNOWN
        else:
            rows[:, _ENTROPY] = zigzag(encode_root(batch.entropy) - self._expected_entropy(tail, values))
        sizes = np.array([len(part.ids) for part in parts], np.int64)
        return Encoded(arrays={ROWS: rows, ENTRIES: entries}, entries_per_sequence=sizes)

    def decode(self, arrays: Mapping[str, NDArray[Any]]) -> TopKTargets:
        """Unpack whole rows; see `Codec.decode`. Raises DamagedError when counts and entries disagree."""
        rows = arrays[ROWS]
        tail = _places(rows)
        splits, ids, values = self._head(rows, tail, arrays[ENTRIES])
        token, entropy = rows[:, _TOKEN], rows[:, _ENTROPY]
        nats = decode_root(unzigzag(entropy) + self._expected_entropy(tail, values))
        nats[entropy == _UNKNOWN] = np.nan
        return TopKTargets(
            ids=ids,
            log_probs=values.log_probs,
            row_splits=splits,
            tail_log_mass=self._tails.log_mass.take(tail),
            token_log_prob=np.where(token == 0, values.top, -decode_root(token - 1)),
            entropy=nats,
        )

    def entries_per_row(self, arrays: Mapping[str, NDArray[Any]]) -> NDArray[np.int64]:
        """int64[R]: see `CountsEntries`."""
        return arrays[ROWS][:, _COUNT].astype(np.int64)

    def _pack(self, batch: TopKTargets) -> NDArray[np.uint32]:
        code = self.grid.cells(batch.log_probs)
        code[likeliest(batch.log_probs, batch.row_splits, packed.row_of_entry(batch.row_splits))] = 0
        return packed.pack(batch.ids, code, batch.row_splits, self.prior.rank_of_token)

    def _head(
        self, rows: NDArray[np.int16], tail: NDArray[np.intp], entries: NDArray[np.uint32]
    ) -> tuple[NDArray[np.int64], NDArray[np.int32], HeadValues]:
        """Row splits, ids ascending within each row, and their values."""
        splits = packed.splits_of(rows[:, _COUNT], len(entries))
        row = packed.row_of_entry(splits)
        ids, code = packed.unpack(entries, splits, row, self.prior.token_of_rank)
        return splits, ids, head_values(code, splits, row, self._tails.rest.take(tail), self._levels)

    def _expected_entropy(self, tail: NDArray[np.intp], values: HeadValues) -> NDArray[np.int16]:
        """int16[C], root grid: the entropy that the head, the tail's mass and an average tail would have."""
        return encode_root((values.entropy + self._tails.entropy.take(tail)).astype(np.float32))

    @cached_property
    def _levels(self) -> Levels:
        return Levels(self.levels)

    @cached_property
    def _tails(self) -> Tails:
        return Tails.of(self.tail_nats)


@dataclass(frozen=True, kw_only=True, eq=False)
class Tails:
    """What each of the 65,536 codes of a tail's mass stands for: looking it up costs a tenth of working it out.

    Attributes:
        log_mass: float32[65536], nats.
        rest: float64[65536], the probability that the kept tokens share.
        entropy: float64[65536], what a tail of that mass adds to its row's entropy on average, nats.
    """

    log_mass: NDArray[np.float32]
    rest: NDArray[np.float64]
    entropy: NDArray[np.float64]

    @classmethod
    def of(cls, tail_nats: float) -> Tails:
        """Where an average tail's own distribution has that entropy."""
        log_mass, log_rest = decode_log_odds(np.arange(1 << 16, dtype=np.uint16).view(np.int16))
        mass = np.exp(log_mass)
        entropy = mass * (tail_nats - np.where(mass > 0, log_mass, 0))
        return cls(log_mass=log_mass.astype(np.float32), rest=np.exp(log_rest), entropy=entropy)


def _places(rows: NDArray[np.int16]) -> NDArray[np.intp]:
    """int64[C]: where in the arrays of `Tails` each row's tail is."""
    return rows[:, _TAIL].view(np.uint16).astype(np.intp)


def _checked(parts: Sequence[TopKTargets]) -> TopKTargets:
    """The parts as one, finite and with a token in every row; UserError otherwise. Entropies may all be NaN."""
    batch = TopKTargets(
        ids=packed.joined(parts, "ids", np.int32),
        row_splits=packed.joined_splits(parts),
        **{name: packed.joined(parts, name, np.float32) for name in _FLOATS},
    )
    for name in ("log_probs", "token_log_prob"):
        require_finite(name, getattr(batch, name))
    if not np.isnan(batch.entropy).all():
        require_finite("entropy", batch.entropy)
    if not (batch.tail_log_mass < np.inf).all():
        raise UserError("tail masses from the teacher", "NaN or infinity", "score the unit again")
    if (np.diff(batch.row_splits) < 1).any():
        raise UserError("a kept token in every row", "an empty row", "ask the scorer for codec.request")
    return batch


_FLOATS = ("log_probs", "tail_log_mass", "token_log_prob", "entropy")
