"""Recommends settings for an environment, from its spaces and from returns of the untrained policy."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, replace
from statistics import fmean, stdev
from typing import Any

import torch

from tokenrl.advisor.advice import (
    Advice,
    AdviseArguments,
    advised,
    command_line,
    settings_of,
    with_changes,
)
from tokenrl.control.arguments import LANDER, PPO, ControlArguments
from tokenrl.control.environments import Environments, Spec, describe
from tokenrl.control.policies import Policy, Shape
from tokenrl.control.rollouts import collect_episodes
from tokenrl.control.setup import control_settings
from tokenrl.core.estimator import Estimator
from tokenrl.core.refusals import LONGEST_WITHOUT_BASELINE
from tokenrl.errors import Refused, Stopped
from tokenrl.runs.findings import Means, observe
from tokenrl.runs.rules import judge, rounded

A2C = {"estimator": Estimator.preset("a2c"), "learning_rate_schedule": "linear"}
CONTINUOUS = {
    "estimator": Estimator.preset("ppo", gamma=0.99),
    "max_steps": 250,
    "num_steps": 128,
    "num_iterations": 10,
    "num_minibatches": 8,
    "hidden": (128, 128),
    "learning_rate": 1e-3,
    "normalize_observations": True,
}
WAYS: dict[str, tuple[dict[str, Any], str]] = {
    "episodes": ({}, "the mean of the other episodes at the same step needs no critic"),
    "critic_episodes": (
        A2C,
        "a critic, as you asked, on whole episodes (a2c): its errors are no bias",
    ),
    "critic": (
        LANDER,
        "a critic on pieces of episodes (ppo): whole episodes are long, or slow to step",
    ),
    "continuous": (
        PPO | CONTINUOUS,
        "a critic on pieces of episodes (ppo): the actions are continuous",
    ),
}
"""How settings differ from the defaults, and why this baseline: the rules of thumb of the advice."""
ENTROPY = 0.01
"""Entropy bonus, in standard deviations of what the advantages are made of (1 where they are whitened)."""
ENDLESS_GAMMA = 0.95
"""Discount of continuous control in which only the time limit ends an episode, such as Pendulum-v1."""
SLOW_STEPS = 10_000
"""Steps per update that are cheap even where environments are stepped one by one."""
MEASURED_STEPS = 20_000
"""Largest number of steps of a measurement, which still takes at least ten episodes."""
RARE = 0.1
"""The reward is sparse if at least 90 % of the episodes have the same return."""


def advise_environment(args: AdviseArguments) -> Advice:
    """Measure an environment and recommend settings for `tokenrl control`.

    Raises:
        Refused: the environment cannot be made, or fails in the measurement; head or baseline do not fit it;
            there is no baseline although episodes may be longer than 500 steps.
    """
    spec = describe(args.env, args.max_episode_steps)
    start, reason = WAYS[choose_way(spec, args.baseline)]
    names = ("env", "head", "seed", "max_episode_steps", "allow_no_baseline")
    settings = {name: getattr(args, name) for name in names}
    if args.baseline not in (None, "value"):
        settings["estimator.baseline"] = args.baseline
        reason = "as you asked"
    control = with_changes(ControlArguments(**start), settings)
    control_settings(control, spec)  # refuses what does not fit the environment
    returns = measure_returns(spec, args, control.hidden)
    control = fitted(replace(control, head=spec.head), spec, returns)
    observed = replace(
        observe([], control),
        groups=f"{returns['episodes']} episodes of nearly random actions",
        step=Means(reward=returns["mean"], equal=1 - returns["unusual"]),
    )
    values = settings_of(control)
    reasons = _reasons(control, returns, reason)
    return Advice(
        subject=spec.env,
        command="control",
        arguments=control,
        line=command_line("control", control),
        measured=asdict(spec) | returns,
        findings=advised(judge(observed), control),
        settings=[{"name": n, "value": values[n], "reason": text} for n, text in reasons.items()],
    )


def choose_way(spec: Spec, baseline: str | None) -> str:
    """Choose a key of `WAYS`: whole episodes with or without a critic, or pieces of episodes with one.

    A baseline that was given decides about the critic; the environment decides whether episodes stay whole.
    Beyond 500 steps pieces learn faster also where steps are cheap: on CartPole with 1000 steps, in the same
    processor time, the mean return of all evaluations is 904 with pieces and 837 with whole episodes.
    """
    cheap = spec.fast or spec.horizon * ControlArguments.num_envs <= SLOW_STEPS
    whole = spec.discrete and spec.horizon <= LONGEST_WITHOUT_BASELINE and cheap
    if baseline == "value" and whole:
        return "critic_episodes"
    if whole or baseline not in (None, "value"):
        return "episodes"
    return "critic" if spec.discrete else "continuous"


def measure_returns(spec: Spec, args: AdviseArguments, hidden: tuple[int, ...]) -> dict[str, float]:
    """Play episodes with a policy before training, whose actions are nearly random, and summarise them.

    Returns:
        The number of `episodes`, the `mean` and `sd` (ddof 1) of their returns, their mean `length`, the
        share with an `unusual` return (not the most frequent return), the share that the time limit `truncated`, and
        the number of `parameters` of the policy.
    """
    episodes = min(args.episodes, max(10, MEASURED_STEPS // spec.horizon))
    generator = torch.Generator().manual_seed(args.seed)
    shape = Shape(spec.observation_size, spec.head, spec.actions or spec.action_size, hidden)
    policy = Policy(shape, generator)
    environments = Environments(args.env, episodes, args.max_episode_steps)
    try:
        rollout = collect_episodes(environments, policy, spec.horizon, generator, seed=args.seed)
    except Stopped as error:  # nothing has been trained
        raise Refused(str(error)) from error
    finally:
        environments.close()
    returns = rollout.returns.tolist()
    return {
        "episodes": len(returns),
        "mean": fmean(returns),
        "sd": stdev(returns),
        "length": fmean(rollout.lengths.tolist()),
        "unusual": 1 - max(Counter(returns).values()) / len(returns),
        "truncated": fmean(rollout.truncated.tolist()),
        "parameters": sum(p.numel() for p in policy.policy_parameters()),
    }


def fitted(control: ControlArguments, spec: Spec, returns: dict[str, float]) -> ControlArguments:
    """Set what follows from the returns: reward scale, discount, entropy bonus, number of environments."""
    estimator = control.estimator
    spread = returns["sd"] or max(1.0, abs(returns["mean"]))
    if estimator.baseline == "running_mean":  # it starts at the mean of other episodes
        estimator = replace(estimator, running_mean_init=rounded(returns["mean"], 2))
    if estimator.needs_values:
        control = replace(control, reward_scale=rounded(1 / spread))
        spread = 1.0  # returns are scaled to it
        if returns["truncated"] == 1 and not spec.discrete:
            estimator = replace(estimator, gamma=ENDLESS_GAMMA)
    if spec.discrete:
        estimator = replace(estimator, entropy_coef=rounded(ENTROPY * spread))
        control = replace(control, entropy_schedule="linear")
    envs = control.num_envs
    is_slow = not spec.fast and spec.horizon * envs > SLOW_STEPS
    if is_slow and control.num_steps is None:
        envs = 16
    if returns["unusual"] < RARE:
        envs *= 2
    return replace(control, estimator=estimator, num_envs=envs)


def _reasons(control: ControlArguments, returns: dict[str, float], baseline: str) -> dict[str, str]:
    """Return why settings have their values, by setting; `baseline` is the reason of the baseline."""
    estimator = control.estimator
    # An entropy bonus changes the objective, not the bias.
    bias = replace(estimator, entropy_coef=0.0).bias_status.replace("_", " ")
    reasons = {
        "estimator.baseline": f"{baseline}; gradient {bias}, an entropy bonus aside",
        "estimator.returns": "rewards that came before an action are left out of its advantage",
        "estimator.scale": "PPO divides by the spread of the step: one rate suits any returns",
        "estimator.ratio": "on-policy: every rollout is used for one update only",
        "num_envs": "as many whole episodes per update",
        "learning_rate": "Adam; halve it if the return rises and then falls",
        "max_steps": "updates; --stop-when-solved may end sooner where there is a threshold",
    }
    if not estimator.divides:
        reasons["estimator.scale"] = (
            "no division is exact; Adam's steps have one size, whatever the returns"
        )
    if estimator.entropy_coef > 0:
        bonus = f"{ENTROPY:g} of the spread of advantages, so that the policy explores at first; falls to 0"
        reasons["estimator.entropy_coef"] = bonus
    if control.num_steps is not None:
        reach = 1 / max(1 - estimator.gamma, 1e-9)
        reasons |= {
            "estimator.returns": "GAE: lam trades the critic's bias for less noise",
            "estimator.ratio": "PPO's clip lets a rollout be used more than once",
            "num_envs": "copies that are stepped together",
            "num_steps": "pieces of episodes: the critic estimates the rest, so that updates need not wait",
            "num_iterations": "passes over each rollout; staler data gets clipped",
            "estimator.gamma": f"credit reaches about {reach:.0f} steps; nearer 1 for later rewards",
        }
    if estimator.needs_values:
        scale = f"about 1 / sd of returns ({returns['sd']:.3g}): a critic learns targets of size 1"
        reasons["reward_scale"] = scale
    return reasons
