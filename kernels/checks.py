"""One divergence to compute, and whether its parts fit together: checked before any work.

Guarantees: a `Call` that exists can be computed; every backend takes one and checks nothing again.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.types import DenseTargets, LinearHead, SampledTargets, Targets, TopKTargets
from kernels.validate import FLOATS, require, require_one_device, require_positive, require_tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class Call:
    """loss = forward_weight * KL(teacher, student) + (1 - forward_weight) * KL(student, teacher), per row.

    Attributes:
        student: the head that learns.
        targets: the teacher.
        forward_weight: 0..1.
        temperature: divides both sides' logits; finite and above 0.
        row_mask: bool[T] or None; rows that are false cost nothing and are 0.
        token_weight: float[T] or None, what the caller will multiply the loss of each row by, up to one constant. The
            head's gradient is accumulated for it in the forward pass; any other upstream gradient is as exact, but
            costs the logits a second time.
    """

    student: LinearHead
    targets: Targets
    forward_weight: float = 1.0
    temperature: float = 1.0
    row_mask: Tensor | None = None
    token_weight: Tensor | None = None

    def __post_init__(self) -> None:
        rows, teacher = self.student.rows, self.targets
        require_positive("temperature", self.temperature)
        require(0 <= self.forward_weight <= 1, "forward_weight", self.forward_weight, "0 to 1")
        require(teacher.rows == rows, "target rows", teacher.rows, f"the student's {rows}")
        for name, dtypes in (("row_mask", (torch.bool,)), ("token_weight", FLOATS)):
            value: Tensor | None = getattr(self, name)
            if value is not None:
                require_tensor(name, value, dtypes, (rows,))
                require_one_device(f"{name} and student", value, self.student.hidden)
        _require_fit(self.student, teacher, self.temperature)

    def active_rows(self) -> Tensor | None:
        """int64[A]: the rows to compute, or None for all of them."""
        if self.row_mask is None or bool(self.row_mask.all()):
            return None
        return self.row_mask.nonzero()[:, 0]


def _require_fit(student: LinearHead, teacher: Targets, temperature: float) -> None:
    """Vocabularies, devices and temperature fit the kind of target."""
    match teacher:
        case LinearHead():
            _require_same_vocabulary(student, teacher)
        case DenseTargets():
            _require_columns(student, teacher)
        case TopKTargets() | SampledTargets():
            require(temperature == 1, "temperature with targets kept at temperature 1", temperature, 1)
            _require_ids(student, teacher)


def _require_same_vocabulary(student: LinearHead, teacher: LinearHead) -> None:
    require_one_device("student and teacher", student.hidden, teacher.hidden)
    for name, theirs, ours in (
        ("vocabulary (valid rows; see vocab_size)", teacher.width, student.width),
        ("shard start", teacher.start, student.start),
        ("shard rows", teacher.local_width, student.local_width),
    ):
        require(theirs == ours, f"teacher {name}", theirs, f"the student's {ours}")


def _require_columns(student: LinearHead, teacher: DenseTargets) -> None:
    """As many columns as the student has valid local rows; more only where the student says which of them are valid."""
    require_one_device("student and teacher", student.hidden, teacher.values)
    have, want = teacher.values.shape[1], student.local_width
    padded = student.shard is None and student.vocab_size is not None and have > want
    require(have == want or padded, "teacher columns", have, f"the student's {want}")
    require(teacher.start == student.start, "teacher columns' start", teacher.start, f"the student's {student.start}")
    got, allowed = teacher.heaviest, teacher.heaviest_allowed
    require(got <= allowed, "DenseTargets.log_probs mass of a row", got, f"at most 1 ({allowed:.4g} with rounding)")


def _require_ids(student: LinearHead, teacher: TopKTargets | SampledTargets) -> None:
    require_one_device("student and teacher", student.hidden, teacher.ids)
    if not len(teacher.ids):
        return
    most, highest = int(teacher.row_splits.diff().max()), int(teacher.ids.max())
    require(most <= student.width, "k, the kept ids of a row,", most, f"at most the vocabulary, {student.width}")
    require(highest < student.width, "target id maximum", highest, f"below the vocabulary, {student.width}")
