"""Problems that cannot be put to a model are named."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from logitcache.errors import UserError
from logitcache.problems import Problem
from logitcache.prompts import PromptStyle, render_prompts

PROBLEMS = [Problem(id="known", text="1", answer=""), Problem(id="strange", text="What?", answer="")]


@pytest.fixture
def digits(tmp_path: Path) -> PreTrainedTokenizerFast:
    """Knows one digit and nothing else, not even that there is more."""
    words = Tokenizer(models.WordLevel({"1": 0, "1\n": 1, "<end>": 2}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>").save_pretrained(tmp_path / "digits")
    return AutoTokenizer.from_pretrained(tmp_path / "digits")


def test_a_problem_that_cannot_be_encoded_is_named(digits: PreTrainedTokenizerFast) -> None:
    style = PromptStyle(instruction="")
    assert render_prompts(digits, PROBLEMS[:1], style)[0].token_ids == (1,)
    with pytest.raises(UserError, match=r"of problem strange: the tokenizer of digits cannot .*UNK.*; leave that"):
        render_prompts(digits, PROBLEMS, style)


def test_a_template_that_refuses_is_named(digits: PreTrainedTokenizerFast) -> None:
    digits.chat_template = "{{ raise_exception('no questions') }}"
    with pytest.raises(UserError, match=r"a prompt of problem known: .*no questions"):
        render_prompts(digits, PROBLEMS[:1], PromptStyle())
