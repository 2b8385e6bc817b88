"""A pruned student from names: which layers, by the teacher's behaviour on its own cached text; then the copy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from logitcache.console import note
from logitcache.errors import UserError
from logitcache.identity import resolve_model
from logitcache.jobs import require_same_teacher
from logitcache.store import open_cache
from trainer.prune import block_influence, most_influential, pruned_student
from trainer.student import load_student

SEQUENCES = 16
"""Cached sequences that layers are judged on."""


def run_prune(*, teacher: str, cache_url: str, layers: int, out: Path) -> dict[str, Any]:
    """Write a student of `layers` layers into the new directory `out`.

    Raises:
        IdentityError: the cache is another teacher's.
        UserError: no such cache or teacher, something at `out`, or more layers than there are.
    """
    if out.exists():
        raise UserError(f"a student in {out}", "something is there already", "choose another place or remove it")
    reader = open_cache(cache_url, targets=None)
    directory = resolve_model(teacher)
    require_same_teacher(cache_url, reader.identity["teacher"], directory)
    note("measuring how much each layer of the teacher matters")
    whole = load_student(directory, vocab_size=reader.identity["teacher"]["vocab_size"], precision="float32")
    influence = block_influence(whole, reader.read_tokens(range(min(SEQUENCES, len(reader)))))
    kept = most_influential(influence, layers)
    pruned_student(directory, out, layers=kept)
    return {"student": str(out), "layers": list(kept), "teacher_layers": len(influence), "block_influence": influence}
