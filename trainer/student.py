"""The model that learns: loaded, run to its final hidden states, saved.

Guarantees: weights are float32 masters; a forward stops at the state after the final norm, so no `[tokens, vocabulary]`
tensor arises here; sequences are packed, so no FLOP goes to padding; what is saved loads with
`AutoModelForCausalLM.from_pretrained`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from kernels import LinearHead, selected_log_probs
from logitcache.console import quiet_transformers
from logitcache.errors import UserError
from logitcache.flops import ModelShape
from trainer.batch import Batch
from trainer.distributed import ALONE, Body, Ranks, shard
from trainer.lora import adapt, merged_weights
from trainer.packing import packed_sequences
from trainer.runs import new_directory
from trainer.settings import Backend, Lora

PRECISIONS = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True, kw_only=True, eq=False)
class Student:
    """A causal language model in float32 and the precision its matrix products are taken in.

    Attributes:
        model: any `AutoModelForCausalLM` whose head is linear.
        tokenizer: saved beside it.
        vocab_size: real tokens; the head's rows from there on are padding and carry no probability.
        precision: bfloat16 (autocast) or float32.
        gradient_checkpointing: whether each layer is run again in the backward pass instead of being kept.
        lora: the adapters that are trained in place of the weights, which `model` holds already; None for none.
        ranks: over which the weights are sharded; see `sharded`.
        body: of a sharded model, what its forward goes through.
    """

    model: Any
    tokenizer: Any
    vocab_size: int
    precision: torch.dtype = torch.bfloat16
    gradient_checkpointing: bool = False
    lora: Lora | None = None
    ranks: Ranks = ALONE
    body: Body | None = None

    def __post_init__(self) -> None:
        if self.gradient_checkpointing:
            # The backward pass runs the layers again, when packed attention would have been taken off already.
            how = {"use_reentrant": False, "context_fn": lambda: (nullcontext(), packed_sequences(self.model))}
            self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=how)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """What is trained."""
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        device: torch.device = self.model.device
        return device

    @property
    def shape(self) -> ModelShape:
        """What decides its FLOPs."""
        return ModelShape.from_config(self.model.config.to_dict())

    def head_over(self, batch: Batch) -> LinearHead:
        """Run the packed batch; the states of its R completion rows with the head over them.

        The states are rounded to `precision`, in which the head's products are then taken.
        """
        with packed_sequences(self.model), self._autocast(), self._checkpointed():
            states_1TD = (self.body or Body(self.model))(
                input_ids=batch.input_ids[None],
                position_ids=batch.position_ids[None],
                sequence_lengths=batch.sequence_lengths,
                use_cache=False,
            )
        layer, config = self.model.get_output_embeddings(), self.model.config
        return LinearHead(
            hidden=states_1TD[0].index_select(0, batch.rows).to(self.precision),
            weight=layer.weight,
            bias=layer.bias,
            soft_cap=getattr(config, "final_logit_softcapping", None),
            scale=getattr(config, "logit_scale", None) or 1.0 / (getattr(config, "logits_scaling", None) or 1.0),
            vocab_size=self.vocab_size,
        )

    @contextmanager
    def _checkpointed(self) -> Iterator[None]:
        """Transformers checkpoints layers in training mode; theirs alone is switched, so that dropout stays off."""
        on = self.gradient_checkpointing and torch.is_grad_enabled()
        layers = self.model.get_decoder().layers if on else ()
        for layer in layers:
            layer.training = True
        try:
            yield
        finally:
            for layer in layers:
                layer.training = False

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.precision is torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.precision)

    def sharded(self, ranks: Ranks) -> Student:
        """The same student with its weights sharded, in place, over ranks that all hold it alike; itself if alone."""
        return self if ranks.size == 1 else replace(self, ranks=ranks, body=shard(self.model, ranks))

    def save(self, directory: Path) -> None:
        """Write model and tokenizer to a new directory, which appears whole or not at all. All ranks call it.

        Raises:
            UserError: it cannot be written (a full disk).
        """
        weights = None
        if self.lora is not None or self.ranks.size > 1:
            weights = merged_weights(self.model, self.ranks)
        if not self.ranks.first:
            return
        with new_directory(directory) as place:
            self.model.save_pretrained(place, state_dict=weights)
            self.tokenizer.save_pretrained(place)


def student_config(model_dir: Path) -> dict[str, Any]:
    """Its `config.json`. Raises UserError if that is damaged."""
    try:
        config = json.loads((model_dir / "config.json").read_text())
        if not isinstance(config, dict):
            raise ValueError("its config.json holds no object")
    except (OSError, ValueError) as error:
        raise _not_loaded(model_dir, error) from error
    return config


def require_backend(student: Student, backend: Backend) -> None:
    """Raise UserError unless this backend of `kernels` serves this student's head on its device."""
    layer = student.model.get_output_embeddings()
    hidden = torch.zeros(1, layer.weight.shape[1], dtype=student.precision, device=student.device)
    head = LinearHead(hidden=hidden, weight=layer.weight.detach(), bias=None, vocab_size=student.vocab_size)
    try:
        selected_log_probs(head, torch.zeros(1, dtype=torch.int64, device=student.device), backend=backend)
    except (ValueError, ImportError, RuntimeError) as error:
        raise UserError(f"--backend {backend}", _first_line(error), "leave it out: it goes by the device") from error


def _not_loaded(model_dir: Path, error: Exception) -> UserError:
    found = f"it cannot be loaded ({_first_line(error)})"
    return UserError(f"a student in {model_dir}", found, "check the directory, or save the model again")


def _first_line(error: Exception) -> str:
    """What follows can be kilobytes: of transformers, every architecture that it knows."""
    return str(error).partition("\n")[0].rstrip(".")


def load_student(
    model_dir: Path,
    *,
    vocab_size: int,
    precision: str = "bfloat16",
    gradient_checkpointing: bool = False,
    lora: Lora | None = None,
) -> Student:
    """Load a model directory with float32 weights, on the GPU if torch sees one.

    Args:
        model_dir: as written by `save_pretrained`, tokenizer included.
        vocab_size: the teacher's; a student has at least as many rows in its head.
        precision: of the matrix products, `bfloat16` or `float32`.
        gradient_checkpointing: see `Student`.
        lora: adapters to train in place of the weights.

    Raises:
        UserError: no such model, an unknown precision, a head smaller than the vocabulary, no peft for adapters, or a
            model that has none of the matrices they are for.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if precision not in PRECISIONS:
        raise UserError(f"precision {precision}", f"it is not {' or '.join(PRECISIONS)}", "choose one of them")
    quiet_transformers()
    try:
        model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32, use_safetensors=True)
        tokenizer = AutoTokenizer.from_pretrained(model_dir)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise _not_loaded(model_dir, error) from error
    rows = model.get_output_embeddings().weight.shape[0]
    if rows < vocab_size:
        raise UserError(
            f"a student for {vocab_size} tokens", f"its head has {rows} rows", "use the teacher's tokenizer"
        )
    if lora is not None:
        adapt(model, lora)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # Evaluation mode: a divergence from fixed targets is taken without dropout on either side.
    return Student(
        model=model.eval().to(device),
        tokenizer=tokenizer,
        vocab_size=vocab_size,
        precision=PRECISIONS[precision],
        gradient_checkpointing=gradient_checkpointing,
        lora=lora,
    )
