"""From problems to prompts: the one place that knows about chat templates."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from logitcache.errors import UserError
from logitcache.problems import Problem
from logitcache.scoring import Prompt


@dataclass(frozen=True, kw_only=True)
class PromptStyle:
    """How a problem is put to a model.

    Attributes:
        instruction: appended to the problem; the default is DeepScaleR's.
        thinking: asks a template that knows the switch (Qwen3) for its thinking mode.
    """

    instruction: str = "Let's think step by step and output the final answer within \\boxed{}."
    thinking: bool = False


def render_prompts(tokenizer: Any, problems: Sequence[Problem], style: PromptStyle) -> list[Prompt]:
    """Token ids of each problem under the tokenizer's chat template, or as plain text where it has none.

    Raises:
        UserError: a problem that the tokenizer or the template cannot take.
    """
    return [Prompt(problem_id=problem.id, token_ids=_encoded(tokenizer, problem, style)) for problem in problems]


def _encoded(tokenizer: Any, problem: Problem, style: PromptStyle) -> tuple[int, ...]:
    try:
        return _render(tokenizer, problem, style)
    except Exception as error:  # tokenizers raises Exception itself, templates whatever they like
        found = f"the tokenizer of {Path(tokenizer.name_or_path).name} cannot encode it ({error})"
        do = "leave that problem out, change --instruction, or use another model"
        raise UserError(f"a prompt of problem {problem.id}", found, do) from error


def _render(tokenizer: Any, problem: Problem, style: PromptStyle) -> tuple[int, ...]:
    text = f"{problem.text} {style.instruction}".strip()
    if tokenizer.chat_template is None:
        return tuple(tokenizer(f"{text}\n")["input_ids"])
    messages = [{"role": "user", "content": text}]
    encoded = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, enable_thinking=style.thinking, return_dict=True
    )
    return tuple(encoded["input_ids"])


def prompts_identity(tokenizer: Any, style: PromptStyle) -> dict[str, Any]:
    """What decides the text put to a model beside the problem, for a cache's identity."""
    template = hashlib.sha256((tokenizer.chat_template or "").encode()).hexdigest()[:32]
    return {"chat_template": template, "instruction": style.instruction, "thinking": style.thinking}
