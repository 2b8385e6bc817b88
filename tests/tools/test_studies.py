"""The world of the laptop-scale study, its claims, and a small study that is killed and goes on."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from logitcache.errors import UserError
from logitcache.identity import weights_fingerprint
from tools.studies.claims import CLAIMS, Results, verdict
from tools.studies.grid import Clock, best_cell
from tools.studies.report import DOCS, RESULTS, STUDIES, gate_text, markdown, read_results
from tools.studies.study import SIZES, Rewarded, Run, Window, named, stages
from tools.studies.teacher import MODELS
from tools.studies.world import (
    LARGEST,
    LONGEST,
    Level,
    draw_sum,
    draw_sums,
    held_out_sums,
    make_tokenizer,
    training_sums,
)
from trainer.curves import Estimate
from trainer.settings import Prefix

STEP = re.compile(r"(\d+)([+-]\d+)=(\d+);")


@pytest.mark.parametrize("level", Level)
def test_every_step_of_a_working_is_right_and_leads_to_the_answer(level: Level) -> None:
    rng, terse, split, longest = np.random.default_rng(0), 0, 0, 0
    tokenizer = make_tokenizer()
    for _ in range(500):
        one = draw_sum(rng, level)
        working = one.working(rng)
        steps = [tuple(map(int, step)) for step in STEP.findall(working)]
        assert all(before + change == after and 0 <= after <= LARGEST for before, change, after in steps)
        assert steps[0][0] == one.terms[0]
        assert [before for before, _, _ in steps[1:]] == [after for _, _, after in steps[:-1]]
        assert working.endswith(f";\\boxed{{{one.answer}}}")
        assert eval(one.text.removesuffix("=?")) == one.answer == steps[-1][2]
        terse += sum(change in one.terms[1:] and abs(change) % 10 > 0 for _, change, _ in steps)
        split += len(steps) > level.terms - 1
        longest = max(longest, len(tokenizer(working)["input_ids"]) + 1)
    assert terse > 200
    assert split > 200
    assert longest <= LONGEST


def test_problems_follow_from_the_seed_and_nothing_is_taught_on_those_held_out() -> None:
    held_out = held_out_sums(Level.HARD)
    assert held_out == held_out_sums(Level.HARD)
    assert len(set(held_out)) == len(held_out)
    assert set(draw_sums(1, Level.HARD, 300)) > set(held_out)
    assert not set(draw_sums(1, Level.HARD, 300, besides=held_out)) & set(held_out)
    assert not set(training_sums(300)) & set(held_out)


def test_the_tokenizer_survives_its_file_and_knows_nothing_else(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    make_tokenizer().save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    text = "19+24-25=?\n19+24=43;43-25=18;\\boxed{18}<end>"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert ids[-1] == tokenizer.eos_token_id
    assert len(ids) == len(text) - len("\\boxed{") + 1 - len("<end>") + 1
    with pytest.raises(Exception, match="UNK"):
        tokenizer("What is 2+2?")


def test_the_kept_models_have_the_worlds_tokenizer() -> None:
    from logitcache.scorers.hf import load_tokenizer

    for name in ("teacher", "student"):
        assert load_tokenizer(MODELS / name).get_vocab() == make_tokenizer().get_vocab()
    assert sum(file.stat().st_size for file in MODELS.rglob("*")) < 8e6


def test_a_run_that_is_none_is_refused() -> None:
    with pytest.raises(UserError, match="run nonsense of the quick study: there is none"):
        named("nonsense", "quick")
    with pytest.raises(UserError, match="a study of size huge"):
        named("nonsense", "huge")


def test_a_run_has_one_name_and_comes_after_what_it_needs() -> None:
    distilled, rewarded = stages(SIZES["full"])
    names = [run.name for run in (*distilled, *rewarded)]
    assert len(set(names)) == len(names) == 24 + 9 + 3 + 12
    assert {run.start for run in rewarded} <= set(distilled)


def test_verdicts_follow_from_the_interval_alone() -> None:
    assert verdict(Estimate(mean=1.0, low=0.1, high=1.9)) == "agrees"
    assert verdict(Estimate(mean=-1.0, low=-1.9, high=-0.1)) == "does not"
    assert verdict(Estimate(mean=1.0, low=-0.1, high=2.1)) == "cannot tell"
    assert verdict(Estimate.of([5.0])) == "cannot tell"


def paper_like(sign: int) -> Results:
    """A world in which every claim holds by a hair that differs a little between seeds, or, with -1, fails so."""

    def figures(avg: float, entropy: float, length: float) -> dict[str, dict[str, float]]:
        one = {"avg_at_8": avg, "pass_at_8": avg, "entropy_nats": entropy, "length_tokens": length}
        return {str(level): {**one, "truncated_share": 0.0} for level in Level}

    def result(run: Run) -> dict[str, Any]:
        start = run.start if isinstance(run, Rewarded) else run
        reverse, own, long = 1 - start.forward_weight, start.prefix is Prefix.STUDENT, start.window is not Window.SHORT
        gated = start.window is Window.CURRICULUM
        avg = 0.5 + sign * (0.04 * reverse + 0.03 * own + 0.02 * long + 0.05 * gated) + 0.001 * start.seed
        if isinstance(run, Rewarded):
            avg += sign * 0.1 * start.forward_weight * (1 + 0.01 * start.seed)
        kept = start.forward_weight if sign < 0 else start.forward_weight**0.5
        entropy = (0.3 * kept + 0.01) if sign > 0 else (0.4 - 0.3 * kept**3)
        flops = 200.0 if own else 100.0
        halfway = figures(avg - sign * 0.02, entropy, 40.0)
        end = figures(avg, entropy + 1e-4 * start.seed, 40.0 - sign * (10 + start.seed) * gated)
        return {"points": [{"step": 1, "flops": flops / 2, **halfway}, {"step": 2, "flops": flops, **end}]}

    size = SIZES["full"]
    runs = {run.name: result(run) for stage in stages(size) for run in stage}
    start = {"student": figures(0.2, 0.5, 40.0), "teacher": figures(0.9, 0.5, 40.0)}
    return Results(size=size, start=start, runs=runs)


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.words)
def test_a_claim_holds_where_the_paper_is_right_and_not_where_it_is_not(claim: Any) -> None:
    assert verdict(claim.estimate(paper_like(1))) == "agrees"
    assert verdict(claim.estimate(paper_like(-1))) == "does not"


def test_what_is_lost_at_equal_flops_is_read_off_the_curve() -> None:
    (claim,) = [claim for claim in CLAIMS if "equal FLOPs" in claim.words]
    # The cached cells cost 100 FLOPs in all, at which the others were half way: 2 points below their end.
    assert claim.estimate(paper_like(1)).mean == pytest.approx(2.0)


def with_checks(*checks: list[tuple[int, float, str]]) -> Results:
    """A study whose curricula, one for each seed, were checked so: window, entropy, decision, 20 steps apart."""
    results = paper_like(1)
    runs = dict(results.runs)
    for seed, of_seed in enumerate(checks):
        name = f"student-0-curriculum-{seed}"
        made = [
            {"step": 20 * number, "window": window, "own_entropy_nats": entropy, "decision": decision}
            for number, (window, entropy, decision) in enumerate(of_seed)
        ]
        runs[name] = {**runs[name], "checks": made}
    return replace(results, runs=runs)


def test_what_the_gate_did_is_said_from_the_checks() -> None:
    ramp = [(16, 0.22, "start"), (32, 0.15, "raise"), (64, 0.12, "raise"), (96, 0.08, "top")]
    said = gate_text(with_checks(ramp, ramp, ramp))
    assert said.startswith(
        "It was never met: the lowest entropy at a check was 0.080 nats. These rows are of a ramp of 40 "
    )
    closed = [*ramp[:2], (32, 0.1, "freeze"), (32, 0.13, "freeze")]
    said = gate_text(with_checks(ramp, closed, ramp))
    assert said == "It held the window at 32 tokens from step 40 on (seed 1)."


def test_the_best_cell_is_chosen_on_one_half_and_judged_on_the_other() -> None:
    results = paper_like(1)

    def end(even: float, odd: float) -> dict[str, Any]:
        halves = {"avg_at_8_even": even, "avg_at_8_odd": odd}
        return {"points": [{str(level): halves for level in Level}]}

    runs = {name: end(0.5, 0.9) for name in results.runs}
    for seed in results.size.seeds:
        runs[f"teacher-0-long-{seed}"] = end(0.7, 0.6)
    start = {"student": {str(level): {"avg_at_8_even": 0.3, "avg_at_8_odd": 0.2} for level in Level}}
    goal = best_cell(results.size, start, runs)
    assert "(teacher-0-long," in goal["what"]
    assert (goal["measured"], goal["holds"]) == (pytest.approx(0.4), True)


def test_time_goes_on_where_an_earlier_invocation_stopped(tmp_path: Path) -> None:
    file = tmp_path / "elapsed.json"
    file.write_text('{"elapsed_s": 100.0}')
    kept = Clock(file).keep()
    assert 100 < kept < 110
    assert json.loads(file.read_text()) == {"elapsed_s": kept}
    assert Clock(file).keep() > kept


def test_the_kept_results_are_of_the_kept_models() -> None:
    for study in STUDIES:
        config = json.loads((RESULTS / f"{study}.json").read_text())["config"]
        assert config["models"] == {name: weights_fingerprint(MODELS / name) for name in ("teacher", "student")}


def test_the_document_is_rendered_from_the_kept_results() -> None:
    kept = all((RESULTS / f"{name}.json").exists() for name in ("cells", "mixes", "curriculum", "grpo"))
    assert (DOCS / "results.md").exists() == kept
    if kept:
        assert (DOCS / "results.md").read_text() == markdown(*read_results(RESULTS))


def study(out: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "tools.studies.grid", "--out", str(out), "--quick"]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)


@pytest.mark.slow
def test_a_killed_study_goes_on_and_its_best_cell_gains(tmp_path: Path) -> None:
    out = tmp_path / "study"
    process = study(out)
    while process.poll() is None and not list(out.glob("runs/*.json")):
        time.sleep(0.5)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    done = {file: file.stat().st_mtime_ns for file in out.glob("runs/*.json")}
    assert done
    assert study(out).wait() == 0
    assert {file: file.stat().st_mtime_ns for file in done} == done
    kept = json.loads((out / "results" / "cells.json").read_text())
    gained, minutes = (goal["measured"] for goal in kept["goals"])
    assert gained > 0
    spent = sum(sum(run["seconds"].values()) for run in kept["figures"]["runs"].values())
    assert spent / 2 < kept["figures"]["elapsed_s"] == pytest.approx(60 * minutes)
    assert "| reverse KL raises accuracy |" in (out / "results.md").read_text()
    assert (out / "results_grpo.png").stat().st_size > 10_000

    again, name = tmp_path / "again", "student-0-long-0"
    again.mkdir()
    shutil.copytree(out / "cache", again / "cache")
    command = ["-m", "tools.studies.run", "--out", str(again), "--name", name, "--size", "quick"]
    subprocess.run([sys.executable, *command], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    twice = json.loads((again / "runs" / f"{name}.json").read_text()), kept["figures"]["runs"][name]
    assert [set(run.pop("seconds")) for run in twice] == [{"training", "measuring"}] * 2
    assert twice[0] == twice[1]
