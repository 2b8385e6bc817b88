"""The one exception a user is meant to read.

Guarantees: an `UserError` is one line saying what was asked, what was found and what to do; command
lines print it without a traceback and exit with its code. Everything else that is raised is a defect
of ours and keeps its traceback.
"""

from __future__ import annotations


class UserError(Exception):
    """Something the person at the keyboard can mend: one line, no traceback.

    Args:
        asked: what was asked for, as the user would say it.
        found: what was there instead.
        do: what to do about it (a command where there is one).
    """

    exit_code = 2

    def __init__(self, asked: str, found: str, do: str) -> None:
        self.asked, self.found, self.do = (" ".join(part.split()) for part in (asked, found, do))
        super().__init__(f"{self.asked}: {self.found}; {self.do}")

    def __reduce__(self) -> tuple[type[UserError], tuple[str, str, str]]:
        return type(self), (self.asked, self.found, self.do)


class DamagedError(UserError):
    """Stored bytes are not what was committed: named object, and the command that mends it."""

    exit_code = 1


class IdentityError(UserError):
    """Two things that must come from one source do not (teacher, tokenizer, head, problems)."""


def require(condition: bool, asked: str, found: object, do: str = "choose a value in that range") -> None:
    """Raise `UserError` unless `condition` holds: `asked` says what is wanted, `found` what was given."""
    if not condition:
        raise UserError(asked, f"got {found}", do)
