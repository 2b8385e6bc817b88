"""A model on a problem set: what it writes, whether that is right, and what its distributions are like.

Guarantees: every completion is kept; killed anywhere, the same command goes on after the last whole chunk and keeps the
same lines; another configuration in the same place, and another process at work there, are refused; several workers
need nothing but a directory in common, and the one that ends last sums up. Besides, distance from a teacher: on the
model's own text, given the teacher, and on held-out text (`trainer.evaluate`), given a cache.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from logitcache.console import note, parse_worker
from logitcache.errors import UserError, require
from logitcache.flops import ModelShape
from logitcache.identity import model_display_name, resolve_model, weights_fingerprint
from logitcache.problems import Problem
from logitcache.prompts import PromptStyle
from logitcache.scorers.choose import EngineName, Served
from logitcache.scoring import DTYPES, Sampling
from trainer.answers import AnswerChecker
from trainer.benchmarks import benchmark_digest, load_benchmark
from trainer.provenance import commit, device_name, versions
from trainer.recipes.held_out import HeldOutText
from trainer.recipes.reader import find_reader
from trainer.recipes.samples import figures, flops_of_lines, only_writer, read_lines
from trainer.recipes.writing import Writing, require_causal
from trainer.runs import CONFIG, PROVENANCE, new_run_dir, open_run, write_json
from trainer.scores import require_ks

RESULT = "result.json"
_LOOKS_EVERY_S = 0.5


@dataclass(frozen=True, kw_only=True)
class Share:
    """What one worker of several does: every `workers`-th problem from number `worker` on; 0 is the first.

    Attributes:
        together: all workers were started at once, and end all if one fails: the first waits for the others, and
            answers for all.
    """

    worker: int = 0
    workers: int = 1
    together: bool = False

    @property
    def answers(self) -> bool:
        """Whether this worker gives an answer."""
        return not self.together or self.worker == 0

    def __str__(self) -> str:
        return f"{self.worker + 1}/{self.workers}"

    @classmethod
    def parse(cls, text: str) -> Share:
        """See `parse_worker`."""
        worker, workers = parse_worker(text)
        return cls(worker=worker, workers=workers)

    @classmethod
    def of_torchrun(cls) -> Share:
        """What torchrun started this process for, on a GPU of its own if there are any; without torchrun the whole."""
        if not dist.is_torchelastic_launched():
            return cls()
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        return cls(worker=int(os.environ["RANK"]), workers=int(os.environ["WORLD_SIZE"]), together=True)

    def directory(self, out: Path) -> Path:
        """Where it is kept; of one worker that is the evaluation's own place."""
        return out if self.workers == 1 else out / f"worker-{self.worker + 1}-of-{self.workers}"

    def places(self, out: Path) -> list[Path]:
        """Where all workers keep theirs, in order."""
        return [replace(self, worker=worker).directory(out) for worker in range(self.workers)]


WHOLE = Share()


