"""How much memory an action takes at its worst, as the operating system saw it (Linux).

Guarantees: counts every allocator, compiled code and libraries' workspaces included. Nothing else may allocate in the
process meanwhile.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from tools.bench.kernels_subjects import DTYPES, SUBJECTS, Shape, Work

STATUS = Path("/proc/self/status")
CLEAR = Path("/proc/self/clear_refs")


def _status_bytes(field: str) -> int:
    for line in STATUS.read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"{STATUS}: no {field}, needs Linux")


def peak_extra_bytes(action: Callable[[], object]) -> int:
    """Peak resident bytes during `action` above what was resident before; what it returns is dropped afterwards."""
    gc.collect()
    CLEAR.write_text("5")  # resets VmHWM to VmRSS: proc(5)
    before = _status_bytes("VmRSS")
    result = action()
    peak = _status_bytes("VmHWM")
    del result
    return peak - before


def main() -> None:
    """Print the peak extra bytes, beyond the gradients, of one subject; argv: subject, dtype, objective, T, V, D, D."""
    subject, dtype, objective, *sizes = sys.argv[1:]
    rows, vocab, student_width, teacher_width = map(int, sizes)
    shape = Shape(rows=rows, vocab=vocab, student_width=student_width, teacher_width=teacher_width)
    warm_up = Work.random(replace(shape, vocab=512), DTYPES[dtype])
    SUBJECTS[subject](warm_up, objective)  # libraries, compilers and thread pools; not what is measured
    work = Work.random(shape, DTYPES[dtype])
    peak = peak_extra_bytes(lambda: SUBJECTS[subject](work, objective))
    print(peak - work.gradient_bytes)


if __name__ == "__main__":
    main()
