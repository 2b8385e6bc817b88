"""`trainer evaluate` end to end: real models, real processes, killed and shared out, and what it refuses."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from logitcache.errors import UserError
from logitcache.flops import ModelShape, forward, generate
from logitcache.jobs import BuildRequest, build_cache
from logitcache.prompts import PromptStyle
from logitcache.scorers.choose import Served
from logitcache.scoring import Sampling
from trainer.recipes.evaluate import Share, run_evaluate
from trainer.recipes.held_out import HeldOutText

pytest.importorskip("math_verify", reason="needs math-verify: pip install math-verify")

SAMPLING = Sampling(max_new_tokens=8, samples_per_problem=2, seed=5)


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-c", "from trainer.cli import main\nmain()", "evaluate", *map(str, arguments)]


def trainer(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*arguments), capture_output=True, text=True, timeout=300, check=False)


def write(path: Path, rows: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def problems(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = [{"id": f"p{n}", "problem": f"What is {n} + {n}?", "answer": str(2 * n)} for n in range(7)]
    return write(tmp_path_factory.mktemp("problems") / "sums.jsonl", rows)


@pytest.fixture(scope="module")
def options(tiny_dir: Path, problems: Path) -> dict[str, Any]:
    """A small evaluation in float32, two problems a chunk."""
    style = PromptStyle(instruction="")
    return {
        "model": str(tiny_dir), "problems": str(problems), "sampling": SAMPLING, "style": style,
        "dtype": "float32", "chunk": 4,
    }  # fmt: skip


@pytest.fixture(scope="module")
def whole(options: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "run"
    run_evaluate(**options, out=out)
    return out


def lines_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]


def test_a_real_model_is_scored_on_what_it_wrote(tmp_path: Path) -> None:
    """SmolLM2 can add two and two, and a wrong key does not make it right."""
    rows = [
        {"id": "right", "problem": "What is 2 + 2?", "answer": "4"},
        {"id": "key is wrong", "problem": "What is 2 + 2?", "answer": "1000003"},
    ]
    out = tmp_path / "run"
    arguments = ["--samples", "1", "--temperature", "0", "--max-new-tokens", "16", "--dtype", "float32"]
    arguments += ["--instruction", "Answer with one number.", "--json"]
    done = trainer("embedded", "--problems", write(tmp_path / "two.jsonl", rows), "--out", out, *arguments)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result == json.loads((out / "result.json").read_text())
    assert [(line["problem_id"], line["verdict"], line["answer"]) for line in lines_of(out)] == [
        ("right", "correct", "4"),
        ("key is wrong", "wrong", "4"),
    ]
    assert result["scores"]["avg_at_1"] == {"mean": 0.5, "low": 0.0, "high": 1.0}
    assert result["verdicts"] == {"correct": 1, "wrong": 1, "unparsed": 0, "cut_off": 0}
    assert (result["truncated_share"], result["worker"], result["held_out"]) == (0.0, "1/1", None)
    assert 0 < result["entropy_nats"] < 3
    assert 0 < result["eos_mass"] < 1
    config = json.loads((out / "config.json").read_text())
    assert config["model"]["name"] == "SmolLM2-135M-Instruct"
    assert config["answers"]["math-verify"]


def test_figures_follow_from_the_lines(options: dict[str, Any], whole: Path) -> None:
    lines, result = lines_of(whole), json.loads((whole / "result.json").read_text())
    assert [(line["problem_id"], line["sample"]) for line in lines] == [(f"p{n}", m) for n in range(7) for m in (0, 1)]
    tokens = np.array([line["completion_tokens"] for line in lines])
    entropy = np.array([line["entropy_nats"] for line in lines])
    assert result["mean_length_tokens"] == tokens.mean()
    assert result["p95_length_tokens"] == np.percentile(tokens, 95)
    assert result["entropy_nats"] == pytest.approx((entropy * tokens).sum() / tokens.sum())
    assert result["truncated_share"] == np.mean([line["finish_reason"] == "length" for line in lines])
    assert sum(result["verdicts"].values()) == 14
    shape = ModelShape.of(Path(options["model"]))
    prompts = [line["prompt_tokens"] for line in lines]
    rows = [prompt + new - 1 for prompt, new in zip(prompts, tokens.tolist(), strict=True)]
    assert result["flops"]["writing"] == sum(generate(shape, prompts, tokens.tolist()))
    assert result["flops"]["reading"] >= forward(shape, rows, head_rows=int(tokens.sum()))
    assert result["flops"]["teacher"] == 0
    assert {"avg_at_2", "pass_at_2", "pass_at_2_plain", "maj_at_2", "pass_at_1"} < result["scores"].keys()


@pytest.mark.parametrize("left", [1, 4, 9, 14])
def test_what_a_killed_run_left_is_gone_on_with(
    left: int, options: dict[str, Any], whole: Path, tmp_path: Path
) -> None:
    """Cut anywhere, in the middle of a line too, the lines and figures end the same."""
    out = Path(shutil.copytree(whole, tmp_path / "run"))
    (out / "result.json").unlink()
    kept = (whole / "samples.jsonl").read_bytes().splitlines(keepends=True)
    (out / "samples.jsonl").write_bytes(b"".join(kept[:left]) + b"".join(kept[left : left + 1])[:17])
    run_evaluate(**options, out=out)
    for name in ("samples.jsonl", "result.json"):
        assert (out / name).read_bytes() == (whole / name).read_bytes()


def test_a_run_that_is_done_is_not_run_again(
    options: dict[str, Any], whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_evaluate(**options, out=whole) == json.loads((whole / "result.json").read_text())
    assert "is done already" in capsys.readouterr().err


@pytest.mark.slow
def test_killed_by_a_signal_and_run_again(options: dict[str, Any], whole: Path, problems: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    arguments = [options["model"], "--problems", problems, "--out", out, "--samples", "2", "--max-new-tokens", "8"]
    arguments += ["--seed", "5", "--dtype", "float32", "--chunk", "2", "--instruction", ""]
    process = subprocess.Popen(command(*arguments), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    samples = out / "samples.jsonl"
    while process.poll() is None and not (samples.exists() and samples.read_bytes().count(b"\n") >= 4):
        time.sleep(0.002)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    done = trainer(*arguments, "--json")
    assert done.returncode == 0, done.stderr
    assert "going on after" in done.stderr
    assert [(line["problem_id"], line["text"]) for line in lines_of(out)] == [
        (line["problem_id"], line["text"]) for line in lines_of(whole)
    ]


def test_workers_share_the_problems_and_the_last_one_sums_up(
    options: dict[str, Any], whole: Path, tmp_path: Path
) -> None:
    """Chunks are cut from other problems, so their batches round otherwise; texts are the same, figures nearly."""
    out = tmp_path / "run"
    shares = [Share.parse(text) for text in ("2/3", "1/3", "3/3")]
    first, second, last = (run_evaluate(**options, out=out, share=share) for share in shares)
    assert [first["worker"], second["worker"], last["worker"]] == ["2/3", "1/3", "all 3"]
    assert [first["problems"], second["problems"], last["problems"]] == [2, 3, 7]
    assert [line["problem_id"] for line in lines_of(out / "worker-2-of-3")] == ["p1", "p1", "p4", "p4"]
    alone = json.loads((whole / "result.json").read_text())
    assert json.loads((out / "result.json").read_text()) == last
    assert last["scores"] == alone["scores"]
    assert last["entropy_nats"] == pytest.approx(alone["entropy_nats"], rel=1e-5)


def test_workers_keep_out_of_each_other_s_evaluations(options: dict[str, Any], whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    run_evaluate(**options, out=out, share=Share.parse("1/2"))
    with pytest.raises(UserError, match="it holds worker-1-of-2 already"):
        run_evaluate(**options, out=out, share=Share.parse("1/3"))
    with pytest.raises(UserError, match=r"it holds config\.json"):
        run_evaluate(**options, out=whole, share=Share.parse("1/2"))
    other = options | {"sampling": Sampling(max_new_tokens=7, samples_per_problem=2)}
    with pytest.raises(UserError, match="worker-2-of-2 has another configuration"):
        run_evaluate(**other, out=out, share=Share.parse("2/2"))
    assert not (out / "result.json").exists()


def test_another_configuration_is_refused_and_what_is_there_stays(options: dict[str, Any], whole: Path) -> None:
    before = {file.name: file.read_bytes() for file in whole.iterdir()}
    changed: list[tuple[dict[str, Any], str]] = [
        ({"sampling": Sampling(max_new_tokens=8, samples_per_problem=2, seed=6)}, "sampling.seed: 5 there, 6 asked"),
        ({"limit": 6}, "problems.count: 7 there, 6 asked"),
        ({"answer_limit_s": 7}, "answers.limit_s: 5 there, 7 asked"),
        ({"dtype": "bfloat16"}, "dtype: "),
    ]
    for change, found in changed:
        with pytest.raises(UserError, match=found):
            run_evaluate(**options | change, out=whole)
    assert {file.name: file.read_bytes() for file in whole.iterdir()} == before


def test_lines_of_something_else_are_refused(options: dict[str, Any], whole: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(whole, tmp_path / "run"))
    (out / "result.json").unlink()
    damaged = (out / "samples.jsonl").read_text().replace('"p1"', '"q1"')
    (out / "samples.jsonl").write_text(damaged)
    with pytest.raises(UserError, match="lines 1 to 4 are not those of this evaluation"):
        run_evaluate(**options, out=out)
    assert (out / "samples.jsonl").read_text() == damaged


@pytest.fixture(scope="module")
def encoder(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real checkpoint that has no language model in it."""
    from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

    place = tmp_path_factory.mktemp("encoder")
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 16}
    BertForSequenceClassification(BertConfig(vocab_size=49_152, **shape)).save_pretrained(place)
    AutoTokenizer.from_pretrained(tiny_dir).save_pretrained(place)
    return place


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda tmp, encoder: {"ks": (1, 3)}, "1 to the 2 samples of a problem: got 3; take 3 samples"),
        (lambda tmp, encoder: {"ks": (0,)}, "got 0"),
        (lambda tmp, encoder: {"model": str(encoder)}, "it is a BertForSequenceClassification; name a causal"),
        (lambda tmp, encoder: {"model": str(tmp / "gone")}, "no such directory"),
        (lambda tmp, encoder: {"dtype": "float16"}, "got float16"),
        (lambda tmp, encoder: {"chunk": 0}, "--chunk, at least 1"),
        (lambda tmp, encoder: {"answer_limit_s": 0}, "--answer-limit-s, at least 1"),
        (lambda tmp, encoder: {"stop_tokens": ("<|nothing|>",)}, "no such token"),
        (
            lambda tmp, encoder: {"sampling": Sampling(temperature=0, samples_per_problem=2)},
            "all would be the same",
        ),
        (lambda tmp, encoder: {"sampling": Sampling(max_new_tokens=600)}, "the model's context holds 512"),
        (lambda tmp, encoder: {"share": Share(worker=0, workers=8)}, "there are 7 problems"),
        (lambda tmp, encoder: {"generator": Served(url="http://127.0.0.1:9", model="m")}, "a server as scorer"),
        (lambda tmp, encoder: {"held_out": HeldOutText(cache_url=str(tmp / "gone"))}, "gone"),
        (
            lambda tmp, encoder: {
                "problems": str(write(tmp / "a.jsonl", [{"problem": "Why?"}, {"problem": "1?", "answer": "1"}]))
            },
            "missing for 1 ",
        ),
        (
            lambda tmp, encoder: {"problems": str(write(tmp / "a.jsonl", [{"problem": "Why?", "answer": "}{"}]))},
            "it cannot those of ",
        ),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(
    change: Callable[[Path, Path], dict[str, Any]],
    found: str,
    options: dict[str, Any],
    encoder: Path,
    tmp_path: Path,
) -> None:
    out = tmp_path / "out"
    with pytest.raises(UserError, match=found):
        run_evaluate(**options | change(tmp_path, encoder), out=out)
    assert not out.exists()


