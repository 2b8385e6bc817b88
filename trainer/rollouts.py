"""The student's own text: who writes it, and what it says of the student.

Guarantees: every call writes with the weights that the student has at that moment; the student's own weights, gradients
and precision are left alone. A completion ends at a stop token of the student or of the teacher
(`reconciled_stop_ids`): a base student ends with one and a chat teacher with another, and behind either of them the
teacher's distribution means nothing.

Keys and values grow with the text (transformers' DynamicCache). A static cache of the full window does the same
arithmetic over its empty part too; `python -m tools.bench.trainer` measures both.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kernels import LinearHead, selected_log_probs
from logitcache.errors import UserError
from logitcache.flops import head
from logitcache.records import FinishReason, Origin, SampledTargets, ScoredSequence, TokenSequence
from logitcache.scoring import Generator, Prompt, Sampling
from trainer.batch import collate, micro_batches
from trainer.flops import FlopLedger, Phase, add_evaluation, rollout
from trainer.lora import merged_weights
from trainer.settings import Lora
from trainer.student import Student

_BLOCK_TOKENS = 128
"""Of vLLM's blocks of keys and values on a CPU, of which it keeps one for itself; those on a GPU are smaller."""


def reconciled_stop_ids(student: Student, teacher_ids: frozenset[int]) -> frozenset[int]:
    """The stop tokens of both: the student's by its tokenizer and generation configuration, and the teacher's."""
    from logitcache.scorers.hf import stop_ids_of

    return stop_ids_of(student.model.generation_config, student.tokenizer) | teacher_ids


def stops_used(sequences: Sequence[TokenSequence]) -> frozenset[int]:
    """The tokens that ended these completions: a teacher's stop tokens as its cache shows them, without the teacher."""
    return frozenset(int(one.token_ids[-1]) for one in sequences if one.finish_reason is FinishReason.STOP)


def student_generator(student: Student, *, stop_ids: frozenset[int]) -> Generator:
    """The student as a `Generator` over transformers, whose completions end at `stop_ids`."""
    from logitcache.scorers.hf import engine_for

    exact = student.precision is torch.float32
    model = student.model if exact else _cast_copy(student)
    engine = replace(engine_for(model, student.tokenizer, origin=Origin.STUDENT), stop_ids=stop_ids)
    return engine if exact else _CopiedStudent(student=student, engine=engine)


@dataclass(frozen=True, kw_only=True, eq=False)
class _CopiedStudent:
    """Writes with a copy of the weights in the student's precision, cast once a call.

    Autocast would cast every matrix again at every token. The copy keeps its residual stream in that precision too.
    """

    student: Student
    engine: Any

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[TokenSequence]:
        """See `Generator.generate`."""
        with torch.no_grad():
            pairs = zip(self.engine.model.parameters(), self.student.model.parameters(), strict=True)
            for kept, current in pairs:
                kept.copy_(current)
        # A new engine, because one keeps what it has derived from the head.
        return replace(self.engine).generate(prompts, sampling)


def _cast_copy(student: Student) -> Any:
    copied = copy.deepcopy(student.model)
    for parameter in copied.parameters():  # and no buffers: rotary frequencies stay in float32
        parameter.data = parameter.data.to(student.precision)
    return copied.requires_grad_(False)


@dataclass(frozen=True, kw_only=True, eq=False)
class VLLMRollouts:
    """The student as a `Generator` over vLLM in this process, its weights put in place at every call.

    Attributes:
        student: whose weights count.
        engine: `logitcache.scorers.vllm_engine.VLLMEngine` over a model of the same shape, see `load_rollout_engine`.
    """

    student: Student
    engine: Any

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[TokenSequence]:
        """See `Generator.generate`."""
        if self.student.lora is None:
            weights = [(name, weight.detach()) for name, weight in self.student.model.named_parameters()]
        else:
            weights = list(merged_weights(self.student.model, self.student.ranks).items())
        # vLLM's own in-place reload: checkpoint names, cast to the engine's precision, repacked for its kernels.
        self.engine.engine.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
        self.engine.engine.apply_model(_repack_head)
        found: list[TokenSequence] = self.engine.generate(prompts, sampling)
        return found


def unmerged_adapters(student: Student, generator: Generator) -> Lora | None:
    """The adapters that this generator runs beside the weights: vLLM is given them merged."""
    return None if isinstance(generator, VLLMRollouts) else student.lora


