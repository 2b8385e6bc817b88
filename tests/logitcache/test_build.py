"""The build as a user runs it: real processes, a real teacher of a tiny size, really killed."""

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

import numpy as np
import pytest

from logitcache import open_cache
from logitcache.records import HiddenStateTargets, TopKTargets

PROBLEMS = [{"id": f"p{n:02d}", "problem": f"What is {n} plus {n * n}?", "answer": str(n + n * n)} for n in range(10)]


def command(tiny_dir: Path, out: Path, problems: Path, *more: str) -> list[str]:
    options = ["--dtype", "float32", "--max-new-tokens", "16", "--problems-per-unit", "3", "--seed", "5"]
    run = [sys.executable, "-m", "logitcache.cli", "build", "--teacher", str(tiny_dir)]
    return [*run, "--problems", str(problems), "--out", str(out), "--targets", "topk:k=32,hidden", *options, *more]


def finish(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(arguments, capture_output=True, text=True, timeout=300, check=False)


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
        (("--seed", "6"), "it has another identity.sampling.seed: 5 there, 6 asked"),
        (("--limit", "0"), "at least 1"),
        (("--top-p", "1.5"), "--top-p, a probability above 0: got 1.5"),
        (("--worker", "3/2"), "not a worker of several"),
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
    first = command(tiny_dir, tmp_path / "cache", problems)
    first[first.index("--targets") + 1] = "hidden"
    assert finish(first).returncode == 0
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
    for worker, place in zip(("1/2", "2/2"), places, strict=True):
        assert finish(command(tiny_dir, place, problems, "--worker", worker)).returncode == 0
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
    assert "it has another identity.teacher" in done.stderr
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


MORE = [{"id": f"q{n}", "problem": f"What is {n} times {n + 3}?", "answer": str(n * (n + 3))} for n in range(5)]


@pytest.fixture(scope="module")
def more(problems: Path) -> Path:
    """A set that holds all of the first and five problems more."""
    file = problems.parent / "more.jsonl"
    file.write_text("".join(json.dumps(problem) + "\n" for problem in [*PROBLEMS, *MORE]))
    return file


@pytest.fixture(scope="module")
def appended(whole: Path, tiny_dir: Path, more: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The whole cache, with the five problems appended."""
    copy = shutil.copytree(whole, tmp_path_factory.mktemp("appended") / "cache")
    done = finish(command(tiny_dir, copy, more, "--append", "--json"))
    assert done.returncode == 0, done.stderr
    assert "10 of 15 problems are there already, 5 are new" in done.stderr
    assert [item["count"] for item in json.loads(done.stdout)["appended"]] == [5]
    return copy


def test_appended_problems_follow_the_first_and_change_no_part(whole: Path, appended: Path) -> None:
    ids = [s.problem_id for s in open_cache(str(appended), targets=None).read_tokens(range(15))]
    assert ids == [problem["id"] for problem in [*PROBLEMS, *MORE]]
    before, after = content(whole), content(appended)
    assert {name for name in before if after[name] != before[name]} == {"manifest.json"}
    assert run("verify", str(appended), "--deep").returncode == 0


def test_an_append_that_was_killed_ends_in_the_same_bytes(
    appended: Path, whole: Path, tiny_dir: Path, problems: Path, more: Path, tmp_path: Path
) -> None:
    out = shutil.copytree(whole, tmp_path / "cache")
    for _ in range(2):
        process = subprocess.Popen(command(tiny_dir, out, more, "--append"), stderr=subprocess.PIPE, text=True)
        wait_for_part(out, process)
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)
    assert finish(command(tiny_dir, out, problems)).returncode == 0  # the first set is whole, and stays
    for worker in ("2/2", "1/2"):
        assert finish(command(tiny_dir, out, more, "--append", "--worker", worker)).returncode == 0
    assert content(out) == content(appended)
    assert finish(command(tiny_dir, out, more, "--append")).returncode == 0  # nothing new
    assert content(out) == content(appended)


def test_an_append_is_refused_where_it_does_not_fit(
    whole: Path, tiny_dir: Path, problems: Path, more: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(whole, tmp_path / "cache")
    for options, found in (
        ((), "identity.problems.count: 10 there, 15 asked; add --append"),
        (("--append", "--seed", "6"), "identity.sampling.seed: 5 there, 6 asked"),
        (("--append", "--targets", "hidden"), "it has hidden, topk"),
    ):
        arguments = command(tiny_dir, copy, more)
        for name, value in zip(options[1::2], options[2::2], strict=True):
            arguments[arguments.index(name) + 1] = value
        refused = finish([*arguments, *options[:1]])
        assert refused.returncode == 2
        assert found in refused.stderr
        assert content(copy) == content(whole)
    (copy / "sequences" / "00000003" / "record.json").unlink()
    refused = finish(command(tiny_dir, copy, more, "--append"))
    assert "1 of 4 units of earlier problems are missing" in refused.stderr


@pytest.mark.parametrize("damage", [bytes.upper, None], ids=["flipped", "lost"])
def test_a_damaged_set_is_restored(appended: Path, tmp_path: Path, damage: Callable[[bytes], bytes] | None) -> None:
    copy = shutil.copytree(appended, tmp_path / "cache")
    victim = copy / "appended" / "00000001.json"
    if damage is None:
        victim.unlink()
    else:
        victim.write_bytes(damage(victim.read_bytes()))
    assert run("verify", str(copy), "--repair").returncode == 1
    assert content(copy) == content(appended)


def test_a_set_lost_before_sealing_is_made_again_by_its_own_command_only(
    appended: Path, tiny_dir: Path, more: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(appended, tmp_path / "cache")
    (copy / "appended" / "00000001.json").unlink()
    (copy / "manifest.json").unlink()
    other = tmp_path / "other.jsonl"
    other.write_text("".join(json.dumps(problem) + "\n" for problem in MORE[:2]))
    refused = finish(command(tiny_dir, copy, other, "--append"))
    assert "run the command that appended those first" in refused.stderr
    assert finish(command(tiny_dir, copy, more, "--append")).returncode == 0
    assert content(copy) == content(appended)


def test_merging_brings_appended_sets_along(appended: Path, whole: Path, tmp_path: Path) -> None:
    assert run("merge", str(whole), str(appended), "--out", str(tmp_path / "merged")).returncode == 0
    assert content(tmp_path / "merged") == content(appended)


def test_info_shows_the_tiers_of_an_unsealed_cache(whole: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(whole, tmp_path / "cache")
    (copy / "manifest.json").unlink()
    (copy / "targets" / "topk" / "00000002" / "record.json").unlink()
    found = json.loads(run("info", str(copy), "--json").stdout)
    assert (found["sealed"], found["units"]) == (False, 4)
    assert {name: tier["units"] for name, tier in found["targets"].items()} == {"topk": 3, "hidden": 4}
    assert "3 of 4 units with sequences have it" in run("info", str(copy)).stdout
