"""A vLLM server as a teacher, for those who have an endpoint and no weights: token ids in, top-k out.

Guarantees: only what a server can give is given. Hidden states, every log-probability and draws from the full
distribution are refused, not replaced; so is an answer that puts mass on ids which are no tokens. A row's entropy needs
the full distribution too: it is NaN here, the one value of top-k targets that an endpoint cannot know.

Deliberately not here: our seeds' uniform numbers. The server draws by itself, reproducibly from the same seeds as long
as it is the same server.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from logitcache.errors import UserError
from logitcache.identity import tokenizer_fingerprint
from logitcache.records import Head, Origin, TokenSequence, TopKTargets, sample_id_of
from logitcache.scorers.answers import OddAnswer, Row, completion, top_rows
from logitcache.scorers.drawing import seed_of
from logitcache.scorers.endpoint import Endpoint
from logitcache.scorers.fits import check_context, check_sequences
from logitcache.scoring import Prompt, Sampling, TargetRequest, TopKRequest

_ROUNDING = 2.0**-16
"""Mass that a server's log-probabilities cannot tell from none (their float32 normalisation is off by about 1e-5): a
smaller tail is said to be this large."""

_Value = TypeVar("_Value")


@dataclass(frozen=True, kw_only=True, eq=False)
class HTTPEngine:
    """A served model as `Scorer` of top-k targets and as `Generator`.

    Attributes:
        endpoint: the server.
        vocab_size: real tokens, V.
        stop_ids: token ids that end a completion.
        tokenizer_fingerprint: goes into every sample id.
        context_tokens: the server's context. Scoring takes one token of it.
        on_sequences: called with the number of sequences that were just generated or scored.
    """

    endpoint: Endpoint
    vocab_size: int
    stop_ids: frozenset[int]
    tokenizer_fingerprint: str
    context_tokens: int
    origin: Origin = Origin.TEACHER
    on_sequences: Callable[[int], None] = lambda _: None

    @property
    def head(self) -> Head:
        """Raises UserError: a server shows no weights."""
        raise self._refusal("the output head")

    def score(self, sequences: Sequence[TokenSequence], want: Sequence[TargetRequest]) -> list[tuple[TopKTargets, ...]]:
        """See `Scorer.score`. Raises UserError for every request but `TopKRequest`."""
        requests = [self._top_k(request) for request in want]
        check_sequences(sequences, vocab_size=self.vocab_size, context_tokens=self.context_tokens - 1)
        scored = self.endpoint.for_all(sequences, lambda sequence: self._score(sequence, requests))
        return [self._counted(targets) for targets in scored]

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[TokenSequence]:
        """See `Generator.generate`."""
        for prompt in prompts:
            check_context(prompt.problem_id, len(prompt.token_ids) + sampling.max_new_tokens, self.context_tokens)
        drafts = [(prompt, number) for prompt in prompts for number in range(sampling.samples_per_problem)]
        completed = self.endpoint.for_all(drafts, lambda draft: self._complete(*draft, sampling))
        return [self._counted(sequence) for sequence in completed]

    def _counted(self, value: _Value) -> _Value:
        self.on_sequences(1)
        return value

    def _top_k(self, request: TargetRequest) -> TopKRequest:
        if not isinstance(request, TopKRequest):
            raise self._refusal(type(request).__name__.removesuffix("Request"))
        return request

    def _refusal(self, what: str) -> UserError:
        return UserError(
            f"{what} from {self.endpoint.shown}", "a server gives top-k and nothing else", "load the model in process"
        )

    def _score(self, sequence: TokenSequence, requests: Sequence[TopKRequest]) -> tuple[TopKTargets, ...]:
        if not sequence.completion_tokens:
            return tuple(_targets([], [], request) for request in requests)
        choice = self.endpoint.complete(
            {
                "prompt": sequence.token_ids.tolist(),
                "max_tokens": 1,
                "temperature": 0.0,
                "prompt_logprobs": max(request.max_k for request in requests),
            }
        )
        tokens = sequence.completion_ids.tolist()
        try:
            rows = top_rows(choice, tokens, prompt_tokens=sequence.prompt_tokens, vocab_size=self.vocab_size)
        except OddAnswer as odd:
            raise self._odd(f"scores for problem {sequence.problem_id}", odd) from odd
        return tuple(_targets(rows, tokens, request) for request in requests)

    def _odd(self, asked: str, odd: OddAnswer) -> UserError:
        return UserError(asked, f"{self.endpoint.shown} gave {odd}", "serve the model with a supported vLLM")

    def _complete(self, prompt: Prompt, number: int, sampling: Sampling) -> TokenSequence:
        seed = seed_of(sampling, prompt.problem_id, number)
        choice = self.endpoint.complete(
            {
                "prompt": list(prompt.token_ids),
                "max_tokens": sampling.max_new_tokens,
                "temperature": sampling.temperature,
                "top_p": sampling.top_p,
                "top_k": sampling.top_k or 0,
                "seed": seed,
                "stop_token_ids": sorted(self.stop_ids),
                "ignore_eos": True,  # `stop_token_ids` is the whole truth about stopping
                "return_token_ids": True,
            }
        )
        try:
            written, reason = completion(
                choice, vocab_size=self.vocab_size, max_tokens=sampling.max_new_tokens, stop_ids=self.stop_ids
            )
        except OddAnswer as odd:
            raise self._odd(f"a completion of problem {prompt.problem_id}", odd) from odd
        token_ids = np.array([*prompt.token_ids, *written], np.int32)
        return TokenSequence(
            token_ids=token_ids,
            prompt_tokens=len(prompt.token_ids),
            origin=self.origin,
            sample_id=sample_id_of(token_ids, len(prompt.token_ids), self.tokenizer_fingerprint),
            problem_id=prompt.problem_id,
            finish_reason=reason,
            seed=seed,
        )


def connect(endpoint: Endpoint, model_dir: Path, **options: Any) -> HTTPEngine:
    """An engine over a server, once it has answered in the right name; `options` as `HTTPEngine`.

    Args:
        endpoint: the server.
        model_dir: holds the served model's tokenizer and configuration; its weights are not needed.
        options: as `HTTPEngine`.

    Raises:
        UserError: the server is not there, serves another model, or the directory lacks a tokenizer.
    """
    from logitcache.scorers.hf import load_stop_ids, load_tokenizer

    tokenizer = load_tokenizer(model_dir)
    vocabulary = tokenizer.get_vocab()
    return HTTPEngine(
        endpoint=endpoint,
        vocab_size=max(vocabulary.values()) + 1,
        stop_ids=load_stop_ids(model_dir, tokenizer),
        tokenizer_fingerprint=tokenizer_fingerprint(vocabulary),
        context_tokens=endpoint.context_tokens(),
        **options,
    )


def _targets(rows: Sequence[Row], tokens: Sequence[int], request: TopKRequest) -> TopKTargets:
    kept = [_kept(row, request) for row in rows]
    counts = [len(ids) for ids, _ in kept]
    tails = [_tail_log_mass(log_probs) for _, log_probs in kept]
    realised = [log_probs[ids == token][0] for (ids, log_probs), token in zip(rows, tokens, strict=True)]
    return TopKTargets(
        ids=np.concatenate([np.zeros(0, np.int32), *(ids.astype(np.int32) for ids, _ in kept)]),
        log_probs=np.concatenate([np.zeros(0, np.float32), *(values.astype(np.float32) for _, values in kept)]),
        row_splits=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        tail_log_mass=np.array(tails, np.float32),
        token_log_prob=np.array(realised, np.float32),
        entropy=np.full(len(rows), np.nan, np.float32),
    )


def _kept(row: Row, request: TopKRequest) -> Row:
    """The rule of `TopKRequest` on a row that is sorted likeliest first; ids ascending."""
    ids, log_probs = row[0][: request.max_k], row[1][: request.max_k]
    probs = np.exp(log_probs)
    keep = probs >= request.min_probability
    if request.mass < 1:  # a peaked row's sum reaches 1 long before its last entry
        keep &= np.cumsum(probs) - probs < request.mass
    keep[0] = True
    order = np.argsort(ids[keep])
    return ids[keep][order], log_probs[keep][order]


def _tail_log_mass(log_probs: NDArray[np.float64]) -> float:
    return float(np.log(max(1.0 - np.exp(log_probs).sum(), _ROUNDING)))
