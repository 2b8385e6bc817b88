"""GRPO from any checkpoint: train, measure as it goes, save; killed anywhere, it goes on when it is run again."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from logitcache.console import Progress, note
from logitcache.errors import require
from logitcache.flops import ModelShape
from logitcache.identity import weights_fingerprint
from logitcache.prompts import PromptStyle
from logitcache.scoring import Generator, Sampling
from trainer.benchmarks import benchmark_digest, load_benchmark
from trainer.checkpoint import Checkpoints, remove_leftovers
from trainer.distributed import require_alone
from trainer.flops import FlopLedger
from trainer.policy.groups import Groups, problems_drawn
from trainer.policy.learner import Learner
from trainer.policy.loop import train_policy
from trainer.policy.rewards import Reward, judging, reward_name
from trainer.policy.settings import PolicyTraining, RewardKind, Surrogate
from trainer.provenance import commit, device_name, versions
from trainer.recipes.cells import flops_of
from trainer.recipes.data import StudentEngine
from trainer.recipes.writing import Writing, require_causal
from trainer.rollouts import VLLMRollouts, load_rollout_engine, student_generator
from trainer.runs import MetricsLog, open_run, write_json
from trainer.student import Student, load_student, require_backend
from trainer.watch import Watch, require_watch, watching


def run_grpo(
    *,
    model_dir: Path,
    problems: str,
    out: Path,
    training: PolicyTraining,
    surrogate: Surrogate,
    sampling: Sampling,
    style: PromptStyle,
    reward: RewardKind | Reward = RewardKind.MATH,
    generator: StudentEngine = "transformers",
    stop_tokens: Sequence[str] = (),
    watch: Sequence[Watch] = (),
    checkpoint_every: int = 100,
    keep: int = 2,
) -> dict[str, Any]:
    """Train a model on what it is rewarded for; write `config.json`, `metrics.jsonl`, `ledger.json`, `result.json` and
    the trained model, `student/`.

    Args:
        model_dir: a causal language model, such as the `student/` of a distillation.
        problems: with answers, see `trainer.benchmarks.load_benchmark`.
        out: a new directory, or that of the same run, which goes on from its newest checkpoint.
        training: steps, groups and the optimizer.
        surrogate: the loss.
        sampling: how answers are drawn. Their number and seed are the training's.
        style: how a problem is put to the model.
        reward: `math`, `exact`, or a function of problem and text, which is told apart by its name alone.
        generator: the engine that answers are written with.
        stop_tokens: that end an answer besides the model's own, such as its teacher's.
        watch: where the metrics go besides `metrics.jsonl`.
        checkpoint_every: steps between checkpoints.
        keep: checkpoints that stay.

    Returns:
        `{"reward": {"first", "last"}, "completion_tokens", "tokens_per_s", "seconds", "flops"}`; rewards are means over
        the first and the last tenth of the steps.

    Raises:
        UserError: see the functions called; nothing is written before the inputs are sound.
    """
    require_watch(watch)
    require_alone("grpo")
    require(sampling.temperature > 0, "--temperature, above 0: greedy answers are all the same", sampling.temperature)
    checkpoints = Checkpoints(directory=out / "checkpoints", every=checkpoint_every, keep=keep)
    asked = load_benchmark(problems)
    require_causal(model_dir)
    writing = Writing(
        model_dir=model_dir,
        problems=asked,
        sampling=replace(sampling, samples_per_problem=training.group, seed=training.seed),
        style=style,
        generator=generator,
        scorer="transformers",
        dtype=training.precision,
        stop_tokens=stop_tokens,
        problems_at_once=training.prompts,
    )
    config = {
        "command": "grpo",
        "model": {"name": model_dir.name, "fingerprint": weights_fingerprint(model_dir)},
        "problems": {"name": Path(problems).name, "count": len(asked), "digest": benchmark_digest(asked)},
        "reward": reward_name(reward),
        "training": asdict(training),
        "surrogate": asdict(surrogate),
        **writing.identity,
        "versions": versions(),
        "device": device_name(),
        "commit": commit(),
    }
    checkpoints = replace(checkpoints, identity={name: config[name] for name in ("model", "problems")})
    drawn = problems_drawn(asked, seed=training.seed, count=training.steps * training.prompts)
    with judging(reward, drawn) as judge:
        policy = _load_policy(writing, training)
        if open_run(out, config):
            if (out / "result.json").exists():
                note(f"{out} is done already")
                return _read_result(out)
            note(f"going on after step {checkpoints.latest() or 0}")
            remove_leftovers(out)
        learner = Learner(
            policy=policy,
            surrogate=surrogate,
            training=training,
            sampling_temperature=sampling.temperature,
            max_new_tokens=sampling.max_new_tokens,
            reference=_frozen(policy) if surrogate.kl_weight > 0 else None,
        )
        with _writer(policy, writing) as writer:
            source = Groups(
                generator=writer,
                problems=asked,
                prompts=writing.prompts,
                reward=judge,
                tokenizer=writing.tokenizer,
                sampling=writing.sampling,
                count=training.prompts,
                shape=policy.shape,
                seed=training.seed,
            )
            return _train(learner, source, checkpoints, out, config, watch)


def described(result: Mapping[str, Any]) -> str:
    """A result for people."""
    reward = result["reward"]
    return "\n".join(
        [
            f"mean reward: {reward['first']:.4f} -> {reward['last']:.4f} (first and last tenth of the steps)",
            f"FLOPs: {result['flops']['marginal']:.4g}",
            f"{result['tokens_per_s']:.0f} completion tokens/s, {result['seconds']:.1f} s",
        ]
    )


def _train(
    learner: Learner,
    source: Groups,
    checkpoints: Checkpoints,
    out: Path,
    config: dict[str, Any],
    watch: Sequence[Watch],
) -> dict[str, Any]:
    ledger, steps, first = FlopLedger(), learner.training.steps, checkpoints.latest() or 0
    with (
        watching(watch, out, config, first_step=first) as sinks,
        Progress("grpo", steps, "steps") as progress,
        MetricsLog(out / "metrics.jsonl") as metrics,
    ):
        progress.add(first)

        def on_step(line: dict[str, Any]) -> None:
            shown = ("reward_mean", "no_signal_share", "student_entropy_nats", "mean_length")
            progress.show(**{name.removesuffix("_nats"): f"{line[name]:.3f}" for name in shown})
            progress.add()
            for sink in sinks:
                sink.write(line)

        trained = train_policy(
            learner=learner, source=source, ledger=ledger, metrics=metrics, checkpoints=checkpoints, on_step=on_step
        )
    rewards = [json.loads(line)["reward_mean"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    tenth = max(steps // 10, 1)
    result = {
        "reward": {"first": sum(rewards[:tenth]) / tenth, "last": sum(rewards[-tenth:]) / tenth},
        **trained.facts(),
        "flops": flops_of(ledger, build_flops=0, students=1),
    }
    write_json(out / "ledger.json", {"rows": ledger.to_json()})
    shutil.rmtree(out / "student", ignore_errors=True)  # a run killed between this and its result had saved it
    learner.policy.save(out / "student")
    write_json(out / "result.json", result)
    return result


def _load_policy(writing: Writing, training: PolicyTraining) -> Student:
    known = max(writing.tokenizer.get_vocab().values()) + 1
    policy = load_student(
        writing.model_dir,
        vocab_size=min(known, ModelShape.of(writing.model_dir).vocab),
        precision=training.precision,
        gradient_checkpointing=training.gradient_checkpointing,
    )
    if training.backend is not None:
        require_backend(policy, training.backend)
    return policy


@contextmanager
def _writer(policy: Student, writing: Writing) -> Iterator[Generator]:
    """Who writes the answers of a step, always with the policy's present weights."""
    if writing.generator == "transformers":
        yield student_generator(policy, stop_ids=writing.stop_ids)
        return
    sampling, longest = writing.sampling, max(len(prompt.token_ids) for prompt in writing.prompts)
    engine = load_rollout_engine(
        policy,
        writing.model_dir,
        sequences=writing.problems_at_once * sampling.samples_per_problem,
        tokens=longest + sampling.max_new_tokens,
    )
    with closing(engine):
        yield VLLMRollouts(student=policy, engine=replace(engine, stop_ids=writing.stop_ids))


def _frozen(policy: Student) -> Student:
    """The policy as it is now, which nothing changes any more."""
    return replace(policy, model=copy.deepcopy(policy.model).requires_grad_(False), gradient_checkpointing=False)


def _read_result(out: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((out / "result.json").read_text())
    return result
