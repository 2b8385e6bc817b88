"""Bad input is refused in one line, with what was got and what was expected, before any work."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

import kernels
from kernels import DenseTargets, LinearHead, SampledTargets, VocabShard
from kernels.native import build
from tests.kernels.cases import head, log_probs_of, sampled, targets_of, top_k

STUDENT, TEACHER = head(4, 10, 6, 0), head(4, 10, 8, 1)
INF, NAN = float("inf"), float("nan")
TOP = top_k(log_probs_of(TEACHER), [3] * 4)


def tensors(**changes: object) -> Callable[[], object]:
    return lambda: replace(TOP, **changes)  # type: ignore[arg-type]


def dense(last: torch.Tensor) -> Callable[[], object]:
    """A student against rows of mass 1, but for the last entry of the last of them, otherwise 0.1."""
    log_probs = torch.full((4, 10), 0.1).log()
    log_probs[-1, -1] = last
    return lambda: kernels.forward_kl(STUDENT, DenseTargets(log_probs=log_probs))


def sharded(whole: LinearHead, start: int) -> LinearHead:
    return replace(whole, shard=VocabShard(start=start), vocab_size=30)


BAD: dict[str, tuple[Callable[[], object], str]] = {
    "width": (lambda: LinearHead(hidden=torch.zeros(2, 3), weight=torch.zeros(5, 4)), r"float32\[5, 4\].*\[\*, 3\]"),
    "dtype": (lambda: LinearHead(hidden=torch.zeros(2, 3).int(), weight=torch.zeros(5, 3)), "got int32"),
    "device": (
        lambda: LinearHead(hidden=torch.zeros(2, 3), weight=torch.zeros(5, 3, device="meta")),
        "got cpu and meta, expected one device",
    ),
    "bias": (lambda: replace(STUDENT, bias=torch.zeros(9)), r"bias: got float32\[9\].*\[10\]"),
    "vocab_size": (lambda: replace(STUDENT, vocab_size=11), "got 11, expected 1 to the 10 rows"),
    "soft cap": (lambda: replace(STUDENT, soft_cap=0.0), "soft_cap: got 0.0"),
    "soft cap infinite": (lambda: replace(STUDENT, soft_cap=INF), "soft_cap: got inf"),
    "scale NaN": (lambda: replace(STUDENT, scale=NAN), "scale: got nan"),
    "fingerprint": (lambda: replace(TEACHER, fingerprint="aa", hidden_fingerprint="bb"), "got aa, expected bb"),
    "rows": (lambda: kernels.forward_kl(STUDENT, head(5, 10, 6, 1)), "target rows: got 5, expected the student's 4"),
    "vocabulary": (lambda: kernels.forward_kl(STUDENT, head(4, 11, 6, 1)), "got 11, expected the student's 10"),
    "columns": (
        lambda: kernels.forward_kl(STUDENT, DenseTargets(logits=torch.zeros(4, 12))),
        "teacher columns: got 12, expected the student's 10",
    ),
    "temperature 0": (lambda: kernels.forward_kl(STUDENT, TEACHER, temperature=0.0), "temperature: got 0.0"),
    "temperature -1": (lambda: kernels.reverse_kl(STUDENT, TEACHER, temperature=-1.0), "temperature: got -1.0"),
    "temperature NaN": (lambda: kernels.forward_kl(STUDENT, TEACHER, temperature=NAN), "temperature: got nan"),
    "temperature infinite": (lambda: kernels.forward_kl(STUDENT, TEACHER, temperature=INF), "temperature: got inf"),
    "selected temperature": (
        lambda: kernels.selected_log_probs(STUDENT, torch.zeros(4).long(), temperature=INF),
        "temperature: got inf",
    ),
    "tempered tail": (lambda: kernels.forward_kl_coarse(STUDENT, TOP, temperature=2.0), "got 2.0, expected 1"),
    "teacher device": (
        lambda: kernels.forward_kl(STUDENT, DenseTargets(logits=torch.zeros(4, 10, device="meta"))),
        "student and teacher device: got cpu and meta, expected one device",
    ),
    "shard rows": (
        lambda: kernels.forward_kl(sharded(STUDENT, 0), sharded(replace(TEACHER, weight=TEACHER.weight[:8]), 0)),
        "teacher shard rows: got 8, expected the student's 10",
    ),
    "shard start": (
        lambda: kernels.forward_kl(sharded(STUDENT, 0), sharded(TEACHER, 10)),
        "teacher shard start: got 10, expected the student's 0",
    ),
    "shard of unknown vocabulary": (
        lambda: replace(STUDENT, shard=VocabShard(start=0)),
        "sharded LinearHead.vocab_size: got None",
    ),
    "mix": (lambda: kernels.mixed_kl(STUDENT, TEACHER, forward_weight=1.5), "forward_weight: got 1.5"),
    "log-prob above 0": (tensors(log_probs=torch.full((12,), 0.5)), "log_probs maximum: got 0.5"),
    "log-prob NaN": (tensors(log_probs=torch.full((12,), NAN)), "log_probs maximum: got nan"),
    "dense log-prob NaN": (dense(torch.tensor(NAN)), "mass of a row: got nan, expected at most 1"),
    "tail above 0": (tensors(tail_log_mass=torch.full((4,), 0.1)), "tail_log_mass maximum"),
    "mass above 1": (tensors(log_probs=torch.full((12,), -0.1)), "mass: got"),
    "dense log-prob above 0": (dense(torch.tensor(0.01)), "mass of a row: got 1.9"),
    "dense mass above 1": (dense(torch.tensor(0.102).log()), r"mass of a row: got 1.002.*, expected at most 1 \(1.001"),
    "dense neither": (lambda: DenseTargets(), "expected one of the two"),
    "id too large": (tensors(ids=TOP.ids + 10), ""),
    "ids repeated": (tensors(ids=torch.zeros(12, dtype=torch.int32)), "repeated or descending"),
    "splits": (tensors(row_splits=torch.tensor([0, 3, 6, 9, 11])), "row_splits ends: got 0 and 11, expected 0 and 12"),
    "no draw": (
        lambda: SampledTargets(
            ids=torch.tensor([1]), counts=torch.tensor([1]), row_splits=torch.tensor([0, 0, 1]), entropy=torch.zeros(2)
        ),
        "draws in a row: got 0",
    ),
    "mask": (lambda: kernels.forward_kl(STUDENT, TEACHER, row_mask=torch.ones(4)), "row_mask: got float32"),
    "coarse as exact": (lambda: kernels.forward_kl(STUDENT, TOP), "got TopKTargets"),  # type: ignore[arg-type]
    "samples in reverse": (
        lambda: kernels.reverse_kl(STUDENT, targets_of("sampled", TEACHER)),  # type: ignore[arg-type]
        "got SampledTargets",
    ),
    "exact as coarse": (lambda: kernels.reverse_kl_coarse(STUDENT, TEACHER), "got LinearHead"),  # type: ignore[arg-type]
    "backend": (lambda: kernels.forward_kl(STUDENT, TEACHER, backend="fast"), "got 'fast'"),  # type: ignore[arg-type]
    "float64 natively": (
        lambda: kernels.forward_kl(head(4, 10, 6, 0, dtype=torch.float64), TEACHER, backend="native"),
        "float32 or bfloat16",
    ),
    "token id negative": (lambda: kernels.selected_log_probs(STUDENT, torch.full((4,), -1)), "minimum: got -1"),
    "token id too large": (lambda: kernels.selected_log_probs(STUDENT, torch.full((4,), 10)), "maximum: got 10"),
    "token ids": (lambda: kernels.selected_log_probs(STUDENT, torch.zeros(3).long()), r"int64\[3\].*\[4\]"),
}


@pytest.mark.parametrize("name", BAD)
def test_refused_in_one_line(name: str) -> None:
    action, message = BAD[name]
    if name == "id too large":
        targets = action()
        action = lambda: kernels.forward_kl_coarse(STUDENT, targets)  # type: ignore[arg-type]  # noqa: E731
        message = "target id maximum: got .*, expected below the vocabulary, 10"
    with pytest.raises(ValueError, match=message) as caught:
        action()
    assert "\n" not in str(caught.value)


def test_k_above_the_vocabulary() -> None:
    wide = top_k(log_probs_of(head(4, 12, 6, 1)), [12] * 4)
    with pytest.raises(ValueError, match="k, the kept ids of a row,: got 12, expected at most the vocabulary, 10"):
        kernels.forward_kl_coarse(STUDENT, wide)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dense_log_probs_may_be_rounded_and_their_mass_is_added_up_once(dtype: torch.dtype) -> None:
    """Even log-probabilities that all round the same way: log(1 / 128,256) is 0.012 above itself in bfloat16."""
    vocab = 128_256
    student = head(9, vocab, 4, 0)
    targets = DenseTargets(log_probs=torch.full((9, vocab), 1 / vocab).log().to(dtype))
    kernels.forward_kl(student, targets)
    assert (targets.heaviest > 1.01) == (dtype == torch.bfloat16)
    assert vars(targets)["heaviest"] == targets.heaviest


def test_matching_fingerprints_and_valid_samples_are_accepted() -> None:
    replace(TEACHER, fingerprint="aa", hidden_fingerprint="aa")
    kernels.forward_kl(STUDENT, sampled(log_probs_of(TEACHER), 5))


def test_no_compiler_is_an_error_that_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    build.library.cache_clear()
    with pytest.raises(build.NativeUnavailableError, match=r"no C\+\+ compiler .* pass backend='chunked'"):
        kernels.forward_kl(STUDENT, TEACHER)
    monkeypatch.undo()
    kernels.forward_kl(STUDENT, TEACHER)


def test_importing_the_package_stays_light_and_leaves_transformers_alone() -> None:
    """`kernels` is also a distribution that transformers probes for: both must import side by side."""
    code = (
        "import sys, kernels; assert not {'triton', 'transformers', 'logitcache', 'trainer'} & set(sys.modules);"
        "import transformers; transformers.AutoConfig; from transformers import PreTrainedModel"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
