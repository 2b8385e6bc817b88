"""What work took beside FLOPs: seconds, and joules where the machine reports them.

Guarantees: joules are those of all processor packages as Linux counts them (powercap's `intel-rapl` zones, which AMD's
processors have too), whoever caused them; where no counter can be read they are None, never an estimate. A counter that
wrapped between two readings is put right, if it wrapped once.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

POWERCAP = Path("/sys/class/powercap")


@dataclass(kw_only=True)
class Stopwatch:
    """Adds up laps. Its state is what it has added up.

    Attributes:
        powercap: where the kernel keeps its energy counters.
        seconds: of all laps.
        joules: of all laps; None without counters.
    """

    powercap: Path = POWERCAP
    seconds: float = 0.0
    joules: float | None = None
    _since_s: float | None = field(default=None, init=False)
    _since_uj: dict[Path, int] = field(default_factory=dict, init=False)

    @classmethod
    def started(cls) -> Stopwatch:
        """One whose first lap begins now."""
        watch = cls()
        watch.skip()
        return watch

    def stopped(self) -> dict[str, Any]:
        """Its state after a last lap."""
        self.lap()
        return self.state()

    def lap(self) -> None:
        """Add what passed since the last lap or `skip`, if there was one."""
        before_s, before_uj = self._since_s, self._since_uj
        self.skip()
        if before_s is None or self._since_s is None:
            return
        self.seconds += self._since_s - before_s
        if before_uj and before_uj.keys() == self._since_uj.keys():
            self.joules = (self.joules or 0.0) + sum(
                _difference_uj(zone, before_uj[zone], now) / 1e6 for zone, now in self._since_uj.items()
            )

    def skip(self) -> None:
        """Add nothing of what passed since."""
        self._since_s, self._since_uj = time.perf_counter(), _counters_uj(self.powercap)

    def state(self) -> dict[str, Any]:
        """As JSON values."""
        return {"seconds": self.seconds, "joules": self.joules}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self.seconds, self.joules = state["seconds"], state["joules"]


def _counters_uj(powercap: Path) -> dict[Path, int]:
    """Of each package; a zone within a zone (`intel-rapl:0:1`) is counted in it. Reading may need privileges."""
    try:
        return {zone: int((zone / "energy_uj").read_text()) for zone in powercap.glob("intel-rapl:?")}
    except (OSError, ValueError):
        return {}


def _difference_uj(zone: Path, before: int, now: int) -> int:
    wraps_at = int((zone / "max_energy_range_uj").read_text()) if now < before else 0
    return now - before + wraps_at
