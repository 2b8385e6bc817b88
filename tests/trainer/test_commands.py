"""The commands end to end, on a tiny teacher and a real cache: what they write, what they need, what they refuse."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from logitcache import open_cache
from logitcache.jobs import BuildRequest, build_cache
from logitcache.prompts import PromptStyle
from logitcache.scoring import Sampling
from trainer.flops import FlopLedger, Phase
from trainer.split import is_held_out

SIZE = ["--steps", "6", "--sequences", "4", "--window", "12", "--learning-rate", "1e-3", "--precision", "float32"]
SIZE += ["--held-out-share", "0.4"]


def trainer(*arguments: str | Path, before: str = "") -> subprocess.CompletedProcess[str]:
    """Run the command line; `before` is Python that runs first in the same process."""
    code = f"{before}\nfrom trainer.cli import main\nmain()"
    command = [sys.executable, "-c", code, *map(str, arguments)]
    # Without the tests' own setting: a command must not need to be told that there is no network.
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=environment)


def built(place: Path, teacher: Path, targets: str) -> Path:
    """A sealed cache of 16 sums in a folder of its own."""
    problems = place / "problems.jsonl"
    problems.write_text(
        "".join(json.dumps({"id": f"p{n}", "problem": f"What is {n} + {n}?"}) + "\n" for n in range(16))
    )
    request = BuildRequest(
        problems=str(problems), out=str(place / "cache"), teacher=str(teacher), targets=targets, dtype="float32"
    )
    build_cache(request, sampling=Sampling(max_new_tokens=12, top_p=1.0), style=PromptStyle(instruction=""))
    return place / "cache"


@pytest.fixture(scope="module")
def cache(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built(tmp_path_factory.mktemp("cache"), tiny_dir, "hidden")


@pytest.fixture(scope="module")
def start(cache: Path, tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("start") / "student"
    done = trainer("prune", tiny_dir, "--cache", cache, "--layers", "1", "--out", out, "--json")
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["layers"]) == 1
    return out


def test_a_pruned_student_is_its_teacher_less_some_layers(start: Path, tiny_dir: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    student, teacher = (AutoModelForCausalLM.from_pretrained(place) for place in (start, tiny_dir))
    mine, theirs = student.state_dict(), teacher.state_dict()
    assert len(student.model.layers) == 1
    kept = [
        layer
        for layer in range(2)
        if torch.equal(mine["model.layers.0.mlp.up_proj.weight"], theirs[f"model.layers.{layer}.mlp.up_proj.weight"])
    ]
    assert len(kept) == 1
    assert all(
        torch.equal(value, theirs[name.replace("layers.0.", f"layers.{kept[0]}.")]) for name, value in mine.items()
    )
    assert AutoTokenizer.from_pretrained(start).get_vocab() == AutoTokenizer.from_pretrained(tiny_dir).get_vocab()


NO_TEACHER = """
import sys

class NoTeacher:
    def find_spec(self, name, path=None, target=None):
        if name.startswith("logitcache.scorers"):
            raise AssertionError(f"{name} was imported")

sys.meta_path.insert(0, NoTeacher())
opened = []
sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event == "open" else None)

import atexit
def report():
    weights = sorted({name for name in opened if name.endswith(".safetensors")})
    print("weights opened:", weights, file=sys.stderr)
atexit.register(report)
import socket
def refuse(*_):
    raise AssertionError("the network was touched")
