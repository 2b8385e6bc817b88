"""What every engine refuses before it starts: tokens it does not have, and more of them than its context holds."""

from __future__ import annotations

from collections.abc import Iterable

from logitcache.errors import UserError
from logitcache.records import TokenSequence


def check_context(problem_id: str, tokens: int, context_tokens: int | None) -> None:
    """Raise UserError if `tokens` are more than the context holds; None is a context without a stated end."""
    if context_tokens is not None and tokens > context_tokens:
        raise UserError(
            f"{tokens} tokens for problem {problem_id}",
            f"the model's context holds {context_tokens}",
            "ask for fewer new tokens or leave that problem out",
        )


def check_sequences(sequences: Iterable[TokenSequence], *, vocab_size: int, context_tokens: int | None) -> None:
    """Raise UserError for the first sequence that is too long or holds an id that is no token."""
    for sequence in sequences:
        check_context(sequence.problem_id, len(sequence), context_tokens)
        if int(sequence.token_ids.max()) >= vocab_size:
            raise UserError(
                f"scores for problem {sequence.problem_id}",
                f"token id {sequence.token_ids.max()} is beyond the teacher's {vocab_size} tokens",
                "use sequences made with the teacher's own tokenizer",
            )
