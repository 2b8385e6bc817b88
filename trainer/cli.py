"""The `trainer` command: train students from a cache, or on their own text.

Guarantees: as for `logitcache`: exit code 0 only when what was asked is done, one line for an error, `--json` for one
JSON object on standard output. Models and torch are imported by the commands that need them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from logitcache.console import answer, command_line, leave, run_command
from logitcache.prompts import PromptStyle
from logitcache.scoring import Sampling
from trainer.planning.case import Aim, Case
from trainer.policy.settings import PolicyTraining, RewardKind, Surrogate
from trainer.settings import Prefix, Training
from trainer.watch import Watch

app = command_line("trainer", __doc__)

_TRAINING = Parameter(name="*", group="Training")
_WRITING = Parameter(group="Writing")
_CURRICULUM = Parameter(group="Curriculum")

RUN = Training()
CASE = Case()
POLICY = PolicyTraining()
SURROGATE = Surrogate()
PROMPT_STYLE = PromptStyle()


@app.command
def prune(teacher: str, /, *, cache: str, layers: int, out: Path, json: bool = False) -> None:
    """Cut a student out of a teacher: the decoder layers that matter most, everything else unchanged.

    Costs one forward of the teacher over 16 cached sequences, to see how much each layer turns its input, and a copy of
    the weights that are kept.

    Example: trainer prune embedded --cache runs/demo/cache --layers 20 --out runs/student

    Args:
        teacher: the transformers model id or directory that built the cache; `embedded` is SmolLM2-135M-Instruct.
        cache: its cache, for the text.
        layers: how many decoder layers to keep.
        out: a new directory for the student.
        json: print one JSON object.
    """
    from trainer.recipes.prune import run_prune

    result = run_prune(teacher=teacher, cache_url=cache, layers=layers, out=out)
    text = f"{out}: layers {', '.join(map(str, result['layers']))} of the teacher's {result['teacher_layers']}"
    answer(result, text, as_json=json)


@app.command
def distill(
    cache: str,
    /,
    *,
    student: str,
    out: Path,
    prefix: Prefix = Prefix.TEACHER,
    student_share: float | None = None,
    forward_weight: str = "1.0",
    teacher: str | None = None,
    generator: Literal["transformers", "vllm"] | None = None,
    training: Annotated[Training, _TRAINING] = RUN,
    temperature: Annotated[float, _WRITING] = 1.0,
    top_p: Annotated[float, _WRITING] = 0.95,
    top_k: Annotated[int, _WRITING] = 20,
    targets: str | None = None,
    cross_entropy_share: float = 0.0,
    curriculum: Annotated[tuple[int, ...], Parameter(consume_multiple=True), _CURRICULUM] = (),
    entropy_floor: Annotated[str | None, _CURRICULUM] = None,
    check_every: Annotated[int | None, _CURRICULUM] = None,
    patience: Annotated[int | None, _CURRICULUM] = None,
    watch: tuple[Watch, ...] = (),
    checkpoint_every: int = 100,
    keep: int = 2,
    json: bool = False,
) -> None:
    """Train one student and measure it on held-out problems before and after.

    The defaults are a first try of seconds; `trainer advise` prints the options of a real run.

    From the cache (teacher prefix) a step costs the student's forward and backward and the teacher's head; the teacher
    itself is neither loaded nor looked for. On student prefixes it costs besides that the student's writing and the
    teacher's reading of what it wrote: two to four times as much in all, more the larger the teacher.

    The same command with the same --out goes on from the newest checkpoint (or from the start, if there is none) and
    ends as if it had never been killed; another configuration there is refused.

    From the cache it trains on several processes too: `torchrun --nproc-per-node 2 -m trainer.cli distill ...` shards
    text, weights and optimizer over them (FSDP2) and takes the same steps, to rounding.

    Example: trainer distill runs/demo/cache --student runs/student --out runs/forward --steps 100

    Args:
        cache: a sealed cache, as `logitcache build` makes it.
        student: the model to start from, a transformers model id or directory with the teacher's tokenizer.
        out: a directory for the trained student, its metrics, checkpoints and result: new, or of this same run.
        prefix: who writes the text: teacher (the cache), student (live), or mixed (both at every step).
        student_share: mixed prefixes: the student's share of each step's sequences; half if not given.
        forward_weight: 1 is forward KL, 0 reverse KL, between them a linear mix; 1.0:0.2@100 goes from 1.0 to 0.2 over
            steps 0 to 100.
        teacher: the model that built the cache, to score what the student writes; for student and mixed prefixes. Or
            a served one, `grpc://HOST:PORT#NAME` (see `logitcache serve`).
        generator: the engine that the student writes with: transformers (if not given), or vllm in this process.
        training: how it is trained.
        temperature: student prefixes: sampling temperature.
        top_p: student prefixes: nucleus.
        top_k: student prefixes: likeliest tokens to draw from.
        targets: the tier to train from, by name or kind: hidden and full are exact, topk is coarse (and named so),
            sampled serves forward KL alone. By default the first of these that the cache has.
        cross_entropy_share: of the loss, for the cross-entropy of the cached text itself: 0 none, 1 nothing else (plain
            fine-tuning). Between them it costs a second pass through the student's head. Teacher prefixes only.
        curriculum: windows in place of --window, ascending, such as `--curriculum 128 256 512`: the next one is taken
            while the entropy of what the student writes on held-out prompts is at or above the floor.
        entropy_floor: in nats per token (0.3), or a share of the entropy before the first step (50%, if not given).
        check_every: steps between the curriculum's checks; 50 if not given.
        patience: checks in a row below the floor after which the window stays for good; 1 if not given.
        watch: tensorboard or wandb, besides metrics.jsonl; may be given twice.
        checkpoint_every: steps between checkpoints, each three times the float32 weights in size.
        keep: checkpoints that stay, the newest.
        json: print one JSON object.
    """
    from logitcache.identity import resolve_model
    from trainer.curriculum import plan_of
    from trainer.distributed import joined
    from trainer.recipes.distill import Distillation, run_distill
    from trainer.schedules import WeightSchedule

    plan = plan_of(curriculum, floor=entropy_floor, check_every=check_every, patience=patience)
    with joined() as ranks:
        result = run_distill(
            cache_url=cache,
            student_dir=resolve_model(student),
            out=out,
            distillation=Distillation(
                prefix=prefix,
                weights=WeightSchedule.parse(forward_weight),
                teacher=teacher,
                targets=targets,
                student_share=student_share,
                generator=generator,
                curriculum=plan,
                cross_entropy_share=cross_entropy_share,
            ),
            training=training,
            sampling=Sampling(temperature=temperature, top_p=top_p, top_k=top_k),
            watch=watch,
            checkpoint_every=checkpoint_every,
            keep=keep,
            ranks=ranks,
        )
    if ranks.first:
        answer({"out": str(out), **result}, _described(result), as_json=json)


@app.command
def grid(
    cache: str,
    /,
    *,
    student: str,
    teacher: str,
    out: Path,
    generator: Literal["transformers", "vllm"] = "transformers",
    training: Annotated[Training, _TRAINING] = RUN,
    temperature: Annotated[float, _WRITING] = 1.0,
    top_p: Annotated[float, _WRITING] = 0.95,
    top_k: Annotated[int, _WRITING] = 20,
    students: int = 10,
    mixes: Annotated[tuple[float, ...], Parameter(consume_multiple=True)] = (1.0, 0.0),
    targets: str | None = None,
    checkpoint_every: int = 100,
    json: bool = False,
) -> None:
    """Train the four cells (teacher or student prefix, forward or reverse KL) from one start and report them.

    Costs four times the steps of `distill`: two runs from the cache, two with the teacher in memory; with more --mixes,
    two runs for each. The trained students are measured and not kept.

    The same command with the same --out goes on where a killed one stopped: cells that are done stay, the one that was
    under way goes on from its newest checkpoint; another configuration there is refused.

    Example: trainer grid runs/demo/cache --student runs/demo/student --teacher embedded --out runs/demo

    Args:
        cache: a cache with hidden states, as `logitcache build` makes it.
        student: the model every cell starts from, a transformers model id or directory with the teacher's tokenizer.
        teacher: the model that built the cache, or a served one, `grpc://HOST:PORT#NAME`; loaded for the cells on
            student prefixes only.
        out: a directory for the report (report.json, report.md, report.png): new, holding cache and student only, or of
            this same grid.
        generator: the engine that students write with: transformers, or vllm in this process.
        training: how every cell is trained.
        temperature: student prefixes: sampling temperature.
        top_p: student prefixes: nucleus.
        top_k: student prefixes: likeliest tokens to draw from.
        students: how many students share the cache, for the amortised cost.
        mixes: forward weights to train with on either prefix, such as `--mixes 0 0.2 0.5 0.8 1`.
        targets: the tier to train from, see `distill`. Measuring needs hidden states or full vocabularies.
        checkpoint_every: steps between checkpoints of the cell under way, three times the float32 weights in size.
        json: print one JSON object.
    """
    from logitcache.identity import resolve_model
    from trainer.recipes.grid import run_grid
    from trainer.report import table

    report = run_grid(
        cache_url=cache,
        student_dir=resolve_model(student),
        teacher=teacher,
        out=out,
        training=training,
        sampling=Sampling(temperature=temperature, top_p=top_p, top_k=top_k),
        students=students,
        mixes=mixes,
        targets=targets,
        generator=generator,
        checkpoint_every=checkpoint_every,
    )
    answer(report, table(report), as_json=json)


@app.command
def grpo(
    model: str,
    /,
    *,
    problems: str,
    out: Path,
    reward: RewardKind = RewardKind.MATH,
    generator: Literal["transformers", "vllm"] = "transformers",
    training: Annotated[PolicyTraining, _TRAINING] = POLICY,
    surrogate: Annotated[Surrogate, Parameter(name="*", group="Loss")] = SURROGATE,
    max_new_tokens: int = 1024,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int | None = None,
    style: Annotated[PromptStyle, Parameter(name="*")] = PROMPT_STYLE,
    stop_tokens: Annotated[tuple[str, ...], Parameter(consume_multiple=True)] = (),
    watch: tuple[Watch, ...] = (),
    checkpoint_every: int = 100,
    keep: int = 2,
    json: bool = False,
) -> None:
    """Train a model by GRPO on verifiable answers, from any checkpoint, such as a distilled student.

    A step costs --prompts times --group answers, and for each --updates a forward and backward over those that were
    better or worse than their group. With --kl-weight, a frozen copy of the model reads them too.

    The same command with the same --out goes on from the newest checkpoint (or from the start, if there is none) and
    ends as if it had never been killed; another configuration there is refused. Measure with `trainer evaluate`.

    Example: trainer grpo runs/forward/student --problems train.jsonl --out runs/forward-grpo --steps 200

    Args:
        model: a transformers model id or directory of a causal language model; `embedded` is SmolLM2-135M-Instruct.
        problems: with answers, as for `trainer evaluate`.
        out: a directory for the trained model (student/), its metrics, checkpoints and result: new, or of this same
            run.
        reward: math (equal to the known answer, by math-verify) or exact (the known answer letter by letter, in the
            last box or as the last word).
        generator: the engine that answers are written with: transformers, or vllm in this process.
        training: how the policy is trained.
        surrogate: what is minimised.
        max_new_tokens: of an answer.
        temperature: of sampling, above 0; also divides the logits of the probabilities that are trained.
        top_p: nucleus; below 1, or with --top-k, the text is drawn from another distribution than the one trained.
        top_k: likeliest tokens to draw from; all by default.
        style: how a problem is put to the model.
        stop_tokens: that end an answer besides the model's own, such as `<|im_end|>` of a chat teacher.
        watch: tensorboard or wandb, besides metrics.jsonl; may be given twice.
        checkpoint_every: steps between checkpoints, each three times the float32 weights in size.
        keep: checkpoints that stay, the newest.
        json: print one JSON object.
    """
    from logitcache.identity import resolve_model
    from trainer.recipes.grpo import described, run_grpo

    result = run_grpo(
        model_dir=resolve_model(model),
        problems=problems,
        out=out,
        training=training,
        surrogate=surrogate,
        sampling=Sampling(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, top_k=top_k),
        style=style,
        reward=reward,
        generator=generator,
        stop_tokens=stop_tokens,
        watch=watch,
        checkpoint_every=checkpoint_every,
        keep=keep,
    )
    answer(result, described(result), as_json=json)


@app.command
def evaluate(
    model: str,
    /,
    *,
    problems: str,
    out: Path,
    samples: int = 8,
    max_new_tokens: int = 4096,
    temperature: float = 1.0,
    top_p: float = 0.95,
    top_k: int | None = 20,
    seed: int = 0,
    style: Annotated[PromptStyle, Parameter(name="*")] = PROMPT_STYLE,
    k: Annotated[tuple[int, ...], Parameter(consume_multiple=True)] = (),
    limit: int | None = None,
    worker: str | None = None,
    generator: str = "transformers",
    scorer: str | None = None,
    dtype: Literal["bfloat16", "float32"] = "bfloat16",
    stop_tokens: Annotated[tuple[str, ...], Parameter(consume_multiple=True)] = (),
    chunk: int = 64,
    answer_limit_s: int = 5,
    teacher: str | None = None,
    cache: str | None = None,
    window: int = 128,
    held_out_share: float = 0.2,
    held_out_sequences: int = 24,
    json: bool = False,
) -> None:
    """Let a model answer problems and score it: Avg@k, Pass@k, maj@k, lengths, entropy, with 95% intervals.

    Costs --samples completions of every problem, and one reading of each to measure entropy and stop mass; checking the
    answers costs milliseconds each. Killed, the same command goes on after the last chunk; another configuration in the
    same --out is refused. Several workers run it with the same --out and their own --worker; the last one sums up.
    Under torchrun each process takes its share by itself, and the first answers for all.

    Example: trainer evaluate runs/student --problems math500 --out runs/student-math500 --samples 4

    Args:
        model: a transformers model id or directory of a causal language model; `embedded` is SmolLM2-135M-Instruct.
        problems: aime24, amc23, math500 or gsm8k (from the hub), a Parquet, JSON or JSONL file or URL with columns
            problem and answer, or the id of a hub dataset of such files.
        out: a directory for samples.jsonl and result.json: new, or of this same evaluation.
        samples: completions of each problem.
        max_new_tokens: of a completion; one that reaches it counts as truncated.
        temperature: of sampling; 0 is greedy, and takes --samples 1.
        top_p: nucleus.
        top_k: likeliest tokens to draw from; `none` for all.
        seed: of sampling.
        style: how a problem is put to the model.
        k: of Pass@k and maj@k, each at most --samples; by default the powers of two up to that.
        limit: the first so many problems.
        worker: this worker of so many, such as `2/8`; by default the only one, or as torchrun says.
        generator: the engine that writes: transformers, vllm, or http://host:port#model.
        scorer: the engine that measures the text, transformers or vllm; by default the one that writes.
        dtype: what the engines compute in.
        stop_tokens: that end a completion besides the model's own, such as `<|im_end|>` of a chat teacher.
        chunk: completions that are written, measured, checked and kept at a time.
        answer_limit_s: processor seconds that checking one answer may take; beyond it, the answer is wrong.
        teacher: a model with the same tokenizer, or a served one, `grpc://HOST:PORT#NAME`, to measure KL and top-1
            agreement on what the model wrote; costs a reading of every completion by the teacher.
        cache: a sealed cache, to measure KL, likelihood and top-1 agreement on its held-out text too.
        window: completion tokens of that text.
        held_out_share: of the cache's problems, as in training.
        held_out_sequences: how many of those to measure on, at most.
        json: print one JSON object.
    """
    from logitcache.errors import require
    from logitcache.scorers.choose import parse_engine
    from trainer.recipes.evaluate import Share, run_evaluate
    from trainer.recipes.held_out import HeldOutText
    from trainer.recipes.samples import described

    require(samples >= 1, "--samples, at least 1", samples)
    share = Share.of_torchrun() if worker is None else Share.parse(worker)
    text = None
    if cache is not None:
        text = HeldOutText(
            cache_url=cache,
            window=window,
            held_out_share=held_out_share,
            held_out_sequences=held_out_sequences,
        )
    result = run_evaluate(
        model=model,
        problems=problems,
        out=out,
        sampling=Sampling(
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            samples_per_problem=samples,
            seed=seed,
        ),
        style=style,
        ks=k,
        generator=parse_engine(generator, "--generator"),
        scorer=None if scorer is None else parse_engine(scorer, "--scorer"),
        dtype=dtype,
        stop_tokens=stop_tokens,
        limit=limit,
        share=share,
        chunk=chunk,
        answer_limit_s=answer_limit_s,
        teacher=teacher,
        held_out=text,
    )
    if share.answers:
        answer(result, described(result), as_json=json)


@app.command
def report(*runs: Path, out: Path, price_per_hour: float | None = None, json: bool = False) -> None:
    """Draw curves and a table of runs, finished or going on, from their metrics. Costs seconds; loads no model.

    Example: trainer report runs/forward runs/reverse --out runs/compared

    Args:
        runs: the --out of `distill` or `grpo`, or a cell of a `grid`, one or more.
        out: without ending: OUT.md and OUT.png are written, over what is there.
        price_per_hour: of the machine, to tell what each run's steps cost; any currency.
        json: print one JSON object.
    """
    from logitcache.errors import require
    from trainer.recipes.report import run_report

    require(bool(runs), "runs to report", "none", "name the --out of one or more")
    result = run_report(runs, out, price_per_hour=price_per_hour)
    text = result.pop("table")
    answer(result, text, as_json=json)


@app.command(name="equal-flops")
def equal_flops(
    cache: str,
    /,
    *,
    student: str,
    teacher: str,
    budgets: Annotated[tuple[float, ...], Parameter(consume_multiple=True)],
    out: Path | None = None,
    student_shares: Annotated[tuple[float, ...], Parameter(consume_multiple=True)] = (0.0, 1.0),
    mixes: Annotated[tuple[float, ...], Parameter(consume_multiple=True)] = (1.0, 0.0),
    seeds: Annotated[tuple[int, ...], Parameter(consume_multiple=True)] = (0, 1, 2),
    parts: int = 4,
    students: int = 10,
    training: Annotated[Training, _TRAINING] = RUN,
    temperature: Annotated[float, _WRITING] = 1.0,
    top_p: Annotated[float, _WRITING] = 0.95,
    top_k: Annotated[int, _WRITING] = 20,
    targets: str | None = None,
    cross_entropy_share: float = 0.0,
    problems: str | None = None,
    limit: int | None = None,
    samples: int = 4,
    max_new_tokens: int = 256,
    style: Annotated[PromptStyle, Parameter(name="*")] = PROMPT_STYLE,
    checkpoint_every: int = 100,
    plan: bool = False,
    flops_per_second: float | None = None,
    price_per_hour: float | None = None,
    json: bool = False,
) -> None:
    """Train every cell until a FLOP budget is spent, several seeds each, and report quality against FLOPs.

    Costs the largest of --budgets for each cell and seed (twelve times, unless told otherwise), and the measuring: at
    --parts points of every budget the held-out text, and the problems if there are any. One run up to the largest
    budget serves the smaller ones: it is measured where they end. --plan says what it comes to and trains nothing.

    The same command with the same --out keeps the runs that are done and goes on with the one that was killed.

    Example: trainer equal-flops runs/demo/cache --student runs/demo/student --teacher embedded --budgets 1e12 2e12
    --out runs/equal

    Args:
        cache: a cache with hidden states, as `logitcache build` makes it.
        student: the model every run starts from, a transformers model id or directory with the teacher's tokenizer.
        teacher: the model that built the cache, or a served one, `grpc://HOST:PORT#NAME`; loaded for student prefixes
            only.
        budgets: FLOPs of training one student (rollouts and live scoring included, measuring not), one or more.
        out: a directory for the report (equal_flops.json, .md, .png) and the runs: new, or of this same study.
        student_shares: of each step's sequences, that the student writes: 0 is teacher prefixes, 1 student prefixes,
            between them a mix, which owes the build as teacher prefixes do.
        mixes: forward weights, each with every share: 1 is forward KL, 0 reverse KL.
        seeds: of order and sampling, a run of every cell for each.
        parts: each budget is measured at so many equal parts of it.
        students: how many students share the cache, for the amortised cost.
        training: how every run is trained; --budgets and --seeds stand for --steps and --seed.
        temperature: of what students write.
        top_p: nucleus.
        top_k: likeliest tokens to draw from.
        targets: the tier to train from, see `distill`. Measuring needs hidden states or full vocabularies.
        cross_entropy_share: of the loss on teacher prefixes, for the cross-entropy of their text, see `distill`.
        problems: a problem set with answers to score the student on, see `evaluate`; none if not given.
        limit: the first so many of them.
        samples: answers to each.
        max_new_tokens: of an answer.
        style: how a problem is put.
        checkpoint_every: steps between checkpoints of the run under way, three times the float32 weights in size.
        plan: predict steps, FLOPs and time from the cache's mean lengths, and stop.
        flops_per_second: for --plan: what this machine achieves at this work, as a finished study reports it.
        price_per_hour: of this machine, for the money.
        json: print one JSON object.
    """
    from logitcache.errors import UserError
    from logitcache.identity import resolve_model
    from trainer.budget_report import described
    from trainer.planning.report import study_text
    from trainer.planning.study import Study, whole_flops
    from trainer.recipes.equal_flops import run_equal_flops
    from trainer.recipes.equal_flops_setup import Questions, Setup, plan_equal_flops

    study = Study(
        budgets=whole_flops(budgets),
        student_shares=student_shares,
        mixes=mixes,
        seeds=seeds,
        parts=parts,
        students=students,
        price_per_hour=price_per_hour,
    )
    questions = None
    if problems is not None:
        questions = Questions(source=problems, limit=limit, samples=samples, max_new_tokens=max_new_tokens, style=style)
    setup = Setup(
        cache_url=cache,
        student_dir=resolve_model(student),
        teacher=teacher,
        training=training,
        sampling=Sampling(temperature=temperature, top_p=top_p, top_k=top_k),
        targets=targets,
        questions=questions,
        checkpoint_every=checkpoint_every,
        cross_entropy_share=cross_entropy_share,
    )
    if plan:
        found = plan_equal_flops(setup, study, flops_per_second=flops_per_second)
        answer(found, study_text(found), as_json=json)
        return
    if out is None:
        raise UserError("equal-flops", "no place for its runs", "give --out, or --plan to see what it comes to")
    report = run_equal_flops(setup, study, out)
    answer(report, described(report), as_json=json)


@app.command
def plan(
    case: Annotated[Case, Parameter(name="*")] = CASE,
    *,
    tiers: Annotated[tuple[str, ...], Parameter(consume_multiple=True)] = ("topk:p=5e-4", "hidden:max-kl=2e-3"),
    budgets: Annotated[tuple[float, ...], Parameter(consume_multiple=True)] = (),
    plot: Path | None = None,
    json: bool = False,
) -> None:
    """Say what training would cost, before anything is run: FLOPs, steps, bytes, and when a cache pays.

    Costs seconds: it reads two configurations and loads no model.

    Example: trainer plan --student Qwen3-0.6B --teacher Qwen3-8B --students 10 --plot break_even.png

    Args:
        case: what is planned.
        tiers: of a cache, to compare, each as for `logitcache build --targets`.
        budgets: FLOPs for one student to compare the cells at, as in `equal-flops`: what each pays for.
        plot: a PNG of the FLOPs of a student against how many share the cache.
        json: print one JSON object.
    """
    from trainer.planning.plan import make_plan
    from trainer.planning.report import draw_break_even, plan_text, require_plot
    from trainer.planning.study import whole_flops

    if plot is not None:
        require_plot(plot)
    found = make_plan(case, tiers, whole_flops(budgets))
    if plot is not None:
        draw_break_even(found, plot)
    answer(found, plan_text(found), as_json=json)


@app.command
def advise(
    aim: Aim,
    /,
    *,
    case: Annotated[Case, Parameter(name="*")] = CASE,
    cache: str = "runs/cache",
    problem_set: str = "agentica-org/DeepScaleR-Preview-Dataset",
    json: bool = False,
) -> None:
    """Say which cell, forward weight, windows and tier to choose for an aim, why, at what cost, and the commands.

    Costs seconds: it reads two configurations and loads no model.

    Example: trainer advise answer --student Qwen3-0.6B --teacher Qwen3-4B --budget 1e18

    Args:
        aim: answer (the best single answer), rl (a start for reinforcement learning), compute (as cheap as can be, or
            the text is there already) or long (long completions).
        case: models, text, budget, students.
        cache: where the cache is or will be.
        problem_set: what it would be built from; --problems of `logitcache build`.
        json: print one JSON object.
    """
    from trainer.planning.advice import advice_facts
    from trainer.planning.advice import advise as choose
    from trainer.planning.report import advice_text

    facts = advice_facts(choose(aim, case, cache=cache, problems=problem_set), case)
    answer(facts, advice_text(facts), as_json=json)


def main() -> None:
    """Entry point."""
    after = "run it again: distill, grpo, grid, equal-flops and evaluate go on from what was kept"
    leave(run_command(app, after_interrupt=after))


def _described(result: dict) -> str:
    held_out = result["held_out"]
    lines = [
        f"{name}: unknown" if value["before"] is None else f"{name}: {value['before']:.4f} -> {value['after']:.4f}"
        for name, value in held_out.items()
    ]
    flops = result["flops"]
    lines.append(f"FLOPs: {flops['marginal']:.4g} marginal, {flops['amortised']:.4g} with the whole build")
    return "\n".join([*lines, f"{result['tokens_per_s']:.0f} completion tokens/s, {result['seconds']:.1f} s"])


if __name__ == "__main__":
    main()
