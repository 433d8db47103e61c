"""Prepares a control run: checks its settings, makes policy, optimiser and environments."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from tokenrl.control.arguments import ControlArguments
from tokenrl.control.environments import Environments, Spec
from tokenrl.control.evaluation import seed_of
from tokenrl.control.policies import Policy, Shape
from tokenrl.control.run import AgentRun
from tokenrl.control.update import Agent
from tokenrl.core.estimator import Estimator
from tokenrl.core.refusals import check_horizon, check_sizes
from tokenrl.core.schedules import check_warmup
from tokenrl.errors import Refused
from tokenrl.names import NamedFunction
from tokenrl.runs import choose_threads, using_threads
from tokenrl.settings import lay

UNSUPPORTED = {
    "beta": "there is no reference policy",
    "zero_spread": "there are no prompts to leave out",
    "prompts": "there are no prompts to draw",
    "truncations": "time limits are handled by the value that follows",
    "importance_centre": "the policy that samples is the one that learns",
    "components": "an environment has a single reward",
    "overlong_buffer": "the environment itself rewards length",
}
"""Axes of an estimator that have no meaning in an environment, and why."""


def control_settings(args: ControlArguments, spec: Spec) -> ControlArguments:
    """Lay the settings that were given over the defaults; only threads and output_dir may stay open.

    Raises:
        Refused: the head cannot give the actions, or these are continuous and masked; the estimator has no meaning
            for environments; or there is no baseline although episodes may be long, or it compares more episodes
            than `num_envs`.
    """
    estimator = args.estimator
    if args.head not in ("auto", spec.head):
        raise Refused(
            f"head {args.head!r} cannot give the actions of {args.env}; use {spec.head!r} or 'auto'."
        )
    if spec.masked and not spec.discrete and args.action_masks == "auto":
        raise Refused(
            f"{args.env} gives masks of actions, and its actions are continuous; masks choose among discrete ones. Set "
            "action_masks 'off'."
        )
    check_horizon(estimator, spec.horizon, allow_no_baseline=args.allow_no_baseline)
    check_supported(estimator, args.num_steps)
    check_warmup(args)
    if args.value_warmup and args.value_network != "separate":
        raise Refused(
            f"value_warmup={args.value_warmup} lets the critic alone learn, and a shared one would change the "
            "policy: choose value_network 'separate'."
        )
    if args.num_steps is None:
        check_sizes(estimator, args.num_envs, args.num_envs)
    defaults = {
        "eval_every": max(1, args.max_steps // 10),
        "value_learning_rate": args.learning_rate,
    }
    values, _ = lay(
        ("default", defaults), ("given", vars(args)), ("the environment", {"head": spec.head})
    )
    return ControlArguments(**values)


def check_supported(estimator: Estimator, num_steps: int | None) -> None:
    """Refuse settings of the estimator that have no meaning in an environment, or with pieces of episodes.

    Raises:
        Refused: the message names the field, and what to choose; or the baseline cannot be imported.
    """
    if isinstance(estimator.baseline, NamedFunction):
        estimator.baseline.load()
    for axis, reason in UNSUPPORTED.items():
        if getattr(estimator, axis) != getattr(Estimator, axis):
            raise Refused(f"In control {axis} cannot be set: {reason}. Leave it at its default.")
    if estimator.chosen("scale").needs:
        raise Refused("In control scale 'target' cannot be set: it is for completions of a prompt.")
    if "greedy_rewards" in estimator.needs:
        raise Refused(
            "In control baseline 'remax' cannot be set: no second episode starts in the same state. Choose another, "
            "such as 'value' or 'running_mean'."
        )
    if num_steps is None:
        return
    whole_episodes = "returns" in estimator.within_rows or estimator.baseline != "value"
    if whole_episodes or estimator.scale not in ("none", "token_whiten"):
        raise Refused(
            f"num_steps {num_steps} cuts episodes: only a critic can estimate what is cut off, and pieces cannot be "
            "compared, or normalised. Choose the baseline 'value' (presets a2c, ppo) with scale 'none' or "
            "'token_whiten' and returns 'gae' or 'reward_to_go', or leave num_steps out for whole episodes."
        )


def prepare(args: ControlArguments, spec: Spec) -> AgentRun:
    """Make policy, optimiser and environments.

    Args:
        args: the settings from `control_settings`.
        spec: the environment.

    Raises:
        Refused: the policy to load does not fit.
    """
    estimator = args.estimator
    shape = Shape(
        spec.observation_size,
        spec.head,
        spec.actions or spec.action_size,
        hidden=args.hidden,
        critic=args.value_network if "values" in estimator.needs else None,
        activation=args.activation,
        normalize_observations=args.normalize_observations,
        initial_weights=args.initial_weights,
        action_masks=spec.masked and args.action_masks == "auto",
    )
    initial, minibatches, actions = (
        torch.Generator().manual_seed(seed_of(args.seed, purpose)) for purpose in (10, 11, 12)
    )
    with using_threads(1):  # the weights must not depend on the number of threads
        policy = Policy(shape, initial)
    if args.load is not None:
        policy.read(args.load)
    size = sum(weights.numel() for weights in policy.parameters())
    threads, reason = choose_threads(size, args.threads)
    args = replace(args, threads=threads)
    groups: list[dict[str, Any]] = [
        {"params": policy.policy_parameters()},
        {"params": policy.value_parameters(), "lr": args.value_learning_rate},
    ]
    agent = Agent(
        policy=policy,
        args=args,
        horizon=spec.horizon,
        optimizer=torch.optim.Adam(groups, lr=args.learning_rate, fused=True),
        memory=estimator.memory(),
        generator=minibatches,
    )
    return AgentRun(
        args=args,
        spec=spec,
        agent=agent,
        envs=Environments(spec.env, args.num_envs, args.max_episode_steps),
        eval_envs=Environments(spec.env, args.eval_episodes, args.max_episode_steps),
        actions=actions,
        threads=f"{threads} ({reason})",
    )
