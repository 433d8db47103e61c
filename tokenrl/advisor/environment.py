"""Recommends settings for an environment, from its spaces and from returns of the untrained policy."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from tokenrl.advisor.arguments import AdviseArguments
from tokenrl.advisor.baseline import Choice, axes, choose_baseline, measured
from tokenrl.advisor.environment_reasons import (
    RARE,
    Returns,
    doubts,
    facts,
    heads,
    settings,
    why_critic,
)
from tokenrl.advisor.noise import Noise, measure_noise, noise_facts
from tokenrl.advisor.rules import ENTROPY, one_figure
from tokenrl.advisor.show import Advice, judge_horizon
from tokenrl.control.arguments import ControlArguments
from tokenrl.control.environments import Environments, Spec, describe
from tokenrl.control.policies import Policy, Shape, check_head
from tokenrl.control.rollouts import Rollout, collect_episodes
from tokenrl.core.baselines import LONGEST_WITHOUT_BASELINE
from tokenrl.core.choices import AXES
from tokenrl.core.estimator import Estimator
from tokenrl.errors import Refused, Stopped
from tokenrl.settings import check_choice


class Way(NamedTuple):
    """A way to train: a preset, the axes that differ from it, and the other settings."""

    preset: str
    axes: dict[str, Any]
    arguments: dict[str, Any]


WAYS = {
    "episodes": Way(
        "reinforce_timestep_mean",
        {},
        {"max_steps": 100, "num_envs": 64, "hidden": (64,), "learning_rate": 2e-2},
    ),
    "critic_episodes": Way(
        "a2c",
        {},
        {"max_steps": 100, "num_envs": 64, "hidden": (64,), "learning_rate": 2e-2,
         "learning_rate_schedule": "linear"},
    ),
    "critic": Way(
        "ppo",
        {"gamma": 0.999, "lam": 0.98, "value_clip": None},
        {"max_steps": 200, "num_envs": 16, "num_steps": 512, "hidden": (64, 64), "learning_rate": 1e-3,
         "num_iterations": 4, "num_minibatches": 16, "learning_rate_schedule": "linear"},
    ),
    "continuous": Way(
        "ppo",
        {"gamma": 0.99},
        {"max_steps": 250, "num_envs": 16, "num_steps": 128, "hidden": (128, 128), "learning_rate": 1e-3,
         "num_iterations": 10, "num_minibatches": 8, "learning_rate_schedule": "linear",
         "normalize_observations": True},
    ),
}  # fmt: skip
"""The rules of thumb of the advice."""
ENDLESS_GAMMA = 0.95
"""Discount of continuous control in which only the time limit ends an episode, such as Pendulum-v1."""
SLOW_STEPS = 10_000
"""Steps per update that are cheap even where environments are stepped one by one."""
MEASURED_STEPS = 20_000
"""Largest number of steps of a measurement, which still takes at least ten episodes."""


def advise_environment(args: AdviseArguments) -> Advice:
    """Measure an environment and recommend settings for `tokenrl control`.

    Raises:
        Refused: the environment cannot be made, or fails in the measurement; the head cannot give its
            actions; there is no baseline although episodes may be longer than 500 steps.
    """
    check_choice("baseline", args.baseline or "none", [b for b in AXES["baseline"] if b != "remax"])
    spec = describe(args.env, args.max_episode_steps)
    check_head(args.head, spec.discrete)
    way = choose(spec, args.baseline)
    policy, rollout = play(spec, args, WAYS[way].arguments["hidden"])
    found = returns(rollout)
    noises = measure_noise(policy, rollout) if way == "episodes" else {}
    choice = baseline(spec, found, noises, args.baseline, way)
    estimator = Estimator.preset(WAYS[way].preset, **WAYS[way].axes | choice.axes)
    warnings = judge_horizon(estimator, spec.horizon, args.allow_no_baseline)
    control = ControlArguments(
        env=args.env,
        estimator=estimator,
        max_episode_steps=args.max_episode_steps,
        head=spec.head,
        allow_no_baseline=args.allow_no_baseline,
        seed=args.seed,
        **WAYS[way].arguments,
    )
    control = fitted(control, spec, found)
    return Advice(
        subject=spec.env,
        command="control",
        arguments=control,
        facts=facts(spec, found) | noise_facts(noises),
        settings=settings(control, spec, found, choice.reason),
        measurements={"environment": spec, "returns": found, "noise": noises},
        heads=heads(control, spec),
        warnings=warnings + doubts(spec, found),
    )


def choose(spec: Spec, baseline: str | None) -> str:
    """Choose a key of `WAYS`: whole episodes with or without a critic, or pieces of episodes with one.

    A baseline that was given decides about the critic; the environment decides whether episodes stay whole.
    Beyond 500 steps pieces learn faster also where steps are cheap: on CartPole with 1000 steps, in the same
    processor time, the mean return of all evaluations is 904 with pieces and 837 with whole episodes.
    """
    cheap = spec.fast or spec.horizon * WAYS["episodes"].arguments["num_envs"] <= SLOW_STEPS
    whole = spec.discrete and spec.horizon <= LONGEST_WITHOUT_BASELINE and cheap
    if baseline == "value":
        return "critic_episodes" if whole else "critic" if spec.discrete else "continuous"
    if whole or baseline is not None:
        return "episodes"
    return "critic" if spec.discrete else "continuous"


def baseline(spec: Spec, found: Returns, noises: dict[str, Noise], asked: str | None, way: str) -> Choice:
    """Return the baseline that was asked for, or that follows from the way to train or from the noise."""
    if way != "episodes":
        return Choice("value", {}, why_critic(spec, way, asked))
    if asked is None:
        return choose_baseline(spec, found, noises)
    plain = "plain REINFORCE; " if asked == "none" else ""
    return Choice(asked, axes(asked, found), f"as you asked; {plain}{measured(noises)}")


def play(spec: Spec, args: AdviseArguments, hidden: tuple[int, ...]) -> tuple[Policy, Rollout]:
    """Play episodes with a policy before training, whose actions are nearly random."""
    episodes = min(args.episodes, max(10, MEASURED_STEPS // spec.horizon))
    generator = torch.Generator().manual_seed(args.seed)
    shape = Shape(spec.observation_size, spec.head, spec.actions or spec.action_size, hidden)
    policy = Policy(shape, generator)
    environments = Environments(args.env, episodes, args.max_episode_steps)
    try:
        return policy, collect_episodes(environments, policy, spec.horizon, generator, seed=args.seed)
    except Stopped as error:  # nothing has been trained
        raise Refused(str(error)) from error
    finally:
        environments.close()


def returns(rollout: Rollout) -> Returns:
    """Summarise the returns of whole episodes."""
    totals = rollout.returns.double()
    (_, commonest), *_ = Counter(totals.tolist()).most_common(1)
    return Returns(
        episodes=len(totals),
        mean=float(totals.mean()),
        sd=float(totals.std()),
        length=float(rollout.lengths.double().mean()),
        unusual=1 - commonest / len(totals),
        truncated=float(rollout.truncated.double().mean()),
    )


def fitted(control: ControlArguments, spec: Spec, found: Returns) -> ControlArguments:
    """Set what follows from the returns: reward scale, discount, entropy bonus, number of environments."""
    estimator = control.estimator
    spread = found.sd or max(1.0, abs(found.mean))
    if estimator.needs_values:
        control = replace(control, reward_scale=one_figure(1 / spread))
        spread = 1.0  # returns are scaled to it, or advantages are whitened
        if found.truncated == 1 and not spec.discrete:
            estimator = replace(estimator, gamma=ENDLESS_GAMMA)
            control = replace(control, estimator=estimator)
    elif estimator.scale == "token_whiten":
        spread = 1.0
    if spec.discrete:
        bonus = one_figure(ENTROPY * spread)
        estimator = replace(estimator, entropy_coef=bonus)
        control = replace(control, estimator=estimator, entropy_schedule="linear")
    slow = control.num_steps is None and not spec.fast and spec.horizon * control.num_envs > SLOW_STEPS
    envs = 16 if slow else control.num_envs
    return replace(control, num_envs=2 * envs if found.unusual < RARE else envs)
