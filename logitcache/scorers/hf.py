"""transformers as a teacher engine: the embedded default for generating and scoring.

Guarantees: a sequence's randomness comes from its own seed (sampling seed, problem, sample number), so what is drawn
does not depend on its neighbours in a batch beyond the rounding of the arithmetic; finished rows leave the batch; the
language-model head is applied to the rows that need it and in tiles, never to a whole batch of prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, DynamicCache, GenerationConfig

from logitcache.console import quiet_transformers
from logitcache.errors import UserError, require
from logitcache.records import FinishReason, Head, Origin, TeacherTargets, TokenSequence, sample_id_of
from logitcache.scorers.drawing import draw, seed_of, uniform_of
from logitcache.scorers.fits import check_context, check_sequences
from logitcache.scorers.select import TorchHead, targets_of
from logitcache.scoring import DTYPES, Prompt, Sampling, TargetRequest


@dataclass(frozen=True, kw_only=True, eq=False)
class HFEngine:
    """A causal language model of transformers as `Scorer` and `Generator`.

    Attributes:
        model: any `AutoModelForCausalLM` whose head is a linear layer (with bias, scale or soft-cap).
        vocab_size: real tokens; rows of the head beyond it are padding and are cut off here, once.
        stop_ids: token ids that end a completion.
        tokenizer_fingerprint: goes into every sample id.
        origin: who a completion of this engine is said to be written by.
        batch_size: sequences decoded together; batch_tokens: tokens scored together.
        autocast: dtype to compute in when the weights are kept in another; None computes in the weights' own.
        on_sequences: called with the number of sequences that were just generated or scored.
    """

    model: Any
    vocab_size: int
    stop_ids: frozenset[int]
    tokenizer_fingerprint: str
    origin: Origin = Origin.TEACHER
    batch_size: int = 64
    batch_tokens: int = 8192
    tile_rows: int = 128
    autocast: torch.dtype | None = None
    on_sequences: Callable[[int], None] = lambda _: None

    @cached_property
    def torch_head(self) -> TorchHead:
        """The head's tensors, padding rows cut off."""
        layer, config = self.model.get_output_embeddings(), self.model.config
        scale = getattr(config, "logit_scale", None) or 1.0 / (getattr(config, "logits_scaling", None) or 1.0)
        return TorchHead(
            weight=layer.weight.detach()[: self.vocab_size],
            bias=None if layer.bias is None else layer.bias.detach()[: self.vocab_size],
            soft_cap=getattr(config, "final_logit_softcapping", None),
            scale=float(scale),
        )

    @cached_property
    def head(self) -> Head:
        """The head as it is stored in a cache."""
        return self.torch_head.to_record()

    def score(
        self, sequences: Sequence[TokenSequence], want: Sequence[TargetRequest]
    ) -> list[tuple[TeacherTargets, ...]]:
        """See `Scorer.score`. Sequences of like length share a batch; rows after a sequence's end are never kept."""
        check_sequences(sequences, vocab_size=self.vocab_size, context_tokens=self._context_tokens)
        results: dict[int, tuple[TeacherTargets, ...]] = {}
        for batch in _length_batches([len(sequence) - 1 for sequence in sequences], self.batch_tokens):
            states = self._hidden([sequences[i] for i in batch])
            for i, hidden_CD in zip(batch, states, strict=True):
                results[i] = targets_of(
                    sequences[i], hidden_CD, self.torch_head, self.head.fingerprint, want, self.tile_rows
                )
            self.on_sequences(len(batch))
        return [results[i] for i in range(len(sequences))]

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[TokenSequence]:
        """See `Generator.generate`."""
        for prompt in prompts:
            check_context(prompt.problem_id, len(prompt.token_ids) + sampling.max_new_tokens, self._context_tokens)
        drafts = [
            _Draft.start(prompt, sampling, number)
            for prompt in prompts
            for number in range(sampling.samples_per_problem)
        ]
        by_length = sorted(drafts, key=lambda draft: len(draft.prompt.token_ids))
        for start in range(0, len(by_length), self.batch_size):
            self._complete(by_length[start : start + self.batch_size], sampling)
        return [self._sequence(draft) for draft in drafts]

    def _hidden(self, sequences: Sequence[TokenSequence]) -> list[Tensor]:
        """The C completion rows' states of each sequence, [C, D] after the final norm.

        The last token of a sequence is not run: it predicts nothing that is kept.
        """
        longest = max(1, *(len(sequence) - 1 for sequence in sequences))
        ids = np.zeros((len(sequences), longest), np.int64)
        for row, sequence in zip(ids, sequences, strict=True):
            row[: len(sequence) - 1] = sequence.token_ids[:-1]
        with torch.no_grad(), self._precision():
            # Right padding under a causal mask: no real row sees a padded one, so no mask is needed.
            hidden_BND = self._body(input_ids=torch.from_numpy(ids).to(self.model.device)).last_hidden_state
        return [
            hidden_ND[sequence.first_row : len(sequence) - 1]
            for hidden_ND, sequence in zip(hidden_BND, sequences, strict=True)
        ]

    def _complete(self, drafts: list[_Draft], sampling: Sampling) -> None:
        """Decode a batch to its end; rows that finish are dropped once they are an eighth of the batch."""
        device, cache = self.model.device, DynamicCache(config=self.model.config)
        ids, mask = _left_padded([draft.prompt.token_ids for draft in drafts], device)
        with torch.no_grad(), self._precision():
            while True:
                positions = (mask.cumsum(dim=1) - 1).clamp_(min=0)[:, -ids.shape[1] :]
                states = self._body(
                    input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
                )
                uniform = [draft.uniform[len(draft.token_ids)] if not draft.reason else 0.0 for draft in drafts]
                problems = [draft.prompt.problem_id for draft in drafts]
                tokens = draw(self.torch_head.log_probs(states.last_hidden_state[:, -1]), uniform, sampling, problems)
                for draft, token in zip(drafts, tokens.tolist(), strict=True):
                    draft.append(token, self.stop_ids, sampling.max_new_tokens)
                running = [i for i, draft in enumerate(drafts) if not draft.reason]
                if not running:
                    break
                ids, mask = tokens[:, None], torch.cat([mask, mask.new_ones(len(drafts), 1)], dim=1)
                if len(drafts) - len(running) >= max(1, len(drafts) // 8):
                    self.on_sequences(len(drafts) - len(running))
                    keep = torch.tensor(running, device=device)
                    ids, mask, drafts = ids[keep], mask[keep], [drafts[i] for i in running]
                    cache.batch_select_indices(keep)
        self.on_sequences(len(drafts))

    @property
    def _body(self) -> Any:
        return self.model.get_decoder()

    def _precision(self) -> AbstractContextManager[Any]:
        if self.autocast is None:
            return nullcontext()
        return torch.autocast(self.model.device.type, dtype=self.autocast)

    def _sequence(self, draft: _Draft) -> TokenSequence:
        token_ids = np.array([*draft.prompt.token_ids, *draft.token_ids], np.int32)
        prompt_tokens = len(draft.prompt.token_ids)
        return TokenSequence(
            token_ids=token_ids,
            prompt_tokens=prompt_tokens,
            origin=self.origin,
            sample_id=sample_id_of(token_ids, prompt_tokens, self.tokenizer_fingerprint),
            problem_id=draft.prompt.problem_id,
            finish_reason=draft.reason or FinishReason.LENGTH,
            seed=draft.seed,
        )

    @property
    def _context_tokens(self) -> int | None:
        return getattr(self.model.config, "max_position_embeddings", None)


@dataclass(kw_only=True, eq=False)
class _Draft:
    """A completion under way: its own seed and the uniform number of each of its steps."""

    prompt: Prompt
    seed: int
    uniform: np.ndarray
    token_ids: list[int]
    reason: FinishReason | None = None

    @classmethod
    def start(cls, prompt: Prompt, sampling: Sampling, number: int) -> _Draft:
        seed = seed_of(sampling, prompt.problem_id, number)
        return cls(prompt=prompt, seed=seed, uniform=uniform_of(seed, sampling.max_new_tokens), token_ids=[])

    def append(self, token: int, stop_ids: frozenset[int], max_new_tokens: int) -> None:
        if self.reason:
            return
        self.token_ids.append(token)
        if token in stop_ids:
            self.reason = FinishReason.STOP
        elif len(self.token_ids) >= max_new_tokens:
            self.reason = FinishReason.LENGTH


def load_engine(model_dir: Path, *, dtype: str = "bfloat16", device: str | None = None, **options: Any) -> HFEngine:
    """A model directory as an engine in bfloat16 or float32; `options` as `HFEngine`.

    It runs on `device`, or else on the GPU if torch sees one.

    Raises:
        UserError: an unknown dtype, or a model that transformers cannot load as a causal language model, or that does
            not fit into memory.
    """
    require(dtype in DTYPES, f"a dtype, {' or '.join(DTYPES)}", dtype)
    tokenizer = load_tokenizer(model_dir)
    quiet_transformers()
    try:
        model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=getattr(torch, dtype), use_safetensors=True)
        model = model.eval().to(torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu")))
    except (OSError, ValueError, KeyError, MemoryError, RuntimeError) as error:  # torch's allocators raise the last
        raise UserError(
            f"a causal language model in {model_dir.name}",
            f"cannot be loaded ({error})",
            "check the directory and the memory it needs",
        ) from error
    return engine_for(model, tokenizer, **options)


def engine_for(model: Any, tokenizer: Any, **options: Any) -> HFEngine:
    """An engine over a model that is already in memory (a student between two steps, say)."""
    from logitcache.identity import tokenizer_fingerprint

    vocabulary = tokenizer.get_vocab()
    return HFEngine(
        model=model,
        vocab_size=min(max(vocabulary.values()) + 1, model.config.get_text_config().vocab_size),
        stop_ids=stop_ids_of(model.generation_config, tokenizer),
        tokenizer_fingerprint=tokenizer_fingerprint(vocabulary),
        **options,
    )


def engine_identity() -> dict[str, str]:
    """The engine and its versions, which decide the rounding of every value."""
    return {"name": "transformers", "version": transformers.__version__, "torch": torch.__version__}


def load_tokenizer(model_dir: Path) -> Any:
    """The tokenizer of a model directory."""
    try:
        return AutoTokenizer.from_pretrained(model_dir)
    except (OSError, ValueError) as error:
        raise UserError(
            f"a tokenizer in {model_dir.name}", f"cannot be loaded ({error})", "save the tokenizer beside the model"
        ) from error


def stop_ids_of(generation_config: Any, tokenizer: Any) -> frozenset[int]:
    """Ids that end a completion: those of the generation config and the tokenizer's end-of-sequence token."""
    configured = generation_config.eos_token_id
    ids = [] if configured is None else [configured] if isinstance(configured, int) else list(configured)
    return frozenset(ids) | ({tokenizer.eos_token_id} if tokenizer.eos_token_id is not None else set())


def load_stop_ids(model_dir: Path, tokenizer: Any) -> frozenset[int]:
    """The same ids, read from a model's directory without loading the model."""
    if (model_dir / "generation_config.json").is_file():
        return stop_ids_of(GenerationConfig.from_pretrained(model_dir), tokenizer)
    return stop_ids_of(GenerationConfig.from_model_config(AutoConfig.from_pretrained(model_dir)), tokenizer)


def _length_batches(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Indices in batches of at most `batch_tokens` padded tokens, with little padding; a long one may be alone."""
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        padding_waste = batch and lengths[batch[0]] > 1.25 * lengths[i] + 8
        if batch and (padding_waste or lengths[batch[0]] * (len(batch) + 1) > batch_tokens):
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def _left_padded(prompts: Sequence[tuple[int, ...]], device: torch.device) -> tuple[Tensor, Tensor]:
    longest = max(map(len, prompts))
    ids, mask = np.zeros((len(prompts), longest), np.int64), np.zeros((len(prompts), longest), np.int64)
    for row, row_mask, prompt in zip(ids, mask, prompts, strict=True):
        row[longest - len(prompt) :], row_mask[longest - len(prompt) :] = prompt, 1
    return torch.from_numpy(ids).to(device), torch.from_numpy(mask).to(device)
