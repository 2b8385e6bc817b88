"""What the `logitcache` command refuses, says and prints, on a real cache of a tiny teacher."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from logitcache.cli import app
from logitcache.console import run_command
from logitcache.errors import IdentityError
from logitcache.jobs import BuildRequest, build_cache
from logitcache.prompts import PromptStyle
from logitcache.scoring import Sampling

TARGETS = "topk:k=8,hidden:max-kl=5e-2"


def build(problems: Path, out: Path, teacher: Path, **sampling: int) -> None:
    places = {"problems": str(problems), "out": str(out), "teacher": str(teacher)}
    request = BuildRequest(**places, targets=TARGETS, dtype="float32", problems_per_unit=2)
    build_cache(request, sampling=Sampling(**{"max_new_tokens": 8, **sampling}), style=PromptStyle())


@pytest.fixture(scope="module")
def problems(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Without answers: a build needs none."""
    file = tmp_path_factory.mktemp("problems") / "problems.jsonl"
    file.write_text("".join(json.dumps({"problem": f"What is {n} plus {n}?"}) + "\n" for n in range(4)))
    return file


@pytest.fixture(scope="module")
def cache(problems: Path, tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("cache") / "cache"
    build(problems, out, tiny_dir)
    return out


def run(capsys: pytest.CaptureFixture[str], *words: str | Path) -> tuple[int, str, str]:
    capsys.readouterr()
    code = run_command(app, [str(word) for word in words], after_interrupt="")
    said = capsys.readouterr()
    return code, said.out, said.err


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["build", "--problems", "P", "--out", "O", "--workers", "4"], "--workers: there is no cluster"),
        (
            ["build", "--problems", "P", "--out", "O", "--gpus-per-worker", "1", "--address", "auto"],
            "--gpus-per-worker, --address: there is no cluster to use; add --cluster ray",
        ),
        (["build", "--problems", "P", "--out", "O", "--cluster", "ray", "--workers", "0"], "--workers, at least 1"),
        (["build", "--problems", "P", "--out", "O", "--worker", "5/4"], "5 is beyond 4"),
        (["build", "--problems", "P", "--out", "P", "--teacher", "T"], "it is a file; choose another place"),
        (["export", "C", "--out", "e.csv"], "--out ending in .parquet: got e.csv"),
        (["build", "--problems", "P", "--out", "O", "--teacher", "C/nope"], "cache has no directory nope"),
    ],
)
def test_what_would_be_ignored_or_misread_is_refused(
    words: list[str],
    found: str,
    cache: Path,
    problems: Path,
    tiny_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    places = {"P": str(problems), "O": str(tmp_path / "out"), "C": str(cache), "T": str(tiny_dir)}
    places["C/nope"] = f"{cache.name}/nope"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(cache.parent)
        code, out, err = run(capsys, *(places.get(word, word) for word in words))
    assert (code, out) == (2, "")
    assert found in err
    assert err.count("error: ") == 1
    assert list(tmp_path.iterdir()) == []


def test_info_names_each_tiers_settings_and_what_is_kept_once(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiers = json.loads(run(capsys, "info", cache, "--json")[1])["targets"]
    assert tiers["hidden"]["asked"] == "hidden:max-kl=0.05"
    assert "k=8" in tiers["topk"]["asked"].split(":")
    header, *rows = run(capsys, "info", cache)[1].splitlines()[4:]
    assert header.split("  ")[0] == "targets"
    assert "kept once MB" in header
    for name, row in zip(tiers, rows, strict=True):
        assert row.split()[:3] == [
            tiers[name]["asked"],
            f"{tiers[name]['bytes'] / 1e6:.2f}",
            f"{tiers[name]['shared_bytes'] / 1e6:.2f}",
        ]


def test_a_tiers_settings_as_info_shows_them_ask_for_the_same_tier(
    cache: Path, tiny_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiers = json.loads(run(capsys, "info", cache, "--json")[1])["targets"]
    asked = ",".join(tier["asked"] for tier in tiers.values())
    assert run(capsys, "score", cache, "--teacher", tiny_dir, "--targets", asked)[0] == 0


def test_verify_says_whether_a_sound_cache_is_sealed(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert json.loads(run(capsys, "verify", cache, "--json")[1])["sound"] is True
    copy = shutil.copytree(cache, tmp_path / "cache")
    (copy / "manifest.json").unlink()
    code, out, _ = run(capsys, "verify", copy)
    assert code == 0
    assert out.startswith("sound, but not sealed: ")
    for record in copy.rglob("record.json"):
        record.unlink()
    assert "nothing is committed" in run(capsys, "verify", copy)[1]


def test_a_build_that_is_done_says_so(
    cache: Path, problems: Path, tiny_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    build(problems, cache, tiny_dir)
    assert f"nothing is missing in {cache}" in capsys.readouterr().err


def test_every_difference_from_the_build_that_is_there_is_named(cache: Path, problems: Path, tiny_dir: Path) -> None:
    with pytest.raises(IdentityError) as refused:
        build(problems, cache, tiny_dir, seed=3, top_k=7)
    for found in ("sampling.seed: 0 there, 3 asked (--seed)", "sampling.top_k: 20 there, 7 asked (--top-k)"):
        assert found in str(refused.value)


def test_a_cache_that_is_not_sealed_says_what_to_do_on_either_side(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = shutil.copytree(cache, tmp_path / "cache")
    (copy / "manifest.json").unlink()
    _, _, err = run(capsys, "export", copy, "--out", tmp_path / "e.parquet")
    assert "`logitcache seal`, or committed=True in Python" in err
