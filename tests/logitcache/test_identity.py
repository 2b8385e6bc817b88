from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

from logitcache.identity import model_display_name, tokenizer_fingerprint, weights_fingerprint


def test_a_fingerprint_follows_content_not_place(tiny_dir: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(tiny_dir, tmp_path / "copy")
    assert weights_fingerprint(copy) == weights_fingerprint(tiny_dir)
    model = AutoModelForCausalLM.from_pretrained(copy)
    next(model.parameters()).data[0, 0] += 1
    model.save_pretrained(copy)
    assert weights_fingerprint(copy) != weights_fingerprint(tiny_dir)


def test_a_configuration_that_changes_logits_changes_the_fingerprint(tiny_dir: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(tiny_dir, tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "transformers_version": "0"}))
    assert weights_fingerprint(copy) == weights_fingerprint(tiny_dir)
    (copy / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1.0}))
    assert weights_fingerprint(copy) != weights_fingerprint(tiny_dir)


def test_a_tokenizers_fingerprint_survives_saving(tiny_dir: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_dir)
    tokenizer("text", padding=True, truncation=True, max_length=4)
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer_fingerprint(again.get_vocab()) == tokenizer_fingerprint(tokenizer.get_vocab())
    again.add_tokens(["<another>"])
    assert tokenizer_fingerprint(again.get_vocab()) != tokenizer_fingerprint(tokenizer.get_vocab())


def test_a_directory_is_shown_by_its_name_alone(tiny_dir: Path) -> None:
    assert model_display_name(str(tiny_dir)) == tiny_dir.name
    assert model_display_name("Qwen/Qwen3-4B") == "Qwen/Qwen3-4B"


def test_importing_the_cache_pulls_in_no_model_library() -> None:
    code = "import sys, logitcache; print([m for m in ('torch', 'transformers', 'vllm') if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


def test_transformers_imports_beside_our_kernels_package() -> None:
    code = "import transformers, sys; print('triton' in sys.modules, transformers.LlamaForCausalLM.__name__)"
    printed = subprocess.check_output([sys.executable, "-c", code], text=True, cwd=Path(__file__).parents[2])
    assert printed.split()[-1] == "LlamaForCausalLM"
