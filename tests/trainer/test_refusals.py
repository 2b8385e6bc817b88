"""What a run cannot do, or would do silently otherwise than asked, is one line, and nothing is written before it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from logitcache.console import run_command
from logitcache.store.layout import MANIFEST
from tests.trainer.conftest import room
from tests.trainer.test_commands import SIZE, built
from trainer.cli import app


@pytest.fixture(scope="module")
def cache(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built(tmp_path_factory.mktemp("cache"), tiny_dir, "hidden")


@pytest.fixture
def run(cache: Path, tiny_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Train in this process into `tmp_path / "out"`; the one line of an error, or nothing."""

    def trained(*options: str | Path, command: str = "distill", url: Path = cache, student: Path = tiny_dir) -> str:
        given = [command, url, "--student", student, "--out", tmp_path / "out", *SIZE[2:], "--steps", "2", *options]
        code = run_command(app, [str(word) for word in given], after_interrupt="run it again")
        errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert len(errors) == bool(code)
        return errors[0] if errors else ""

    return trained


@pytest.mark.parametrize(
    ("options", "found"),
    [
        (["--kl-temperature", "inf"], "got inf"),
        (["--backend", "triton"], "got cpu, expected cuda"),
        (["--seed", "-1"], "--seed, 0 or above"),
        (["--weight-decay", "-1"], "--weight-decay, 0 or above"),
        (["--max-grad-norm", "0"], "--max-grad-norm, above 0"),
        (["--betas", "0.9", "1"], "--betas, 0 to below 1"),
        (["--warmup-steps", "3"], "the run has 2 steps"),
        (["--lora-alpha", "4"], "give --lora-rank too"),
        (["--lora-matrices", "q"], "give --lora-rank too"),
        (["--student-share", "0.5"], "teacher prefixes share nothing"),
        (["--generator", "vllm"], "the student writes nothing"),
        (["--teacher", "embedded"], "teacher prefixes come from the cache"),
        (["--entropy-floor", "0.3"], "--entropy-floor: without a curriculum"),
        (["--check-every", "3"], "--check-every: without a curriculum"),
        (["--patience", "2"], "--patience: without a curriculum"),
    ],
)
def test_what_is_impossible_or_decides_nothing(
    options: list[str], found: str, run: Callable[..., str], tmp_path: Path
) -> None:
    assert found in run(*options)
    assert not (tmp_path / "out").exists()


def copied(tiny_dir: Path, place: Path, **config: Any) -> Path:
    """The tiny model in a directory of its own, with these entries in its configuration."""
    shutil.copytree(tiny_dir, place)
    file = place / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    return place


def truncated(tiny_dir: Path, tmp_path: Path) -> Path:
    place = copied(tiny_dir, tmp_path / "student")
    weights = place / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    return place


def unreadable(tiny_dir: Path, tmp_path: Path) -> Path:
    place = copied(tiny_dir, tmp_path / "student")
    (place / "config.json").write_text("{")
    return place


@pytest.mark.parametrize("command", ["distill", "grid"])
@pytest.mark.parametrize(
    ("student", "found"),
    [
        (truncated, "it cannot be loaded (Error while deserializing header"),
        (unreadable, "it cannot be loaded (Expecting property name"),
        (lambda tiny, tmp: copied(tiny, tmp / "s", model_type="vit"), "AutoModel: AutoModelForCausalLM)"),
        (lambda tiny, tmp: copied(tiny, tmp / "s", max_position_embeddings=20), "the student's context holds 20"),
    ],
)
def test_a_student_that_will_not_do(
    student: Callable[[Path, Path], Path], found: str, command: str, run: Callable[..., str], tiny_dir: Path,
    tmp_path: Path,
) -> None:  # fmt: skip
    more = ["--teacher", tiny_dir] if command == "grid" else []
    said = run(*more, command=command, student=student(tiny_dir, tmp_path))
    assert found in said
    assert len(said) < 500  # of a model that is none, transformers names every architecture there is
    assert not (tmp_path / "out").exists()


def test_an_unsealed_cache(run: Callable[..., str], cache: Path, tmp_path: Path) -> None:
    unsealed = shutil.copytree(cache, tmp_path / "cache")
    (unsealed / MANIFEST).unlink()
    assert "seal" in run(url=unsealed)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", [MANIFEST, "samples.parquet", "tier.json", "head_weight/c/0/0", "states/c/0/0"])
def test_a_damaged_cache(name: str, run: Callable[..., str], cache: Path, tmp_path: Path) -> None:
    """The held-out text is read before anything is written; what it does not lie in can only turn up later."""
    damaged = shutil.copytree(cache, tmp_path / "cache")
    (file,) = [path for path in damaged.rglob("*") if str(path).endswith(f"/{name}")]
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    assert "logitcache verify" in run(url=damaged)
    assert not (tmp_path / "out").exists()


def test_a_full_disk_is_one_line_and_the_run_goes_on(run: Callable[..., str], tmp_path: Path) -> None:
    """At the configuration, and at the student, when all steps are done."""
    out = tmp_path / "out"
    with room(100):
        said = run()
    assert "config.json: it cannot be written" in said
    assert "make room" in said
    assert run() == ""
    (out / "result.json").unlink()
    shutil.rmtree(out / "student")
    lines = (out / "metrics.jsonl").read_bytes()
    with room(1 << 20):
        assert "student: it cannot be written" in run()
    assert sorted(path.name for path in out.iterdir() if path.name.startswith(".")) == []
    assert run() == ""
    assert (out / "metrics.jsonl").read_bytes() == lines  # no step was taken twice
    assert (out / "student" / "model.safetensors").exists()


def test_other_weights_under_the_same_name_are_another_student(
    run: Callable[..., str], tiny_dir: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    mine, other = copied(tiny_dir, tmp_path / "a" / "student"), copied(tiny_dir, tmp_path / "b" / "student")
    weights = load_file(other / "model.safetensors")
    save_file({name: 2 * value for name, value in weights.items()}, other / "model.safetensors", {"format": "pt"})
    assert run(student=mine) == ""
    assert "student.fingerprint" in run(student=other)
