"""How many bytes a token and how many nats each codec costs, beside what other caches keep.

    python -m tools.bench.codecs [--quick] [--json PATH] [--data DIR]

The embedded teacher reads DeepScaleR's own solutions in float32. Codecs are fitted on some documents and measured on
others. Bytes are those of the shards that the store writes: chunks of about 1,024 rows, compressed, with checksum and
index; arrays kept once a tier (prior, head) are counted apart. KL is over the full vocabulary. A peer's tail is spread
by one prior fitted for it, which is more than it carries. "Peaked" is the same logits times 2.5, a stand-in for a
strong teacher. A gradient error is that of the mean loss's gradient in the student's logits, Frobenius, relative; the
student is the teacher with noise in its states.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from logitcache.codecs import Calibration, Codec, calibrate, parse_targets, spread_tail
from logitcache.codecs.dense import DenseHead, row_blocks
from logitcache.codecs.fidelity import distribution_of, kl_nats, targets_of
from logitcache.codecs.fit_prior import fit_prior, gather
from logitcache.codecs.prior import VocabularyPrior
from logitcache.embedded import embedded_teacher_dir
from logitcache.records import Head, TopKTargets
from logitcache.scoring import TopKRequest
from logitcache.store.shards import ArraySpec, encode_shards
from tools.bench.codecs_goals import goals
from tools.bench.codecs_sample import teacher_sample
from tools.bench.peers import Peer, TopTokens, compressed_bytes, peers, top_tokens
from tools.bench.result import keep, options

PEAKED = 2.5
BLOCK = 512
THRESHOLDS = ("2e-3", "1.5e-3", "1e-3", "5e-4", "2e-4", "1e-4")
SPECS = (
    *(f"topk:p={p}" for p in THRESHOLDS),
    "topk:k=64:p=0",
    "topk:mass=0.98:p=1e-5",
    "hidden",
    *(f"hidden:step={step}" for step in ("0.02", "0.01", "0.005")),
    "hidden:max-kl=2e-3",
)
PEAKED_SPECS = (*(f"topk:p={p}" for p in ("1e-3", "7e-4", "6e-4", "5e-4", "3e-4")), "hidden:step=0.01")
PEAKED_PEERS = 3
GRADIENT_BLOCKS = 2
STUDENT_NOISE = {"student": 0.45, "near_student": 0.18}
"""Of the standard deviation of each state's coordinate: students about 0.6 and 0.1 nats away."""


@dataclass(kw_only=True)
class Tally:
    """How far a format's distributions are from the teacher's, over the blocks it was given."""

    forward: list[NDArray[np.float64]] = field(default_factory=list)
    reverse: list[NDArray[np.float64]] = field(default_factory=list)
    gradients: dict[str, NDArray[np.float64]] = field(default_factory=dict)

    def add(
        self, students: Mapping[str, NDArray[np.float32]], exact: NDArray[np.float32], returned: NDArray[np.float32]
    ) -> None:
        """Compare a block's log-probabilities, float32[n, V]; `students` are there in the first blocks only."""
        self.forward.append(kl_nats(exact, returned))
        self.reverse.append(kl_nats(returned, exact))
        for (student, log_probs), (direction, gradient) in product(students.items(), GRADIENTS.items()):
            truth = gradient(log_probs, exact)
            error = gradient(log_probs, returned) - truth
            norms = np.array([np.vdot(error, error), np.vdot(truth, truth)], np.float64)
            name = f"{student}_{direction}"
            self.gradients[name] = self.gradients.get(name, np.zeros(2)) + norms

    def figures(self) -> dict[str, float]:
        """Means, 99th percentiles and relative errors."""
        forward, reverse = np.concatenate(self.forward), np.concatenate(self.reverse)
        errors = {name: float(np.sqrt(wrong / right)) for name, (wrong, right) in self.gradients.items()}
        return {
            "forward_kl_mean_nats": float(forward.mean()),
            "forward_kl_p99_nats": float(np.quantile(forward, 0.99)),
            "reverse_kl_mean_nats": float(reverse.mean()),
            **{f"{name}_gradient_relative_error": error for name, error in errors.items()},
        }


