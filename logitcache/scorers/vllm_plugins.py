"""What runs inside vLLM: the capture of final hidden states, and the draw of each token.

Guarantees: a captured row is the state after the final norm at one absolute position of one request, whatever chunks,
batches and preemptions the scheduler chose; a token is drawn from its request's own uniform numbers by position, so
neither chunks nor neighbours move it; padding rows of the vocabulary are never drawn.

Uses two doors that vLLM leaves open to plug-ins (`worker_extension_cls`, `logits_processors`) and the one method that
its source names as the place to look at a forward pass (`GPUModelRunner._model_forward`, model runner V1).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates

from logitcache.errors import UserError
from logitcache.scorers.drawing import draw, uniform_of
from logitcache.scoring import Sampling

DRAW = "logitcache_draw"
"""Key of a request's `DrawRequest` in `SamplingParams.extra_args`."""
VOCAB_SIZE = "logitcache_vocab_size"
"""Key of the number of real tokens in vLLM's `additional_config`."""


@dataclass(frozen=True, kw_only=True)
class DrawRequest:
    """How one request draws its tokens."""

    problem_id: str
    seed: int
    sampling: Sampling


@dataclass(kw_only=True, eq=False)
class _Track:
    """The captured rows of one request: `chunks` are (first position, [R, D]) in the order computed."""

    first_row: int
    chunks: list[tuple[int, Tensor]] = field(default_factory=list)

    def rows(self) -> Tensor:
        """[C, D] from `first_row` on, without hole or repetition.

        A preempted request computes its positions again; what was computed first is kept, as that is what the tokens
        after it were drawn from.
        """
        kept, end = [], self.first_row
        for position, states_RD in self.chunks:
            if position > end:
                raise RuntimeError(f"hidden states of positions {end}..{position - 1} were never computed")
            kept.append(states_RD[end - position :])
            end = max(end, position + len(states_RD))
        return torch.cat(kept) if kept else torch.empty(0, 0)


class CaptureExtension:
    """Mixed into vLLM's worker: `logitcache_*` can be called through `collective_rpc`.

    Where a model is divided over several workers, each has the same states after the final norm: the first keeps them.
    """

    model_runner: Any
    rank: int

    def logitcache_install(self) -> None:
        """Look at every forward pass from now on."""
        runner = self.model_runner
        if not hasattr(runner, "_model_forward"):
            raise RuntimeError("this engine needs vLLM's model runner V1 (VLLM_USE_V2_MODEL_RUNNER=0)")
        forward, self._logitcache_tracks = runner._model_forward, {}

        def watched(*args: Any, **kwargs: Any) -> Any:
            output = forward(*args, **kwargs)
            if self._logitcache_tracks:
                _record(runner, output, self._logitcache_tracks)
            return output

        runner._model_forward = watched

    def logitcache_track(self, request_id: str, first_row: int) -> None:
        """Keep this request's states from row `first_row` on."""
        if self.rank == 0:
            self._logitcache_tracks[request_id] = _Track(first_row=first_row)

    def logitcache_take(self, request_id: str) -> Tensor | None:
        """The states kept of a request, [rows, D] on the CPU; forgets them. None from all workers but the first."""
        return self._logitcache_tracks.pop(request_id).rows() if self.rank == 0 else None

    def logitcache_forget(self) -> None:
        """Drop everything that was tracked."""
        self._logitcache_tracks.clear()

    _logitcache_tracks: dict[str, _Track]


def _record(runner: Any, hidden_ND: Tensor, tracks: dict[str, _Track]) -> None:
    """File the rows of one forward pass under the requests they belong to: one gather, one copy."""
    batch, starts = runner.input_batch, runner.query_start_loc.np
    pieces: list[tuple[_Track, int, int, int]] = []
    for i in range(batch.num_reqs):
        track = tracks.get(batch.req_ids[i])
        if track is None:
            continue
        computed, start, end = int(batch.num_computed_tokens_cpu[i]), int(starts[i]), int(starts[i + 1])
        skipped = max(0, track.first_row - computed)
        if start + skipped < end:
            pieces.append((track, computed + skipped, start + skipped, end))
    if not pieces:
        return
    index = np.concatenate([np.arange(start, end) for _, _, start, end in pieces])
    rows = hidden_ND.index_select(0, torch.from_numpy(index).to(hidden_ND.device)).cpu()
    offset = 0
    for track, position, start, end in pieces:
        track.chunks.append((position, rows[offset : offset + end - start]))
        offset += end - start


@dataclass(kw_only=True, eq=False)
class _Row:
    """A batch row that draws: its uniform numbers, and the list of its tokens so far (vLLM appends to it)."""

    request: DrawRequest
    uniform: NDArray[np.float64]
    token_ids: list[int]


class SeededDraws(LogitsProcessor):
    """Draws each token itself and leaves vLLM's greedy sampler no other choice."""

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        self._vocab_size = int(vllm_config.additional_config[VOCAB_SIZE])
        self._rows: dict[int, _Row] = {}

    def is_argmax_invariant(self) -> bool:
        """False: it decides the argmax."""
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Follow requests as they enter, leave and move between the rows of the batch."""
        process_dict_updates(self._rows, batch_update, _row)

    def apply(self, logits: Tensor) -> Tensor:
        """Raise the drawn token of each row to infinity, [B, V] in place."""
        for sampling, rows in self._by_sampling().items():
            index = torch.tensor(rows, device=logits.device)
            scores_RV = logits[index, : self._vocab_size]
            uniform = [self._rows[i].uniform[len(self._rows[i].token_ids)] for i in rows]
            self._check(scores_RV.amax(dim=-1), rows)
            logits[index, draw(scores_RV, uniform, sampling)] = torch.inf
        return logits

    def _by_sampling(self) -> dict[Sampling, list[int]]:
        groups: dict[Sampling, list[int]] = {}
        for i, row in sorted(self._rows.items()):
            groups.setdefault(row.request.sampling, []).append(i)
        return groups

    def _check(self, largest_R: Tensor, rows: list[int]) -> None:
        bad = ~torch.isfinite(largest_R)  # amax carries a NaN
        if bad.any():
            row = self._rows[rows[int(bad.nonzero()[0])]]
            raise UserError(
                f"a completion of problem {row.request.problem_id}",
                f"the teacher's logits are not finite at completion row {len(row.token_ids)}",
                "run it in float32 (--dtype float32), or check the teacher's weights",
            )


def _row(params: Any, prompt_ids: list[int] | None, token_ids: list[int]) -> _Row | None:
    request = (params.extra_args or {}).get(DRAW)
    if request is None:
        return None
    uniform = uniform_of(request.seed, request.sampling.max_new_tokens)
    return _Row(request=request, uniform=uniform, token_ids=token_ids)
