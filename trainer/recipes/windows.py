"""The curriculum at work: checks the student on held-out prompts when one is due, and sets the source's window.

Guarantees: a check is a function of the student's weights alone (same prompts, same seed, at every check), so that a
resumed run repeats it exactly; the teacher is not needed. The rule is `trainer.curriculum`'s.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from logitcache.scoring import Prompt, Sampling
from trainer.curriculum import Curriculum
from trainer.flops import FlopLedger
from trainer.prefixes import PrefixSource
from trainer.recipes.data import Writer
from trainer.rollouts import measure_own_text
from trainer.student import Student


@dataclass(frozen=True, kw_only=True, eq=False)
class GatedWindows:
    """A curriculum with what it is checked on and what it steers.

    Attributes:
        curriculum: its state goes into checkpoints.
        prompts: held out.
        sampling: how the student writes; its seed is the same at every check, its length the window that is judged.
    """

    curriculum: Curriculum
    source: PrefixSource
    student: Student
    writer: Writer
    prompts: Sequence[Prompt]
    sampling: Sampling
    micro_batch_tokens: int

    def check(self, step: int, ledger: FlopLedger) -> dict[str, Any]:
        """Check if one is due before this step, set the window; the entries for the step's line of metrics."""
        entries: dict[str, Any] = {}
        if self.curriculum.due(step):
            own = measure_own_text(
                self.student,
                self.writer.generator,
                self.prompts,
                replace(self.sampling, max_new_tokens=self.curriculum.window, samples_per_problem=1),
                ledger,
                stop_ids=self.writer.stop_ids,
                micro_batch_tokens=self.micro_batch_tokens,
                step=step,
            )
            shown = ("entropy_nats", "eos_mass", "truncated_share", "mean_length")
            entries = {f"own_{name}": value for name, value in asdict(own).items() if name in shown}
            entries["decision"] = str(self.curriculum.observe(step, own.entropy_nats))
        self.source.use_window(self.curriculum.window)
        return {"window": self.curriculum.window, **entries}
