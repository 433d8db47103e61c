"""Plans a comparison: problems, arms, budgets and seeds, all of it before anything is run."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields
from itertools import product
from typing import Any

from tokenrl.control.arguments import ControlArguments
from tokenrl.control.environments import describe
from tokenrl.control.setup import resolve as resolve_control
from tokenrl.core.estimator import Estimator
from tokenrl.errors import Refused, nearest, suggest
from tokenrl.lab.compare.arguments import CompareArguments
from tokenrl.lab.compare.arms import OWN, read_arms
from tokenrl.lab.compare.plan import Kind, Plan, Problem
from tokenrl.language.tasks.task import find_task
from tokenrl.language.training.arguments import TrainArguments
from tokenrl.language.training.setup import load_base, resolve
from tokenrl.runs.files import plain
from tokenrl.settings import arguments, check_seed

MARGIN = 0.02
"""Differences below this share of the reward's declared range count as none."""
FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)
"""Learning rates that are tried, relative to the recommended one: four times that often destroys a policy."""
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
    kind: Kind = "control" if args.env else "train"
    if args.env and (args.task or args.model or args.num_generations):
        raise Refused(
            "env names environments, which have no task, model or num_generations; leave these out."
        )
    names = [f.name for f in fields(KINDS[kind])]
    shared, axes = _shared(args.shared, names)
    arms = read_arms(args.arms, axes, names)
    modes = {"fixed", "tuned"}.intersection(args.learning_rate)
    if modes and len(args.learning_rate) > 1:
        raise Refused("learning_rate is fixed, tuned, or one or several numbers; they cannot be mixed.")
    tuned = modes == {"tuned"}
    problems = tuple(_problems(args, kind, shared, announce))
    first, count = args.first_seed, args.seeds
    plan = Plan(
        problems=problems,
        arms=arms,
        reference=reference_of(args, [arm.label for arm in arms]),
        metric=args.metric,
        margins={p.label: margin_of(args, p) for p in problems},
        seeds=tuple(range(first, first + count)),
        itself_seeds=tuple(range(first + 10_000, first + 10_000 + count)) if args.against_itself else (),
        tuning_seeds=tuple(range(first + 20_000, first + 20_000 + TUNING_SEEDS)) if tuned else (),
        rates=FACTORS if tuned else (1.0,),
        failure_below=args.failure_below,
        all_pairs=args.all_pairs,
        command=command,
    )
    check_seed(max(*plan.seeds, *plan.itself_seeds, *plan.tuning_seeds))
    for problem, arm in product(problems, arms):
        try:
            _check_run(kind, plan.run(problem, arm, first).settings)
        except Refused as error:
            raise Refused(f"The arm {arm.label!r} cannot train on {problem.label}: {error}") from error
    return plan


def reference_of(args: CompareArguments, labels: Sequence[str]) -> str:
    """Return the label of the reference arm.

    Raises:
        Refused: no arm has the label that was given.
    """
    reference = labels[0] if args.reference is None else args.reference
    if reference not in labels:
        raise Refused(f"reference was given as {reference!r}, which is no arm.{suggest(reference, labels)}")
    return reference


def margin_of(args: CompareArguments, problem: Problem) -> float | None:
    """Return the margin of equivalence: the given one, else a share of the reward's range if it has one."""
    if args.margin is not None or problem.reward_range is None:
        return args.margin
    low, high = problem.reward_range
    return MARGIN * (high - low)


