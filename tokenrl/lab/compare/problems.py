"""Makes the plan of a comparison from its arguments: problems, arms, budgets and seeds."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from itertools import combinations, product
from typing import Any

from tokenrl.control.arguments import ControlArguments
from tokenrl.control.environments import describe
from tokenrl.control.setup import control_settings
from tokenrl.core.estimator import Estimator
from tokenrl.core.presets import read_changes
from tokenrl.errors import Refused, nearest
from tokenrl.foreign import check_names
from tokenrl.lab.compare.arguments import CompareArguments
from tokenrl.lab.compare.plan import Arm, Kind, Plan, PlannedRun, Problem
from tokenrl.language.supervised.base import load_base
from tokenrl.language.tasks.task import find_task
from tokenrl.language.training.arguments import TrainArguments
from tokenrl.language.training.settings import train_settings
from tokenrl.runs.files import plain
from tokenrl.runs.origin import typed_command
from tokenrl.settings import arguments, check_choice, check_seed, field_types

MARGIN = 0.02
"""Differences smaller than this share of the reward's declared range count as none."""
TUNING_SEEDS = 3
EVALUATIONS = 10
KINDS: dict[Kind, Any] = {"train": TrainArguments, "control": ControlArguments}
AXES = tuple(f.name for f in fields(Estimator))
RESERVED = (
    *(
        "task",
        "env",
        "model",
        "output_dir",
        "overwrite",
        "quiet",
        "seed",
        "resume",
        "check",
        "threads",
    ),
    *("keep", "best_metric", "patience", "max_samples"),
)
"""Settings of a run that neither users nor arms may set, because the comparison does."""
SWEPT = ("num_generations", "learning_rate")
"""Settings of which a comparison takes several values, each a problem; an arm may set its own value too."""
SHARED = (
    *(
        "reward",
        "reward_weights",
        "prompt_column",
        "prompt_template",
        "split",
        "eval_split",
        "eval_size",
    ),
    *("environment", "max_turns", "malformed"),
    *("eval_generations", "num_envs", "num_steps", "eval_episodes", "max_episode_steps"),
    *("max_steps", "eval_every"),
)
"""Settings that decide what is measured, how often, and on how many samples; all arms share them."""


def make_plan(args: CompareArguments, announce: Callable[[str], None]) -> Plan:
    """Plan a comparison; everything that can be refused without running is refused here.

    Args:
        args: the arguments.
        announce: prints a line, such as that a model is being warm-started.

    Raises:
        Refused: an argument cannot be used, two contradict each other, or an arm cannot train on a problem.
    """
    first = args.first_seed
    seeds = range(first, first + args.seeds)
    check_seed(seeds[-1] + 20_000)
    problems, arms = _problems_and_arms(args, announce)
    labels, is_tuned = [arm.label for arm in arms], "tuned" in args.learning_rate
    plan = Plan(
        problems=tuple(
            replace(problem, margin=args.margin or problem.margin) for problem in problems
        ),
        arms=tuple(arms),
        reference=labels[0] if args.reference is None else args.reference,
        metric=args.metric,
        seeds=tuple(seeds),
        tuning_seeds=tuple(
            first + 20_000 + number for number in range(TUNING_SEEDS if is_tuned else 0)
        ),
        failure_below=args.failure_below,
        all_pairs=args.all_pairs,
        command=typed_command(),
    )
    check_choice("reference", plan.reference, labels)
    for problem, arm in product(problems, arms):
        try:
            _check_settings(plan.run(problem, arm, first))
        except Refused as error:
            raise Refused(
                f"The arm {arm.label!r} cannot train on {problem.label}: {error}"
            ) from error
    return plan


def _check_settings(run: PlannedRun) -> None:
    """Refuse settings of a run that contradict each other, as far as they are known without its model."""
    if run.kind == "control":
        agent = arguments(ControlArguments, run.settings)
        control_settings(agent, describe(agent.env, agent.max_episode_steps))
    else:
        args = arguments(TrainArguments, run.settings)
        train_settings(args, find_task(args)[0])


def _problems_and_arms(
    args: CompareArguments, announce: Callable[[str], None]
) -> tuple[list[Problem], list[Arm]]:
    """Make a problem of each combination of tasks and swept settings, and read the arms."""
    kind: Kind = "control" if args.env else "train"
    if args.env and (args.task or args.model or args.num_generations):
        raise Refused(
            "Environments have no task, model or num_generations; give --env without these."
        )
    if "tuned" in args.learning_rate and len(args.learning_rate) > 1:
        raise Refused("learning_rate must be tuned alone, or one or several numbers.")
    check_names(args.shared, field_types(CompareArguments) | field_types(KINDS[kind]))
    for name in args.shared:
        if name in (*RESERVED, *SWEPT):
            raise Refused(f"{name} is set by the comparison itself; leave it out.")
    shared = {name: value for name, value in args.shared.items() if value is not None}
    axes = shared.pop("estimator", {})
    if not isinstance(axes, Mapping):
        raise Refused(
            "Name estimators as arms; only single axes can be shared, as estimator.aggregation."
        )
    arms = [read_arm(text, axes, KINDS[kind]) for text in args.arms]
    if len(arms) < 2:
        raise Refused(
            f"A comparison needs two or more arms, such as rloo grpo; arms names {len(arms)}."
        )
    for arm, twin in combinations(arms, 2):
        if arm.settings == twin.settings:
            raise Refused(
                f"The arms {arm.label!r} and {twin.label!r} have the same settings; leave one out."
            )
    swept: dict[str, Sequence[Any]] = {"model": args.model, "num_generations": args.num_generations}
    swept |= {
        "learning_rate": [None if isinstance(rate, str) else rate for rate in args.learning_rate]
    }
    problems = []
    names = args.env or args.task or (shared.get("environment") or "sort_digits",)
    for name, *values in product(names, *(options or (None,) for options in swept.values())):
        chosen = {key: value for key, value in zip(swept, values, strict=True) if value is not None}
        label = ", ".join(
            [name, *(f"{key}={chosen[key]}" for key in chosen if len(swept[key]) > 1)]
        )
        problems.append(
            _problem(label, {**shared, **chosen, "env" if args.env else "task": name}, announce)
        )
    return problems, arms


