"""A vLLM engine in this process, set up for capture and for our own draws.

Guarantees: another version of vLLM than the tested one is refused before anything is loaded; one worker runs in this
process, and where the model is divided over several devices vLLM starts a process for each; nothing is sampled or
stopped by the checkpoint's own defaults.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from logitcache.errors import UserError, require
from logitcache.identity import tokenizer_fingerprint
from logitcache.scorers.checkpoint_head import read_head
from logitcache.scorers.hf import load_stop_ids, load_tokenizer
from logitcache.scorers.vllm_engine import VLLMEngine
from logitcache.scoring import DTYPES

SUPPORTED = "0.32"
"""The minor version of vLLM whose plug-in doors this module uses and the tests run."""

_ENVIRONMENT = {
    "VLLM_USE_V2_MODEL_RUNNER": "0",  # the capture looks at the V1 runner's forward pass
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # else the CPU build puts its worker in another process
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",  # a fork of a process that has looked at a GPU cannot use it
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",  # standard output belongs to the command's answer
    "VLLM_LOGGING_LEVEL": "WARNING",
}
_CPU_KV_CACHE_BYTES = 1 << 30


def load_vllm_engine(
    model_dir: Path,
    *,
    dtype: str = "bfloat16",
    batch_size: int | None = None,
    batch_tokens: int | None = None,
    kv_cache_bytes: int | None = None,
    context_tokens: int | None = None,
    tensor_parallel: int = 1,
    **options: Any,
) -> VLLMEngine:
    """A model directory as an engine in bfloat16 or float32 on whatever device this vLLM was built for.

    Args:
        model_dir: a directory with safetensors weights and a tokenizer.
        dtype: the precision to compute in.
        batch_size: requests that run together; None leaves it to vLLM.
        batch_tokens: tokens in one forward pass, prompts are cut into chunks to fit; None leaves it to vLLM.
        kv_cache_bytes: memory for keys and values. None lets vLLM take its usual share of a GPU, or 1 GiB on a CPU.
        context_tokens: the longest sequence that it will be given; None for the longest that the model takes.
        tensor_parallel: devices that each layer is divided over; the head that selects targets is on the first.
        options: as `VLLMEngine`.

    Raises:
        UserError: no vLLM or an unsupported one, an unknown dtype, a model that vLLM cannot load or that does not fit.
    """
    require(dtype in DTYPES, f"a dtype, {' or '.join(DTYPES)}", dtype)
    require_vllm()
    tokenizer = load_tokenizer(model_dir)
    vocabulary = tokenizer.get_vocab()
    arguments = {
        "model": str(model_dir),
        "dtype": dtype,
        "max_num_seqs": batch_size,
        "max_num_batched_tokens": batch_tokens,
        "kv_cache_memory_bytes": kv_cache_bytes,
        "max_model_len": context_tokens,
        "tensor_parallel_size": tensor_parallel,
        "distributed_executor_backend": "uni" if tensor_parallel == 1 else "mp",
    }
    with _loading(model_dir.name):
        engine, config = _llm_engine(arguments, max(vocabulary.values()) + 1)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        rows = min(max(vocabulary.values()) + 1, config.hf_text_config.vocab_size)
        head = read_head(model_dir, config.hf_config, vocab_size=rows, dtype=getattr(torch, dtype), device=device)
    return VLLMEngine(
        engine=engine,
        torch_head=head,
        stop_ids=load_stop_ids(model_dir, tokenizer),
        tokenizer_fingerprint=tokenizer_fingerprint(vocabulary),
        context_tokens=config.max_model_len,
        **options,
    )


def require_vllm() -> str:
    """The version of vLLM, once it is known to be there and supported. Raises UserError otherwise."""
    os.environ.update(_ENVIRONMENT)  # vLLM reads these at its import and ever after
    try:
        import vllm
    except Exception as error:  # a broken install raises what it likes
        raise UserError(
            "the vLLM engine", f"vLLM cannot be imported ({error})", f"install vllm {SUPPORTED} in this environment"
        ) from error
    version: str = vllm.__version__
    if not version.startswith(f"{SUPPORTED}."):
        raise UserError("the vLLM engine", f"vLLM {version} is installed", f"install {SUPPORTED}, the one supported")
    return version


def vllm_identity() -> dict[str, str]:
    """The engine and its versions, which decide the rounding of every value."""
    return {"name": "vllm", "version": require_vllm(), "torch": torch.__version__}


@contextmanager
def _loading(name: str) -> Iterator[None]:
    """What can go wrong with a model is one line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # vLLM raises a zoo of types, a bare Exception where a worker does not start
        raise UserError(
            f"{name} in vLLM", f"cannot be loaded ({error})", "check the model and the memory it needs"
        ) from error


def _llm_engine(arguments: dict[str, Any], vocab_size: int) -> tuple[Any, Any]:
    """An engine of vLLM in this process, watched; and its model configuration."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.platforms import current_platform
    from vllm.v1.engine.llm_engine import LLMEngine
    from vllm.v1.executor import Executor

    from logitcache.scorers.vllm_plugins import VOCAB_SIZE, CaptureExtension, SeededDraws

    on_cpu = current_platform.is_cpu()
    if on_cpu and arguments["kv_cache_memory_bytes"] is None:
        arguments = {**arguments, "kv_cache_memory_bytes": _CPU_KV_CACHE_BYTES}
    engine_args = EngineArgs(
        **arguments,
        enforce_eager=on_cpu,  # compiling pays on a GPU only
        enable_prefix_caching=False,  # a cached row is a row whose state is not computed
        async_scheduling=False,
        generation_config="vllm",  # sampling is what was asked for, not what the checkpoint suggests
        logits_processors=[SeededDraws],
        additional_config={VOCAB_SIZE: vocab_size},
        worker_extension_cls=f"{CaptureExtension.__module__}.{CaptureExtension.__name__}",
        disable_log_stats=True,
    )
    config = engine_args.create_engine_config()
    engine = LLMEngine(vllm_config=config, executor_class=Executor.get_class(config), log_stats=False)
    engine.collective_rpc("logitcache_install")
    return engine, config.model_config
