"""`trainer grpo` end to end: it learns, goes on after a kill, and says what it cannot take."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from logitcache.errors import UserError
from logitcache.flops import backward, forward, generate, head
from logitcache.problems import Problem
from logitcache.prompts import PromptStyle
from logitcache.scoring import Sampling
from trainer.flops import Phase
from trainer.policy.rewards import exact_match, judging
from trainer.policy.settings import PolicyTraining, RewardKind, Surrogate
from trainer.recipes.grpo import run_grpo
from trainer.recipes.report import run_report

SYMBOLS = ("<end>", "\n", *"0123456789")
TRAINING = PolicyTraining(
    steps=40, prompts=10, group=12, learning_rate=1e-2, warmup_steps=0, precision="float32", seed=1
)
SAMPLING = Sampling(max_new_tokens=2, top_p=1.0, top_k=None)
TIMES = ("draw_s", "step_s")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen3 of random weights that knows ten digits."""
    import torch
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    directory = tmp_path_factory.mktemp("grpo") / "start"
    config = Qwen3Config(
        vocab_size=len(SYMBOLS),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=64,
        eos_token_id=0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        Qwen3ForCausalLM(config).save_pretrained(directory)
    tokenizer = Tokenizer(models.WordLevel({symbol: place for place, symbol in enumerate(SYMBOLS)}, unk_token="<end>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def problems(model: Path) -> Path:
    """The digit that follows another."""
    rows = [{"id": f"p{n}", "problem": str(n), "answer": str((n + 1) % 10)} for n in range(10)]
    return write(model.parent / "problems.jsonl", rows)


def write(path: Path, rows: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(model: Path, problems: Path, out: Path, **options: Any) -> dict[str, Any]:
    wanted: dict[str, Any] = {
        "training": TRAINING,
        "surrogate": Surrogate(),
        "sampling": SAMPLING,
        "style": PromptStyle(instruction=""),
        "reward": RewardKind.EXACT,
        **options,
    }
    return run_grpo(model_dir=model, problems=str(problems), out=out, **wanted)


def lines(out: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in TIMES} for line in found]


def test_a_model_learns_from_its_rewards(model: Path, problems: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    result = run(model, problems, out)
    assert result["reward"]["first"] < 0.3
    assert result["reward"]["last"] > 0.8
    metrics = lines(out)
    assert metrics[-1]["student_entropy_nats"] < 0.5 * metrics[0]["student_entropy_nats"]
    assert metrics[-1]["no_signal_share"] > metrics[0]["no_signal_share"]
    assert {line["clip_share"] for line in metrics} == {0.0}  # one update: the ratio is 1
    assert run(model, problems, out) == result  # it is done already
    (row,) = run_report([out], tmp_path / "report")["runs"]
    assert row["last_steps"]["reward_mean"] > 0.8

    from transformers import AutoModelForCausalLM, AutoTokenizer

    AutoModelForCausalLM.from_pretrained(out / "student")
    AutoTokenizer.from_pretrained(out / "student")
    # And from what was saved it goes on: most is known.
    more = run(out / "student", problems, tmp_path / "more", training=replace(TRAINING, steps=1))
    assert more["reward"]["first"] > 0.7


@pytest.mark.slow
def test_a_killed_run_takes_the_same_steps(model: Path, problems: Path, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    arguments = "--steps 40 --prompts 4 --group 4 --updates 2 --learning-rate 5e-3 --precision float32 --kl-weight 0.01"
    arguments += " --reward exact --max-new-tokens 2 --checkpoint-every 5 --json"
    command = [sys.executable, "-c", "from trainer.cli import main\nmain()", "grpo", str(model), *arguments.split()]
    command += ["--problems", str(problems), "--out", str(killed), "--instruction", ""]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not (killed / "checkpoints" / "step-00000010").exists():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (killed / "result.json").exists()

    training = replace(TRAINING, steps=40, prompts=4, group=4, updates=2, learning_rate=5e-3, warmup_steps=5, seed=0)
    how: dict[str, Any] = {"training": training, "surrogate": Surrogate(kl_weight=0.01), "checkpoint_every": 5}
    with pytest.raises(UserError, match="another sampling"):
        run(model, problems, killed, **how | {"training": replace(training, group=5)})
    with pytest.raises(UserError, match="another reward"):
        run(model, problems, killed, **how, reward=RewardKind.MATH)
    mended, straight = run(model, problems, killed, **how), run(model, problems, whole, **how)
    assert lines(killed) == lines(whole)
    assert mended["flops"] == straight["flops"]
    assert any(line["clip_share"] > 0 for line in lines(whole))
    assert lines(whole)[-1]["reference_kl_nats"] > 0


def test_every_flop_is_in_the_ledger(model: Path, problems: Path, tmp_path: Path) -> None:
    """Two updates, all answers with a signal: each has a length of 1 or 2 after a prompt of 2."""
    from trainer.student import load_student

    shape = load_student(model, vocab_size=len(SYMBOLS)).shape
    seen: list[int] = []

    def reward(_: Problem, text: str) -> float:
        seen.append(len(text.split()))
        return float(len(seen))  # no two are alike

    training = replace(TRAINING, steps=1, group=2, prompts=3, updates=2)
    found = run(model, problems, tmp_path / "run", training=training, reward=reward, surrogate=Surrogate(kl_weight=0.1))
    (line,) = lines(tmp_path / "run")
    tokens, count = line["completion_tokens"], 6
    lengths = [2] * (2 * count - tokens) + [3] * (tokens - count)  # rows of answers of 1 and of 2 tokens
    once = forward(shape, lengths, head_rows=tokens)
    expected = {
        Phase.STUDENT_ROLLOUT: sum(generate(shape, [2] * count, [length - 1 for length in lengths])),
        Phase.STUDENT_FORWARD: 2 * (once + head(shape, tokens)),  # with a reference, no ratio is known before
        Phase.STUDENT_BACKWARD: 2 * backward(once),
        Phase.REFERENCE_FORWARD: once,
    }
    assert {name: flops for name, flops in found["flops"]["by_phase"].items() if flops} == expected
    assert found["flops"]["marginal"] == line["flops"] == sum(expected.values())


def test_rewards_by_hand() -> None:
    problem = Problem(id="p", text="?", answer="42")
    for text, right in {
        "so \\boxed{41} no, \\boxed{ 42 }.": 1,
        "\\boxed{42} then \\boxed{43}": 0,
        "it is 42": 1,
        "42 it is": 0,
        "142": 0,
        "": 0,
    }.items():
        assert exact_match(problem, text) == right, text
    pytest.importorskip("math_verify", reason="needs math-verify: pip install math-verify")
    with judging(RewardKind.MATH, [problem]) as judge:
        assert judge(problem, "\\boxed{84/2}") == 1
        assert judge(problem, "\\boxed{41}") == judge(problem, "none") == 0


def test_what_cannot_be_taken_is_refused_before_anything_is_written(
    model: Path, problems: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    silent = write(tmp_path / "silent.jsonl", [{"id": "p0", "problem": "1"}, {"problem": "2", "answer": "3"}])
    with pytest.raises(UserError, match="missing for 1"):
        run(model, silent, out)
    with pytest.raises(UserError, match="greedy"):
        run(model, problems, out, sampling=replace(SAMPLING, temperature=0.0))
    with pytest.raises(UserError, match="context holds 64"):
        run(model, problems, out, sampling=replace(SAMPLING, max_new_tokens=64))
    with pytest.raises(UserError, match=r"stop token <\|im_end\|>"):
        run(model, problems, out, stop_tokens=["<|im_end|>"])
    encoder = shutil.copytree(model, tmp_path / "encoder")
    config = json.loads((encoder / "config.json").read_text())
    (encoder / "config.json").write_text(json.dumps(config | {"architectures": ["BertModel"]}))
    with pytest.raises(UserError, match="a BertModel"):
        run(encoder, problems, out)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "tests")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="trainer grpo under torchrun: 2 processes"):
        run(model, problems, out)
    assert not out.exists()


@pytest.mark.parametrize(
    ("reward", "answer", "found"),
    [
        (RewardKind.MATH, "}{", r"answers to 10 problems .*: it cannot those of bad \(`}{`\); mend them"),
        (RewardKind.EXACT, "\\frac{1}{2}", r"problem bad: .* cannot be in a box .*; use --reward math"),
    ],
)
def test_an_answer_that_could_not_be_recognised_is_refused_if_its_problem_will_be_drawn(
    reward: RewardKind, answer: str, found: str, model: Path, tmp_path: Path
) -> None:
    if reward is RewardKind.MATH:
        pytest.importorskip("math_verify", reason="needs math-verify: pip install math-verify")
    rows = [{"id": f"p{n}", "problem": str(n), "answer": str((n + 1) % 10)} for n in range(9)]
    problems = write(tmp_path / "problems.jsonl", [*rows, {"id": "bad", "problem": "9", "answer": answer}])
    out, training = tmp_path / "run", replace(TRAINING, steps=1, prompts=10, group=2)
    with pytest.raises(UserError, match=found):
        run(model, problems, out, reward=reward, training=training)
    assert not out.exists()
    few = replace(training, prompts=2, seed=0)  # of seed 0, the first two are others
    run(model, problems, out, reward=reward, training=few)
    assert len(lines(out)) == 1


def test_a_reward_that_is_no_number_stops_the_run(model: Path, problems: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"a reward for problem p[0-9]: it is nan"):
        run(model, problems, tmp_path / "run", reward=lambda _problem, _text: float("nan"))
