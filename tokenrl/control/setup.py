"""Everything before the first update of a control run: settings checked, policy and environments made."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch

from tokenrl.control.arguments import ControlArguments
from tokenrl.control.environments import Environments, Spec
from tokenrl.control.evaluation import check_film, seed_of
from tokenrl.control.policies import Policy, Shape
from tokenrl.control.run import Run
from tokenrl.control.saving import load_policy
from tokenrl.control.update import Agent, check_supported
from tokenrl.core import rules
from tokenrl.core.baselines import RunningMean
from tokenrl.core.estimator import Estimator
from tokenrl.core.statistics import GradientDiagnostics
from tokenrl.errors import Refused
from tokenrl.settings import check_choice, check_number


def arguments(options: dict[str, Any]) -> ControlArguments:
    """Make the settings of keywords; a preset's name becomes the estimator.

    Raises:
        Refused: a keyword that is no field.
    """
    known = [entry.name for entry in fields(ControlArguments)]
    for name in options:
        check_choice("setting", name, known)
    if isinstance(options.get("estimator"), str):
        options = options | {"estimator": Estimator.preset(options["estimator"])}
    return ControlArguments(**options)


BOUNDS = {
    "max_steps": 0, "num_envs": 1, "num_steps": 2, "max_episode_steps": 1, "num_iterations": 1,
    "num_minibatches": 1, "eval_episodes": 1, "eval_every": 0, "diagnostics_every": 0, "save_every": 0,
    "keep_checkpoints": 1, "logging_steps": 1, "stop_after_nonfinite": 1, "seed": 0,
}  # fmt: skip


def check_settings(args: ControlArguments) -> None:
    """Refuse numbers out of range and names that do not exist.

    Raises:
        Refused: naming the first of them.
    """
    for name, least in BOUNDS.items():
        value = getattr(args, name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
            raise Refused(f"{name} was given as {value!r}; it must be a whole number of at least {least}.")
    for name, hint in get_type_hints(ControlArguments).items():
        if get_origin(hint) is Literal:
            check_choice(name, getattr(args, name), get_args(hint))
    check_number("learning_rate", args.learning_rate, above=0)
    check_number("reward_scale", args.reward_scale, above=0)
    check_number("value_coef", args.value_coef, at_least=0)
    check_number("max_grad_norm", args.max_grad_norm, at_least=0)
    if args.value_learning_rate is not None:
        check_number("value_learning_rate", args.value_learning_rate, above=0)
    if any(isinstance(units, bool) or not isinstance(units, int) or units < 1 for units in args.hidden):
        raise Refused(f"hidden was given as {args.hidden!r}; it must be whole numbers of at least 1.")


def resolve(args: ControlArguments, spec: Spec) -> ControlArguments:
    """Fill in what the environment decides, and refuse what does not fit it.

    Raises:
        Refused: a head for other actions, an estimator without meaning here, no baseline on long episodes.
    """
    head = ("softmax" if spec.discrete else "gaussian") if args.head == "auto" else args.head
    rules.check_head(head, discrete=spec.discrete)
    rules.check_horizon(args.estimator, spec.horizon, allow_no_baseline=args.allow_no_baseline)
    check_supported(args.estimator, args)
    if args.video:
        check_film(spec)
    every = max(1, args.max_steps // 10) if args.eval_every is None else args.eval_every
    return replace(args, head=head, eval_every=every)


def prepare(args: ControlArguments, spec: Spec) -> Run:
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
        for choice in (estimator.baseline, estimator.scale):
            rules.set_size(str(choice), args.num_envs, args.num_envs)
    policy = Policy(shape, torch.Generator().manual_seed(seed_of(args.seed, 10)))
    if args.load is not None:
        load_policy(policy, args.load)
    critic = policy.value_parameters()
    value_rate = args.value_learning_rate or args.learning_rate
    agent = Agent(
        policy=policy,
        args=args,
        horizon=spec.horizon,
        optimizer=torch.optim.Adam(policy.policy_parameters(), lr=args.learning_rate, fused=True),
        value_optimizer=torch.optim.Adam(critic, lr=value_rate, fused=True) if critic else None,
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
