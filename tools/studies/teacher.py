"""The world's models: Qwen3's architecture, trained from nothing on worked sums by plain next-token training.

    python -m tools.studies.teacher --out tools/studies/models [--only student]

makes what the repository keeps: the teacher, and the student that every run of the study starts from, which was stopped
early: it knows the format, and gets most sums wrong. On two quiet cores that is about fifteen minutes.

The training is the project's own loop: forward KL from the distribution that is all on the token that follows
(`with_own_tokens`) is cross-entropy.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np
import torch
from cyclopts import App

from logitcache.console import Progress, note, run_command
from logitcache.identity import tokenizer_fingerprint
from logitcache.records import FinishReason, Origin, SampledTargets, ScoredSequence, TokenSequence, sample_id_of
from tools.studies.world import END, Level, Sum, draw_sum, held_out_sums, make_tokenizer
from trainer.batch import Batch, batches_of
from trainer.flops import FlopLedger
from trainer.loop import distill
from trainer.objectives import Objective
from trainer.rollouts import with_own_tokens
from trainer.runs import MetricsLog, new_run_dir
from trainer.schedules import Decay
from trainer.settings import Optimisation
from trainer.student import Student

MODELS = Path(__file__).parent / "models"
CONTEXT = 128
"""Tokens of the longest prompt and completion, with room."""

app = App(name="teacher", help=__doc__.splitlines()[0], version_flags=[])


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A model and how long it learns."""

    width: int
    layers: int
    steps: int
    decay: Decay
    learning_rate: float = 2e-3
    weight_decay: float = 0.01
    sequences: int = 32
    seed: int = 0


RECIPES = {
    "teacher": Recipe(width=256, layers=4, steps=1500, decay=Decay.COSINE),
    "student": Recipe(width=128, layers=3, steps=700, decay=Decay.CONSTANT),
}


@dataclass(kw_only=True)
class CorpusPrefixes:
    """Worked sums without end, each with its own tokens as targets; see `trainer.prefixes.PrefixSource`."""

    tokenizer: Any
    sequences: int
    rng: np.random.Generator
    besides: frozenset[Sum]

    def draw(self, step: int, ledger: FlopLedger) -> list[Batch]:
        """As many easy as hard ones."""
        texts = [self._text(level) for level in (*Level,) * (self.sequences // 2)]
        scored = [_certain(sequence_of(self.tokenizer, *text)) for text in texts]
        return batches_of(scored, None, torch.device("cpu"), max_tokens=4096)

    def _text(self, level: Level) -> tuple[str, str]:
        while (one := draw_sum(self.rng, level)) in self.besides:
            pass
        return one.text, one.working(self.rng)

    def use_window(self, completion_tokens: int) -> None:
        """Whole workings always."""

    def state(self) -> dict[str, Any]:
        """Of the generator of random numbers."""
        return dict(self.rng.bit_generator.state)

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self.rng.bit_generator.state = state

    def close(self) -> None:
        """There is nothing to stop."""


def _certain(sequence: TokenSequence) -> ScoredSequence:
    """With the distributions of one who knows what comes: all on the token that follows, of no entropy."""
    own = with_own_tokens(sequence)
    assert isinstance(own.targets, SampledTargets)
    nothing = np.zeros(sequence.completion_tokens, np.float32)
    return replace(own, targets=replace(own.targets, token_log_prob=nothing, entropy=nothing))


def sequence_of(tokenizer: Any, problem: str, working: str) -> TokenSequence:
    """A given text as tokens, ended by the stop token."""
    prompt = tokenizer(f"{problem}\n")["input_ids"]
    ids = np.array([*prompt, *tokenizer(working + END)["input_ids"]], np.int32)
    return TokenSequence(
        token_ids=ids,
        prompt_tokens=len(prompt),
        origin=Origin.CORPUS,
        sample_id=sample_id_of(ids, len(prompt), tokenizer_fingerprint(tokenizer.get_vocab())),
        problem_id=problem,
        finish_reason=FinishReason.GIVEN,
    )


def new_model(recipe: Recipe) -> Any:
    """Random weights, drawn from the recipe's seed."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    tokenizer = make_tokenizer()
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=recipe.width,
        intermediate_size=3 * recipe.width,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.width // 32,
        num_key_value_heads=recipe.width // 64,
        head_dim=32,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=None,
        bos_token_id=None,
    )
    with torch.random.fork_rng():
        torch.manual_seed(recipe.seed)
        return Qwen3ForCausalLM(config).eval()


def train(recipe: Recipe, metrics: Path) -> Student:
    """A model after its recipe."""
    tokenizer = make_tokenizer()
    student = Student(model=new_model(recipe), tokenizer=tokenizer, vocab_size=len(tokenizer), precision=torch.bfloat16)
    source = CorpusPrefixes(
        tokenizer=tokenizer,
        sequences=recipe.sequences,
        rng=np.random.default_rng(recipe.seed),
        besides=frozenset(one for level in Level for one in held_out_sums(level)),
    )
    optimisation = Optimisation(
        steps=recipe.steps,
        learning_rate=recipe.learning_rate,
        warmup_steps=min(50, recipe.steps),
        decay=recipe.decay,
        weight_decay=recipe.weight_decay,
    )
    with MetricsLog(metrics) as log, Progress("teach", recipe.steps, "steps") as progress:

        def on_step(line: dict[str, Any]) -> None:
            progress.show(loss=f"{line['loss_nats']:.4f}")
            progress.add()

        distill(
            student=student,
            source=source,
            objective=Objective(forward_weight=1.0),
            optimisation=optimisation,
            ledger=FlopLedger(),
            metrics=log,
            on_step=on_step,
        )
    return student


@app.default
def make(*, out: Path = MODELS, only: Literal["teacher", "student"] | None = None) -> int:
    """Train and save both models, in bfloat16.

    Args:
        out: gets a directory for each, which must not be there yet.
        only: one of them.
    """
    for name in [only] if only else RECIPES:
        new_run_dir(out / name)
        with TemporaryDirectory() as scratch:
            student = train(RECIPES[name], Path(scratch) / "metrics.jsonl")
        (out / name).rmdir()
        replace(student, model=student.model.to(torch.bfloat16)).save(out / name)
        size = sum(file.stat().st_size for file in (out / name).iterdir())
        note(f"{name}: {sum(p.numel() for p in student.parameters):,} parameters, {size / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command(app, after_interrupt="what is not saved must be trained again"))