def main() -> None:
    """Measure and keep."""
    chosen = options("codecs", __doc__)
    fitted, measured = (2_048, 1_024) if chosen.quick else (16_384, 6_144)
    model_dir = embedded_teacher_dir()
    sample, head = teacher_sample(model_dir, chosen.data / "deepscaler.parquet", fitted + measured)
    calibration, rows = sample.rows(slice(fitted)), sample.rows(slice(fitted, fitted + measured))
    rivals = peers(head.vocab_size)
    plain = measure(SPECS, rivals, head, calibration, rows)
    sharper = replace(head, scale=head.scale * PEAKED)
    peaked = measure(PEAKED_SPECS, rivals[:PEAKED_PEERS], sharper, calibration, rows)
    keep(
        chosen,
        config={"teacher": model_dir.name, "dtype": "float32", "rows_fitted": fitted, "rows_measured": len(rows),
                "vocab_size": head.vocab_size, "width": head.weight.shape[1], "peaked_scale": PEAKED,
                "student_noise": STUDENT_NOISE},
        figures={"plain": plain, "peaked": peaked},
        goals=goals(plain, peaked, raw_state_bytes=2.0 * head.weight.shape[1]),
    )  # fmt: skip


def measure(
    specs: Sequence[str], rivals: Sequence[Peer], head: Head, calibration: Calibration, rows: Calibration
) -> dict[str, Any]:
    """Every spec's and every peer's figures, over the same rows."""
    teacher = DenseHead(head)
    formats: dict[str, Ours | Theirs] = {}
    for text in specs:
        codec = calibrate(parse_targets(text)[0], teacher, calibration)
        formats[text] = Ours(codec=codec, source=head.fingerprint)
    for peer in rivals:
        formats[peer.name] = Theirs(peer=peer, prior=one_tail(teacher, calibration, peer.k))
    tallies = {name: Tally() for name in formats}
    spread = rows.hidden.std(axis=0)
    distances: dict[str, list[float]] = {name: [] for name in STUDENT_NOISE}
    for block in row_blocks(len(rows), BLOCK):
        some = rows.rows(block)
        exact = teacher.log_probs(some.hidden)
        students = _students(teacher, some.hidden, spread) if block.stop <= GRADIENT_BLOCKS * BLOCK else {}
        for name, log_probs in students.items():
            distances[name].append(float(kl_nats(exact, log_probs).mean()))
        for name, tally in tallies.items():
            tally.add(students, exact, formats[name].through(exact, some))
    figures = {name: tally.figures() | formats[name].cost(len(rows)) for name, tally in tallies.items()}
    return figures | {f"{name}_kl_mean_nats": float(np.mean(far)) for name, far in distances.items()}


