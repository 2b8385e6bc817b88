"""Engines by name, and the names that are none."""

from __future__ import annotations

import pytest

from logitcache.errors import UserError
from logitcache.jobs import BuildRequest
from logitcache.scorers.choose import Served, parse_engine


def test_names() -> None:
    assert parse_engine("vllm", "--scorer") == "vllm"
    assert parse_engine("http://h:8000#m/n", "--generator") == Served(url="http://h:8000", model="m/n")


@pytest.mark.parametrize("text", ["sglang", "http://h:8000", "", "ftp://h#m"])
def test_names_that_are_none(text: str) -> None:
    with pytest.raises(UserError, match="no engine of that name"):
        parse_engine(text, "--scorer")


def test_a_server_that_should_score_for_a_cache_is_refused_before_anything_runs() -> None:
    with pytest.raises(UserError, match="a server shows no hidden states"):
        BuildRequest(problems="p.jsonl", out="cache", scorer="http://h:8000#m")
    assert BuildRequest(problems="p.jsonl", out="cache", generator="http://h:8000#m").scorer == "transformers"
