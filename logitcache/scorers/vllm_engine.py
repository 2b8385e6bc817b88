"""vLLM in this process as a teacher engine: continuous batching for both abilities, and both in one pass.

Guarantees: top-k, tails and entropies come from final hidden states and the checkpoint's own head, in float32, by the
same code as every other engine's (`select`); no dictionary of log-probabilities is ever built. Tokens are drawn with
the seeds and uniform numbers of the transformers engine. Scheduling is synchronous and prefix caching is off, so every
completion row is computed and the same call schedules the same batches.

Deliberately not here: several engines at a time in one process (vLLM's distributed state is the process's).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from logitcache.errors import UserError
from logitcache.records import FinishReason, Head, Origin, TeacherTargets, TokenSequence, sample_id_of
from logitcache.scorers.drawing import seed_of
from logitcache.scorers.fits import check_context, check_sequences
from logitcache.scorers.select import TorchHead, targets_of
from logitcache.scoring import Prompt, Sampling, TargetRequest


@dataclass(frozen=True, kw_only=True)
class _Request:
    """One run of tokens through the engine; hidden states are kept from `first_row` on, or not at all."""

    token_ids: Sequence[int]
    params: Any
    first_row: int | None


@dataclass(frozen=True, kw_only=True, eq=False)
class VLLMEngine:
    """A vLLM engine in this process as `Scorer`, `Generator` and both at once.

    Attributes:
        engine: vLLM's `LLMEngine`, made by `vllm_load.load_vllm_engine`.
        torch_head: the checkpoint's head, padding rows cut off.
        stop_ids: token ids that end a completion.
        tokenizer_fingerprint: goes into every sample id.
        context_tokens: the longest sequence the engine takes.
        tile_rows: rows of full-vocabulary logits that exist at once.
        on_sequences: called with the number of sequences that were just generated or scored.
    """

    engine: Any
    torch_head: TorchHead
    stop_ids: frozenset[int]
    tokenizer_fingerprint: str
    context_tokens: int
    origin: Origin = Origin.TEACHER
    tile_rows: int = 128
    on_sequences: Callable[[int], None] = lambda _: None

    @cached_property
    def head(self) -> Head:
        """The head as it is stored in a cache."""
        return self.torch_head.to_record()

    @property
    def vocab_size(self) -> int:
        """V, the number of real tokens."""
        return self.torch_head.weight.shape[0]

    def score(
        self, sequences: Sequence[TokenSequence], want: Sequence[TargetRequest]
    ) -> list[tuple[TeacherTargets, ...]]:
        """See `Scorer.score`: one prefill of all tokens but the last, which predicts nothing that is kept."""
        from vllm import SamplingParams

        check_sequences(sequences, vocab_size=self.vocab_size, context_tokens=self.context_tokens)
        params = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True, detokenize=False)
        scored = [sequence for sequence in sequences if sequence.completion_tokens]
        requests = [
            _Request(token_ids=sequence.token_ids[:-1].tolist(), params=params, first_row=sequence.first_row)
            for sequence in scored
        ]
        found = iter(self._selected(requests, lambda i, _: scored[i], want))
        empty = self.torch_head.weight.new_empty(0, self.torch_head.weight.shape[1])
        return [
            next(found)[1] if sequence.completion_tokens else self._targets(sequence, empty, want)
            for sequence in sequences
        ]

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[TokenSequence]:
        """See `Generator.generate`."""
        return [sequence for sequence, _ in self._generate(prompts, sampling, ())]

    def generate_scored(
        self, prompts: Sequence[Prompt], sampling: Sampling, want: Sequence[TargetRequest]
    ) -> list[tuple[TokenSequence, tuple[TeacherTargets, ...]]]:
        """Both in one pass: the targets are of the very states that the tokens were drawn from.

        They differ from those of `generate` and then `score` by the rounding between decoding and prefill.
        """
        return self._generate(prompts, sampling, want)

    def close(self) -> None:
        """Free the engine; it takes no further calls."""
        from vllm.distributed import cleanup_dist_env_and_memory

        self.engine.engine_core.shutdown()
        cleanup_dist_env_and_memory()

    def _generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, want: Sequence[TargetRequest]
    ) -> list[tuple[TokenSequence, tuple[TeacherTargets, ...]]]:
        for prompt in prompts:
            check_context(prompt.problem_id, len(prompt.token_ids) + sampling.max_new_tokens, self.context_tokens)
        drafts = [(prompt, number) for prompt in prompts for number in range(sampling.samples_per_problem)]
        requests = [self._draft(prompt, number, sampling, capture=bool(want)) for prompt, number in drafts]

        def finish(i: int, output: Any) -> TokenSequence:
            prompt, number = drafts[i]
            return self._sequence(prompt, seed_of(sampling, prompt.problem_id, number), output)

        return self._selected(requests, finish, want)

    def _selected(
        self,
        requests: Sequence[_Request],
        finish: Callable[[int, Any], TokenSequence],
        want: Sequence[TargetRequest],
    ) -> list[tuple[TokenSequence, tuple[TeacherTargets, ...]]]:
        """Run the requests and select targets beside the engine, in a thread that takes sequences as they finish."""
        pending: dict[int, tuple[TokenSequence, Future[tuple[TeacherTargets, ...]]]] = {}
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="selector") as selector:
            for i, output, hidden_CD in self._run(requests):
                sequence = finish(i, output)
                pending[i] = (sequence, selector.submit(self._targets, sequence, hidden_CD, want))
            return [(pending[i][0], pending[i][1].result()) for i in range(len(requests))]

    def _draft(self, prompt: Prompt, number: int, sampling: Sampling, *, capture: bool) -> _Request:
        from vllm import SamplingParams

        from logitcache.scorers.vllm_plugins import DRAW, DrawRequest

        seed = seed_of(sampling, prompt.problem_id, number)
        params = SamplingParams(
            temperature=0.0,  # the draw is made by our logits processor, which leaves greedy sampling one choice
            max_tokens=sampling.max_new_tokens,
            stop_token_ids=sorted(self.stop_ids),
            ignore_eos=True,  # `stop_token_ids` is the whole truth about stopping
            detokenize=False,
            extra_args={DRAW: DrawRequest(problem_id=prompt.problem_id, seed=seed, sampling=sampling)},
        )
        first_row = len(prompt.token_ids) - 1 if capture else None
        return _Request(token_ids=list(prompt.token_ids), params=params, first_row=first_row)

    def _run(self, requests: Sequence[_Request]) -> Iterator[tuple[int, Any, Tensor]]:
        """(index, output, hidden [C, D] or [0, 0]) of each request, as they finish."""
        names = [self._add(str(i), request) for i, request in enumerate(requests)]
        try:
            while self.engine.has_unfinished_requests():
                for output in self._step():
                    if not output.finished:
                        continue
                    i = int(output.request_id)
                    captured = requests[i].first_row is not None
                    hidden = self._worker("logitcache_take", names[i]) if captured else torch.empty(0, 0)
                    self.on_sequences(1)
                    yield i, output.outputs[0], hidden.to(self.torch_head.weight.device)
        finally:
            if self.engine.has_unfinished_requests():
                self.engine.abort_request(names, internal=True)
            with suppress(UserError):  # a dead engine said so already
                self._worker("logitcache_forget")

    def _add(self, name: str, request: _Request) -> str:
        internal: str = self.engine.add_request(name, {"prompt_token_ids": request.token_ids}, request.params)
        if request.first_row is not None:
            self._worker("logitcache_track", internal, request.first_row)
        return internal

    def _worker(self, method: str, *arguments: Any) -> Any:
        """What the first worker returns: its states after the final norm are whole, however the layers are divided."""
        with _at_work():
            return self.engine.collective_rpc(method, args=arguments)[0]

    def _step(self) -> list[Any]:
        with _at_work():
            outputs: list[Any] = self.engine.step()
        return outputs

    def _targets(
        self, sequence: TokenSequence, hidden_CD: Tensor, want: Sequence[TargetRequest]
    ) -> tuple[TeacherTargets, ...]:
        if not want:
            return ()
        with torch.inference_mode():
            return targets_of(sequence, hidden_CD, self.torch_head, self.head.fingerprint, want, self.tile_rows)

    def _sequence(self, prompt: Prompt, seed: int, output: Any) -> TokenSequence:
        token_ids = np.array([*prompt.token_ids, *output.token_ids], np.int32)
        prompt_tokens = len(prompt.token_ids)
        return TokenSequence(
            token_ids=token_ids,
            prompt_tokens=prompt_tokens,
            origin=self.origin,
            sample_id=sample_id_of(token_ids, prompt_tokens, self.tokenizer_fingerprint),
            problem_id=prompt.problem_id,
            finish_reason=FinishReason(output.finish_reason),
            seed=seed,
        )


@contextmanager
def _at_work() -> Iterator[None]:
    """What can go wrong inside the engine is one line."""
    from vllm.v1.engine.exceptions import EngineDeadError

    try:
        yield
    except (EngineDeadError, MemoryError, RuntimeError) as error:
        # RuntimeError is what torch's allocators raise, and what a worker of several raised in its own process.
        do = "check the memory it needs, then run the command again; what was committed stays"
        raise UserError("a step of the vLLM engine", f"it failed ({error})", do) from error
