"""Engines by name, and the names that are none."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from logitcache.errors import UserError
from logitcache.jobs import BuildRequest, build_cache
from logitcache.prompts import PromptStyle
from logitcache.scorers.choose import EngineName, Served, parse_engine, scorer_of, teacher_identity
from logitcache.scoring import Sampling


def test_names() -> None:
    assert parse_engine("vllm", "--scorer") == "vllm"
    assert parse_engine("http://h:8000#m/n", "--generator") == Served(url="http://h:8000", model="m/n")


@pytest.mark.parametrize("text", ["sglang", "http://h:8000", "", "ftp://h#m"])
def test_names_that_are_none(text: str) -> None:
    with pytest.raises(UserError, match="no engine of that name"):
        parse_engine(text, "--scorer")


@pytest.mark.parametrize(
    ("targets", "found"),
    [
        ("topk,hidden", "hidden of a server as scorer: a server gives top-k and nothing else"),
        ("full", "full of a server as scorer: a server gives top-k and nothing else"),
        ("sampled:n=8", "sampled of a server as scorer: a server gives top-k and nothing else"),
        ("topk:max-kl=1e-2", "topk:max-kl= of a server as scorer: a server gives no full distribution"),
    ],
)
def test_what_a_server_cannot_score_is_refused_before_anything_runs(targets: str, found: str) -> None:
    with pytest.raises(UserError, match=found):
        BuildRequest(problems="p.jsonl", out="cache", scorer="http://h:8000#m", targets=targets)
    assert BuildRequest(problems="p.jsonl", out="cache", generator="http://h:8000#m", targets=targets)
    assert BuildRequest(problems="p.jsonl", out="cache", scorer="http://h:8000#m", targets="topk:k=64")


def test_a_cache_that_a_server_scored_gets_no_more_targets() -> None:
    server = Served(url="http://h:8000", model="m")
    assert scorer_of(teacher_identity(server, "transformers")) == "transformers"
    generators: tuple[EngineName, ...] = (server, "transformers")
    for generator in generators:
        with pytest.raises(UserError, match="a server scored it"):
            scorer_of(teacher_identity(generator, server))


@pytest.mark.parametrize(
    ("generator", "scorer"), [("transformers", "http://h:8000#m"), ("http://h:8000#m", "transformers")]
)
def test_whoever_runs_the_teacher_here_needs_its_weights(
    generator: str, scorer: str, tiny_dir: Path, tmp_path: Path
) -> None:
    known, problems = tmp_path / "known", tmp_path / "p.jsonl"
    shutil.copytree(tiny_dir, known, ignore=shutil.ignore_patterns("*.safetensors"))
    problems.write_text('{"problem": "add"}')
    wants = BuildRequest(
        problems=str(problems),
        out=str(tmp_path / "c"),
        teacher=str(known),
        targets="topk:k=8",
        generator=generator,
        scorer=scorer,
    )
    with pytest.raises(UserError, match=r"no config.json with \*.safetensors"):
        build_cache(wants, sampling=Sampling(), style=PromptStyle())
    assert not (tmp_path / "c").exists()