@pytest.mark.parametrize("text", ["0/2", "3/2", "1", "a/b", "1/0", "-1/2"])
def test_a_worker_is_one_of_several(text: str) -> None:
    with pytest.raises(UserError, match="write it as 1/4"):
        Share.parse(text)


def test_an_error_on_the_command_line_is_one_line(problems: Path, tmp_path: Path) -> None:
    done = trainer("embedded", "--problems", problems, "--out", tmp_path / "out", "--samples", "2", "--k", "4")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines() == [
        "error: k, 1 to the 2 samples of a problem: got 4; take 4 samples or more, or a smaller k"
    ]


def test_on_its_own_cache_a_teacher_agrees_with_itself(
    options: dict[str, Any], tiny_dir: Path, problems: Path, tmp_path: Path
) -> None:
    request = BuildRequest(
        problems=str(problems), out=str(tmp_path / "cache"), teacher=str(tiny_dir), targets="hidden", dtype="float32"
    )
    build_cache(request, sampling=Sampling(max_new_tokens=12, top_p=1.0), style=PromptStyle(instruction=""))
    text = HeldOutText(cache_url=str(tmp_path / "cache"), window=10, held_out_share=0.5)
    held_out = run_evaluate(**options | {"limit": 2}, out=tmp_path / "run", held_out=text)["held_out"]
    assert held_out["tokens"] > 0
    assert held_out["top1_share"] == 1.0
    assert held_out["forward_kl_nats"] == pytest.approx(0, abs=2e-3)  # what the tier's rounding leaves
    assert held_out["reverse_kl_nats"] == pytest.approx(0, abs=2e-3)
    assert held_out["student_entropy_nats"] == pytest.approx(held_out["teacher_entropy_nats"], rel=0.01)
    assert held_out["nll_nats"] == pytest.approx(held_out["teacher_entropy_nats"], rel=0.5)  # it drew the text
    assert held_out["tier"] == "hidden"


