"""Without vLLM, or with a version that was never tested, the engine says so before it loads anything."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest

from logitcache.errors import UserError
from logitcache.scorers.vllm_load import SUPPORTED, require_vllm


def test_vllm_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(UserError, match=rf"cannot be imported .*; install vllm {SUPPORTED}"):
        require_vllm()


@pytest.mark.parametrize("error", ["RuntimeError('operator torchvision::nms does not exist')", "AttributeError('x')"])
def test_vllm_that_is_broken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: str) -> None:
    (tmp_path / "vllm.py").write_text(f"raise {error}")
    monkeypatch.delitem(sys.modules, "vllm", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=rf"cannot be imported .*; install vllm {SUPPORTED}"):
        require_vllm()


@pytest.mark.parametrize("version", ["0.9.2", "0.33.0", "1.0.32"])
def test_a_version_that_was_never_tested(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    other = ModuleType("vllm")
    other.__dict__["__version__"] = version
    monkeypatch.setitem(sys.modules, "vllm", other)
    with pytest.raises(UserError, match=f"vLLM {version} is installed"):
        require_vllm()
