"""Plans a comparison: problems, arms, budgets and seeds, all of it before anything is run."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields
from itertools import product
from typing import Any

from tokenrl.control.arguments import ControlArguments
from tokenrl.core.estimator import Estimator
from tokenrl.errors import Refused, suggest
from tokenrl.lab.compare.arguments import OWN, CompareArguments
from tokenrl.lab.compare.arms import read_arms
from tokenrl.lab.compare.problems import control_problem, language_problem, run_arguments
from tokenrl.lab.compare.records import Arm, Kind, Plan, PlannedRun, Problem, Role
from tokenrl.language.training.arguments import TrainArguments
from tokenrl.settings import check_seed

MARGIN = 0.02
"""Differences below this share of the reward's declared range count as none."""
FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)
"""Learning rates that are tried, relative to the recommended one: four times that often destroys a policy."""
TUNING_SEEDS = 3
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
    labels = [arm.label for arm in arms]
    reference = labels[0] if args.reference is None else args.reference
    if reference not in labels:
        raise Refused(f"reference was given as {reference!r}, which is no arm.{suggest(reference, labels)}")
    modes = {"fixed", "tuned"}.intersection(args.learning_rate)
    if modes and len(args.learning_rate) > 1:
        raise Refused("learning_rate is fixed, tuned, or one or several numbers; they cannot be mixed.")
    tuned = modes == {"tuned"}
    problems = tuple(_problems(args, kind, shared, announce))
    first, count = args.first_seed, args.seeds
    plan = Plan(
        problems=problems,
        arms=arms,
        reference=reference,
        metric=args.metric,
        margins={p.label: _margin(args, p) for p in problems},
        seeds=tuple(range(first, first + count)),
        itself_seeds=tuple(range(first + 10_000, first + 10_000 + count)) if args.against_itself else (),
        tuning_seeds=tuple(range(first + 20_000, first + 20_000 + TUNING_SEEDS)) if tuned else (),
        rates=FACTORS if tuned else (1.0,),
        noise=args.noise and kind == "train",
        command=command,
    )
    check_seed(max(*plan.seeds, *plan.itself_seeds, *plan.tuning_seeds))
    for problem, arm in product(problems, arms):
        _try(problem, arm, planned_run(plan, problem, arm, first, "comparison"))
    return plan