def flags(options: dict[str, Any], problems: Path) -> list[str | Path]:
    """Those of `options` on a command line, after the model."""
    words = {"samples": 2, "max-new-tokens": 8, "seed": 5, "dtype": "float32", "chunk": 4, "instruction": ""}
    given = [text for name, value in words.items() for text in (f"--{name}", str(value))]
    return [options["model"], "--problems", problems, *given]


def test_two_processes_on_one_place_are_one_and_an_error(
    options: dict[str, Any], whole: Path, problems: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    arguments = [*flags(options, problems), "--out", out, "--json"]
    racing = [subprocess.Popen(command(*arguments), stdout=-1, stderr=-1, text=True) for _ in range(2)]
    said = [process.communicate(timeout=120) for process in racing]
    failed = [error for process, (_, error) in zip(racing, said, strict=True) if process.returncode]
    assert len(failed) <= 1  # a slow second finds that the first is done
    for error in failed:
        assert error.splitlines()[-1].startswith("error: ")
        assert "Traceback" not in error
    assert [(line["problem_id"], line["text"]) for line in lines_of(out)] == [
        (line["problem_id"], line["text"]) for line in lines_of(whole)
    ]


def test_a_place_where_another_process_writes_is_refused(options: dict[str, Any], whole: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(whole, tmp_path / "run"))
    (out / "result.json").unlink()
    hold = "import sys, pathlib; from trainer.recipes.samples import only_writer\n"
    hold += "with only_writer(pathlib.Path(sys.argv[1])): print(flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", hold, str(out)], stdin=-1, stdout=-1, text=True) as other:
        assert other.stdout is not None
        other.stdout.readline()
        with pytest.raises(UserError, match=r"evaluate in .*: another process does so now; wait for it"):
            run_evaluate(**options, out=out)
        other.communicate("")
    run_evaluate(**options, out=out)
    assert (out / "result.json").read_bytes() == (whole / "result.json").read_bytes()


