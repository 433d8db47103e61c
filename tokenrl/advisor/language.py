"""Recommends settings for a language task, from what the model already does with its prompts."""

from __future__ import annotations

from dataclasses import asdict, fields, replace
from typing import Any

from accelerate import PartialState

from tokenrl.advisor.advice import Advice, Setting, bias_in_words, judge_horizon
from tokenrl.advisor.arguments import AdviseArguments
from tokenrl.core.choices import choice_of
from tokenrl.core.estimator import Estimator
from tokenrl.errors import Refused
from tokenrl.language.policy.prompts import asked, settled_form
from tokenrl.language.rewards.model import RewardModel
from tokenrl.language.rollout.agreement import agree
from tokenrl.language.rollout.sampling import Sampling
from tokenrl.language.tasks.stream import PromptStream, few_prompts
from tokenrl.language.tasks.task import find_task
from tokenrl.language.training.arguments import TrainArguments, TrainSettings
from tokenrl.language.training.probe import Estimate, Probe, probe_policy
from tokenrl.language.training.setup import check, make_policy, resolve
from tokenrl.runs.console import Console
from tokenrl.runs.facts import MOST
from tokenrl.runs.rules import LEAST_ENTROPY
from tokenrl.runs.threads import choose_threads, using_threads

REWARD_MODEL_BETA = 0.05
"""KL weight where the reward is a model, because a policy can learn to exploit its errors."""
SMALLEST_GROUP = 4
"""A leave-one-out baseline of G - 1 others adds 1 / (G - 1) of the variance: groups of two double it."""
HOPELESS, EASY = 0.9, 0.95
"""A task is too hard above this share of dead groups of the largest size, too easy from this pass@1 on."""
CUT = 0.1
"""From this share of completions that are cut on, the largest length should grow."""
ENTROPY = 0.01
"""Entropy bonus for a policy that is almost certain of every token."""


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
    agree(policy, gradient=False)
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
    beta = REWARD_MODEL_BETA * any(isinstance(function, RewardModel) for function in rewards.functions)
    room = None
    if policy.context is not None and found.truncated.value >= CUT:
        rows = [*task.train_prompts, *task.eval_prompts]
        room = policy.context - max(len(policy.encode(row["prompt"])) for row in rows)
    train, settings = fitted(train, found, room, beta=beta, size=args.num_generations, baseline=args.baseline)
    if args.lora_r:
        own = sum(p.numel() for p in policy.trainable_parameters())
        why = f"as you asked: trains {own:,} of {policy.size:,} parameters"
        settings.append(Setting("lora_r", args.lora_r, why))
    return Advice(
        subject=f"{task.name}, {policy.source}",
        command="train",
        arguments=train,
        facts=asked(policy.form, args.model) | _facts(found, solved),
        settings=settings,
        measurements={"probe": asdict(found), "solved": solved, "difficulty": difficulty(found, solved)},
        warnings=warnings + few_prompts(task.train_prompts) + _doubts(found, solved, train.num_generations),
    )


def difficulty(found: Probe, solved: float | None = None) -> str:
    """Return how hard the task is for this policy: `too hard`, `too easy` or `fine`.

    It is too easy where the mean reward reaches the task's own mark, `solved`; without a mark, where pass@1
    is near 1; and never where nothing says what a right answer is.
    """
    easy = bool(found.passed) and found.passed[1].value >= EASY
    if solved is not None:
        easy = found.reward.value >= solved
    if easy:
        return "too easy"
    return "too hard" if found.dead_groups[max(found.dead_groups)].value > HOPELESS else "fine"


def group_size(found: Probe) -> int:
    """Return the smallest group size, from four on, with at most half the groups dead; else the largest.

    Larger groups need more completions per prompt, and gain little once most groups have unequal rewards.
    """
    sizes = [size for size in found.dead_groups if size >= SMALLEST_GROUP] or list(found.dead_groups)
    return next((size for size in sizes if found.dead_groups[size].value <= MOST), max(sizes))


def choose_baseline(found: Probe, size: int) -> tuple[str, str]:
    """Choose the baseline from the size of groups and the spread of rewards; return it with the reason.

    With the variance W of the rewards of one prompt and the variance B of the prompts' expected rewards, the
    mean square of `reward - baseline` is W + B for a running mean, and W G / (G - 1) for `rloo` in groups of
    G. Groups of four or more are compared whatever these are: while the policy learns, prompts come to differ
    in difficulty, which only a mean of the prompt's own rewards follows.
    """
    if size == 1:
        return "running_mean", "one completion per prompt leaves none to compare it with"
    running, compared = found.within + found.between, found.within * size / (size - 1)
    if size < SMALLEST_GROUP and running < compared:
        why = (
            f"groups are small: mean square of reward minus baseline {running:.2g}, {compared:.2g} with rloo"
        )
        return "running_mean", why
    return "rloo", "mean of the prompt's other rewards; with one completion per prompt, take running_mean"


