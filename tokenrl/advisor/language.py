"""Recommends settings for a language task, from what the model already does with its prompts."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

from accelerate import PartialState

from tokenrl.advisor.arguments import AdviseArguments
from tokenrl.advisor.language_baseline import bias_in_words, why_scale, with_baseline
from tokenrl.advisor.rules import (
    DEAD_GROUPS,
    EASY,
    ENTROPY,
    HOPELESS,
    SMALLEST_GROUP,
    cut_too_often,
    mostly_dead,
)
from tokenrl.advisor.show import Advice, Setting, judge_horizon
from tokenrl.core.entropy import LEAST_ENTROPY
from tokenrl.core.estimator import Estimator
from tokenrl.errors import Refused
from tokenrl.language.policy.model import Policy
from tokenrl.language.policy.prompts import asked, settled_form
from tokenrl.language.rewards.model import RewardModel
from tokenrl.language.rollout.sampling import Sampling
from tokenrl.language.rollout.ways import choose_way
from tokenrl.language.tasks.stream import PromptStream, few_prompts
from tokenrl.language.tasks.task import find_task
from tokenrl.language.training.arguments import TrainArguments, TrainSettings
from tokenrl.language.training.probe import Estimate, Probe, probe_policy
from tokenrl.language.training.setup import check, make_policy, resolve
from tokenrl.runs.console import Console
from tokenrl.runs.threads import choose_threads, using_threads

REWARD_MODEL_BETA = 0.05
"""KL weight where the reward is a model, because a policy can learn to exploit its errors."""


def advise_language(args: AdviseArguments) -> Advice:
    """Sample a model on a task's training prompts and recommend settings for `tokenrl train`.

    Raises:
        Refused: the task or the model does not exist, or there is no baseline although completions may be
            longer than 500 tokens.
    """
    if args.head == "gaussian":
        raise Refused(
            "head 'gaussian' draws vectors of real numbers, but a language model's actions are tokens, a "
            "finite list. Leave --head out: the model brings its own softmax."
        )
    args = settled_form(args)
    shared = {f.name: getattr(args, f.name) for f in fields(TrainArguments) if hasattr(args, f.name)}
    del shared["num_generations"]  # the number of completions in a step stays that of the task's settings
    task, rewards = find_task(args)
    alone = args.num_generations == 1  # then no completions of a prompt can be compared
    estimator = Estimator(baseline=args.baseline or ("running_mean" if alone else "rloo"))
    given = TrainArguments(**shared | {"estimator": estimator, "allow_no_baseline": True})
    train = resolve(given, task)
    check(replace(train, num_generations=args.num_generations or train.num_generations))
    warnings = judge_horizon(estimator, train.max_completion_length, args.allow_no_baseline)
    policy = make_policy(args, task, Console().note)
    train = replace(resolve(given, task, policy), allow_no_baseline=args.allow_no_baseline)
    policy.model.to(PartialState().device)
    choose_way(policy, gradient=False)
    count = min(args.num_prompts, len(task.train_prompts))
    rows = [row for _, row in PromptStream(task.train_prompts, count, args.seed).next()]
    sampling = Sampling(
        max_completion_length=train.max_completion_length,
        num_generations=args.num_samples,
        temperature=args.temperature,
        seed=args.seed,
    )
    with using_threads(choose_threads(policy.size)[0]):
        found = probe_policy(policy, rows, rewards, sampling)
    solved = getattr(task, "solved", None)
    reward_model = any(isinstance(function, RewardModel) for function in rewards.functions)
    room = None
    if policy.context is not None and cut_too_often(found.truncated.value):
        rows = [*task.train_prompts, *task.eval_prompts]
        room = policy.context - max(len(policy.encode(row["prompt"])) for row in rows)
    train, settings = fitted(
        train, found, room, reward_model=reward_model, size=args.num_generations, baseline=args.baseline
    )
    return Advice(
        subject=f"{task.name}, {policy.source}",
        command="train",
        arguments=train,
        facts=asked(policy.form, args.model) | facts(found, solved),
        settings=settings + _adapter(args.lora_r, policy),
        measurements={"probe": found, "solved": solved, "difficulty": difficulty(found, solved)},
        warnings=warnings + few_prompts(task.train_prompts) + doubts(found, solved, train),
    )


def _adapter(rank: int, policy: Policy) -> list[Setting]:
    """Say how many parameters an adapter of this rank trains; nothing without one."""
    if not rank:
        return []
    own = sum(p.numel() for p in policy.trainable_parameters())
    return [Setting("lora_r", rank, f"as you asked: trains {own:,} of {policy.size:,} parameters")]


def difficulty(found: Probe, solved: float | None = None) -> str:
    """Return how hard the task is for this policy: `too hard`, `too easy` or `fine`.

    It is too easy where the mean reward reaches the task's own mark, `solved`; without a mark, where pass@1
    is near 1; and never where nothing says what a right answer is.
    """
    if solved is not None:
        easy = found.reward.value >= solved
    else:
        easy = bool(found.passed) and found.passed[1].value >= EASY
    if easy:
        return "too easy"
    largest = max(found.dead_groups)
    return "too hard" if found.dead_groups[largest].value > HOPELESS else "fine"


def group_size(found: Probe) -> int:
    """Return the smallest group size, from four on, with at most half the groups dead; else the largest.

    Larger groups need more completions per prompt, and gain little once most groups have unequal rewards.
    """
    sizes = [size for size in found.dead_groups if size >= SMALLEST_GROUP] or list(found.dead_groups)
    return next((size for size in sizes if not mostly_dead(found.dead_groups[size].value)), max(sizes))


def fitted(
    train: TrainSettings,
    found: Probe,
    room: int | None,
    *,
    reward_model: bool,
    size: int | None = None,
    baseline: str | None = None,
) -> tuple[TrainSettings, list[Setting]]:
    """Set what follows from the probe, and give the reason of each setting.

    Args:
        train: the resolved settings.
        found: the measurements.
        room: number of tokens that the model's context leaves beside the longest prompt; None if unknown.
        reward_model: whether one of the rewards is a model.
        size: the group size that was asked for; None to choose it.
        baseline: the baseline that was asked for; None to choose it.
    """
    rows = train.prompts_per_step * train.num_generations
    size, why_size = (size, "as you asked") if size else (group_size(found), None)
    estimator, why_baseline = with_baseline(train.estimator, found, size, baseline)
    length, why_length = completion_length(train.max_completion_length, found, room)
    if reward_model:
        estimator = replace(estimator, beta=REWARD_MODEL_BETA)
    low = found.entropy < LEAST_ENTROPY
    if low:
        estimator = replace(estimator, entropy_coef=ENTROPY)
    train = replace(
        train,
        num_generations=size,
        prompts_per_step=max(2, rows // size),
        max_completion_length=length,
        estimator=estimator,
    )
    beta = (
        "a policy can exploit a reward model"
        if reward_model
        else "a reward by rule needs no KL term; saves a model"
    )
    entropy = f"the policy starts at {found.entropy:.3g} nats per token"
    entropy += ", almost certain of every token" if low else "; a run that ends below 0.1 is flagged"
    reasons = {
        "num_generations": why_size or _why_size(size, found),
        "prompts_per_step": f"{rows} completions a step, as the task's settings have, in groups of {size}",
        "max_completion_length": why_length,
        "estimator.baseline": f"{why_baseline}; gradient {bias_in_words(estimator)}",
        "estimator.returns": "there is one reward, at the end: it is the return of every token",
        "estimator.scale": why_scale(),
        "estimator.ratio": "on-policy: every rollout is used for one update only",
        "estimator.beta": beta,
        "estimator.entropy_coef": entropy,
        "temperature": "the same in sampling and in training",
        "learning_rate": "recommended by the task for its own model, else by size (adapters: ten times that)",
        "max_grad_norm": "limits how far one unusual rollout can move the weights",
    }
    return train, [Setting(name, _value(train, name), reason) for name, reason in reasons.items()]


def completion_length(length: int, found: Probe, room: int | None) -> tuple[int, str]:
    """Keep the length, or double it if many completions were cut, as far as the context allows."""
    seen = f"{_percent(found.truncated)} cut, the longest had {found.longest} tokens"
    if not cut_too_often(found.truncated.value):
        return length, f"enough: {seen}"
    longer = 2 * length if room is None else min(2 * length, room)
    if longer <= length:
        return length, f"too short ({seen}), but the model's context leaves no more"
    return longer, f"longer than {length}: {seen}, and a cut completion seldom gets a reward"


def doubts(found: Probe, solved: float | None, train: TrainSettings) -> list[str]:
    """Return warnings about what may go wrong, judged by the measurements."""
    size, out = train.num_generations, []
    hard = difficulty(found, solved)
    if hard == "too hard":
        out.append(
            f"too hard: {found.dead_groups[max(found.dead_groups)].value:.0%} of groups of "
            f"{max(found.dead_groups)} have equal rewards. Begin with demonstrations (--warm-start, or "
            "tokenrl sft), take easier prompts, or grade the reward."
        )
    elif hard == "too easy":
        out.append("too easy: the policy already solves it; take harder prompts.")
    elif size in found.dead_groups and mostly_dead(found.dead_groups[size].value):
        out.append(
            f"more than {DEAD_GROUPS:.0%} of groups of {size} are dead: --num-samples "
            "measures larger ones, and --estimator.zero-spread refill samples new prompts instead of them."
        )
    return out


def facts(found: Probe, solved: float | None) -> dict[str, str]:
    """Return the facts that the advice shows."""
    most = max(found.best_of)
    shown = {}
    if not found.binary:
        shown = {
            "mean reward": _plus_minus(found.reward),
            f"best of {most}": _plus_minus(found.best_of[most]),
        }
    shown |= {f"pass@{k}": _plus_minus(found.passed[k]) for k in (1, most) if k in found.passed}
    dead = (f"{size}: {_percent(share)}" for size, share in found.dead_groups.items())
    return shown | {
        "difficulty": difficulty(found, solved),
        "solved at": "no threshold" if solved is None else f"greedy reward {solved:g}",
        "dead groups, by size": ", ".join(dead),
        "cut at the limit": _percent(found.truncated),
        "length": f"{found.length:.1f} tokens on average, {found.longest} at most",
        "entropy": f"{found.entropy:.3g} nats per token",
        "measured on": f"{found.prompts} training prompts, {found.samples} completions for each; +- is the "
        "standard error over prompts",
    }


def _value(train: TrainSettings, name: str) -> Any:
    axis = name.removeprefix("estimator.")
    return getattr(train if axis == name else train.estimator, axis)


def _why_size(size: int, found: Probe) -> str:
    dead = found.dead_groups[size]
    enough = not mostly_dead(dead.value)
    bound = "the largest measured" + (";" if enough else "; not")
    if enough and size >= SMALLEST_GROUP:
        bound = f"the smallest from {SMALLEST_GROUP} up with"
    return f"{bound} at most {DEAD_GROUPS:.0%} dead groups: {_percent(dead)} here"


def _plus_minus(estimate: Estimate) -> str:
    return f"{estimate.value:.3f} +- {estimate.stderr:.3f}"


def _percent(estimate: Estimate) -> str:
    return f"{estimate.value:.0%} +- {estimate.stderr:.0%}"
