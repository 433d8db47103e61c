"""Makes the plan of a comparison from its arguments: problems, arms, budgets and seeds."""

from __future__ import annotations

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
from tokenrl.language.policy.arguments import fill_form
from tokenrl.language.tasks.held_out import division_of
from tokenrl.language.tasks.task import find_task
from tokenrl.language.training.arguments import TrainArguments
from tokenrl.language.training.settings import check_choices, settle
from tokenrl.language.training.teacher import read_models
from tokenrl.runs.files import plain
from tokenrl.runs.origin import typed_command
from tokenrl.settings import arguments, check_choice, check_seed, field_types

MARGIN = 0.02
"""Differences smaller than this share of the reward's declared range count as none."""
TUNING_SEEDS = 3
TUNING_OFFSET = 20_000
"""Number of tuning seeds, and the distance of the first of them from the first seed."""
EVALUATIONS = 10
KINDS: dict[Kind, Any] = {"train": TrainArguments, "control": ControlArguments}
AXES = tuple(f.name for f in fields(Estimator))
RESERVED = [
    "task",
    "env",
    "model",
    "output_dir",
    "quiet",
    "seed",
    "resume",
    "check",
    "threads",
    "keep",
    "best_metric",
    "patience",
]
"""Settings of a run that neither users nor arms may set, because the comparison does."""
SWEPT = ("num_generations", "learning_rate")
"""Settings of which a comparison takes several values, each a problem; an arm may set its own value too."""
SHARED = [
    "reward",
    "reward_weights",
    "prompt_column",
    "prompt_template",
    "split",
    "eval_split",
    "eval_size",
    "environment",
    "max_turns",
    "malformed",
    "eval_generations",
    "num_envs",
    "num_steps",
    "eval_episodes",
    "max_episode_steps",
    "max_steps",
    "eval_every",
]
"""Settings that decide what is measured, how often, and on how many samples; all arms share them."""
FIXED = {"threads": 1}
FIXED_OF_TRAIN = {
    "mixed_precision": "no",
    "training_attention": "as_loaded",
    "stop_after_zero_spread": 0,
}
"""Settings of every run, and of those of tokenrl train, unless a user sets them."""
CHOSEN = ["learning_rate", "num_envs"]
CHOSEN_OF_TRAIN = [
    "learning_rate",
    "prompts_per_step",
    "num_generations",
    "max_completion_length",
    "lr_scheduler_type",
]
"""Settings that get the value that a single run would choose, unless a user sets them."""


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
    check_seed(seeds[-1] + TUNING_OFFSET)
    tuning_seeds = range(first + TUNING_OFFSET, first + TUNING_OFFSET + TUNING_SEEDS)
    problems, arms = _problems_and_arms(args, announce)
    plan = Plan(
        problems=tuple(problems),
        arms=tuple(arms),
        reference=args.reference or arms[0].label,
        metric=args.metric,
        seeds=tuple(seeds),
        tuning_seeds=tuple(tuning_seeds) if "tuned" in args.learning_rate else (),
        failure_below=args.failure_below,
        all_pairs=args.all_pairs,
        command=typed_command(),
    )
    check_choice("reference", plan.reference, plan.labels)
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
        args = fill_form(arguments(TrainArguments, run.settings))
        task = find_task(args, may_lack_rewards=True)[0]
        check_choices(args, task)
        settle(args, task, read_models(args, task))


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
    if "overwrite" in args.shared:
        raise Refused(
            "A comparison is continued, and never replaced: give another output_dir, or remove the directory."
        )
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
    rates = [None if isinstance(rate, str) else rate for rate in args.learning_rate]
    swept: dict[str, Sequence[Any]] = {
        "model": args.model or [None],
        "num_generations": args.num_generations or [None],
        "learning_rate": rates,
    }
    names = args.env or args.task or [shared.get("environment") or "sort_digits"]
    problems = []
    for name, *values in product(names, *swept.values()):
        settings = {**shared, "env" if args.env else "task": name}
        label = name
        for setting, value in zip(swept, values, strict=True):
            if value is not None:
                settings[setting] = value
                if len(swept[setting]) > 1:
                    label += f", {setting}={value}"
        problem = _problem(label, settings, announce)
        problems.append(replace(problem, margin=args.margin or problem.margin))
    return problems, arms


def _problem(label: str, user_settings: dict[str, Any], announce: Callable[[str], None]) -> Problem:
    """Make a problem; settings without a value get the value that a single run would choose.

    In control the budget is counted in episodes, or, if `num_steps` is set, in steps of the environment, of
    which all arms then generate equally many per update.
    """
    if "env" in user_settings:
        args: Any = arguments(ControlArguments, user_settings)
        task: Any = describe(args.env, args.max_episode_steps)
        resolved = args
        reward_range = None
        unit = "environment steps" if args.num_steps else "episodes"
        per_step = args.num_envs * (args.num_steps or 1)
    else:
        # as an arm's may not
        fits_every_shape = {"baseline": "running_mean", "ratio": "token", "beta": 1.0}
        options = {**user_settings, "estimator": fits_every_shape}
        args = fill_form(arguments(TrainArguments, options))
        task, reward = find_task(args, may_lack_rewards=True)
        policy = read_models(args, task)
        for warning in division_of(task, args.eval_size, {"the model": policy})[1]:
            announce(f"warning: {label}: {warning}")
        check_choices(args, task)
        resolved = settle(args, task, policy).args
        reward_range = reward.range
        unit = "completions"
        per_step = resolved.prompts_per_step * resolved.num_generations
    every = args.eval_every
    if every is None:
        every = max(1, resolved.max_steps // EVALUATIONS)
    settings = {**FIXED, "eval_every": every}
    chosen = CHOSEN
    if unit == "completions":
        settings |= FIXED_OF_TRAIN | {"log_completions": every}
        chosen = CHOSEN_OF_TRAIN
    settings |= user_settings | {name: getattr(resolved, name) for name in chosen}
    settings.pop("max_steps", None)  # which follow from the budget and the arm
    margin = None
    if reward_range:
        low, high = reward_range
        margin = MARGIN * (high - low)
    return Problem(
        label=label,
        settings=plain({name: value for name, value in settings.items() if value is not None}),
        budget=resolved.max_steps * per_step,
        unit=unit,
        per_step=per_step,
        every=per_step * every,
        margin=margin,
        reward_range=reward_range,
        solved=task.solved,
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
    axes = dict(axes)
    changes_of_run = {}
    settings = field_types(kind)
    try:
        preset, changes = read_changes(text)
        for name, value in changes.items():
            if name in (*RESERVED, *SHARED, "estimator"):
                raise Refused(f"{name} must be the same for all arms; leave it out there.")
            if name in AXES:
                axes[name] = value
            elif name in settings:
                changes_of_run[name] = value
            else:
                raise Refused(f"there is no setting {name!r}.{nearest(name, [*AXES, *settings])}")
            if name in SWEPT:  # other settings are checked with those of a whole run
                arguments(kind, {name: value})
                if value is None:
                    raise Refused(f"{name} was given as None; give a number, or leave it out.")
        estimator = Estimator.preset(preset, **axes) if preset else arguments(Estimator, axes)
    except Refused as error:
        raise Refused(f"The arm {text!r} cannot be used: {error}") from error
    usual = plain(Estimator())
    changed_axes = {axis: value for axis, value in plain(estimator).items() if value != usual[axis]}
    return Arm(text, {"estimator": changed_axes, **changes_of_run})
