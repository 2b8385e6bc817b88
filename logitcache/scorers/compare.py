"""How far an engine's distributions are from the reference: transformers, in float32, on the CPU.

Users ask whether scoring with an inference engine is harmless. A build that does so answers with a number of its own:
the exact KL in both directions over the full vocabulary, on a sample of its first unit.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from logitcache.codecs.blas import one_blas_thread
from logitcache.codecs.dense import DenseHead, row_blocks, spread
from logitcache.codecs.fidelity import kl_nats
from logitcache.codecs.quantize import as_float32
from logitcache.errors import UserError
from logitcache.flops import ModelShape
from logitcache.records import Head, HiddenStateTargets, TokenSequence
from logitcache.scorers.hf import HFEngine, load_engine
from logitcache.scoring import HiddenStateRequest

COMPARED_SEQUENCES = 8
"""Sequences scored again: seconds, beside the loading of the model."""
COMPARED_ROWS = 256
"""Rows compared, spread over those sequences: enough for a 99th percentile, and tens of seconds at most."""
_BLOCK_ROWS = 32
_AVAILABLE = Path("/proc/meminfo")


def compare_with_reference(
    model_dir: Path, sequences: Sequence[TokenSequence], states: Sequence[NDArray[np.float32]], head: Head
) -> dict[str, list[float]]:
    """KL per row in nats between an engine and the reference, on rows of the first sequences.

    Args:
        model_dir: the teacher, loaded again for this and freed at once.
        sequences: scored by the engine.
        states: float32[C, D] of each, the engine's.
        head: the engine's.

    Returns:
        `forward`, KL(reference, engine), and `reverse`, KL(engine, reference).

    Raises:
        UserError: the reference does not fit into memory.
    """
    reference = _load(model_dir)
    again = reference.score(sequences[:COMPARED_SEQUENCES], [HiddenStateRequest()])
    exact = np.concatenate([as_float32(item.hidden) for (item,) in again if isinstance(item, HiddenStateTargets)])
    theirs, ours = (spread(rows, COMPARED_ROWS) for rows in (exact, np.concatenate(states[:COMPARED_SEQUENCES])))
    own, other = DenseHead(head), DenseHead(reference.head)
    found: dict[str, list[float]] = {"forward": [], "reverse": []}
    with one_blas_thread():  # the values go into a part, whose bytes follow from them
        for block in row_blocks(len(ours), _BLOCK_ROWS):
            measured, exact = own.log_probs(ours[block]), other.log_probs(theirs[block])
            found["forward"] += kl_nats(exact, measured).tolist()
            found["reverse"] += kl_nats(measured, exact).tolist()
    return found


def _load(model_dir: Path) -> HFEngine:
    shape = ModelShape.of(model_dir)
    needed, available = 4 * (shape.parameters + 3 * shape.hidden * shape.vocab), _available_bytes()
    if needed > available:
        raise UserError(
            f"compare the engine with {model_dir.name} in float32",
            f"{available / 1e9:.1f} GB of memory are free, it takes about {needed / 1e9:.1f}",
            "pass --no-compare-engines: the manifest then says that it was not measured",
        )
    return load_engine(model_dir, dtype="float32", device="cpu")


def _available_bytes() -> int:
    """Memory that can be had without swapping, as Linux estimates it; elsewhere all there is."""
    if _AVAILABLE.is_file():
        (line,) = [line for line in _AVAILABLE.read_text().splitlines() if line.startswith("MemAvailable:")]
        return int(line.split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
