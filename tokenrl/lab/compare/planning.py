"""Plans a comparison: problems, arms, budgets and seeds, all of it before anything is run."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from itertools import product
from typing import Any

from tokenrl.control.arguments import ControlArguments
from tokenrl.control.environments import describe
from tokenrl.control.setup import resolve as resolve_control
from tokenrl.core.estimator import Estimator
from tokenrl.errors import Refused, nearest, suggest
from tokenrl.lab.compare.arguments import CompareArguments
from tokenrl.lab.compare.arms import OWN, SWEPT, read_arms
from tokenrl.lab.compare.existing import read_existing
from tokenrl.lab.compare.plan import Arm, Kind, Plan, Problem, Run
from tokenrl.language.tasks.task import find_task
from tokenrl.language.training.arguments import TrainArguments
from tokenrl.language.training.setup import load_base, resolve
from tokenrl.runs.files import plain
from tokenrl.settings import arguments, check_seed

MARGIN = 0.02
"""Differences below this share of the reward's declared range count as none."""
TUNING_SEEDS = 3
EVALUATIONS = 10
KINDS: dict[Kind, Any] = {"train": TrainArguments, "control": ControlArguments}


def make_plan(args: CompareArguments, announce: Callable[[str], None], command: str = "") -> Plan:
    """Plan a comparison; everything that can be refused without running is refused here.

    Args:
        args: the arguments.
        announce: prints a line for people, as while a model is warm-started.
        command: the command line that repeats the comparison.

    Raises:
        Refused: an argument cannot be used, two contradict each other, or an arm cannot train on a problem.
    """
    first, existing = args.first_seed, list[Run]()
    seeds, others = list(range(first, first + args.seeds)), list[int]()
    if args.runs:
        problems, arms, existing = read_existing(args.runs, args.output_dir)
        seeds = sorted({run.seed for run in existing})
    else:
        problems, arms = _problems_and_arms(args, announce)
        check_seed(seeds[-1] + 20_000)
        others = seeds if args.against_itself else others
    labels, is_tuned = [arm.label for arm in arms], args.learning_rate == ("tuned",) and not existing
    plan = Plan(
        kind="control" if problems[0].unit != "completions" else "train",
        problems=tuple(replace(problem, margin=_margin(args, problem)) for problem in problems),
        arms=tuple(arms),
        reference=labels[0] if args.reference is None else args.reference,
        metric=args.metric,
        seeds=tuple(seeds),
        itself_seeds=tuple(seed + 10_000 for seed in others),
        tuning_seeds=tuple(range(first + 20_000, first + 20_000 + TUNING_SEEDS)) if is_tuned else (),
        failure_below=args.failure_below,
        all_pairs=args.all_pairs,
        existing=tuple(existing),
        command=command,
    )
    if plan.reference not in labels:
        hint = suggest(plan.reference, labels)
        raise Refused(f"reference was given as {plan.reference!r}, which is no arm.{hint}")
    for problem, arm in () if existing else product(problems, arms):
        _check_run(plan, problem, arm)
    return plan


def _margin(args: CompareArguments, problem: Problem) -> float | None:
    """Return the margin of equivalence: the given one, else a share of the reward's range if it has one."""
    if args.margin is not None or problem.reward_range is None:
        return args.margin
    return MARGIN * (problem.reward_range[1] - problem.reward_range[0])


def _check_run(plan: Plan, problem: Problem, arm: Arm) -> None:
    """Check all settings of a run that can be checked before a model is loaded."""
    settings = plan.settings(plan.run(problem, arm, plan.seeds[0]))
    try:
        if plan.kind == "control":
            agent = arguments(ControlArguments, settings)
            resolve_control(agent, describe(agent.env, agent.max_episode_steps))
        else:
            args = arguments(TrainArguments, settings)
            resolve(args, find_task(args)[0])
    except Refused as error:
        raise Refused(f"The arm {arm.label!r} cannot train on {problem.label}: {error}") from error


