"""Which cell, forward weight, window schedule and tier to choose for an aim, why, and the commands that do it.

Guarantees: each reason names its source: a finding of arXiv 2605.16826 (on Qwen3-0.6B and mathematics; nobody has
repeated it here), a figure read from a kept result of this repository, or this plan's own count. The rules are the
paper's findings and arithmetic, no model of quality: none of them knows what a FLOP buys on other data.
"""

from __future__ import annotations

import shlex
from dataclasses import asdict, dataclass, replace
from typing import Any

from logitcache.console import note
from logitcache.errors import UserError, require
from trainer.curriculum import CurriculumPlan
from trainer.planning.case import Aim, Case, Have
from trainer.planning.costs import Text, build_cost
from trainer.planning.evidence import STUDY_RESULTS, at_equal_flops
from trainer.planning.models import hub_name
from trainer.planning.plan import CellCost, cache_text, cell_cost, models
from trainer.planning.storage import MEASUREMENTS, PLAIN, kind_of_tier, measured, storage
from trainer.report import flop_text
from trainer.settings import Prefix

PAPER = "arXiv 2605.16826"
COUNT = "this plan's FLOPs"
SHORT_WINDOW = 128
"""Completion tokens at which the paper saw no difference between prefixes, and where its curriculum starts."""
HIDDEN, TOPK = "hidden:max-kl=2e-3", "topk:p=5e-4"


@dataclass(frozen=True, kw_only=True)
class Reason:
    """One ground, and where it is from."""

    why: str
    source: str


@dataclass(frozen=True, kw_only=True)
class Advice:
    """What to do.

    Attributes:
        prefix: who writes the text.
        forward_weight: 1 forward KL, 0 reverse KL.
        tier: of the cache, to train from and to measure on; student prefixes are scored live.
        windows: completion tokens to train on: one, or the ladder of the entropy-gated curriculum.
        cost: of one student; its build is what must be built first, whoever owes it.
        reasons: for each of these.
        commands: that do it, in order, as words.
    """

    prefix: Prefix
    forward_weight: float
    tier: str
    windows: tuple[int, ...]
    cost: CellCost
    reasons: tuple[Reason, ...]
    commands: tuple[tuple[str, ...], ...]


def advise(aim: Aim, case: Case, *, cache: str, problems: str) -> Advice:
    """Choose.

    Args:
        aim: what the student is for.
        case: models, text, budget, students.
        cache: where the cache is or will be.
        problems: what it will be built from.

    Raises:
        UserError: an unknown model, long completions that are not, or a budget that does not pay for a step and the
            share of the build.
    """
    _note_vocabularies(case)
    window = min(case.completion_tokens, case.window or case.completion_tokens)
    share = case.student_share
    require(share is None, "advice without --student-share", share, "leave it out: `trainer plan` has mixed prefixes")
    require(aim is not Aim.LONG or window > SHORT_WINDOW, f"long completions, over {SHORT_WINDOW} tokens", window)
    forward_weight, divergence = _divergence(aim)
    tier = TOPK if forward_weight > 0 else HIDDEN
    prefix, prefix_reasons = _prefix(aim, case, window, tier)
    if prefix is Prefix.STUDENT:
        tier = HIDDEN
    windows, schedule = _windows(prefix, forward_weight, window)
    cost = _costs(case, tier)[prefix]
    if cost.amortised_steps < 1:
        share = cost.share(case.students)
        raise UserError(
            f"--budget {case.budget:g}",
            f"one step on {prefix} prefixes costs {cost.step_flops:.4g} FLOPs, the share of the build {share:.4g}",
            "raise it, build for fewer --problems or more --students, or take a shorter --window",
        )
    ours = Reason(why=at_equal_flops(prefix, "forward" if forward_weight == 1 else "reverse"), source=STUDY_RESULTS)
    distill = _distill(case, prefix, forward_weight, windows, tier, cost.amortised_steps, cache)
    return Advice(
        prefix=prefix,
        forward_weight=forward_weight,
        tier=tier,
        windows=windows,
        cost=cost,
        reasons=(divergence, *prefix_reasons, ours, _tier_reason(tier, prefix, case), schedule),
        commands=(*_cache_commands(case, tier, prefix, cache, problems), distill),
    )