def load_rollout_engine(student: Student, model_dir: Path, *, sequences: int, tokens: int) -> Any:
    """Start vLLM for `VLLMRollouts`, with memory for one step's rollouts: the rest of the device is the trainer's.

    Args:
        student: of the architecture and precision that vLLM is to run.
        model_dir: what it was loaded from.
        sequences: written at once; more than that wait for each other.
        tokens: of the longest, prompt included.

    Raises:
        UserError: no vLLM or an unsupported one, or a model it cannot load.
    """
    from logitcache.scorers.vllm_load import load_vllm_engine

    shape, blocks = student.shape, 1 + sequences * -(-tokens // _BLOCK_TOKENS)
    token_bytes = 2 * shape.layers * shape.kv_heads * shape.head_dim * student.precision.itemsize
    engine = load_vllm_engine(
        model_dir,
        dtype=str(student.precision).removeprefix("torch."),
        origin=Origin.STUDENT,
        context_tokens=tokens,
        kv_cache_bytes=blocks * _BLOCK_TOKENS * token_bytes,
    )
    # At every reload it warns of each module that has nothing to load.
    logging.getLogger("vllm.model_executor.model_loader.reload.layerwise").setLevel(logging.ERROR)
    return engine


def _repack_head(model: Any) -> None:
    """A tied head is in no checkpoint, so vLLM's reload leaves what a CPU had repacked of the old one."""
    model.lm_head.quant_method.process_weights_after_loading(model.lm_head)


@dataclass(frozen=True, kw_only=True)
class OwnText:
    """What a student's own completions say of it.

    Attributes:
        entropy_nats: mean over tokens of the entropy of its full distribution at temperature 1.
        eos_mass: mean over tokens of the probability it gives to stop tokens.
        truncated_share: of the completions, that ran into the window.
        mean_length: completion tokens per completion.
        tokens: completion tokens in all; sequences: completions.
    """

    entropy_nats: float
    eos_mass: float
    truncated_share: float
    mean_length: float
    tokens: int
    sequences: int


def measure_own_text(
    student: Student,
    generator: Generator,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    ledger: FlopLedger,
    *,
    stop_ids: frozenset[int],
    micro_batch_tokens: int,
    step: int,
) -> OwnText:
    """Let the student continue held-out prompts, and measure it on what it wrote.

    Text is drawn as in training (`sampling`); entropy and stop mass are of the whole distribution at temperature 1,
    exact. The cost goes to the ledger as evaluation: the writing, a forward over what was written, and one pass over
    the vocabulary for each stop token.

    Raises:
        UserError: no prompts, or no stop token.
    """
    if not prompts or not stop_ids:
        missing = "no prompts" if not prompts else "no stop token"
        raise UserError("measure a student on its own text", missing, "hold problems out, and set eos_token_id")
    written = generator.generate(prompts, sampling)
    shape, sums = student.shape, torch.zeros(2, dtype=torch.float64)
    for part in micro_batches([with_own_tokens(sequence) for sequence in written], micro_batch_tokens):
        batch = collate(part, None, student.device)
        with torch.no_grad():
            entropy_R, stop_R = _entropy_and_stop_mass(student.head_over(batch), sorted(stop_ids))
        sums += torch.stack([entropy_R.double().sum(), stop_R.double().sum()]).cpu()
        add_evaluation(ledger, shape, batch, teacher_head_flops=0, step=step, lora=student.lora)
        ledger.add(Phase.EVALUATION, head(shape, batch.target_rows * (len(stop_ids) - 1)), step=step)
    lengths = [sequence.completion_tokens for sequence in written]
    prompt_tokens = [sequence.prompt_tokens for sequence in written]
    writing = rollout(shape, prompt_tokens, lengths, unmerged_adapters(student, generator))
    ledger.add(Phase.EVALUATION, writing, step=step)
    tokens = sum(lengths)
    truncated = sum(sequence.finish_reason is FinishReason.LENGTH for sequence in written)
    return OwnText(
        entropy_nats=float(sums[0]) / tokens,
        eos_mass=float(sums[1]) / tokens,
        truncated_share=truncated / len(written),
        mean_length=tokens / len(written),
        tokens=tokens,
        sequences=len(written),
    )


def _entropy_and_stop_mass(head: LinearHead, stop_ids: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Both [R]; the entropy comes with the first stop token's log-probabilities."""
    passes = [
        selected_log_probs(head, torch.full((head.rows,), token, device=head.hidden.device)) for token in stop_ids
    ]
    return passes[0].student_entropy, torch.stack([one.log_probs.exp() for one in passes]).sum(dim=0)


def with_own_tokens(sequence: TokenSequence) -> ScoredSequence:
    """With its own tokens as the targets: one draw a row, and nothing known of the distribution that it is from."""
    rows = sequence.completion_tokens
    unknown = np.full(rows, np.nan, np.float32)
    drawn = SampledTargets(
        ids=sequence.completion_ids,
        counts=np.ones(rows, np.int32),
        row_splits=np.arange(rows + 1),
        token_log_prob=unknown,
        entropy=unknown,
    )
    return ScoredSequence(sequence=sequence, targets=drawn)
