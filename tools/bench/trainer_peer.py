"""One trainer on one step's tokens, over and over, in a process of its own: seconds a step and peak resident memory.

python -m tools.bench.trainer_peer WORK gkd|gkd_checkpointing|live|cached STEPS

All minimise forward KL at temperature 1 from a student of the same weights, with AdamW, float32 weights under bfloat16
autocast and a bfloat16 teacher: `gkd` is TRL's GKD trainer with lmbda 0 and beta 0, on given text; `live` scores with
the teacher in memory, `cached` has no teacher. The first step's loss is printed, by which they can be seen to agree.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from logitcache.embedded import embedded_teacher_dir
from logitcache.flops import ModelShape
from logitcache.records import TokenSequence
from logitcache.scorers.hf import load_engine
from logitcache.scoring import Prompt, Sampling
from logitcache.store import open_cache
from trainer.batch import teacher_head
from trainer.flops import FlopLedger
from trainer.loop import distill
from trainer.objectives import Objective
from trainer.prefixes import CachedPrefixes, OnPolicyPrefixes, PrefixSource, prompts_of
from trainer.runs import MetricsLog
from trainer.settings import Training
from trainer.student import load_student

CPU = torch.device("cpu")
RATE = 1e-6


def main() -> None:
    """Print one JSON object; argv as above."""
    work, name, steps = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    tokens = json.loads((work / "tokens.json").read_text())
    completion_tokens = sum(len(one["ids"]) - one["prompt_tokens"] for one in tokens)
    if name.startswith("gkd"):
        losses, seconds = _gkd(work, tokens, steps, checkpointing=name == "gkd_checkpointing")
    else:
        losses, seconds = _ours(work, len(tokens), steps, live=name == "live")
    result = {
        "tokens_per_s": completion_tokens / median(seconds[1:]),
        "step_s": seconds[1:],
        "peak_bytes": _peak_bytes(),
        "first_loss_nats": losses[0],
    }
    print(json.dumps(result))


def _peak_bytes() -> int:
    """The most that was resident since the last `_forget_peak` (Linux)."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:")]
    return int(line.split()[1]) * 1024


def _forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")  # proc(5): loading a model is not what is measured


def _ours(work: Path, count: int, steps: int, *, live: bool) -> tuple[list[float], list[float]]:
    """The training loop itself, as it is by default."""
    reader = open_cache(str(work / "cache"), targets="hidden")
    assert reader.head is not None
    sequences = reader.read_tokens(range(count))
    window = max(one.completion_tokens for one in sequences)
    training = Training(steps=steps + 1, sequences=count, window=window, learning_rate=RATE, warmup_steps=0)
    student = load_student(work / "student", vocab_size=reader.head.vocab_size, precision=training.precision)
    common: dict[str, Any] = {"plan": training.plan, "seed": training.seed, "device": CPU}
    common["head"] = teacher_head(reader.head, CPU)
    source: PrefixSource
    if live:
        teacher = load_engine(embedded_teacher_dir())
        source = OnPolicyPrefixes(
            generator=_Given(text={one.problem_id: one for one in sequences}),
            scorer=teacher,
            prompts=prompts_of(sequences),
            sampling=Sampling(),
            student_shape=student.shape,
            teacher_shape=ModelShape.from_config(teacher.model.config.to_dict()),
            **common,
        )
    else:
        source = CachedPrefixes(reader=reader, indices=range(count), **common)
    lines: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as out, MetricsLog(Path(out) / "metrics.jsonl") as metrics:
        _forget_peak()
        distill(
            student=student,
            source=source,
            objective=Objective(forward_weight=1.0),
            optimisation=training.optimisation,
            ledger=FlopLedger(),
            metrics=metrics,
            on_step=lines.append,
        )
    return [line["loss_nats"] for line in lines], [line["step_s"] for line in lines]


@dataclass(frozen=True, kw_only=True)
class _Given:
    """A generator that writes what it was given, by problem."""

    text: Mapping[str, TokenSequence]

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[TokenSequence]:
        """See `Generator.generate`."""
        return [self.text[prompt.problem_id] for prompt in prompts]


def _gkd(
    work: Path, tokens: list[dict[str, Any]], steps: int, *, checkpointing: bool
) -> tuple[list[float], list[float]]:
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    class Clock(TrainerCallback):
        """Seconds of each step, and the peak from the first one on."""

        def __init__(self) -> None:
            self.seconds: list[float] = []

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            if not self.seconds:
                _forget_peak()
            self.started = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.seconds.append(time.perf_counter() - self.started)

    clock = Clock()
    with tempfile.TemporaryDirectory() as out:
        settings = GKDConfig(
            output_dir=out, max_steps=steps + 1, per_device_train_batch_size=len(tokens), learning_rate=RATE,
            lr_scheduler_type="constant", lmbda=0.0, beta=0.0, temperature=1.0, bf16=True, use_cpu=True,
            gradient_checkpointing=checkpointing, logging_steps=1, report_to="none", save_strategy="no",
            dataloader_pin_memory=False,
        )  # fmt: skip
        trainer = GKDTrainer(
            model=AutoModelForCausalLM.from_pretrained(work / "student", dtype=torch.float32),
            teacher_model=AutoModelForCausalLM.from_pretrained(embedded_teacher_dir(), dtype=torch.bfloat16),
            args=settings,
            data_collator=lambda rows: _padded([json.loads(row["tokens"]) for row in rows]),
            train_dataset=Dataset.from_list([{"tokens": json.dumps(one)} for one in tokens]),
            processing_class=AutoTokenizer.from_pretrained(work / "student"),
            callbacks=[clock],
        )
        trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], clock.seconds


def _padded(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Padded on the right, as GKD's own collator gives it."""
    longest, prompt = (max(map(len, parts)) for parts in ([r["ids"] for r in rows], [_prompt(r) for r in rows]))
    ids, mask = torch.zeros(len(rows), longest, dtype=torch.long), torch.zeros(len(rows), longest, dtype=torch.long)
    labels = torch.full((len(rows), longest), -100)
    for place, row in enumerate(rows):
        given, first = torch.tensor(row["ids"]), row["prompt_tokens"]
        ids[place, : len(given)], mask[place, : len(given)] = given, 1
        labels[place, first : len(given)] = given[first:]
    return {
        "input_ids": ids, "attention_mask": mask, "labels": labels,
        "prompts": ids[:, :prompt], "prompt_attention_mask": mask[:, :prompt],
    }  # fmt: skip


def _prompt(row: dict[str, Any]) -> list[int]:
    return list(row["ids"][: row["prompt_tokens"]])


if __name__ == "__main__":
    main()