def run_evaluate(
    *,
    model: str,
    problems: str,
    out: Path,
    sampling: Sampling,
    style: PromptStyle,
    ks: Sequence[int] = (),
    generator: EngineName = "transformers",
    scorer: EngineName | None = None,
    dtype: str = "bfloat16",
    stop_tokens: Sequence[str] = (),
    limit: int | None = None,
    share: Share = WHOLE,
    chunk: int = 64,
    answer_limit_s: int = 5,
    teacher: str | None = None,
    held_out: HeldOutText | None = None,
) -> dict[str, Any]:
    """Evaluate a model and write `config.json`, `samples.jsonl` and `result.json`.

    Args:
        model: `embedded`, a directory or a hub id of a causal language model.
        problems: see `load_benchmark`.
        out: a new directory, or that of the same evaluation, which goes on.
        sampling: how completions are drawn, and how many of each problem; temperature 0 is greedy, and takes one.
        style: how a problem is put to the model.
        ks: of Pass@k and maj@k; by default the powers of two up to the samples of a problem.
        generator: the engine that writes.
        scorer: the engine that says what the model's distributions were; by default the one that writes.
        dtype: what both compute in, bfloat16 or float32.
        stop_tokens: that end a completion besides the model's own, such as its teacher's.
        limit: of the problems, the first so many.
        share: of the problems, for one worker of several. With several, each has a directory under `out`.
        chunk: completions that are written, measured, checked and kept at a time.
        answer_limit_s: processor seconds that checking one answer may take.
        teacher: a model with the same tokenizer, or a served one, `grpc://HOST:PORT#NAME`, that reads every completion
            and is compared with the model there.
        held_out: text of a cache to measure the model on besides; the first worker does.

    Returns:
        The figures of the whole set, or, while other workers are not done, of this share; `worker` says which.

    Raises:
        UserError: see the functions called; nothing is written before the inputs are sound, and what was kept stays.
    """
    samples = sampling.samples_per_problem
    ks = tuple(ks) or tuple(2**power for power in range(samples.bit_length()))
    require_ks(ks, samples)
    require(dtype in DTYPES, f"a dtype, {' or '.join(DTYPES)}", dtype)
    require(chunk >= 1, "--chunk, at least 1", chunk)
    require(answer_limit_s >= 1, "--answer-limit-s, at least 1", answer_limit_s)
    if sampling.temperature == 0 and samples > 1:
        raise UserError(f"{samples} greedy samples", "all would be the same", "ask for 1, or a temperature above 0")
    if isinstance(scorer or generator, Served):
        found = "a server gives no full distribution to take entropies from"
        raise UserError("a server as scorer", found, "say --scorer transformers or vllm")
    wanted = load_benchmark(problems, limit=limit)
    if len(wanted) < share.workers:
        raise UserError(f"{share.workers} workers", f"there are {len(wanted)} problems", "start fewer")
    model_dir = resolve_model(model)
    require_causal(model_dir)
    text = None if held_out is None else held_out.open(model_dir, dtype)
    writing = Writing(
        model_dir=model_dir,
        problems=wanted[share.worker :: share.workers],
        sampling=sampling,
        style=style,
        generator=generator,
        scorer=scorer or generator,
        dtype=dtype,
        stop_tokens=stop_tokens,
        problems_at_once=max(1, chunk // samples),
        teacher=None if teacher is None else find_reader(teacher, model_dir, dtype),
    )
    directory = share.directory(out)
    with AnswerChecker(limit_s=answer_limit_s) as checker:
        checker.require_checkable(writing.problems)
        config = {
            "command": "evaluate",
            "worker": str(share),
            "model": {"name": model_display_name(model), "fingerprint": weights_fingerprint(model_dir)},
            "problems": {"name": Path(problems).name, "count": len(wanted), "digest": benchmark_digest(wanted)},
            **writing.identity,
            **({} if writing.teacher is None else {"teacher": writing.teacher.identity}),
            "answers": {"math-verify": version("math-verify"), "limit_s": answer_limit_s},
            "ks": list(ks),
            "held_out": None if text is None else text.identity,
            "versions": versions(),
            "device": device_name(),
            "commit": commit(),
        }
        if share.workers > 1:
            new_run_dir(out, may_hold=[*map(str, share.places(out)), str(out / RESULT)])
        open_run(directory, config)
        with only_writer(directory):
            if (directory / RESULT).exists():
                note(f"{directory} is done already")
            else:
                writing.run(directory, checker)
                on_text = text.measure() if text is not None and share.worker == 0 else None
                lines = read_lines(directory, writing.problems, samples)
                teacher_shape = None if writing.teacher is None else writing.teacher.shape
                flops = flops_of_lines(
                    lines, ModelShape.of(model_dir), stop_tokens=len(writing.stop_ids), teacher=teacher_shape
                )
                result = {"worker": str(share), **figures(lines, samples, ks), "flops": flops, "held_out": on_text}
                write_json(directory / RESULT, result)
    return _summed_up(out, share, wanted, samples, ks)


def _summed_up(out: Path, share: Share, problems: Sequence[Problem], samples: int, ks: Sequence[int]) -> dict[str, Any]:
    """The figures of all shares if they are all there, in the order of the problems."""
    own = share.directory(out)
    places = share.places(out)
    missing = _not_done(places)
    while missing and share.together and share.answers:
        time.sleep(_LOOKS_EVERY_S)
        missing = _not_done(places)
    if share.workers == 1 or missing:
        if missing:
            note(f"worker {share} is done; {missing} of {share.workers} are not")
        return _read(own / RESULT)
    configs = [_read(place / CONFIG) for place in places]
    for place, config in zip(places, configs, strict=True):
        if any(config.get(name) != value for name, value in configs[0].items() if name not in (*PROVENANCE, "worker")):
            raise UserError(f"sum up {out}", f"{place.name} has another configuration", "do that share again elsewhere")
    shares = [read_lines(place, problems[worker :: share.workers], samples) for worker, place in enumerate(places)]
    lines = []
    for number in range(len(problems)):
        first = number // share.workers * samples
        lines += shares[number % share.workers][first : first + samples]
    found = [_read(place / RESULT) for place in places]
    flops = {name: sum(one["flops"][name] for one in found) for name in found[0]["flops"]}
    result = {"worker": f"all {share.workers}", **figures(lines, samples, ks), "flops": flops}
    result["held_out"] = found[0]["held_out"]
    write_json(own / "all.json", result)  # in a place of this worker's own: two may end at the same moment
    (own / "all.json").replace(out / RESULT)
    return result


def _not_done(places: Sequence[Path]) -> int:
    return sum(not (place / RESULT).exists() for place in places)


def _read(file: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(file.read_text())
    return value