def _shared(given: Mapping[str, Any], names: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split what all runs share into settings and axes of the estimator."""
    for name in given:
        if name in OWN:
            raise Refused(f"{name} is set by the comparison itself; leave it out.")
        if name not in names:
            raise Refused(f"There is no setting {name!r}.{nearest(name, names)}")
    shared = dict(given)
    axes = shared.pop("estimator", {})
    if isinstance(axes, str | Estimator):
        raise Refused("Name estimators as arms; only single axes can be shared, as estimator.aggregation.")
    return shared, dict(axes)


def _problems(
    args: CompareArguments, kind: Kind, shared: dict[str, Any], announce: Callable[[str], None]
) -> Iterator[Problem]:
    """Yield each combination of task (or environment), model, group size and learning rate."""
    named: dict[str, Sequence[Any]] = {"learning_rate": [_rate(text) for text in args.learning_rate]}
    if kind == "train":
        named = {"model": args.model or (None,), "num_generations": args.num_generations or (None,), **named}
    for name, *values in product(args.env or args.task or ("sort_digits",), *named.values()):
        own = dict(zip(named, values, strict=True))
        parts = [f"{key}={own[key]}" for key, several in named.items() if len(several) > 1]
        label = ", ".join([name, *parts])
        if kind == "control":
            yield _control_problem(label, {**shared, "env": name, **own})
        else:
            yield _language_problem(label, {**shared, "task": name, **own}, announce)


def _rate(text: str) -> float | None:
    """Return a learning rate that is given as a number; None for those that are chosen later."""
    if text in ("fixed", "tuned"):
        return None
    try:
        return float(text)
    except ValueError:
        raise Refused(
            f"learning_rate was given as {text!r}; it must be fixed, tuned, or one or several numbers."
        ) from None


def _check_run(kind: Kind, settings: Mapping[str, Any]) -> None:
    """Check all settings of a run that can be checked before a model is loaded."""
    if kind == "control":
        agent = arguments(ControlArguments, settings)
        resolve_control(agent, describe(agent.env, agent.max_episode_steps))
    else:
        args = arguments(TrainArguments, settings)
        resolve(args, find_task(args)[0])


def _language_problem(label: str, settings: dict[str, Any], announce: Callable[[str], None]) -> Problem:
    """Make the problem of a task: settings that are left open become what `tokenrl train` would take."""
    given = {name: value for name, value in settings.items() if value is not None}
    args = arguments(TrainArguments, {**given, "estimator": "reinforce_running_mean"})  # fits every shape
    task, rewards = find_task(args)
    found = resolve(args, task, load_base(args, task, announce))
    per_step = found.prompts_per_step * found.num_generations
    steps = -(-args.max_samples // per_step) if args.max_samples else found.max_steps
    open_ = ("prompts_per_step", "num_generations", "max_completion_length", "lr_scheduler_type")
    budget_too = ("max_steps", "max_samples", "learning_rate")
    shared = {name: plain(value) for name, value in given.items() if name not in budget_too}
    every = max(1, steps // EVALUATIONS) if args.eval_every is None else args.eval_every
    usual = {"stop_after_zero_spread": 0, "log_completions": every, "eval_every": every}
    budget = args.max_samples or steps * per_step
    return Problem(
        label=label,
        kind="train",
        settings={**usual, **shared, **{name: getattr(found, name) for name in open_}},
        budget=budget,
        unit="completions",
        per_step=per_step,
        num_generations=found.num_generations,
        learning_rate=found.learning_rate,
        places=_places(budget, per_step * every),
        reward_range=getattr(rewards, "range", None),
        solved=getattr(task, "solved", None),
    )


def _control_problem(label: str, settings: dict[str, Any]) -> Problem:
    """Make the problem of an environment.

    The budget is counted in episodes, or in steps of the environment if `num_steps` is set: then all arms
    generate as many of them per update.
    """
    given = {name: value for name, value in settings.items() if value is not None}
    args = arguments(ControlArguments, given)
    every = max(1, args.max_steps // EVALUATIONS) if args.eval_every is None else args.eval_every
    shared = {name: plain(value) for name, value in given.items() if name != "learning_rate"}
    per_step = args.num_envs * (args.num_steps or 1)
    return Problem(
        label=label,
        kind="control",
        settings={**shared, "max_steps": args.max_steps, "num_envs": args.num_envs, "eval_every": every},
        budget=args.max_steps * per_step,
        unit="environment steps" if args.num_steps else "episodes",
        per_step=per_step,
        num_generations=args.num_envs,
        learning_rate=args.learning_rate,
        places=_places(args.max_steps * per_step, per_step * every),
        solved=describe(args.env, args.max_episode_steps).solved,
    )


def _places(budget: int, every: int) -> tuple[float, ...]:
    """Return the samples at which runs are evaluated, without that before training; the last is the budget.

    An arm with larger steps, because of greedy completions or refills, is evaluated a little later.
    """
    count = math.ceil(budget / every) if every else 1
    return tuple(float(min(place * every, budget)) for place in range(1, count + 1))
