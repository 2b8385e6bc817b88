"""A FLOP budget round a source of prefixes: training ends inside the step that would exceed it.

Guarantees: the ledger's marginal FLOPs never exceed the budget, and one more step would have exceeded it. A step that
is not taken leaves no row; what drawing it had cost is stated apart. A step's cost is known before its update, from the
function that fills the ledger, and compared with the ledger after it: a difference is an error. The student is measured
as it is when a point is reached: before the step that would pass it. With a learning rate that does not depend on the
number of steps, a run up to a budget is therefore the beginning of every run up to a larger one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from logitcache.usage import Stopwatch
from trainer.batch import Batch
from trainer.flops import FlopLedger
from trainer.loop import add_batch
from trainer.objectives import Objective
from trainer.prefixes import PrefixSource
from trainer.student import Student


@dataclass(kw_only=True, eq=False)
class BudgetedPrefixes:
    """A `PrefixSource` that ends when the budget does.

    Attributes:
        source: whose text is trained on.
        student: that is trained.
        objective: what is minimised.
        points: marginal FLOPs at which to measure, ascending; the last is the budget.
        measure: told the step that was not taken and the ledger; what it returns is kept with the point.
        measured: a line for each point that was reached.
        abandoned_flops: of drawing the step that the budget had no room for; in no ledger.
        usage: of training, without measuring.
    """

    source: PrefixSource
    student: Student
    objective: Objective
    points: tuple[int, ...]
    measure: Callable[[int, FlopLedger], Mapping[str, Any]]
    measured: list[dict[str, Any]] = field(default_factory=list, init=False)
    abandoned_flops: int = field(default=0, init=False)
    usage: Stopwatch = field(default_factory=Stopwatch, init=False)
    _predicted: int | None = field(default=None, init=False)

    @property
    def spent(self) -> bool:
        """Whether the budget is."""
        return len(self.measured) == len(self.points)

    def draw(self, step: int, ledger: FlopLedger) -> list[Batch]:
        """See `PrefixSource.draw`; no batches once the budget is spent.

        Raises:
            RuntimeError: the step before cost something else than was predicted.
        """
        done = ledger.marginal()
        if self._predicted not in (None, done):
            raise RuntimeError(f"step {step - 1}: the ledger holds {done} FLOPs, predicted were {self._predicted}")
        self.usage.lap()
        drawn = FlopLedger()
        batches = self.source.draw(step, drawn)
        after = done + drawn.marginal() + self._training_flops(batches, step)
        self.usage.lap()
        passed = [point for point in self.points[len(self.measured) :] if point < after]
        if passed:
            found = {"spent_flops": done, "steps": step, **self.usage.state(), **self.measure(step, ledger)}
            self.measured += [{"flops": point, **found} for point in passed]
            self.usage.skip()
        if self.spent:
            self.abandoned_flops = drawn.marginal()
            return []
        ledger.extend(drawn.rows)
        self._predicted = after
        return batches

    def _training_flops(self, batches: list[Batch], step: int) -> int:
        predicted = FlopLedger()
        for batch in batches:
            add_batch(predicted, self.student, self.objective, batch, step=step)
        return predicted.marginal()

    def use_window(self, completion_tokens: int) -> None:
        """See `PrefixSource.use_window`."""
        self.source.use_window(completion_tokens)

    def state(self) -> dict[str, Any]:
        """See `PrefixSource.state`."""
        return {"source": self.source.state(), "measured": self.measured, "usage": self.usage.state()}

    def restore(self, state: dict[str, Any]) -> None:
        """See `PrefixSource.restore`."""
        self.source.restore(state["source"])
        self.measured = list(state["measured"])
        self.usage.restore(state["usage"])

    def close(self) -> None:
        """See `PrefixSource.close`."""
        self.source.close()