def _note_vocabularies(case: Case) -> None:
    """Heads of one tokenizer may be padded differently: this tells no more than that the tokenizers may differ."""
    student, teacher = models(case).student.vocab, models(case).teacher.vocab
    if student != teacher:
        found = f"the student's head has {student:,} rows, the teacher's {teacher:,}"
        note(f"warning: {found}; unless that is padding, the tokenizers differ and `trainer distill` will refuse")


def _divergence(aim: Aim) -> tuple[float, Reason]:
    if aim is Aim.RL:
        why = "forward KL: after it (student prefixes, 4,096 tokens) GRPO took MATH500 from 40 to 45, after reverse KL "
        return 1.0, Reason(why=why + "from 45 down to 36", source=PAPER)
    return 0.0, Reason(why="reverse KL: 2.45 points more Avg@k than forward KL, on average", source=PAPER)


def _prefix(aim: Aim, case: Case, window: int, tier: str) -> tuple[Prefix, list[Reason]]:
    if aim is Aim.COMPUTE:
        prefix, reason = _cheaper(case, tier)
        return prefix, [reason]
    if window <= SHORT_WINDOW:
        prefix, reason = _cheaper(case, tier)
        why = f"the cheaper prefix: up to {SHORT_WINDOW} tokens it makes about no difference who writes"
        return prefix, [Reason(why=why, source=PAPER), reason]
    why = "student prefixes: 1.80 points more Avg@k than teacher prefixes on average, 3.55 at 4,096 tokens"
    return Prefix.STUDENT, [Reason(why=why, source=PAPER)]


def _cheaper(case: Case, tier: str) -> tuple[Prefix, Reason]:
    """More steps within the budget, or fewer FLOPs for the steps, what must be built first included."""
    costs = _costs(case, tier)
    cached, live = costs[Prefix.TEACHER], costs[Prefix.STUDENT]
    if case.budget is not None:
        wins = cached.amortised_steps >= live.amortised_steps
        why = f"the budget pays for {cached.amortised_steps} steps from the cache, {live.amortised_steps} on student "
        why += "prefixes, each after its share of what must be built first"
    else:
        of_cached, of_live = (cost.amortised(case.students) for cost in (cached, live))
        wins = of_cached <= of_live
        why = f"a student costs {flop_text(of_cached)} from the cache, {flop_text(of_live)} on its own prefixes, each "
        why += "with its share of what must be built first"
    chosen = Prefix.TEACHER if wins else Prefix.STUDENT
    return chosen, Reason(why=f"{chosen} prefixes: {why}", source=COUNT)


def _costs(case: Case, tier: str) -> dict[Prefix, CellCost]:
    """Of a student from the cache with this tier, and of one that writes, which needs a cache all the same."""
    cached, live = cell_cost(case, Prefix.TEACHER, tier), cell_cost(case, Prefix.STUDENT, None)
    live = replace(live, build=build_cost(models(case).teacher, _prompts_text(case), kind="hidden", have=case.have))
    if case.budget is not None:
        steps = max(0, int(case.budget) - live.share(case.students)) // live.step_flops
        live = replace(live, amortised_steps=steps)
    return {Prefix.TEACHER: cached, Prefix.STUDENT: live}


def _prompts_text(case: Case) -> Text:
    """Of a cache for a student that writes: it takes prompts and held-out text, for which short completions do."""
    text = cache_text(case)
    return text.within(SHORT_WINDOW) if case.have is Have.NOTHING else text