def _problems_and_arms(
    args: CompareArguments, announce: Callable[[str], None]
) -> tuple[list[Problem], list[Arm]]:
    """Make a problem of each combination of what several are given of, and read the arms."""
    if args.env and (args.task or args.model or args.num_generations):
        raise Refused(
            "env names environments, which have no task, model or num_generations; leave these out."
        )
    names = [f.name for f in fields(KINDS["control" if args.env else "train"])]
    for name in args.shared:
        if name in (*OWN, *SWEPT):
            raise Refused(f"{name} is set by the comparison itself; leave it out.")
        if name not in names:
            raise Refused(f"There is no setting {name!r}.{nearest(name, names)}")
    shared = {name: value for name, value in args.shared.items() if value is not None}
    axes = shared.pop("estimator", {})
    if isinstance(axes, str | Estimator):
        raise Refused("Name estimators as arms; only single axes can be shared, as estimator.aggregation.")
    arms = read_arms(args.arms, axes, names)
    swept: dict[str, Sequence[Any]] = {"model": args.model, "num_generations": args.num_generations}
    swept |= {"learning_rate": _rates(args.learning_rate)}
    problems = []
    for name, *values in product(
        args.env or args.task or ("sort_digits",), *(several or (None,) for several in swept.values())
    ):
        own = {key: value for key, value in zip(swept, values, strict=True) if value is not None}
        label = ", ".join([name, *(f"{key}={own[key]}" for key in own if len(swept[key]) > 1)])
        if args.env:
            problems.append(_control_problem(label, {**shared, **own, "env": name}))
        else:
            problems.append(_language_problem(label, {**shared, **own, "task": name}, announce))
    return problems, list(arms)


def _rates(given: Sequence[str]) -> tuple[float, ...]:
    """Return the learning rates that are given as numbers; none if they are chosen later."""
    if given in (("fixed",), ("tuned",)):
        return ()
    try:
        return tuple(map(float, given))
    except ValueError:
        raise Refused(
            f"learning_rate was given as {' '.join(given)!r}; it must be fixed, or tuned, or one or several "
            "numbers."
        ) from None


def _language_problem(label: str, given: dict[str, Any], announce: Callable[[str], None]) -> Problem:
    """Make the problem of a task: settings that are left open become what `tokenrl train` would take."""
    args = arguments(TrainArguments, {**given, "estimator": "reinforce_running_mean"})  # fits every shape
    task, rewards = find_task(args)
    found = resolve(args, task, load_base(args, task, announce))
    per_step = found.prompts_per_step * found.num_generations
    budget = args.max_samples or found.max_steps * per_step
    steps = math.ceil(budget / per_step)
    every = max(1, steps // EVALUATIONS) if args.eval_every is None else args.eval_every
    open_ = ("prompts_per_step", "num_generations", "max_completion_length", "lr_scheduler_type")
    usual = {"stop_after_zero_spread": 0, "log_completions": every, "eval_every": every}
    settings = {**usual, **given, **{name: getattr(found, name) for name in (*open_, "learning_rate")}}
    return Problem(
        label=label,
        settings=plain({n: value for n, value in settings.items() if n not in ("max_steps", "max_samples")}),
        budget=budget,
        unit="completions",
        per_step=per_step,
        places=_places(budget, per_step * every),
        reward_range=getattr(rewards, "range", None),
        solved=getattr(task, "solved", None),
    )


def _control_problem(label: str, given: dict[str, Any]) -> Problem:
    """Make the problem of an environment.

    The budget is counted in episodes, or in steps of the environment if `num_steps` is set: then all arms
    generate as many of them per update.
    """
    args = arguments(ControlArguments, given)
    every = max(1, args.max_steps // EVALUATIONS) if args.eval_every is None else args.eval_every
    per_step = args.num_envs * (args.num_steps or 1)
    open_ = ("max_steps", "num_envs", "learning_rate")
    return Problem(
        label=label,
        settings=plain({**given, **{name: getattr(args, name) for name in open_}, "eval_every": every}),
        budget=args.max_steps * per_step,
        unit="environment steps" if args.num_steps else "episodes",
        per_step=per_step,
        places=_places(args.max_steps * per_step, per_step * every),
        solved=describe(args.env, args.max_episode_steps).solved,
    )


def _places(budget: int, every: int) -> tuple[float, ...]:
    """Return the samples at which runs are evaluated, without that before training; the last is the budget.

    An arm with larger steps, because of greedy completions or refills, is evaluated a little later.
    """
    step = every or budget
    return tuple(float(min(place, budget)) for place in range(step, budget + step, step))
