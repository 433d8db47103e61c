"""Recommends settings for a language task, from what the model already does with its prompts."""

from __future__ import annotations

from dataclasses import fields, replace

from tokenrl.advisor.advice import (
    Advice,
    describe_bias,
    merge,
    recommendation,
    with_changes,
)
from tokenrl.advisor.arguments import AdviseArguments
from tokenrl.control.policies import check_head
from tokenrl.core.estimator import Estimator
from tokenrl.language.evaluation.probe import Probe, probe_policy
from tokenrl.language.policy.arguments import fill_form, form_line
from tokenrl.language.policy.loading import device_for
from tokenrl.language.policy.model import Policy
from tokenrl.language.rewards.model import RewardModel
from tokenrl.language.rollout.agreement import check_scoring
from tokenrl.language.rollout.sampling import Sampling
from tokenrl.language.supervised.base import make_policy
from tokenrl.language.tasks.stream import PromptStream, few_prompts
from tokenrl.language.tasks.task import find_task
from tokenrl.language.training.arguments import TrainArguments
from tokenrl.language.training.settings import train_settings
from tokenrl.runs.console import Console
from tokenrl.runs.files import plain
from tokenrl.runs.findings import LOST_SHARE, Finding, facts, rounded
from tokenrl.runs.rules import judge
from tokenrl.runs.threads import choose_threads, using_threads

REWARD_MODEL_BETA = 0.05
"""KL weight where the reward is a model, because a policy can learn to exploit its errors."""
SMALLEST_GROUP = 4
"""A leave-one-out baseline of G - 1 others adds 1 / (G - 1) of the variance: groups of two double it."""
EASY = 0.95
"""A task without a mark of its own counts as solved from this share of right completions on."""


def advise_language(args: AdviseArguments) -> Advice:
    """Sample a model on a task's training prompts and recommend settings for `tokenrl train`.

    Raises:
        Refused: the task or the model does not exist, or there is no baseline although completions may be
            longer than 500 tokens.
    """
    check_head(args.head, discrete=True)  # tokens are a finite list
    args = fill_form(args)
    task, rewards = find_task(args)
    shared = vars(args).keys() & {field.name for field in fields(TrainArguments)}
    beta = (
        REWARD_MODEL_BETA
        if any(isinstance(reward, RewardModel) for reward in rewards.functions)
        else 0.0
    )
    baseline = args.baseline or ("running_mean" if args.num_generations == 1 else "rloo")
    settings = {name: getattr(args, name) for name in shared}
    settings |= {"estimator": Estimator(baseline=baseline, beta=beta)}
    train_settings(TrainArguments(**settings), task)  # refused before anything is loaded
    policy = make_policy(args, task, Console().note)
    train = train_settings(TrainArguments(**settings | {"num_generations": None}), task, policy)
    policy.model.to(device_for(policy.size))
    check_scoring(policy, gradient=False)
    count = min(args.num_prompts, len(task.train_prompts))
    rows = [row for _, row in PromptStream(task.train_prompts, args.seed).draw_prompts(count)]
    sampling = Sampling(
        max_completion_length=train.max_completion_length,
        num_generations=args.num_samples,
        temperature=args.temperature,
        seed=args.seed,
    )
    with using_threads(choose_threads(policy.size)[0]):
        probe = probe_policy(policy, rows, rewards, sampling)
    prompts = [row["prompt"] for row in (*task.train_prompts, *task.eval_prompts)]
    # An environment begins other episodes with equal prompts, and writes to all of them.
    room = None
    episodic = rewards.environments is not None
    if policy.context is not None and not episodic:
        room = policy.context - max(map(len, map(policy.encode, prompts)))
    solved = getattr(task, "solved", None)
    train, findings = fitted(train, probe, room=room, solved=solved, size=args.num_generations)
    few = [] if episodic else few_prompts(task.train_prompts)
    return recommendation(
        "train",
        train,
        _reasons(train, policy),
        subject=f"{task.name}, {policy.source}",
        measured=form_line(policy.form, args.model) | plain(probe),
        findings=[*findings, *(Finding("few-prompts", "watch", text) for text in few)],
    )


