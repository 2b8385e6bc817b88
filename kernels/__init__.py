"""Exact full-vocabulary divergences that never hold the vocabulary (see `kernels.api`).

Guarantees: importing this package imports torch and nothing heavier. `kernels` is also the name of a distribution that
transformers probes for, so neither triton nor transformers may be imported from here (a test holds this).
"""

from __future__ import annotations

from kernels.api import (
    Backend,
    default_backend,
    forward_kl,
    forward_kl_coarse,
    mixed_kl,
    mixed_kl_coarse,
    reverse_kl,
    reverse_kl_coarse,
    selected_log_probs,
)
from kernels.types import (
    DenseTargets,
    KLOutput,
    LinearHead,
    SampledTargets,
    SelectedOutput,
    Targets,
    TopKTargets,
    VocabShard,
)

__all__ = [
    "Backend",
    "DenseTargets",
    "KLOutput",
    "LinearHead",
    "SampledTargets",
    "SelectedOutput",
    "Targets",
    "TopKTargets",
    "VocabShard",
    "default_backend",
    "forward_kl",
    "forward_kl_coarse",
    "mixed_kl",
    "mixed_kl_coarse",
    "reverse_kl",
    "reverse_kl_coarse",
    "selected_log_probs",
]