socket.socket.connect = refuse
"""


def test_training_from_the_cache_needs_no_teacher(cache: Path, start: Path, tmp_path: Path) -> None:
    """No engine can be imported, no network reached, and no weights but the student's are opened."""
    own = shutil.copytree(start, tmp_path / "start")
    out = tmp_path / "run"
    done = trainer("distill", cache, "--student", own, "--out", out, *SIZE, "--json", before=NO_TEACHER)
    assert done.returncode == 0, done.stderr
    opened = done.stderr.split("weights opened: ")[1]
    assert all(str(tmp_path) in name for name in opened.strip().strip("[]").split(", ") if name), opened
    result = json.loads(done.stdout)
    assert result["teacher_engine_imported"] is False
    (progress,) = [line for line in done.stderr.splitlines() if line.startswith("distill: 100%")]
    shown = ("loss", "forward_kl", "reverse_kl", "student_entropy", "length", "tokens_per_s", "flops")
    assert [name for name in shown if f", {name} " not in progress] == []
    last = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])
    assert f"length {last['completion_tokens'] / last['sequences']:.0f}, " in progress
    assert f"flops {last['flops']:.3g}]" in progress
    assert result["held_out"]["forward_kl_nats"]["after"] < result["held_out"]["forward_kl_nats"]["before"]
    assert (
        json.loads((out / "config.json").read_text())["cache_manifest"]
        == open_cache(str(cache), targets=None).manifest.digest
    )
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 6

    from transformers import AutoModelForCausalLM, AutoTokenizer

    AutoModelForCausalLM.from_pretrained(out / "student")
    AutoTokenizer.from_pretrained(out / "student")


@pytest.fixture(scope="module")
def grid(cache: Path, start: Path, tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, str]:
    out = tmp_path_factory.mktemp("grid") / "demo"
    shutil.copytree(start, out / "student")
    options = [
        "--teacher",
        tiny_dir,
        "--out",
        out,
        "--students",
        "5",
        "--top-p",
        "1.0",
        *SIZE,
        "--mixes",
        "1",
        "0.5",
        "0",
    ]
    done = trainer("grid", cache, "--student", out / "student", *options, "--json")
    assert done.returncode == 0, done.stderr
    return out, json.loads(done.stdout), done.stderr