def _reasons(train: TrainArguments, policy: Policy) -> dict[str, str]:
    """Return why settings have their values, by setting."""
    bias = f"gradient {describe_bias(train.estimator)}"
    size = f"the smallest size from {SMALLEST_GROUP} on with at most {LOST_SHARE:.0%} dead groups"
    baselines = {
        "rloo": "mean of the prompt's other rewards",
        "running_mean": "mean of earlier rewards: one completion per prompt has none beside it",
    }
    baseline = baselines.get(str(train.estimator.baseline), "as you asked")
    reasons = {
        "num_generations": f"{size}, else the largest; or as you asked",
        "prompts_per_step": "so many completions a step as the task's settings have",
        "max_completion_length": "the task's, or twice that where many completions are cut",
        "estimator.scale": "no division, exact: a divisor weights easy and hard prompts unequally",
        "estimator.ratio": "on-policy: every rollout is used for one update only",
        "estimator.entropy_coef": "none, unless the policy is almost certain of every token",
        "temperature": "the same in sampling and in training",
        "learning_rate": "recommended by the task for its own model, else by size (adapters: ten times that)",
        "estimator.baseline": f"{baseline}; {bias}",
        "estimator.beta": "a reward by rule needs no KL term",
    }
    if train.estimator.beta > 0:
        reasons["estimator.beta"] = "a policy can exploit a reward model"
    if train.lora_r > 0:
        adapter = sum(p.numel() for p in policy.trainable_parameters())
        reasons["lora_r"] = f"as you asked: trains {adapter:,} of {policy.size:,} parameters"
    return reasons


def fitted(
    train: TrainArguments, probe: Probe, *, room: int | None, solved: float | None, size: int | None
) -> tuple[TrainArguments, list[Finding]]:
    """Set what follows from the probe; return the settings and what the rules find.

    The group has the smallest size from four on with at most half dead groups, else the largest: larger ones need
    more completions per prompt, and gain little once most groups have unequal rewards.

    Args:
        train: the resolved settings.
        probe: what was measured of the policy.
        room: number of tokens that the model's context leaves beside the longest prompt; None if unknown.
        solved: the mean reward that counts as solved; None if the task has no mark.
        size: the group size that was asked for; None to choose it.
    """
    dead = {count: share.value for count, share in probe.dead_groups.items()}
    if size is None:
        sizes = [count for count in dead if count >= SMALLEST_GROUP] or list(dead)
        alive = [count for count in sizes if dead[count] <= LOST_SHARE]
        size = min(alive, default=max(sizes))
    completions = train.prompts_per_step * train.num_generations
    estimator = train.estimator
    if estimator.baseline == "running_mean":
        estimator = replace(estimator, running_mean_init=rounded(probe.reward.value, 2))
    prompts = max(2, completions // size)
    train = replace(train, num_generations=size, prompts_per_step=prompts, estimator=estimator)
    score = probe.reward.value
    mark = solved
    if solved is None and probe.passed:
        score = probe.passed[1].value
        mark = EASY
    observed = facts(
        [],
        train,
        horizon=train.max_completion_length,
        room=room,
        recent_cut=probe.truncated.value,
        recent_entropy=probe.entropy,
        recent_equal=dead.get(size),
        step_equal=dead[max(dead)],
        step_reward=score,
        groups=f"groups of {max(dead)} completions",
        who="Sampled completions",
        before_greedy=score,
        pass_mark=mark,
        is_easy=mark is not None and score >= mark,
    )
    findings = judge(observed)
    # The size of the groups was chosen above.
    changes = merge(finding for finding in findings if finding.flag != "no-signal")
    return with_changes(train, changes), findings
