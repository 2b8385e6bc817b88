"""What was written to the sinks is read back from their own files; the real libraries, no service."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from logitcache.errors import UserError
from trainer.watch import Watch, require_watch, watching

LINES = [
    {"step": 0, "loss_nats": 2.5, "reverse_kl_nats": None, "completion_tokens": 64, "sample": "a", "frozen": True},
    {"step": 1, "loss_nats": 1.25, "reverse_kl_nats": 3.0, "completion_tokens": 32, "sample": "b", "frozen": False},
]


@pytest.mark.parametrize("kind", list(Watch))
def test_a_sink_that_is_not_installed_is_refused(kind: Watch, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(sys, "path", [])
        patched.setattr(sys, "path_importer_cache", {})
        patched.delitem(sys.modules, str(kind), raising=False)
        with pytest.raises(UserError, match=rf"--watch {kind}: .* pip install 'logitcache\[{kind}\]'"):
            require_watch([kind])


def test_watching_nothing_imports_nothing() -> None:
    code = (
        "import sys; from pathlib import Path; from trainer.watch import watching\n"
        "with watching([], Path('nowhere'), {}) as sinks: assert sinks == []\n"
        "assert not {'torch', 'wandb', 'tensorboard'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_tensorboard_reads_back_what_was_written(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with watching([Watch.TENSORBOARD, Watch.TENSORBOARD], tmp_path, {}) as sinks:
        for line in LINES:
            for sink in sinks:
                sink.write(line)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert sorted(events.Tags()["scalars"]) == ["completion_tokens", "loss_nats", "reverse_kl_nats"]
    assert [(event.step, event.value) for event in events.Scalars("loss_nats")] == [(0, 2.5), (1, 1.25)]
    assert [(event.step, event.value) for event in events.Scalars("reverse_kl_nats")] == [(1, 3.0)]


def test_a_resumed_run_does_not_draw_its_steps_twice(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for first_step, loss in ((0, 9.0), (1, 1.0)):
        with watching([Watch.TENSORBOARD], tmp_path, {}, first_step=first_step) as (sink,):
            for step in range(first_step, 3):
                sink.write({"step": step, "loss_nats": loss})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss_nats")] == [(0, 9.0), (1, 1.0), (2, 1.0)]


def test_wandb_offline_keeps_what_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    with watching([Watch.WANDB], tmp_path, {"steps": 2}) as sinks:
        for line in LINES:
            sinks[0].write(line)
    (kept,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    content = kept.read_bytes()
    for word in (b"loss_nats", b"1.25", b"reverse_kl_nats", b"completion_tokens", b"steps"):
        assert word in content
    assert b"frozen" not in content