def completion_length(length: int, found: Probe, room: int | None) -> tuple[int, str]:
    """Keep the length, or double it if many completions were cut, as far as the context allows."""
    seen = f"{_percent(found.truncated)} cut, the longest had {found.longest} tokens"
    if found.truncated.value < CUT:
        return length, f"enough: {seen}"
    longer = 2 * length if room is None else min(2 * length, room)
    if longer <= length:
        return length, f"too short ({seen}), but the model's context leaves no more"
    return longer, f"longer than {length}: {seen}, and a cut completion seldom gets a reward"


def fitted(
    train: TrainSettings,
    found: Probe,
    room: int | None,
    *,
    beta: float = 0.0,
    size: int | None = None,
    baseline: str | None = None,
) -> tuple[TrainSettings, list[Setting]]:
    """Set what follows from the probe, and give the reason of each setting.

    Args:
        train: the resolved settings.
        found: the measurements.
        room: number of tokens that the model's context leaves beside the longest prompt; None if unknown.
        beta: weight of the KL, above 0 where one of the rewards is a model.
        size: the group size that was asked for; None to choose it.
        baseline: the baseline that was asked for; None to choose it.
    """
    rows = train.prompts_per_step * train.num_generations
    why_size = "as you asked" if size else _why_size(found)
    size = size or group_size(found)
    length, why_length = completion_length(train.max_completion_length, found, room)
    chosen, why_baseline = choose_baseline(found, size)
    if baseline is not None:
        chosen, why_baseline = baseline, "as you asked" + ("; plain REINFORCE" if baseline == "none" else "")
    estimator = replace(train.estimator, baseline=chosen, beta=beta)
    if chosen == "running_mean":
        estimator = replace(estimator, running_mean_init=float(f"{found.reward.value:.2g}"))
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
    scales = ("group_std", "loo_std", "batch_std", "token_whiten")
    bias = ", ".join(f"{name} is {choice_of('scale', name).status.replace('_', ' ')}" for name in scales)
    certain = ", almost certain of every token" if low else "; a run that ends below 0.1 is flagged"
    reasons = {
        "num_generations": why_size,
        "prompts_per_step": f"{rows} completions a step, as the task's settings have, in groups of {size}",
        "max_completion_length": why_length,
        "estimator.baseline": f"{why_baseline}; gradient {bias_in_words(estimator)}",
        "estimator.returns": "there is one reward, at the end: it is the return of every token",
        "estimator.scale": f"no division, exact: a divisor would weight easy and hard prompts; {bias}",
        "estimator.ratio": "on-policy: every rollout is used for one update only",
        "estimator.beta": "a policy can exploit a reward model"
        if beta
        else "a reward by rule needs no KL term",
        "estimator.entropy_coef": f"the policy starts at {found.entropy:.3g} nats per token{certain}",
        "temperature": "the same in sampling and in training",
        "learning_rate": "recommended by the task for its own model, else by size (adapters: ten times that)",
        "max_grad_norm": "limits how far one unusual rollout can move the weights",
    }
    return train, [Setting(name, _value(train, name), reason) for name, reason in reasons.items()]


def _doubts(found: Probe, solved: float | None, size: int) -> list[str]:
    """Return warnings about what may go wrong, judged by the measurements."""
    hard, largest = difficulty(found, solved), max(found.dead_groups)
    if hard == "too hard":
        return [
            f"too hard: {found.dead_groups[largest].value:.0%} of groups of {largest} have equal rewards. "
            "Begin with demonstrations (--warm-start, or tokenrl sft), take easier prompts, or grade the "
            "reward."
        ]
    if hard == "too easy":
        return ["too easy: the policy already solves it; take harder prompts."]
    if size in found.dead_groups and found.dead_groups[size].value > MOST:
        return [
            f"more than {MOST:.0%} of groups of {size} are dead: --num-samples measures larger ones, and "
            "--estimator.zero-spread refill samples new prompts instead of them."
        ]
    return []


def _facts(found: Probe, solved: float | None) -> dict[str, str]:
    """Return the facts that the advice shows."""
    most, shown = max(found.best_of), {}
    if not found.binary:
        shown["mean reward"] = _plus_minus(found.reward)
        shown[f"best of {most}"] = _plus_minus(found.best_of[most])
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


def _why_size(found: Probe) -> str:
    size = group_size(found)
    dead = found.dead_groups[size]
    bound = f"the smallest from {SMALLEST_GROUP} up with at most"
    if dead.value > MOST or size < SMALLEST_GROUP:
        bound = "the largest measured; at most"
    return f"{bound} {MOST:.0%} dead groups are wanted: {_percent(dead)} here"


def _plus_minus(estimate: Estimate) -> str:
    return f"{estimate.value:.3f} +- {estimate.stderr:.3f}"


def _percent(estimate: Estimate) -> str:
    return f"{estimate.value:.0%} +- {estimate.stderr:.0%}"