def _shared(given: Mapping[str, Any], names: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split what all runs share into settings and axes of the estimator."""
    for name in given:
        if name in OWN:
            raise Refused(f"{name} is set by the comparison itself; leave it out.")
        if name not in names:
            raise Refused(f"There is no setting {name!r}.{suggest(name, names)}")
    shared = dict(given)
    axes = shared.pop("estimator", {})
    if isinstance(axes, str | Estimator):
        raise Refused("Name estimators as arms; only single axes can be shared, as estimator.aggregation.")
    return shared, dict(axes)


def _problems(
    args: CompareArguments, kind: Kind, shared: dict[str, Any], announce: Callable[[str], None]
) -> Iterator[Problem]:
    """Yield each combination of task (or environment), model, group size and learning rate."""
    rates: Sequence[float | None] = [_rate(text) for text in args.learning_rate]
    if kind == "control":
        for env, rate in product(args.env, rates):
            settings = {**shared, "env": env, "learning_rate": rate}
            yield control_problem(_label(env, learning_rate=rate if len(rates) > 1 else None), settings)
        return
    tasks, models = args.task or ("sort_digits",), args.model or (None,)
    sizes = args.num_generations or (None,)
    for task, model, size, rate in product(tasks, models, sizes, rates):
        named = {
            "model": model if len(models) > 1 else None,
            "num_generations": size if len(sizes) > 1 else None,
            "learning_rate": rate if len(rates) > 1 else None,
        }
        settings = {**shared, "task": task, "model": model, "num_generations": size, "learning_rate": rate}
        yield language_problem(_label(task, **named), settings, announce)


def _label(name: str, **named: Any) -> str:
    """Name a problem by its task or environment, and by what differs between problems."""
    parts = [f"{key}={value:g}" if isinstance(value, float) else f"{key}={value}"
             for key, value in named.items() if value is not None]  # fmt: skip
    return ", ".join([name, *parts])


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


def _margin(args: CompareArguments, problem: Problem) -> float | None:
    if args.margin is not None or problem.reward_range is None:
        return args.margin
    low, high = problem.reward_range
    return MARGIN * (high - low)


def planned_run(
    plan: Plan, problem: Problem, arm: Arm, seed: int, role: Role, rate: float | None = None
) -> PlannedRun:
    """Plan one run: an arm on a problem with a seed.

    Args:
        plan: the comparison.
        problem: what the run trains on.
        arm: how it trains.
        seed: its seed.
        role: why it is made.
        rate: its learning rate; None for the arm's own, else the problem's.
    """
    settings = {**problem.settings, "learning_rate": problem.learning_rate, **arm.settings, "seed": seed}
    folder = arm.label if role != "itself" else f"{arm.label} itself"
    if rate is not None:
        settings["learning_rate"] = rate
    if role == "tuning":
        folder = f"{arm.label} tuning {rate:g}"
    if problem.kind == "train":
        settings |= _same_samples(problem, settings)
    settings["keep_checkpoints"] = 1
    if plan.noise and (arm.label, seed, role) == (plan.reference, plan.seeds[0], "comparison"):
        steps = problem.budget // (problem.prompts_per_step * problem.num_generations)
        settings |= {"save_every": max(1, -(-steps // 2)), "keep_checkpoints": 2}  # one half way
    place = [_slug(one, [o.label for o in others]) for one, others in
             ((problem.label, plan.problems), (arm.label, plan.arms))]  # fmt: skip
    place[1] += folder.removeprefix(arm.label).replace(" ", "-")
    path = "/".join(["runs", *place, f"seed_{seed}"])
    return PlannedRun(problem.label, arm.label, seed, role, problem.kind, path, settings)


def _same_samples(problem: Problem, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that give a run the problem's budget, and its evaluations at the same samples."""
    size = settings["num_generations"]
    every = settings["eval_every"] * problem.num_generations / size if settings["eval_every"] else 0
    return {"max_samples": problem.budget, "eval_every": max(1, round(every)) if every else 0}


def _slug(label: str, all_labels: Sequence[str]) -> str:
    """Return a label as the name of a folder; labels that become the same get their place."""

    def plainly(text: str) -> str:
        return re.sub(r"[^A-Za-z0-9_.=-]+", "-", text).strip("-.")[:80] or "arm"

    same = [other for other in all_labels if plainly(other).lower() == plainly(label).lower()]
    return plainly(label) + (f"-{same.index(label) + 1}" if len(same) > 1 else "")


def _try(problem: Problem, arm: Arm, run: PlannedRun) -> None:
    """Refuse an arm that cannot be trained on a problem."""
    try:
        run_arguments(problem.kind, run.settings)
    except Refused as error:
        raise Refused(f"The arm {arm.label!r} cannot train on {problem.label}: {error}") from error


def runs_of(plan: Plan, rates: Mapping[tuple[str, str], float] | None = None) -> list[PlannedRun]:
    """Return the runs of the comparison, those of one seed together, so that pairs are complete early.

    Args:
        plan: the comparison.
        rates: learning rates by problem and arm, where they have been tuned.
    """
    chosen = rates or {}
    runs = []
    for problem in plan.problems:
        for place, seed in enumerate(plan.seeds):
            for arm in plan.arms:
                rate = chosen.get((problem.label, arm.label))
                runs.append(planned_run(plan, problem, arm, seed, "comparison", rate))
                if arm.label == plan.reference and plan.itself_seeds:
                    other = plan.itself_seeds[place]
                    runs.append(planned_run(plan, problem, arm, other, "itself", rate))
    return runs
