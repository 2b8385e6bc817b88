"""The build as a user runs it: real processes, a real teacher of a tiny size, really killed."""

from __future__ import annotations

import json
import math
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from logitcache import open_cache
from logitcache.errors import UserError
from logitcache.jobs import BuildRequest, build_cache
from logitcache.prompts import PromptStyle
from logitcache.records import HiddenStateTargets, TopKTargets
from logitcache.scoring import Sampling

PROBLEMS = [{"id": f"p{n:02d}", "problem": f"What is {n} plus {n * n}?", "answer": str(n + n * n)} for n in range(10)]


def command(tiny_dir: Path, out: Path, problems: Path, *more: str) -> list[str]:
    options = ["--dtype", "float32", "--max-new-tokens", "16", "--problems-per-unit", "3", "--seed", "5"]
    run = [sys.executable, "-m", "logitcache.cli", "build", "--teacher", str(tiny_dir)]
    return [*run, "--problems", str(problems), "--out", str(out), "--targets", "topk:k=32,hidden", *options, *more]


def finish(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(arguments, capture_output=True, text=True, timeout=300, check=False)


def build_here(
    teacher: Path,
    out: Path,
    problems: Path,
    *,
    targets: str = "topk:k=32,hidden",
    temperature: float = 1.0,
    worker: int = 0,
    workers: int = 1,
) -> None:
    """What `command` runs, in this process."""
    places = {"problems": str(problems), "out": str(out), "teacher": str(teacher)}
    request = BuildRequest(**places, targets=targets, dtype="float32", problems_per_unit=3)
    sampling = Sampling(max_new_tokens=16, seed=5, temperature=temperature)
    build_cache(request, sampling=sampling, style=PromptStyle(), worker=worker, workers=workers)


def content(cache: Path) -> dict[str, bytes]:
    return {str(file.relative_to(cache)): file.read_bytes() for file in sorted(cache.rglob("*")) if file.is_file()}


@pytest.fixture(scope="module")
def problems(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("problems") / "set.jsonl"
    file.write_text("".join(json.dumps(problem) + "\n" for problem in PROBLEMS))
    return file


@pytest.fixture(scope="module")
def whole(tiny_dir: Path, problems: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache that was built without interruption."""
    out = tmp_path_factory.mktemp("whole") / "cache"
    done = finish(command(tiny_dir, out, problems, "--json"))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["sealed"] is True
    return out


def test_both_tiers_hold_what_the_teacher_says(whole: Path, tiny_dir: Path) -> None:
    from logitcache.scorers.hf import load_engine
    from logitcache.scoring import HiddenStateRequest, TopKRequest

    hidden, topk = open_cache(str(whole), targets="hidden"), open_cache(str(whole), targets="topk")
    everything = list(range(len(PROBLEMS)))
    assert [s.sequence.problem_id for s in hidden.read(everything)] == [p["id"] for p in PROBLEMS]
    engine = load_engine(tiny_dir, dtype="float32")
    for a, b in zip(hidden.read(everything), topk.read(everything), strict=True):
        assert np.array_equal(a.sequence.token_ids, b.sequence.token_ids)
        ((state, kept),) = engine.score([a.sequence], [HiddenStateRequest(), TopKRequest(max_k=32)])
        assert isinstance(a.targets, HiddenStateTargets)
        assert isinstance(b.targets, TopKTargets)
        assert isinstance(kept, TopKTargets)
        assert a.targets.head_fingerprint == engine.head.fingerprint
        stored = (a.targets.hidden.astype(np.uint32) << 16).view(np.float32)
        assert np.abs(stored - state.hidden).max() <= np.abs(state.hidden).max() * 2**-8
        assert np.abs(b.targets.entropy - kept.entropy).max() < 0.05
        assert np.abs(np.exp(b.targets.token_log_prob) - np.exp(kept.token_log_prob)).max() < 0.01


def test_info_says_what_the_contract_promises(whole: Path) -> None:
    done = finish([sys.executable, "-m", "logitcache.cli", "info", str(whole), "--json"])
    found = json.loads(done.stdout)
    assert found["format_version"] == 1
    assert found["sealed"] is True
    assert {"name", "fingerprint", "vocab_size"} <= found["teacher"].keys()
    assert found["tokenizer"]["fingerprint"]
    assert found["sequences"] == len(PROBLEMS)
    assert found["tokens"] > found["completion_tokens"] > 0
    assert min(found["flops"]["generate"], found["flops"]["score"]) > 0
    assert found["targets"].keys() == {"topk", "hidden"}
    for tier in found["targets"].values():
        assert tier["bytes_per_token"] == pytest.approx(tier["bytes"] / found["completion_tokens"])
        assert 0 <= tier["kl_nats"]["mean"] <= tier["kl_nats"]["p99"]


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_build_that_was_stopped_anywhere_ends_in_the_same_bytes(
    how: signal.Signals, whole: Path, tiny_dir: Path, problems: Path, tmp_path: Path
) -> None:
    out, draw = tmp_path / "cache", random.Random(int(how))
    for _ in range(3):
        process = subprocess.Popen(command(tiny_dir, out, problems), stderr=subprocess.PIPE, text=True)
        wait_for_part(out, process)
        time.sleep(draw.uniform(0, 0.4))
        process.send_signal(how)
        _, said = process.communicate(timeout=60)
        assert "Traceback" not in said
    done = finish(command(tiny_dir, out, problems))
    assert done.returncode == 0, done.stderr
    assert content(out) == content(whole)


def wait_for_part(out: Path, process: subprocess.Popen[str]) -> None:
    """Until one more part than now is committed, or the build is done."""
    before = len(list(out.rglob("record.json")))
    while process.poll() is None and len(list(out.rglob("record.json"))) == before:
        time.sleep(0.01)


def test_workers_that_never_speak_build_the_same_cache(
    whole: Path, tiny_dir: Path, problems: Path, tmp_path: Path
) -> None:
    out = tmp_path / "cache"
    for worker in ("2/2", "1/2"):
        done = finish(command(tiny_dir, out, problems, "--worker", worker, "--json"))
        assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["sealed"] is True
    assert content(out) == content(whole)


def test_running_a_finished_build_again_changes_nothing(
    whole: Path, tiny_dir: Path, problems: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(whole, tmp_path / "cache")
    assert finish(command(tiny_dir, copy, problems)).returncode == 0
    assert content(copy) == content(whole)


@pytest.mark.parametrize(
    ("options", "found"),
    [
        (("--problems", "nowhere.parquet"), "no such file"),
        (("--teacher", "nowhere/at-all"), "no such directory"),
        (("--targets", "logits"), "there is no kind 'logits'"),
        (("--targets", ""), "nothing was named"),
        (("--dtype", "int3"), "bfloat16 or float32"),
        (("--seed", "6"), "it has another sampling.seed: 5 there, 6 asked (--seed)"),
        (("--limit", "0"), "at least 1"),
        (("--top-p", "1.5"), "--top-p, a probability above 0: got 1.5"),
        (("--worker", "3/2"), "3 is beyond 2"),
        (("--max-new-tokens", "5000"), "the model's context holds 512"),
    ],
)
def test_bad_input_is_one_line_and_changes_nothing(
    options: tuple[str, ...], found: str, whole: Path, tiny_dir: Path, problems: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(whole, tmp_path / "cache")
    arguments = command(tiny_dir, copy, problems)
    for name, value in zip(options[::2], options[1::2], strict=True):
        if name in arguments:
            arguments[arguments.index(name) + 1] = value
        else:
            arguments += [name, value]
    if "5000" in options:
        arguments[arguments.index("--out") + 1] = str(tmp_path / "another")
    done = finish(arguments)
    assert done.returncode != 0
    assert done.stdout == ""
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert found in line
    assert "Traceback" not in done.stderr
    assert content(copy) == content(whole)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return finish([sys.executable, "-m", "logitcache.cli", *arguments])


def test_a_damaged_part_is_found_undone_and_made_again_with_the_same_bytes(
    whole: Path, tiny_dir: Path, problems: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(whole, tmp_path / "cache")
    assert run("verify", str(copy), "--deep").returncode == 0
    victim = max((copy / "targets" / "topk").rglob("c*/0"), key=lambda file: file.stat().st_size)
    flipped = bytearray(victim.read_bytes())
    flipped[len(flipped) // 3] ^= 4
    victim.write_bytes(flipped)
    found = run("verify", str(copy), "--deep", "--repair", "--json")
    assert found.returncode == 1
    report = json.loads(found.stdout)
    assert [item["object"] for item in report["damage"]] == [str(victim.relative_to(copy))]
    assert run("info", str(copy)).returncode == 0
    assert finish(command(tiny_dir, copy, problems)).returncode == 0
    assert content(copy) == content(whole)
    assert run("verify", str(tmp_path)).returncode == 2


def test_a_tier_added_later_is_the_tier_built_at_once(
    whole: Path, tiny_dir: Path, problems: Path, tmp_path: Path
) -> None:
    build_here(tiny_dir, tmp_path / "cache", problems, targets="hidden")
    added = run("score", str(tmp_path / "cache"), "--teacher", str(tiny_dir), "--targets", "topk:k=32", "--json")
    assert added.returncode == 0, added.stderr
    assert json.loads(added.stdout)["targets"].keys() == {"hidden", "topk"}
    later, at_once = open_cache(str(tmp_path / "cache"), targets="topk"), open_cache(str(whole), targets="topk")
    everything = range(len(PROBLEMS))
    for a, b in zip(later.read(everything), at_once.read(everything), strict=True):
        assert all(np.array_equal(value, vars(b.targets)[name]) for name, value in vars(a.targets).items())


def test_a_tier_cannot_be_added_by_another_teacher_or_with_another_configuration(
    whole: Path, tiny_dir: Path, embedded_dir: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(whole, tmp_path / "cache")
    other = run("score", str(copy), "--teacher", str(embedded_dir), "--targets", "hidden")
    assert (other.returncode, other.stdout) == (2, "")
    assert "name the teacher that built the cache" in other.stderr
    changed = run("score", str(copy), "--teacher", str(tiny_dir), "--targets", "topk:k=8")
    assert changed.returncode == 2
    assert "topk" in changed.stderr
    assert content(copy) == content(whole)


def test_parts_built_apart_merge_into_the_whole(whole: Path, tiny_dir: Path, problems: Path, tmp_path: Path) -> None:
    places = [tmp_path / name for name in ("a", "b")]
    for worker, place in enumerate(places):
        build_here(tiny_dir, place, problems, worker=worker, workers=2)
    assert run("merge", *map(str, places), "--out", str(tmp_path / "merged")).returncode == 0
    assert content(tmp_path / "merged") == content(whole)


def test_export_writes_what_the_reader_reads(whole: Path, tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    done = run("export", str(whole), "--out", str(tmp_path / "cache.parquet"), "--targets", "topk")
    assert done.returncode == 0, done.stderr
    table = pq.read_table(tmp_path / "cache.parquet")
    for row, scored in zip(table.to_pylist(), open_cache(str(whole), targets="topk").read(range(10)), strict=True):
        assert row["token_ids"] == scored.sequence.token_ids.tolist()
        assert isinstance(scored.targets, TopKTargets)
        assert np.array_equal(np.array(row["entropy"], np.float32), scored.targets.entropy)


def test_a_cache_of_another_teacher_is_refused(whole: Path, tiny_dir: Path, problems: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    other, copy = tmp_path / "other", shutil.copytree(whole, tmp_path / "cache")
    shutil.copytree(tiny_dir, other)
    model = AutoModelForCausalLM.from_pretrained(other)
    next(model.parameters()).data[0, 0] += 1
    model.save_pretrained(other)
    done = finish(command(other, copy, problems))
    assert done.returncode == 2
    assert "it has another teacher.fingerprint" in done.stderr
    assert content(copy) == content(whole)


def test_a_place_that_holds_something_else_is_refused(tiny_dir: Path, problems: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    done = finish(command(tiny_dir, tmp_path, problems))
    assert done.returncode == 2
    assert "it is not empty and not a cache" in done.stderr
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_place_that_cannot_be_written_is_refused(tiny_dir: Path, problems: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = finish(command(tiny_dir, tmp_path / "file" / "cache", problems))
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(("done", "limit"), [(0, 1 << 20), (1, 300)], ids=["the head does not fit", "no part does"])
def test_a_disk_that_fills_up_is_one_line_and_the_build_goes_on_from_there(
    done: int, limit: int, whole: Path, tiny_dir: Path, problems: Path, tmp_path: Path
) -> None:
    """A limit on file size, under which the kernel fails a write half-way, as a full disk does."""
    out = tmp_path / "cache"
    if done:  # the tiers and the first unit
        shutil.copytree(whole, out, ignore=shutil.ignore_patterns("manifest.json", "0000000[1-9]"))
    before = content(out)
    full = subprocess.run(
        command(tiny_dir, out, problems),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert full.returncode == 2, full.stderr
    (line,) = [line for line in full.stderr.splitlines() if line.startswith("error: ")]
    assert "File too large; make it writable or free some space, then run it again" in line
    assert "Traceback" not in full.stderr
    after = content(out)
    assert not [name for name in after if ".partial" in name]
    assert before.items() <= after.items()
    build_here(tiny_dir, out, problems)
    assert content(out) == content(whole)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("targets", ["topk:k=8", "hidden"])
def test_a_teacher_of_logits_that_are_no_numbers_is_one_line_and_no_targets(
    value: float, targets: str, tiny_dir: Path, problems: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    broken, out = shutil.copytree(tiny_dir, tmp_path / "broken"), tmp_path / "cache"
    model = AutoModelForCausalLM.from_pretrained(broken)
    model.get_input_embeddings().weight.data[1234] = value  # the head, too: every row has one such logit
    model.save_pretrained(broken)
    with pytest.raises(UserError, match="finite"):
        build_here(broken, out, problems, targets=targets, temperature=0)
    assert [name for name in content(out) if name.startswith("targets/") and "record" in name] == []


def test_debug_shows_the_traceback(tiny_dir: Path, tmp_path: Path) -> None:
    done = finish([*command(tiny_dir, tmp_path, tmp_path / "missing.json"), "--debug"])
    assert done.returncode != 0
    assert "Traceback" in done.stderr


def test_help_has_an_example_and_says_what_it_costs() -> None:
    done = finish([sys.executable, "-m", "logitcache.cli", "build", "--help"])
    assert "Example:" in done.stdout
    assert "Costs" in done.stdout


def test_there_is_progress_with_a_rate_on_a_plain_stream(whole: Path, tiny_dir: Path, problems: Path) -> None:
    environment = {**os.environ, "COLUMNS": "200"}
    out = whole.parent / "again"
    done = subprocess.run(
        command(tiny_dir, out, problems), capture_output=True, text=True, env=environment, check=True, timeout=300
    )
    assert "20/20" in done.stderr
    assert "sequences/s" in done.stderr


def test_info_shows_the_tiers_of_an_unsealed_cache(whole: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(whole, tmp_path / "cache")
    (copy / "manifest.json").unlink()
    (copy / "targets" / "topk" / "00000002" / "record.json").unlink()
    found = json.loads(run("info", str(copy), "--json").stdout)
    assert (found["sealed"], found["units"]) == (False, 4)
    assert {name: tier["units"] for name, tier in found["targets"].items()} == {"topk": 3, "hidden": 4}
    assert "3 of 4 units with sequences have it" in run("info", str(copy)).stdout
