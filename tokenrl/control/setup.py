"""Prepares a control run: checks its settings, makes policy, optimiser and environments."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from tokenrl.control.arguments import ControlArguments, ControlSettings
from tokenrl.control.environments import Environments, Spec
from tokenrl.control.evaluation import check_film, seed_of
from tokenrl.control.policies import Policy, SavedPolicy, Shape, check_head
from tokenrl.control.run import Run
from tokenrl.control.update import Agent
from tokenrl.core.baselines import RunningMean, check_horizon, set_size
from tokenrl.core.estimator import Estimator
from tokenrl.core.statistics import GradientDiagnostics
from tokenrl.errors import Refused
from tokenrl.names import NamedFunction
from tokenrl.runs.schedules import make_schedule
from tokenrl.runs.threads import using_threads
from tokenrl.settings import settled


def resolve(args: ControlArguments, spec: Spec) -> ControlSettings:
    """Fill in the defaults that the arguments leave open, and refuse what does not fit the environment.

    Raises:
        Refused: the head cannot give the actions; the estimator has no meaning for environments; there is no
            baseline although episodes may be long, or it compares more episodes than `num_envs`; or a video
            is asked for that cannot be made.
    """
    check_head(args.head, discrete=spec.discrete)
    check_horizon(args.estimator, spec.horizon, allow_no_baseline=args.allow_no_baseline)
    check_supported(args.estimator, args)
    if args.video:
        check_film(spec)
    if args.num_steps is None:
        for axis in ("baseline", "scale"):
            set_size(args.estimator, axis, args.num_envs, args.num_envs)
    found = {"eval_every": max(1, args.max_steps // 10), "value_learning_rate": args.learning_rate}
    return settled(ControlSettings, replace(args, head=spec.head), found)


def check_supported(estimator: Estimator, args: ControlArguments) -> None:
    """Refuse settings of the estimator that have no meaning in an environment.

    Raises:
        Refused: the message names the field, and what to choose; or the baseline cannot be imported.
    """
    if isinstance(estimator.baseline, NamedFunction):
        estimator.baseline.load()
    wrong = {
        "beta": estimator.beta > 0 and "there is no reference policy",
        "baseline 'remax'": estimator.needs_greedy and "no second episode starts in the same state",
        "zero_spread": estimator.zero_spread != "keep" and "there are no prompts to leave out",
        "truncations": estimator.truncations != "keep"
        and "time limits are handled by the value that follows",
        "overlong_buffer": estimator.overlong_buffer > 0 and "the environment itself rewards length",
    }
    for what, why in wrong.items():
        if why:
            raise Refused(f"In control {what} cannot be set: {why}. Leave it at its default.")
    if args.num_steps is None:
        return
    if not estimator.needs_values:
        raise Refused(
            f"num_steps {args.num_steps} cuts episodes, and only a critic can estimate what is cut off. "
            "Choose the baseline 'value' (presets a2c, ppo), or leave num_steps out for whole episodes."
        )
    whole = "returns" in estimator.within_rows
    if estimator.baseline != "value" or estimator.scale not in ("none", "token_whiten") or whole:
        raise Refused(
            f"num_steps {args.num_steps} cuts episodes, and pieces cannot be compared, or normalised. "
            "Choose the baseline 'value' with scale 'none' or 'token_whiten' and returns 'gae' or "
            "'reward_to_go', or leave num_steps out for whole episodes."
        )


def prepare(args: ControlSettings, spec: Spec) -> Run:
    """Make policy, optimiser and environments.

    Raises:
        Refused: the policy to load does not fit.
    """
    estimator = args.estimator
    shape = Shape(
        spec.observation_size,
        args.head,
        spec.actions or spec.action_size,
        hidden=tuple(args.hidden),
        critic=args.value_network if estimator.needs_values else None,
        **{name: getattr(args, name) for name in ("activation", "normalize_observations", "initial_weights")},
    )
    with using_threads(1):  # the same weights for everyone
        policy = Policy(shape, torch.Generator().manual_seed(seed_of(args.seed, 10)))
    if args.load is not None:
        SavedPolicy(policy, spec.env).read(args.load)
    groups: list[dict[str, Any]] = [
        {"params": policy.policy_parameters()},
        {"params": policy.value_parameters(), "lr": args.value_learning_rate},
    ]
    agent = Agent(
        policy=policy,
        args=args,
        horizon=spec.horizon,
        optimizer=torch.optim.Adam(groups, lr=args.learning_rate, fused=True),
        running_mean=RunningMean(estimator.running_mean_decay, estimator.running_mean_init),
        diagnostics=GradientDiagnostics(args.diagnostics_every),
        generator=torch.Generator().manual_seed(seed_of(args.seed, 11)),
    )
    return Run(
        args=args,
        spec=spec,
        agent=agent,
        schedule=make_schedule(args.learning_rate_schedule, agent.optimizer, args.max_steps),
        envs=Environments(spec.env, args.num_envs, args.max_episode_steps),
        eval_envs=Environments(spec.env, args.eval_episodes, args.max_episode_steps),
        actions=torch.Generator().manual_seed(seed_of(args.seed, 12)),
    )
