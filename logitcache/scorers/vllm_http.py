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
from logitcache.records import FinishReason, Head, Origin, TokenSequence, TopKTargets, sample_id_of
from logitcache.scorers.drawing import seed_of
from logitcache.scorers.endpoint import Endpoint
from logitcache.scorers.fits import check_context, check_sequences
from logitcache.scoring import Prompt, Sampling, TargetRequest, TopKRequest

_ROUNDING = 2.0**-16
"""Mass that a server's log-probabilities cannot tell from none (their float32 normalisation is off by about 1e-5): a
smaller tail is said to be this large."""


_Value = TypeVar("_Value")
_Row = tuple[NDArray[np.int64], NDArray[np.float64]]
"""Ids and log-probabilities of one position, likeliest first."""


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
        rows = choice.get("prompt_logprobs")
        if not isinstance(rows, list) or len(rows) != len(sequence):
            raise self._nonsense(sequence, f"{len(rows) if isinstance(rows, list) else 'no'} rows of log-probabilities")
        tokens = sequence.completion_ids.tolist()
        parsed = [self._row(sequence, row) for row in rows[sequence.prompt_tokens :]]
        for (ids, _), token in zip(parsed, tokens, strict=True):
            if token not in ids:
                raise self._nonsense(sequence, f"no log-probability of token {token}")
        return tuple(_targets(parsed, tokens, request) for request in requests)

    def _row(self, sequence: TokenSequence, row: dict[str, Any]) -> _Row:
        """Ids and log-probabilities of one position, likeliest first, the realised token among them."""
        ids = np.array([int(ident) for ident in row], np.int64)
        log_probs = np.array([entry["logprob"] for entry in row.values()], np.float64)
        if not np.isfinite(log_probs).all():
            raise self._nonsense(sequence, "log-probabilities that are not finite")
        if ids.max() >= self.vocab_size:
            raise self._nonsense(sequence, f"probability of id {ids.max()}, beyond the {self.vocab_size} tokens")
        order = np.lexsort((ids, -log_probs))
        return ids[order], log_probs[order]

    def _nonsense(self, sequence: TokenSequence, found: str) -> UserError:
        return UserError(
            f"scores for problem {sequence.problem_id}", f"{self.endpoint.shown} gave {found}", "score in process"
        )

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
        if not choice.get("token_ids"):
            raise UserError(
                f"a completion of problem {prompt.problem_id}",
                f"{self.endpoint.shown} gave no token ids",
                "serve the model with a vLLM that knows return_token_ids",
            )
        token_ids = np.array([*prompt.token_ids, *choice["token_ids"]], np.int32)
        return TokenSequence(
            token_ids=token_ids,
            prompt_tokens=len(prompt.token_ids),
            origin=self.origin,
            sample_id=sample_id_of(token_ids, len(prompt.token_ids), self.tokenizer_fingerprint),
            problem_id=prompt.problem_id,
            finish_reason=FinishReason(choice["finish_reason"]),
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


def _targets(rows: Sequence[_Row], tokens: Sequence[int], request: TopKRequest) -> TopKTargets:
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


def _kept(row: _Row, request: TopKRequest) -> _Row:
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