@dataclass(kw_only=True)
class Ours:
    """A codec, and the arrays it has made so far; `source` is the fingerprint of the teacher's head."""

    codec: Codec
    source: str
    made: list[Mapping[str, NDArray[Any]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.decoder = None if self.codec.head is None else DenseHead(self.codec.head)

    def through(self, exact: NDArray[np.float32], rows: Calibration) -> NDArray[np.float32]:
        """The distributions float32[n, V] of a block once it has been stored."""
        targets = targets_of(self.codec.request, exact, rows.hidden, self.source, rows.token_ids)
        self.made.append(self.codec.encode([targets]).arrays)
        return distribution_of(self.codec, self.decoder, self.codec.decode(self.made[-1]))

    def cost(self, rows: int) -> dict[str, float]:
        """Bytes on disk, decoding rate (best of three), and the bytes of what is kept once."""
        arrays = {name: np.concatenate([some[name] for some in self.made]) for name in self.codec.layouts}
        seconds = []
        for _ in range(3):
            started = time.perf_counter()
            self.codec.decode(arrays)
            seconds.append(time.perf_counter() - started)
        return {
            "bytes_per_token": stored_bytes(self.codec, arrays) / rows,
            "kept_once_bytes": sum(array.nbytes for array in self.codec.shared.values()),
            "decode_tokens_per_s": rows / min(seconds),
        }


@dataclass(kw_only=True)
class Theirs:
    """A peer's format, with a prior for its tail, and its bytes so far: as they are and after zstd."""

    peer: Peer
    prior: VocabularyPrior
    raw: int = 0
    squeezed: int = 0

    def through(self, exact: NDArray[np.float32], rows: Calibration) -> NDArray[np.float32]:
        """The distributions float32[n, V] of a block once it has been stored."""
        data = self.peer.encode(top_tokens(exact, self.peer.k))
        self.raw, self.squeezed = self.raw + len(data), self.squeezed + compressed_bytes(data)
        return spread_tail(with_tail(self.peer.decode(data, len(exact))), self.prior)

    def cost(self, rows: int) -> dict[str, float]:
        """Bytes."""
        return {"bytes_per_token": self.squeezed / rows, "bytes_per_token_before_zstd": self.raw / rows}


def _students(
    teacher: DenseHead, hidden: NDArray[np.float32], spread: NDArray[np.float32]
) -> dict[str, NDArray[np.float32]]:
    """Log-probabilities of the teacher with noise in its states."""
    noise = np.random.default_rng(1).standard_normal(hidden.shape, np.float32) * spread
    return {name: teacher.log_probs(hidden + np.float32(size) * noise) for name, size in STUDENT_NOISE.items()}


def stored_bytes(codec: Codec, arrays: Mapping[str, NDArray[Any]]) -> int:
    """Bytes of the shards that the store writes of these arrays."""
    total = 0
    for name, layout in codec.layouts.items():
        spec = ArraySpec(
            dtype=layout.dtype,
            shape=arrays[name].shape,
            chunk_shape=layout.chunk_shape,
            dimension_names=tuple(f"axis{axis}" for axis in range(arrays[name].ndim)),
            compression=layout.compression,
        )
        total += sum(len(shard.data) for shard in encode_shards(spec, arrays[name]))
    return total


def one_tail(head: DenseHead, sample: Calibration, k: int) -> VocabularyPrior:
    """One tail shape for a format that keeps k tokens."""
    seen = gather(head, sample, TopKRequest(max_k=k))
    together = seen.tail_sums.sum(axis=0, keepdims=True)
    return fit_prior(replace(seen, shape_of_row=np.zeros_like(seen.shape_of_row), tail_sums=together))


def with_tail(top: TopTokens) -> TopKTargets:
    """Tokens of a format that keeps no tail: the tail is what they leave."""
    kept = np.exp(top.log_probs.astype(np.float64)).sum(axis=1)
    excess = np.log(np.maximum(kept, 1))  # what rounding made more than 1 is brought back to it
    rows, k = top.ids.shape
    zeros = np.zeros(rows, np.float32)
    return TopKTargets(
        ids=top.ids.ravel(),
        log_probs=(top.log_probs - excess[:, None]).astype(np.float32).ravel(),
        row_splits=np.arange(rows + 1) * k,
        tail_log_mass=np.log(np.maximum(1 - kept, 1e-7)).astype(np.float32),
        token_log_prob=zeros,
        entropy=zeros,
    )


def _forward_gradient(student: NDArray[np.float32], teacher: NDArray[np.float32]) -> NDArray[np.float32]:
    """The gradient q - p."""
    return np.exp(student) - np.exp(teacher)


def _reverse_gradient(student: NDArray[np.float32], teacher: NDArray[np.float32]) -> NDArray[np.float32]:
    """The gradient q (log q - log p - KL(q, p))."""
    probs, ratio = np.exp(student), student - teacher
    return probs * (ratio - np.einsum("nv,nv->n", probs, ratio)[:, None])


GRADIENTS = {"forward": _forward_gradient, "reverse": _reverse_gradient}

if __name__ == "__main__":
    main()