def test_the_grid_reports_a_cell_for_each_prefix_and_mix(grid: tuple[Path, Any, str], cache: Path) -> None:
    out, report, _ = grid
    assert json.loads((out / "report.json").read_text()) == report
    assert {"run_s", "device", "commit", "cells"} <= report.keys()
    cells = {(cell["prefix"], cell["divergence"]): cell for cell in report["cells"]}
    assert cells.keys() == {(p, d) for p in ("teacher", "student") for d in ("forward", "mixed-0.5", "reverse")}
    build = sum(open_cache(str(cache), targets=None).manifest.flops.values())
    for (prefix, divergence), cell in cells.items():
        held_out, flops = cell["held_out"], cell["flops"]
        assert held_out.keys() >= {"forward_kl_nats", "reverse_kl_nats", "student_entropy_nats"}
        assert all(change.keys() == {"before", "after"} for change in held_out.values())
        assert cell["forward_weight"] == {"forward": 1, "mixed-0.5": 0.5, "reverse": 0}[divergence]
        weights = {"forward": cell["forward_weight"], "reverse": 1 - cell["forward_weight"]}
        trained = [held_out[f"{name}_kl_nats"] for name, weight in weights.items() if weight]
        assert sum(change["after"] for change in trained) < sum(change["before"] for change in trained)
        assert cell["tokens_per_s"] > 0 < cell["seconds"]
        live = [flops["by_phase"][phase] for phase in (Phase.STUDENT_ROLLOUT, Phase.TEACHER_PREFILL)]
        assert all(live) if prefix == "student" else not any(live)
        assert cell["teacher_engine_imported"] is (prefix == "student")
        share = -(-build // 5) if prefix == "teacher" else 0
        assert flops["amortised"] == flops["marginal"] + share
        ledger = FlopLedger.from_json(
            json.loads((out / "cells" / f"{prefix}-{divergence}" / "ledger.json").read_text())["rows"]
        )
        assert ledger.marginal() == flops["marginal"]
    start = {
        json.dumps({name: change["before"] for name, change in cell["held_out"].items()}) for cell in cells.values()
    }
    assert len(start) == 1


def test_the_report_can_be_read(grid: tuple[Path, Any, str]) -> None:
    out, report, said = grid
    text = (out / "report.md").read_text()
    for cell in report["cells"]:
        value = cell["held_out"]["reverse_kl_nats"]
        assert f"{value['before']:.3f} -> {value['after']:.3f}" in text
    assert (out / "report.png").read_bytes().startswith(b"\x89PNG")
    assert "steps" in said


def test_held_out_problems_are_never_trained_on(grid: tuple[Path, Any, str], cache: Path) -> None:
    _, report, _ = grid
    problem_ids = open_cache(str(cache), targets=None).samples(["problem_id"])["problem_id"].to_pylist()
    held_out = [name for name in problem_ids if is_held_out(name, 0.4)]
    assert report["held_out"]["sequences"] == len(held_out) > 0


OWN_TEXT = ["--cross-entropy-share", "0.5", "--prefix", "student", "--teacher"]


def other_tokenizer(start: Path, tmp_path: Path) -> Path:
    from transformers import AutoTokenizer

    place = shutil.copytree(start, tmp_path / "other-tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(place)
    tokenizer.add_tokens(["<one more>"])
    tokenizer.save_pretrained(place)
    return place


@pytest.mark.parametrize(
    ("command", "found"),
    [
        (lambda c, s, t, tmp: ["distill", tmp / "nowhere", "--student", s], "nowhere"),
        (lambda c, s, t, tmp: ["distill", c, "--student", tmp / "no-student"], "no such directory, and no hub id"),
        (lambda c, s, t, tmp: ["distill", c, "--student", other_tokenizer(s, tmp)], "the teacher's tokenizer"),
        (lambda c, s, t, tmp: ["distill", c, "--student", s, "--prefix", "student"], "no teacher to score"),
        (lambda c, s, t, tmp: ["distill", c, "--student", s, "--prefix", "student", "--teacher", s], "was built by"),
        (lambda c, s, t, tmp: ["distill", c, "--student", s, "--forward-weight", "1.5"], "got 1.5"),
        (lambda c, s, t, tmp: ["distill", c, "--student", s, "--steps", "0"], "below 1"),
        (lambda c, s, t, tmp: ["distill", c, "--student", s, "--learning-rate", "0"], "--learning-rate, above 0"),
        (lambda c, s, t, tmp: ["distill", c, "--student", s, "--held-out-share", "0.0001"], "0 held out"),
        (lambda c, s, t, tmp: ["distill", c, "--student", s, "--checkpoint-every", "0"], "got 0"),
        (lambda c, s, t, tmp: ["distill", c, "--student", s, "--prefix", "mixed"], "no teacher to score"),
        (
            lambda c, s, t, tmp: [
                "distill",
                c,
                "--student",
                s,
                "--prefix",
                "mixed",
                "--teacher",
                t,
                "--student-share",
                "0.3",
            ],
            "of 8 sequences that is 2.4",
        ),
        (lambda c, s, t, tmp: ["distill", c, "--student", s, "--curriculum", "8", "4"], "ascending windows"),
        (lambda c, s, t, tmp: ["distill", c, "--student", s, "--curriculum", "8", "64"], "at most 12 tokens in the"),
        (lambda c, s, t, tmp: ["distill", c, "--student", s, "--window", "13"], "at most 12 tokens in the"),
        (lambda c, s, t, tmp: ["distill", c, "--student", s, "--cross-entropy-share", "2"], "got 2.0"),
        (lambda c, s, t, tmp: ["distill", c, "--student", s, *OWN_TEXT, t], "which teaches it nothing by itself"),
        (lambda c, s, t, tmp: ["distill", c, "--student", s, "--lora-rank", "0"], "--lora-rank, at least 1"),
        (lambda c, s, t, tmp: ["distill", c, "--student", s, "--curriculum", "8", "--entropy-floor", "x"], "no number"),
        (lambda c, s, t, tmp: ["report", tmp / "no-run"], "no metrics.jsonl"),
        (lambda c, s, t, tmp: ["report"], "name the --out"),
        (lambda c, s, t, tmp: ["grid", c, "--student", s, "--teacher", s], "was built by"),
        (lambda c, s, t, tmp: ["grid", c, "--student", s, "--teacher", t, "--mixes", "1", "2"], "got 2"),
        (lambda c, s, t, tmp: ["grid", c, "--student", s, "--teacher", tmp / "gone"], "gone"),
        (lambda c, s, t, tmp: ["prune", t, "--cache", c, "--layers", "3"], "the teacher has 2"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    command: Callable[..., list[Any]], found: str, cache: Path, start: Path, tiny_dir: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    done = trainer(*command(cache, start, tiny_dir, tmp_path), "--out", out)
    assert done.returncode != 0
    assert done.stdout == ""
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, done.stderr
    assert found in errors[0]
    assert "Traceback" not in done.stderr
    assert not out.exists()


def test_a_place_that_holds_something_else_is_left_alone(cache: Path, start: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    done = trainer("distill", cache, "--student", start, "--out", tmp_path, "--window", "12")
    assert done.returncode == 2
    assert "it holds thesis.txt already" in done.stderr
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.txt"]


def test_debug_shows_the_traceback(start: Path, tmp_path: Path) -> None:
    done = trainer("distill", tmp_path / "nowhere", "--student", start, "--out", tmp_path / "out", "--debug")
    assert done.returncode != 0
    assert "Traceback" in done.stderr


@pytest.mark.parametrize("command", ["distill", "grid", "evaluate", "prune", "report"])
def test_help_says_what_a_command_costs_and_gives_an_example(command: str) -> None:
    done = trainer(command, "--help")
    assert done.returncode == 0
    words = " ".join(done.stdout.split())
    assert "Costs" in words or "costs" in words
    assert f"Example: trainer {command}" in words


def test_the_command_line_starts_without_torch() -> None:
    code = "import trainer.cli, sys; assert not {'torch', 'transformers', 'matplotlib'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)


def of_steps(out: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in ("draw_s", "step_s")} for line in lines]


CURRICULUM = ["--curriculum", "4", "8", "12", "--entropy-floor", "10%", "--check-every", "3", "--schedule", "cosine"]
CURRICULUM += ["--forward-weight", "1.0:0.2@6"]


def test_a_curriculum_needs_no_teacher_and_is_watched_and_reported(cache: Path, start: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    options = ["--out", out, *SIZE, *CURRICULUM, "--weighting", "sequence", "--gradient-checkpointing"]
    done = trainer("distill", cache, "--student", start, *options, "--watch", "tensorboard")
    assert done.returncode == 0, done.stderr
    metrics = of_steps(out)
    assert [line["window"] for line in metrics] == [4, 4, 4, 8, 8, 8]
    assert [line["decision"] for line in metrics if "decision" in line] == ["start", "raise"]
    for line in (metrics[0], metrics[3]):
        assert 0 < line["own_entropy_nats"] < 11
        assert 0 <= line["own_eos_mass"] <= 1
        assert 0 <= line["own_truncated_share"] <= 1
    assert metrics[0]["own_mean_length"] <= 4  # a check judges the window before its decision
    assert metrics[0]["completion_tokens"] <= 16 < metrics[3]["completion_tokens"]
    assert metrics[5]["learning_rate"] < metrics[2]["learning_rate"]
    assert list((out / "tensorboard").iterdir())
    drawn = trainer("report", out, "--out", tmp_path / "compared", "--json")
    assert drawn.returncode == 0, drawn.stderr
    (row,) = json.loads(drawn.stdout)["runs"]
    assert (row["run"], row["window"]) == ("run", 8)
    assert (tmp_path / "compared.png").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("prefix", "more"), [("teacher", []), ("student", []), ("teacher", CURRICULUM), ("mixed", CURRICULUM)]
)
def test_killed_at_random_moments_a_run_ends_as_if_it_never_was(
    prefix: str, more: list[str], cache: Path, start: Path, tiny_dir: Path, tmp_path: Path
) -> None:
    options = ["--student", start, "--prefix", prefix, "--checkpoint-every", "1", *SIZE[2:], *more]
    if prefix != "teacher":
        options += ["--teacher", tiny_dir]
    command = ["distill", cache, *options, "--steps", "12"]
    assert trainer(*command, "--out", tmp_path / "whole").returncode == 0
    chance, out = random.Random(), tmp_path / "killed"
    code = [sys.executable, "-c", "from trainer.cli import main\nmain()", *map(str, command), "--out", str(out)]
    for steps in (2, 6):
        process = subprocess.Popen(code, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        metrics = out / "metrics.jsonl"
        while process.poll() is None and not (metrics.exists() and metrics.read_bytes().count(b"\n") >= steps):
            time.sleep(0.002)
        time.sleep(chance.uniform(0, 0.1))
        process.kill()
        assert process.wait() == -signal.SIGKILL
    done = trainer(*command, "--out", out)
    assert done.returncode == 0, done.stderr
    assert "going on after step " in done.stderr
    assert of_steps(out) == of_steps(tmp_path / "whole")
    if more:
        assert [line["window"] for line in of_steps(out)] == [4] * 3 + [8] * 3 + [12] * 6
    for name in ("ledger.json", "start.json", "student/model.safetensors"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_a_finished_run_is_not_run_again_and_another_one_is_refused(cache: Path, start: Path, tmp_path: Path) -> None:
    command = ["distill", cache, "--student", start, "--out", tmp_path / "run", *SIZE, "--json"]
    first, second = trainer(*command), trainer(*command)
    assert json.loads(first.stdout) == json.loads(second.stdout)
    assert "done already" in second.stderr
    flops = json.loads(first.stdout)["flops"]
    rows = json.loads((tmp_path / "run" / "ledger.json").read_text())["rows"]
    measured = [row["flops"] for row in rows if row["phase"] == Phase.EVALUATION]
    assert (rows[0]["step"], rows[0]["phase"]) == (None, Phase.EVALUATION)  # before the first step, and after the last
    assert sum(measured) == 2 * measured[0] == flops["by_phase"][Phase.EVALUATION]
    assert flops["total"] == flops["amortised"] + sum(measured)
    other = trainer(*command, "--seed", "1")
    assert other.returncode == 2
    assert "training.seed: 0 there, 1 asked" in other.stderr


@pytest.fixture(scope="module")
def tiers(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache without exact targets."""
    return built(tmp_path_factory.mktemp("tiers"), tiny_dir, "topk:k=32,sampled:n=64")


@pytest.mark.parametrize(("tier", "ending"), [("topk", "_coarse"), ("sampled", "_sampled")])
def test_what_is_not_exact_is_named_so(tier: str, ending: str, tiers: Path, start: Path, tmp_path: Path) -> None:
    chosen = [] if tier == "topk" else ["--targets", tier]
    done = trainer("distill", tiers, "--student", start, "--out", tmp_path / "run", *chosen, *SIZE, "--json")
    assert done.returncode == 0, done.stderr
    assert f"targets: tier {tier} ({tier})" in done.stderr
    held_out = json.loads(done.stdout)["held_out"]
    assert {f"forward_kl_nats{ending}", "student_entropy_nats"} < held_out.keys()
    assert not {"forward_kl_nats", "reverse_kl_nats"} & (held_out.keys() | of_steps(tmp_path / "run")[0].keys())
    trained = held_out[f"forward_kl_nats{ending}"]
    assert trained["after"] < trained["before"]
    assert (held_out[f"reverse_kl_nats{ending}"]["after"] is None) is (tier == "sampled")


@pytest.mark.parametrize(
    ("options", "found"),
    [
        (["--targets", "sampled", "--forward-weight", "0"], "a sampled tier, which says nothing of it"),
        (["--targets", "sampled", "--forward-weight", "1:0.5@10"], "a sampled tier, which says nothing of it"),
        (["--targets", "topk", "--kl-temperature", "2"], "kept at temperature 1"),
        (["--targets", "hidden"], "name one of its tiers"),
    ],
)
def test_what_a_tier_cannot_serve_is_refused(
    options: list[str], found: str, tiers: Path, start: Path, tmp_path: Path
) -> None:
    done = trainer("distill", tiers, "--student", start, "--out", tmp_path / "out", "--window", "12", *options)
    assert done.returncode == 2
    assert found in done.stderr
    assert not (tmp_path / "out").exists()