def _tier_reason(tier: str, prefix: Prefix, case: Case) -> Reason:
    kept, sparse = measured(PLAIN, tier), measured(PLAIN, TOPK)
    if prefix is Prefix.STUDENT:
        why = f"{tier}, to measure with: the run takes prompts and held-out text from the cache, and no targets"
        return Reason(why=why, source="docs/planning.md")
    if kept is None or sparse is None:
        why = f"{tier}: hidden states give both divergences exactly, top-k gives reverse KL badly; nothing was measured"
        return Reason(why=why, source="docs/objectives.md")
    if tier == HIDDEN:
        ours, theirs = (figures["student_reverse_gradient_relative_error"] for figures in (kept, sparse))
        why = f"{tier}: its reverse gradient is off by {ours:.2g}, that of {TOPK} by {theirs:.2g} (relative)"
        return Reason(why=why, source=MEASUREMENTS)
    bytes_of = {word: storage(models(case).teacher, word).bytes_per_token[PLAIN] for word in (tier, HIDDEN)}
    why = (
        f"{tier}: its forward gradient is off by {kept['student_forward_gradient_relative_error']:.2g} (relative), at "
    )
    why += f"{bytes_of[tier]:.3g} bytes a token where {HIDDEN} takes {bytes_of[HIDDEN]:.3g}; a step projects no states"
    return Reason(why=why, source=MEASUREMENTS)


def _windows(prefix: Prefix, forward_weight: float, window: int) -> tuple[tuple[int, ...], Reason]:
    if prefix is Prefix.TEACHER or forward_weight > 0 or window <= SHORT_WINDOW:
        why = f"a fixed window of {window}: what the curriculum prevents was seen in reverse KL over long windows of "
        return (window,), Reason(why=why + "the student's own text", source=PAPER)
    ladder = tuple(length for length in CurriculumPlan().lengths if length < window)
    why = "the entropy-gated curriculum: over a fixed 4,096 tokens reverse KL drives entropy to 0 and lengths to the "
    return (*ladder, window), Reason(why=why + "cap; with it Avg@k went from 36.4 to 40.0", source=PAPER)


def _cache_commands(case: Case, tier: str, prefix: Prefix, cache: str, problems: str) -> list[tuple[str, ...]]:
    teacher = ("--teacher", hub_name(case.teacher))
    match case.have:
        case Have.NOTHING:
            text = cache_text(case) if prefix is Prefix.TEACHER else _prompts_text(case)
            build = ("logitcache", "build", *teacher, "--problems", problems, "--out", cache, "--targets", tier)
            return [(*build, "--limit", str(case.problems), "--max-new-tokens", str(max(text.completion_tokens)))]
        case Have.TEXT:
            return [("logitcache", "score", cache, *teacher, "--targets", tier)]
        case Have.CACHE:
            return []


def _distill(
    case: Case, prefix: Prefix, forward_weight: float, windows: tuple[int, ...], tier: str, steps: int, cache: str
) -> tuple[str, ...]:
    """Learning rate and warm-up are the paper's."""
    command = ("trainer", "distill", cache, "--student", hub_name(case.student), "--out", "runs/student")
    chosen = ("--prefix", str(prefix), "--forward-weight", f"{forward_weight:g}")
    live = ("--teacher", hub_name(case.teacher)) if prefix is Prefix.STUDENT else ("--targets", kind_of_tier(tier))
    size = ("--steps", str(steps), "--sequences", str(case.sequences))
    length = ("--curriculum" if len(windows) > 1 else "--window", *map(str, windows))
    rate = ("--learning-rate", "5e-7", "--warmup-steps", str(max(1, steps // 20)))
    memory = ("--gradient-checkpointing",) if case.gradient_checkpointing else ()
    return (*command, *chosen, *live, *size, *length, *rate, *memory)


def advice_facts(advice: Advice, case: Case) -> dict[str, Any]:
    """As JSON values."""
    text = cache_text(case) if advice.prefix is Prefix.TEACHER else _prompts_text(case)
    kept, cost = storage(models(case).teacher, advice.tier), advice.cost
    return {
        **asdict(advice),
        "commands": [shlex.join(command) for command in advice.commands],
        "marginal": cost.amortised_steps * cost.step_flops,
        "amortised": cost.amortised(case.students),
        "students": case.students,
        "trajectories": cost.amortised_steps * case.sequences,
        "storage": {**asdict(kept), "bytes": kept.total_bytes(text.target_rows)},
    }
