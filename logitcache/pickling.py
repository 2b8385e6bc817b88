"""Objects that travel to another process as the arguments they were made from."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any


def as_arguments(instance: Any) -> tuple[Any, ...]:
    """A dataclass's `__reduce__`: it is made anew where it arrives, without locks, connections and what it has read."""
    fields = {item.name: getattr(instance, item.name) for item in dataclasses.fields(instance) if item.init}
    made_by: Callable[..., Any] = type(instance)
    return partial(made_by, **fields), ()