def test_lines_that_are_too_many_are_not_summed_up(options: dict[str, Any], whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    run_evaluate(**options, out=out, share=Share.parse("1/2"))
    twice = out / "worker-1-of-2" / "samples.jsonl"
    twice.write_text(twice.read_text() * 2)
    with pytest.raises(UserError, match=r"its 16 lines are not the 8 of this evaluation"):
        run_evaluate(**options, out=out, share=Share.parse("2/2"))
    assert not (out / "result.json").exists()


@pytest.mark.slow
def test_torchrun_shares_the_problems_and_the_first_rank_answers(
    options: dict[str, Any], whole: Path, problems: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "trainer.cli", "evaluate"]
    launch += [*map(str, flags(options, problems)), "--out", str(out), "--json"]
    done = subprocess.run(launch, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)  # one object
    assert result == json.loads((out / "result.json").read_text())
    assert (result["worker"], result["problems"]) == ("all 2", 7)
    assert result["scores"] == json.loads((whole / "result.json").read_text())["scores"]


def test_a_teacher_reads_what_the_model_wrote(options: dict[str, Any], tiny_dir: Path, tmp_path: Path) -> None:
    from tests.trainer.test_served import Served

    options = options | {"limit": 3}
    own = run_evaluate(**options, out=tmp_path / "run", teacher=str(tiny_dir))["own_text"]
    assert own["top1_share"] == 1.0  # of itself
    assert own["forward_kl_nats"] == pytest.approx(0, abs=1e-5)
    assert own["reverse_kl_nats"] == pytest.approx(0, abs=1e-5)
    served = Served("--teacher", f"tiny={tiny_dir}", "--dtype", "float32")
    try:
        there = run_evaluate(**options, out=tmp_path / "served", teacher=f"{served.location}#tiny")["own_text"]
    finally:
        served.kill()
    assert there == pytest.approx(own, abs=1e-5)
    config = json.loads((tmp_path / "served" / "config.json").read_text())
    assert (config["teacher"]["name"], config["teacher"]["dtype"]) == (tiny_dir.name, "float32")
    with pytest.raises(UserError, match="it has another teacher"):
        run_evaluate(**options, out=tmp_path / "run")


def test_a_teacher_of_another_tokenizer_is_refused(options: dict[str, Any], tmp_path: Path) -> None:
    from tools.studies.teacher import MODELS

    with pytest.raises(UserError, match="it has another tokenizer"):
        run_evaluate(**options, out=tmp_path / "run", teacher=str(MODELS / "teacher"))
    assert not (tmp_path / "run").exists()
