"""Everything before the first update of a control run: settings checked, policy and environments made."""

from __future__ import annotations

from dataclasses import replace

import torch

from tokenrl.control.arguments import ControlArguments, ControlSettings
from tokenrl.control.environments import Environments, Spec
from tokenrl.control.evaluation import check_film, seed_of
from tokenrl.control.policies import Policy, Shape, check_head
from tokenrl.control.run import Run
from tokenrl.control.saving import load_policy
from tokenrl.control.update import Agent, check_supported
from tokenrl.core.baselines import RunningMean
from tokenrl.core.guards import check_horizon, set_size
from tokenrl.core.statistics import GradientDiagnostics
from tokenrl.settings import settled


def resolve(args: ControlArguments, spec: Spec) -> ControlSettings:
    """Settle what the arguments leave open, and refuse what does not fit the environment.

    Raises:
        Refused: a head for other actions, an estimator without meaning here, no baseline on long episodes.
    """
    head = ("softmax" if spec.discrete else "gaussian") if args.head == "auto" else args.head
    check_head(head, discrete=spec.discrete)
    check_horizon(args.estimator, spec.horizon, allow_no_baseline=args.allow_no_baseline)
    check_supported(args.estimator, args)
    if args.video:
        check_film(spec)
    found = {"eval_every": max(1, args.max_steps // 10), "value_learning_rate": args.learning_rate}
    return settled(ControlSettings, replace(args, head=head), found)


def prepare(args: ControlSettings, spec: Spec) -> Run:
    """Make policy, optimisers and environments.

    Raises:
        Refused: a group comparison of too few episodes, a policy to load that does not fit.
    """
    estimator, discrete = args.estimator, spec.discrete
    shape = Shape(
        observation_size=spec.observation_size,
        head="softmax" if discrete else "gaussian",
        action_size=(spec.actions or 0) if discrete else spec.action_size,
        hidden=tuple(args.hidden),
        activation=args.activation,
        critic=args.value_network if estimator.needs_values else None,
        normalize_observations=args.normalize_observations,
    )
    if args.num_steps is None:
        for axis in ("baseline", "scale"):
            set_size(estimator, axis, args.num_envs, args.num_envs)
    policy = Policy(shape, torch.Generator().manual_seed(seed_of(args.seed, 10)))
    if args.load is not None:
        load_policy(policy, args.load)
    critic = policy.value_parameters()
    agent = Agent(
        policy=policy,
        args=args,
        horizon=spec.horizon,
        optimizer=torch.optim.Adam(policy.policy_parameters(), lr=args.learning_rate, fused=True),
        value_optimizer=torch.optim.Adam(critic, lr=args.value_learning_rate, fused=True) if critic else None,
        running_mean=RunningMean(estimator.running_mean_decay, estimator.running_mean_init),
        diagnostics=GradientDiagnostics(args.diagnostics_every),
        generator=torch.Generator().manual_seed(seed_of(args.seed, 11)),
    )
    return Run(
        args=args,
        spec=spec,
        agent=agent,
        envs=Environments(spec.env, args.num_envs, args.max_episode_steps),
        eval_envs=Environments(spec.env, args.eval_episodes, args.max_episode_steps),
        actions=torch.Generator().manual_seed(seed_of(args.seed, 12)),
    )
