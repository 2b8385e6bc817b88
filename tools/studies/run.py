"""One run of the study, in a process of its own; `tools.studies.grid` starts it.

    python -m tools.studies.run --out runs/study --name student-0-long-0

Guarantees: the project's own recipes do the work, and every figure is taken from their checkpoints and their metrics; a
result appears whole or not at all, a run that is done is not done again, and one that was killed goes on from its
newest checkpoint. The name and the study's size decide a run, nothing else does.
"""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from cyclopts import App
from safetensors.torch import load_file

from logitcache.console import note, run_command
from tools.studies.measuring import ANSWERED, STYLE, VOCABULARY, Exam
from tools.studies.study import LADDER, Distilled, Rewarded, Size, Window, named
from tools.studies.teacher import MODELS
from trainer.curriculum import CurriculumPlan, parse_floor
from trainer.policy.settings import PolicyTraining, RewardKind, Surrogate
from trainer.recipes.distill import Distillation, run_distill
from trainer.recipes.grpo import run_grpo
from trainer.runs import write_json
from trainer.schedules import WeightSchedule
from trainer.settings import Prefix, Training
from trainer.student import Student, load_student

CACHE, PROBLEMS = "cache", "train.jsonl"
"""In a study's directory."""
MICRO_BATCH_TOKENS = 4096

app = App(name="run", help=__doc__.splitlines()[0], version_flags=[])


@app.default
def main(*, out: Path, name: str, size: str = "full") -> int:
    """Do one run; keep `runs/NAME.json` and, in `work/NAME/student`, the student.

    Args:
        out: the study's directory, with cache and problems.
        name: of the run.
        size: of the study, full or quick.
    """
    run, chosen = named(name, size)
    file, work = out / "runs" / f"{name}.json", out / "work" / name
    if not file.exists():
        torch.set_num_threads(1)  # models this small gain nothing from more; the study runs two at once
        result = _distilled(run, out, work, chosen) if isinstance(run, Distilled) else _rewarded(run, out, work, chosen)
        file.parent.mkdir(exist_ok=True)
        write_json(file, result)
    shutil.rmtree(work / "checkpoints", ignore_errors=True)
    note(f"{name} is done")
    return 0


def _distilled(run: Distilled, out: Path, work: Path, size: Size) -> dict[str, Any]:
    plan = None
    if run.window is Window.CURRICULUM:
        plan = CurriculumPlan(lengths=LADDER, floor=parse_floor(size.floor), check_every=size.check_every)
    result = run_distill(
        cache_url=str(out / CACHE),
        student_dir=MODELS / "student",
        out=work,
        distillation=Distillation(
            prefix=run.prefix,
            weights=WeightSchedule.constant(run.forward_weight),
            teacher=str(MODELS / "teacher") if run.prefix is Prefix.STUDENT else None,
            curriculum=plan,
        ),
        training=Training(
            steps=size.steps,
            sequences=size.sequences,
            window=run.window.tokens,
            learning_rate=size.learning_rate,
            warmup_steps=size.steps // 20,
            micro_batch_tokens=MICRO_BATCH_TOKENS,
            precision="float32",
            held_out_share=0.05,
            held_out_sequences=64,
            seed=run.seed,
        ),
        sampling=ANSWERED,
        checkpoint_every=size.steps // size.points,
        keep=size.points,
    )
    kept = ("step", "window", "own_entropy_nats", "decision")
    checks = [{key: line[key] for key in kept} for line in _metrics(work) if "decision" in line]
    return {"held_out": result["held_out"], "checks": checks, **_measured_at_points(work, size.exam)}


def _rewarded(run: Rewarded, out: Path, work: Path, size: Size) -> dict[str, Any]:
    run_grpo(
        model_dir=out / "work" / run.start.name / "student",
        problems=str(out / PROBLEMS),
        out=work,
        training=PolicyTraining(
            steps=size.grpo_steps,
            prompts=size.grpo_prompts,
            group=size.grpo_group,
            learning_rate=size.grpo_learning_rate,
            warmup_steps=size.grpo_steps // 20,
            micro_batch_tokens=MICRO_BATCH_TOKENS,
            precision="float32",
            seed=run.start.seed,
        ),
        surrogate=Surrogate(),
        sampling=replace(ANSWERED, top_p=size.grpo_top_p, top_k=None),
        style=STYLE,
        reward=RewardKind.EXACT,
        checkpoint_every=size.grpo_steps // size.points,
        keep=size.points,
    )
    return _measured_at_points(work, size.exam)


def measured(model_dir: Path, exam: Exam) -> dict[str, dict[str, float]]:
    """Of a model that is in the repository."""
    return exam.measure(_load(model_dir))


def _measured_at_points(work: Path, problems: int) -> dict[str, Any]:
    """What the student could do at each checkpoint, the FLOPs it had cost by then, and the run's seconds."""
    started = time.perf_counter()
    exam, lines, student = Exam(problems=problems), _metrics(work), _load(MODELS / "student")
    found = []
    for checkpoint in sorted((work / "checkpoints").glob("step-*")):
        student.model.load_state_dict(load_file(checkpoint / "model.safetensors"), strict=False)  # a tied head is none
        steps = int(checkpoint.name.removeprefix("step-"))
        found.append({"step": steps, "flops": lines[steps - 1]["flops"], **exam.measure(student)})
    training_s = sum(line["step_s"] for line in lines)
    return {"points": found, "seconds": {"training": training_s, "measuring": time.perf_counter() - started}}


def _metrics(work: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (work / "metrics.jsonl").read_text().splitlines()]


def _load(model_dir: Path) -> Student:
    return load_student(model_dir, vocab_size=VOCABULARY, precision="float32")


if __name__ == "__main__":
    raise SystemExit(run_command(app, after_interrupt="run it again to go on"))
