"""A vocabulary split over two gloo ranks gives what one rank with all of it gives."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import kernels
from kernels import DenseTargets, LinearHead, VocabShard
from kernels.types import Targets
from tests.kernels.cases import gradients, head, relative_error, targets_of, trainable

VOCAB, PADDED, ROWS = 37, 48, 13  # rank 1 holds 24 rows of which 13 are tokens
KINDS = ("hidden", "logits", "top_k", "sampled")


def shard_of(whole: LinearHead, rank: int) -> LinearHead:
    """The half of the padded rows that `rank` holds."""
    rows = slice(rank * PADDED // 2, (rank + 1) * PADDED // 2)
    bias = None if whole.bias is None else whole.bias[rows]
    return replace(whole, weight=whole.weight[rows], bias=bias, shard=VocabShard(start=rows.start))


def targets_shard(targets: Targets, rank: int) -> Targets:
    match targets:
        case LinearHead():
            return shard_of(targets, rank)
        case DenseTargets():
            start = rank * PADDED // 2
            return DenseTargets(logits=targets.values[:, start : min(start + PADDED // 2, VOCAB)], start=start)
    return targets  # top-k and samples are whole on every rank


def rank_main(rank: int, init: str) -> None:
    dist.init_process_group("gloo", init_method=init, rank=rank, world_size=2)
    torch.set_num_threads(1)
    student, teacher = head(ROWS, VOCAB, 8, 1, bias=True, padding=11), head(ROWS, VOCAB, 6, 2, padding=11)
    mask, upstream = torch.arange(ROWS) % 4 != 1, torch.linspace(-1, 2, ROWS)
    for kind in KINDS:
        targets = targets_of(kind, teacher)
        mix = 1.0 if kind == "sampled" else 0.3
        loss = kernels.mixed_kl_coarse if kind == "top_k" else kernels.mixed_kl
        for backend in ("chunked", "native"):
            whole, part = trainable(student), trainable(shard_of(student, rank))
            for h, t, name in ((whole, targets, "reference"), (part, targets_shard(targets, rank), backend)):
                function = loss if kind != "sampled" else kernels.forward_kl
                mixing = {} if kind == "sampled" else {"forward_weight": mix}
                out = function(h, t, backend=name, row_mask=mask, **mixing)  # type: ignore[arg-type,operator]
                (out.loss * upstream.to(out.loss.dtype)).sum().backward()
                if name == "reference":
                    truth = out
            assert relative_error(out.loss.detach(), truth.loss.detach()) < 2e-6
            assert relative_error(out.student_entropy, truth.student_entropy) < 2e-6
            got, expected = gradients(part), gradients(whole)
            rows = slice(rank * PADDED // 2, (rank + 1) * PADDED // 2)
            assert relative_error(got["hidden"], expected["hidden"]) < 1e-5
            for key in ("weight", "bias"):
                assert relative_error(got[key], expected[key][rows]) < 1e-5
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_equal_one(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(rank_main, args=(f"file://{tmp_path}/init",), nprocs=2)
