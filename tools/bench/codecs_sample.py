"""Real rows to fit codecs on and to measure them with: the embedded teacher over DeepScaleR's own solutions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from logitcache.codecs import Calibration
from logitcache.records import FinishReason, Head, HiddenStateTargets, Origin, TokenSequence
from logitcache.scorers.hf import load_engine, load_tokenizer
from logitcache.scoring import HiddenStateRequest

LONGEST = 1024


def teacher_sample(model_dir: Path, problems: Path, rows: int) -> tuple[Calibration, Head]:
    """States and ids of at least `rows` rows of solutions, and the head, all in float32."""
    tokenizer, engine = load_tokenizer(model_dir), load_engine(model_dir, dtype="float32", batch_tokens=2048)
    table = [row for row in pq.read_table(problems, columns=["problem", "solution"]).to_pylist() if row["solution"]]
    order = np.random.default_rng(0).permutation(len(table))
    states: list[NDArray[np.float32]] = []
    ids: list[NDArray[np.int32]] = []
    for position in order:
        prompt = tokenizer(table[position]["problem"] + "\n\n").input_ids
        solution = [*tokenizer(table[position]["solution"]).input_ids, tokenizer.eos_token_id]
        sequence = TokenSequence(
            token_ids=np.array((prompt + solution)[:LONGEST], np.int32),
            prompt_tokens=min(len(prompt), LONGEST),
            origin=Origin.CORPUS,
            sample_id=f"{position:032x}",
            problem_id=str(position),
            finish_reason=FinishReason.GIVEN,
        )
        ((targets,),) = engine.score([sequence], [HiddenStateRequest()])
        assert isinstance(targets, HiddenStateTargets)
        states.append(targets.hidden.astype(np.float32))
        ids.append(sequence.completion_ids)
        if sum(map(len, ids)) >= rows:
            break
    numbers = np.repeat(np.arange(len(ids)), [len(item) for item in ids])
    return Calibration(hidden=np.concatenate(states), token_ids=np.concatenate(ids), sequence=numbers), engine.head
