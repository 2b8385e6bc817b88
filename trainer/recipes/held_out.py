"""A finished model on the held-out text of a cache: distance from the teacher, likelihood, agreement.

Guarantees: the text is that which a training run with the same share, window and number of sequences held out; exact
and coarse numbers have different names (`trainer.objectives.names_of`); the teacher is not needed.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trainer.agreement import agreement
from trainer.evaluate import evaluate
from trainer.flops import FlopLedger
from trainer.recipes.data import CacheData, held_out_batches, open_data, open_student
from trainer.settings import Training


@dataclass(frozen=True, kw_only=True)
class HeldOutText:
    """Which text.

    Attributes:
        cache_url: a sealed cache, whose tokenizer is the model's.
        window: completion tokens of a sequence, at most.
        held_out_share: of the problems.
        held_out_sequences: how many of those, at most.
    """

    cache_url: str
    window: int = 128
    held_out_share: float = 0.2
    held_out_sequences: int = 24

    def open(self, model_dir: Path, precision: str) -> OpenText:
        """Open the cache for a model, before any work. Raises as `trainer.recipes.data.open_data`."""
        training = Training(
            window=self.window,
            held_out_share=self.held_out_share,
            held_out_sequences=self.held_out_sequences,
            precision=precision,
        )
        return OpenText(data=open_data(self.cache_url, model_dir, training), model_dir=model_dir, training=training)


@dataclass(frozen=True, kw_only=True, eq=False)
class OpenText:
    """The text, and the model that will be measured on it.

    Attributes:
        training: the settings of a run that holds the same text out.
    """

    data: CacheData
    model_dir: Path
    training: Training

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the figures beside the model."""
        names = ("window", "held_out_share", "held_out_sequences")
        chosen = {name: getattr(self.training, name) for name in names}
        return {"cache_manifest": self.data.reader.manifest.digest, "tier": self.data.measured.tier, **chosen}

    def measure(self) -> dict[str, Any]:
        """KL in nats by the names of `names_of`, `nll_nats`, `top1_share`, and how much text it was."""
        data, training = self.data, self.training
        student = open_student(data, self.model_dir, training)
        batches = held_out_batches(data, student, training)
        measured = evaluate(student, batches, FlopLedger(), step=None)
        sequences = data.measured.read_tokens(
            data.split.held_out[: training.held_out_sequences], max_completion_tokens=training.window
        )
        written = np.concatenate([sequence.completion_ids for sequence in sequences]).astype(np.int64)
        token_ids = torch.from_numpy(written).split([batch.target_rows for batch in batches])
        agreed = agreement(student, batches, token_ids)
        return {
            **measured.nats,
            "nll_nats": agreed.nll_nats,
            "top1_share": agreed.top1_share,
            "tokens": measured.tokens,
            "sequences": measured.sequences,
            "flops": measured.flops,
            "tier": data.measured.tier,
        }
