"""One student on several processes, as torchrun starts them: who is there, how sums are taken, how weights are sharded.

Guarantees: with one process nothing is communicated and no process group is needed. With several, weights, gradients
and the optimizer's moments are sharded by FSDP2 (`torch.distributed.fsdp.fully_shard`), and gradients are added over
ranks, not averaged: each rank's loss is its part of the mean over the whole step. A rank that fails leaves its reason
where the others find it.

Deliberately not here: a launcher, an elastic world, sharding a vocabulary (`kernels.VocabShard` can).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, redirect_stderr, suppress
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from logitcache.errors import UserError

_REASON = "logitcache/why-a-rank-ended"


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """Who trains together: `size` processes, of which this one is `rank`."""

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the one that writes files and speaks."""
        return self.rank == 0

    def gathered(self, values: Tensor) -> Tensor:
        """[size, ...]: every rank's `values`, in their order, on the CPU; they have one shape and dtype."""
        if self.size == 1:
            return values[None]
        mine = values.to("cuda" if dist.get_backend() == "nccl" else "cpu")
        found = mine.new_empty(self.size, *mine.shape)
        dist.all_gather_single(found, mine[None])
        return found.cpu()

    def agreed(self, answer: bool) -> bool:
        """The first rank's answer, on all of them; it has what it did for it behind it."""
        return bool(self.gathered(torch.tensor(answer))[0])


ALONE = Ranks()
"""One process, and no process group."""


@contextmanager
def joined() -> Iterator[Ranks]:
    """Join the ranks that torchrun started; without torchrun, or with one process, this one is alone.

    Ranks but the first say nothing on standard error while they work.

    Raises:
        UserError: another rank has failed: with its reason, if it left one.
    """
    if _launched() == 1:
        yield ALONE
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    store, rank, size = next(dist.rendezvous("env://"))
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=dist.PrefixStore("ranks", store), rank=rank, world_size=size)
    with open(os.devnull, "w") as nowhere, redirect_stderr(sys.stderr if rank == 0 else nowhere):
        try:
            yield Ranks(rank=rank, size=size)
        except BaseException as error:
            if not is_left_alone(error):
                with suppress(dist.DistError):  # torchrun itself may have ended
                    store.set(_REASON, f"rank {rank}: {str(error) or type(error).__name__}")
                raise
            reason = "it left no reason: was it killed?"
            with suppress(dist.DistError):
                if store.check([_REASON]):
                    reason = store.get(_REASON).decode()
            do = "mend that, then run the same command again"
            raise UserError(f"training on {size} ranks", f"another rank has ended ({reason})", do) from error
    dist.destroy_process_group()


def require_alone(command: str) -> None:
    """Raise UserError if torchrun started several of this process: for commands that would all write the same files."""
    if _launched() > 1:
        raise UserError(f"trainer {command} under torchrun", f"{_launched()} processes", "start it without torchrun")


def _launched() -> int:
    """How many processes torchrun started; 1 without it."""
    return int(os.environ["WORLD_SIZE"]) if dist.is_torchelastic_launched() else 1


def is_left_alone(error: BaseException) -> bool:
    """Whether a collective failed for want of a partner; gloo has no class of its own for that."""
    told = isinstance(error, RuntimeError) and any(words in str(error) for words in ("by peer", "Timed out waiting"))
    return told or isinstance(error, dist.DistError)


class Body(nn.Module):
    """A causal language model up to the state after its final norm, as one module that FSDP2 can gather at its start.

    Attributes:
        model: whole, its head included, so that a head tied to the embedding is sharded with it.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, **inputs: Any) -> Tensor:
        """float[1, T, D]. Weights outside the layers stay gathered behind it, for the head's products."""
        states: Tensor = self.model.get_decoder()(**inputs).last_hidden_state
        return states


def shard(model: Any, ranks: Ranks) -> Body:
    """Shard a model in place over all ranks: each layer by itself, embedding, norm and head together.

    While a step runs, every rank holds the layer at work, and the embedding and head with their gradients, whole.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(model.device.type, (ranks.size,))
    body = Body(model)
    layers = [fully_shard(layer, mesh=mesh) for layer in model.get_decoder().layers]
    for module in (*layers, fully_shard(body, mesh=mesh, reshard_after_forward=False)):
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # gloo knows no scaled sum
    return body


def whole(tensor: Any) -> Tensor:
    """A sharded tensor gathered from all ranks, which all must ask for it; any other as it is."""
    gathered: Tensor = tensor.full_tensor() if _is_sharded(tensor) else tensor
    return gathered


def collected(tensors: Iterable[tuple[str, Tensor]], ranks: Ranks) -> dict[str, Tensor]:
    """Tensors by name; of sharded ones the first rank gets them whole, in its CPU's memory, the others nothing.

    All ranks must ask for it, in the same order.
    """
    if ranks.size == 1:
        return {name: tensor.contiguous() for name, tensor in tensors}
    found: dict[str, Tensor] = {}
    for name, tensor in tensors:
        gathered = whole(tensor)  # one after another: no rank holds the whole model on its device
        if ranks.first:
            found[name] = gathered.contiguous().cpu()
    return found


def like(tensor: Any, value: Tensor) -> Tensor:
    """`value`, the same on all ranks, sharded as `tensor` is."""
    if not _is_sharded(tensor):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(tensor.device), tensor.device_mesh, tensor.placements, src_data_rank=None)


def _is_sharded(tensor: Any) -> bool:
    """Whether it is a DTensor, whose module takes half a second to import."""
    return hasattr(tensor, "full_tensor")
