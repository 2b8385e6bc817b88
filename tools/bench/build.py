"""What keeping costs: a build against the teacher's own forward passes alone.

    python -m tools.bench.build [--quick] [--json PATH] [--data DIR]

Both generate the same completions of real DeepScaleR problems with the embedded teacher and run it over them once more
with logits of every completion token; the build besides selects, encodes, checksums, writes and measures fidelity.
Rounds alternate; the median ratio is what counts. The first unit, on which codecs are calibrated once per cache, is
reported apart and in neither.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from statistics import median

import torch

from logitcache import flops
from logitcache.build import Build, Unit, cut_into_units
from logitcache.codecs import parse_targets
from logitcache.embedded import embedded_teacher_dir
from logitcache.problems import load_problems
from logitcache.prompts import PromptStyle, render_prompts
from logitcache.records import HiddenStateTargets
from logitcache.scorers.hf import HFEngine, load_engine, load_tokenizer
from logitcache.scoring import HiddenStateRequest, Sampling
from logitcache.store import create
from tools.bench.result import at_most, keep, options

TARGETS = "topk,hidden"


def main() -> None:
    """Measure and keep."""
    chosen = options("build", __doc__)
    units, window, rounds = (2, 16, 1) if chosen.quick else (4, 64, 3)
    model_dir = embedded_teacher_dir()
    problems = load_problems(str(chosen.data / "deepscaler.parquet"), limit=16 * units)
    cut = cut_into_units(render_prompts(load_tokenizer(model_dir), problems, PromptStyle()), 16)
    engine, sampling = load_engine(model_dir), Sampling(max_new_tokens=window)
    shape = flops.ModelShape.from_config(json.loads((model_dir / "config.json").read_text()))
    forward_s, build_s, calibrate_s = [], [], []
    for _ in range(rounds):
        forward_s.append(_timed(lambda: _forward(engine, cut[1:], sampling)))
        with tempfile.TemporaryDirectory() as place:
            store = create(f"{place}/cache", {"tokenizer": {"fingerprint": engine.tokenizer_fingerprint}})
            specs = parse_targets(TARGETS)
            job = Build(engine=engine, shape=shape, store=store, units=cut, specs=specs, sampling=sampling)
            calibrate_s.append(_timed(lambda: job.run(cut[:1])))  # noqa: B023 (called at once)
            build_s.append(_timed(lambda: job.run(cut[1:])))  # noqa: B023 (called at once)
    ratio = median(b / f for b, f in zip(build_s, forward_s, strict=True))
    keep(
        chosen,
        config={"teacher": model_dir.name, "dtype": "bfloat16", "targets": TARGETS, "problems": len(problems),
                "window_tokens": window, "rounds": rounds},
        figures={"forward_s": forward_s, "build_s": build_s, "first_unit_s": calibrate_s, "build_over_forward": ratio},
        goals=[at_most("build over the teacher's own forward passes", 1.08, ratio, "times")],
    )  # fmt: skip


def _forward(engine: HFEngine, units: list[Unit], sampling: Sampling) -> None:
    """Generate, and score with logits that nobody looks at."""
    for unit in units:
        sequences = engine.generate(unit.prompts, sampling)
        for (targets,) in engine.score(sequences, [HiddenStateRequest()]):
            assert isinstance(targets, HiddenStateTargets)
            hidden_CD = torch.from_numpy(targets.hidden).view(torch.bfloat16)
            for start in range(0, len(hidden_CD), engine.tile_rows):
                engine.torch_head.logits(hidden_CD[start : start + engine.tile_rows])


def _timed(work: Callable[[], None]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
