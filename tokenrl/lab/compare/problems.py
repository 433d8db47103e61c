"""Finds out what the runs of a comparison share on each problem: budget, learning rate, range of rewards."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from tokenrl.control.arguments import ControlArguments
from tokenrl.control.environments import describe
from tokenrl.control.setup import resolve as resolve_control
from tokenrl.lab.compare.records import Kind, Problem
from tokenrl.language.tasks.task import find_task
from tokenrl.language.training.arguments import TrainArguments
from tokenrl.language.training.setup import load_base, resolve
from tokenrl.runs.files import plain
from tokenrl.settings import arguments

LENGTH = ("max_steps", "max_samples")
"""Settings that say how long a run is: the budget replaces them."""


def run_arguments(kind: Kind, settings: Mapping[str, Any]) -> Any:
    """Make the arguments of a run, and check all that can be checked before a model is loaded.

    Raises:
        Refused: a setting cannot be used, or two contradict each other.
    """
    if kind == "control":
        agent = arguments(ControlArguments, settings)
        return resolve_control(agent, describe(agent.env, agent.max_episode_steps))
    args = arguments(TrainArguments, settings)
    return resolve(args, find_task(args)[0])


def language_problem(label: str, settings: dict[str, Any], announce: Callable[[str], None]) -> Problem:
    """Make the problem of a task: settings that are left open become what `tokenrl train` would take.

    Args:
        label: name of the problem.
        settings: the settings that all arms share; a value of None is left open.
        announce: prints a line for people, as while a model is warm-started.

    Raises:
        Refused: a setting cannot be used.
    """
    given = {name: value for name, value in settings.items() if value is not None}
    args = arguments(TrainArguments, {**given, "estimator": "reinforce_running_mean"})  # fits every shape
    task, rewards = find_task(args)
    policy = load_base(args, task, announce)
    found = resolve(args, task, policy)
    per_step = found.prompts_per_step * found.num_generations
    steps = -(-args.max_samples // per_step) if args.max_samples else found.max_steps
    open_ = ("prompts_per_step", "num_generations", "max_completion_length", "lr_scheduler_type")
    settled = {name: getattr(found, name) for name in open_}
    shared = {name: plain(value) for name, value in given.items() if name not in (*LENGTH, "learning_rate")}
    every = max(1, steps // 10) if args.eval_every is None else args.eval_every
    return Problem(
        label=label,
        kind="train",
        settings={
            "stop_after_zero_spread": 0,
            "log_completions": every,
            "eval_every": every,
            **shared,
            **settled,
        },
        budget=args.max_samples or steps * per_step,
        unit="completions",
        prompts_per_step=found.prompts_per_step,
        num_generations=found.num_generations,
        learning_rate=found.learning_rate,
        reward_range=getattr(rewards, "range", None),
        solved=getattr(task, "solved", None),
    )


def control_problem(label: str, settings: dict[str, Any]) -> Problem:
    """Make the problem of an environment.

    The budget is counted in episodes, or in steps of the environment if `num_steps` is set: then all arms
    generate as many of them per update.

    Raises:
        Refused: a setting cannot be used.
    """
    given = {name: value for name, value in settings.items() if value is not None}
    args = arguments(ControlArguments, given)
    spec = describe(args.env, args.max_episode_steps)
    every = max(1, args.max_steps // 10) if args.eval_every is None else args.eval_every
    shared = {name: plain(value) for name, value in given.items() if name != "learning_rate"}
    return Problem(
        label=label,
        kind="control",
        settings={**shared, "max_steps": args.max_steps, "num_envs": args.num_envs, "eval_every": every},
        budget=args.max_steps * args.num_envs * (args.num_steps or 1),
        unit="environment steps" if args.num_steps else "episodes",
        prompts_per_step=1,
        num_generations=args.num_envs,
        learning_rate=args.learning_rate,
        solved=spec.solved,
    )
