"""Prepares a control run: checks its settings, makes policy, optimiser and environments."""

from __future__ import annotations

from typing import Any

import torch

from tokenrl.control.arguments import ControlArguments
from tokenrl.control.environments import Environments, Spec
from tokenrl.control.evaluation import check_film, seed_of
from tokenrl.control.policies import Policy, SavedPolicy, Shape, check_head
from tokenrl.control.run import AgentRun
from tokenrl.control.update import Agent
from tokenrl.core.baselines import check_horizon, set_size
from tokenrl.core.estimator import Estimator
from tokenrl.core.memories import memory_of
from tokenrl.core.objectives import check_group
from tokenrl.errors import Refused
from tokenrl.names import NamedFunction
from tokenrl.runs.schedules import make_schedule
from tokenrl.runs.threads import choose_threads, using_threads
from tokenrl.settings import lay


def control_settings(args: Any, spec: Spec) -> ControlArguments:
    """Return the settings of a run of these arguments, complete and checked (see `fill_defaults`)."""
    return ControlArguments(**vars(fill_defaults(args, spec)))


def fill_defaults(choices: Any, spec: Spec) -> Any:
    """Lay what was given over the defaults, and refuse what does not fit the environment.

    Raises:
        Refused: the head cannot give the actions; the estimator has no meaning for environments; there is no
            baseline although episodes may be long, or it compares more episodes than `num_envs`; or a video
            is asked for that cannot be made.
    """
    check_head(choices.head, discrete=spec.discrete)
    check_horizon(choices.estimator, spec.horizon, allow_no_baseline=choices.allow_no_baseline)
    check_supported(choices.estimator, choices)
    if choices.video:
        check_film(spec)
    if choices.num_steps is None:
        for axis in ("baseline", "scale"):
            set_size(choices.estimator, axis, choices.num_envs, choices.num_envs)
        check_group(choices.estimator, choices.num_envs)
    usual = {
        "eval_every": max(1, choices.max_steps // 10),
        "value_learning_rate": choices.learning_rate,
    }
    return lay(
        ("default", usual), ("given", vars(choices)), ("environment", {"head": spec.head})
    ).values


def check_supported(estimator: Estimator, args: Any) -> None:
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
        "importance_centre": estimator.needs_centres
        and "the policy that samples is the one that learns",
        "components": estimator.components != "summed" and "an environment has a single reward",
        "overlong_buffer": estimator.overlong_buffer > 0
        and "the environment itself rewards length",
    }
    for setting, reason in wrong.items():
        if reason:
            raise Refused(f"In control {setting} cannot be set: {reason}. Leave it at its default.")
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


def prepare(choices: Any, spec: Spec, directory: str) -> AgentRun:
    """Make policy, settings, optimiser and environments.

    Args:
        choices: the settings, of which the number of threads may be open.
        spec: the environment.
        directory: the run directory.

    Raises:
        Refused: the policy to load does not fit.
    """
    estimator = choices.estimator
    shape = Shape(
        spec.observation_size,
        choices.head,
        spec.actions or spec.action_size,
        hidden=tuple(choices.hidden),
        critic=choices.value_network if estimator.needs_values else None,
        activation=choices.activation,
        normalize_observations=choices.normalize_observations,
        initial_weights=choices.initial_weights,
    )
    with using_threads(1):  # the same weights for everyone
        policy = Policy(shape, torch.Generator().manual_seed(seed_of(choices.seed, 10)))
    if choices.load is not None:
        SavedPolicy(policy, spec.env).read(choices.load)
    threads, reason = choose_threads(sum(p.numel() for p in policy.parameters()), choices.threads)
    args = ControlArguments(**vars(choices) | {"threads": threads, "output_dir": directory})
    groups: list[dict[str, Any]] = [
        {"params": policy.policy_parameters()},
        {"params": policy.value_parameters(), "lr": args.value_learning_rate},
    ]
    agent = Agent(
        policy=policy,
        args=args,
        horizon=spec.horizon,
        optimizer=torch.optim.Adam(groups, lr=args.learning_rate, fused=True),
        memory=memory_of(estimator),
        generator=torch.Generator().manual_seed(seed_of(args.seed, 11)),
    )
    return AgentRun(
        args=args,
        spec=spec,
        agent=agent,
        schedule=make_schedule(args.learning_rate_schedule, agent.optimizer, args.max_steps),
        envs=Environments(spec.env, args.num_envs, args.max_episode_steps),
        eval_envs=Environments(spec.env, args.eval_episodes, args.max_episode_steps),
        actions=torch.Generator().manual_seed(seed_of(args.seed, 12)),
        threads=f"{threads} ({reason})",
    )