def _problem(label: str, user_settings: dict[str, Any], announce: Callable[[str], None]) -> Problem:
    """Make a problem; settings without a value get the value that a single run would choose.

    In control the budget is counted in episodes, or, if `num_steps` is set, in steps of the environment, of
    which all arms then generate equally many per update.
    """
    reward_range, fixed = None, dict[str, Any](threads=1)
    if "env" in user_settings:
        args: Any = arguments(ControlArguments, user_settings)
        task: Any = describe(args.env, args.max_episode_steps)
        unit = "environment steps" if args.num_steps else "episodes"
        per_step = args.num_envs * (args.num_steps or 1)
        resolved = args
        filled_in = ["learning_rate", "num_envs"]
    else:
        fits_every_shape = {
            "baseline": "running_mean",
            "ratio": "token",
        }  # in place of an arm's estimator
        args = arguments(TrainArguments, {**user_settings, "estimator": fits_every_shape})
        task, reward = find_task(args)
        resolved = train_settings(args, task, load_base(args, task, announce))
        unit, per_step = "completions", resolved.prompts_per_step * resolved.num_generations
        reward_range = getattr(reward, "range", None)
        fixed |= {
            "mixed_precision": "no",
            "training_attention": "as_loaded",
            "stop_after_zero_spread": 0,
        }
        filled_in = [
            "learning_rate",
            "prompts_per_step",
            "num_generations",
            "max_completion_length",
        ]
        filled_in += ["lr_scheduler_type"]
    budget = resolved.max_steps * per_step
    every = args.eval_every
    every = max(1, math.ceil(budget / per_step) // EVALUATIONS) if every is None else every
    settings = {**fixed, "eval_every": every, **user_settings}
    settings |= {name: getattr(resolved, name) for name in filled_in}
    settings["max_steps"] = None  # it follows from the budget and the arm
    if unit == "completions":
        settings = {"log_completions": every, **settings}
    return Problem(
        label=label,
        settings=plain({name: value for name, value in settings.items() if value is not None}),
        budget=budget,
        unit=unit,
        per_step=per_step,
        every=per_step * every,
        margin=MARGIN * (reward_range[1] - reward_range[0]) if reward_range else None,
        reward_range=reward_range,
        solved=getattr(task, "solved", None),
    )


def read_arm(text: str, axes: Mapping[str, Any], kind: Any) -> Arm:
    """Read one arm, such as `rloo`, `grpo,scale=none`, `baseline=group_mean` or `mine.py:baseline`.

    Args:
        text: a preset, or a function that is the baseline; then changes, each NAME=VALUE, where NAME is an
            axis of the estimator or another setting of a run. Without a preset the changes are to the
            default estimator. Changes are separated by commas; a comma in brackets belongs to a value.
        axes: axes that all arms share.
        kind: the dataclass of the settings of a run.

    Raises:
        Refused: there is no such preset, axis or setting, one is given twice, or a value is not allowed.
    """
    axes, own_settings, settings = dict(axes), dict[str, Any](), field_types(kind)
    try:
        preset, changes = read_changes(text)
        for name, value in changes.items():
            if name in (*RESERVED, *SHARED, "estimator"):
                raise Refused(f"{name} must be the same for all arms; leave it out there.")
            if name not in AXES and name not in settings:
                raise Refused(f"there is no setting {name!r}.{nearest(name, [*AXES, *settings])}")
            (axes if name in AXES else own_settings)[name] = value
        swept = {name: own_settings[name] for name in SWEPT if name in own_settings}
        arguments(kind, swept)  # the others are checked with the whole run's
        if None in swept.values():
            raise Refused(
                f"{' or '.join(swept)} was given as None; give a number, or leave it out."
            )
        estimator = Estimator.preset(preset, **axes) if preset else arguments(Estimator, axes)
    except Refused as error:
        raise Refused(f"The arm {text!r} cannot be used: {error}") from error
    usual = plain(Estimator())
    changed_axes = {axis: value for axis, value in plain(estimator).items() if value != usual[axis]}
    return Arm(text, {"estimator": changed_axes, **own_settings})
