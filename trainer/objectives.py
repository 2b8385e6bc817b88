"""What is minimised: a per-token divergence, chosen by what is known of the teacher.

Guarantees: losses are per token, in nats, unreduced; the division by a token count happens in `token_mean` and nowhere
else; targets that cannot give the divergence asked for are refused, never approximated.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

import kernels
from kernels import DenseTargets, KLOutput, LinearHead, SampledTargets, Targets, TopKTargets
from logitcache.errors import UserError

Backend = Literal["reference", "chunked", "native", "triton"]


@dataclass(frozen=True, kw_only=True)
class Objective:
    """forward_weight * KL(teacher, student) + (1 - forward_weight) * KL(student, teacher).

    Attributes:
        forward_weight: 1 forward, 0 reverse, between them a linear mix (arXiv 2605.16826).
        temperature: divides both sides' logits.
        backend: of `kernels`; None picks by device.
    """

    forward_weight: float
    temperature: float = 1.0
    backend: Backend | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.forward_weight <= 1:
            raise UserError("a forward weight of 0 to 1", f"got {self.forward_weight}", "1 is forward KL, 0 reverse KL")
        if not self.temperature > 0:
            raise UserError("a temperature above 0", f"got {self.temperature}", "1 is what the paper uses")

    def __call__(self, student: LinearHead, targets: Targets) -> KLOutput:
        """The divergence of each row; coarse for top-k targets, exact for hidden states and full vocabularies.

        Raises:
            UserError: sampled targets and anything but forward KL.
        """
        match targets:
            case LinearHead() | DenseTargets():
                return kernels.mixed_kl(student, targets, forward_weight=self.forward_weight, **self._how)
            case TopKTargets():
                return kernels.mixed_kl_coarse(student, targets, forward_weight=self.forward_weight, **self._how)
            case SampledTargets():
                if self.forward_weight != 1:
                    found = "sampled targets, which say nothing of it"
                    raise UserError("reverse KL", found, "train from hidden states, or use forward weight 1")
                return kernels.forward_kl(student, targets, **self._how)

    @property
    def _how(self) -> dict[str, Any]:
        return {"temperature": self.temperature, "backend": self.backend}


def token_mean(loss_R: Tensor, step_rows: int) -> Tensor:
    """A micro-batch's part of the mean over all completion tokens of the step: summed, divided once."""
    return loss_R.sum() / step_rows
