"""Makes the plan of a comparison from its arguments: problems, arms, budgets and seeds."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any

from tokenrl.control import control_settings, describe
from tokenrl.core.estimator import Estimator
from tokenrl.core.presets import read_changes
from tokenrl.errors import Refused, nearest
from tokenrl.files import plain
from tokenrl.foreign import check_names
from tokenrl.lab.compare.arguments import CompareArguments
from tokenrl.lab.compare.equality import KINDS, measured
from tokenrl.lab.compare.looks import check_looks
from tokenrl.lab.compare.plan import CONTROLS, Arm, Kind, Plan, folder_of
from tokenrl.language import plan_training
from tokenrl.runs import typed_command
from tokenrl.settings import (
    Positive,
    arguments,
    check_choice,
    check_seed,
    checked,
    field_types,
)

MARGIN = 0.02
"""Differences smaller than this share of the reward's declared range count as none."""
FACTORS: dict[Any, tuple[float, ...]] = {"fixed": (1.0,), "tuned": (0.25, 0.5, 1.0, 2.0, 4.0)}
"""Learning rates that are tried, relative to the recommended one: four times that often destroys a policy."""
TUNING_SEEDS = 3
TUNING_OFFSET = 20_000
"""Number of tuning seeds, and the distance of the first of them from the first seed."""
EVALUATIONS = 10
AXES = tuple(f.name for f in fields(Estimator))
FITTING = Estimator(baseline="running_mean", ratio="token", beta=1.0)
"""An estimator that fits every shape of a language task, as an arm's may not."""
RESERVED = [
    "task",
    "env",
    "output_dir",
    "quiet",
    "seed",
    "learning_rate",
    "resume",
    "overwrite",
    "check",
    "threads",
    "keep",
    "best_metric",
    "patience",
    "stop_at_reward",
]
"""Settings of a run that neither users nor arms may set, because the comparison does; but an arm may name rates."""
FIXED: dict[Kind, dict[str, Any]] = {
    "train": {
        "threads": 1,
        "mixed_precision": "no",
        "training_attention": "as_loaded",
        "stop_after_zero_spread": 0,
        "keep_checkpoints": 1,
    },
    "control": {"threads": 1, "keep_checkpoints": 1},
}
"""Settings of every run unless a user sets them."""
CHOSEN: dict[Kind, list[str]] = {
    "train": ["prompts_per_step", "num_generations", "max_completion_length", "lr_scheduler_type"],
    "control": ["num_envs"],
}
"""Settings that get the value that a single run would choose, unless a user sets them."""


def make_plan(args: CompareArguments, announce: Callable[[str], None]) -> Plan:
    """Plan a comparison; everything that can be refused without running is refused here.

    What users leave open is chosen as for a single run. In control the budget is counted in episodes, or, if
    `num_steps` is set, in steps of the environment, of which all arms then generate equally many per update.

    Args:
        args: the arguments.
        announce: prints a line, such as that a model is being warm-started.

    Raises:
        Refused: an argument cannot be used, two contradict each other, or an arm cannot train on the problem.
    """
    first = args.first_seed
    tuning = first + TUNING_OFFSET
    looks = check_looks("seeds", args.seeds)
    check_seed(tuning + looks[-1])
    kind: Kind = "control" if args.env else "train"
    shared = _shared_settings(args, kind)
    axes = shared.pop("estimator", {})
    reference = args.reference or args.arms[0]
    check_choice("reference", reference, args.arms)
    arms = [read_arm(text, axes, KINDS[kind], (reference, *args.arms)) for text in args.arms]
    names = (*args.env, *args.task, shared.get("environment"), "sort_digits")
    problem = next(filter(None, names))
    own = {**shared, "env" if kind == "control" else "task": problem}
    usual = own if kind == "control" else {**own, "estimator": FITTING}
    rates: Any = args.learning_rate
    if not rates or (rates[1:] and FACTORS.keys() & rates):
        raise Refused(f"learning_rate was given as {rates}; give fixed, tuned or numbers.")
    factors = FACTORS.get(rates[0])
    if not factors:
        usual = {**usual, "learning_rate": rates[0]}
    run, solved, reward_range = _settled(usual, kind, announce)
    every = run.eval_every
    if own.get("eval_every") is None:
        every = max(1, run.max_steps // EVALUATIONS)
    settings = FIXED[kind] | own | {setting: getattr(run, setting) for setting in CHOSEN[kind]}
    per_step = _samples_per_step(settings, Estimator())
    margin = args.margin
    ceiling = solved
    if reward_range:
        low, high = reward_range
        margin = margin or MARGIN * (high - low)
        ceiling = min(high - margin, math.inf if ceiling is None else ceiling)
    if factors:
        rates = [factor * run.learning_rate for factor in factors]
    budget = run.max_steps * per_step
    plan = Plan(
        problem=problem,
        arms=tuple(_planned(arm, settings, rates, budget, every * per_step) for arm in arms),
        reference=reference,
        metric=args.metric,
        seeds=tuple(range(first, first + looks[-1])),
        looks=looks,
        tuning_seeds=tuple(range(tuning, tuning + TUNING_SEEDS)),
        budget=budget,
        unit=_unit(settings),
        every=every * per_step,
        margin=margin,
        solved=solved,
        ceiling=ceiling,
        failure_below=args.failure_below,
        all_pairs=args.all_pairs,
        command=typed_command(),
    )
    _check_arms(plan)
    return plan


def _planned(
    arm: Arm, settings: Mapping[str, Any], rates: Sequence[float], budget: int, every: int
) -> Arm:
    """Return an arm with all settings of its runs, whose length and evaluations follow from the samples."""
    own = {**settings, **arm.settings}
    samples = _samples_per_step(own, arm.estimator)
    own["max_steps"] = math.ceil(budget / samples)
    own["eval_every"] = max(1, round(every / samples)) if every else 0
    # of a search, which learns nothing, one rate is enough
    count = 1 if own.get("control_arm") == "best_of_n" else None
    return Arm(arm.label, plain(own), tuple(dict.fromkeys(arm.rates or rates))[:count])


def _check_arms(plan: Plan) -> None:
    """Refuse two arms in one directory, and an arm that cannot train."""
    folders = set()
    for arm in plan.arms:
        folder = folder_of(arm.label)
        if folder.lower() in folders:
            raise Refused(
                f"Two arms would have the same directory, {folder}. Leave one out, or write it in another way, "
                "such as with its settings in another order."
            )
        folders.add(folder.lower())
        try:
            run = plan.run(arm, plan.seeds[0], arm.rates[0])
            _settled(run.settings, run.kind)
        except Refused as error:
            raise Refused(
                f"The arm {arm.label!r} cannot train on {plan.problem}: {error}"
            ) from error


def _shared_settings(args: CompareArguments, kind: Kind) -> dict[str, Any]:
    """Return the settings that all runs share, without those that are left open.

    Raises:
        Refused: what the arguments say, whatever the arms, cannot be compared.
    """
    if len(args.env) + len(args.task) > 1:
        raise Refused(
            "A call of compare has one task or one environment; call it for each. tokenrl compare takes several "
            "of a kind."
        )
    if len(args.arms) < 2:
        raise Refused(
            f"A comparison needs two or more arms, such as rloo grpo; arms names {len(args.arms)}."
        )
    if not isinstance(args.shared.get("estimator", {}), Mapping):
        raise Refused(
            "Name estimators as arms; only single axes can be shared, as estimator.aggregation."
        )
    check_names(args.shared, field_types(CompareArguments) | field_types(KINDS[kind]))
    for name in args.shared:
        if name in RESERVED:
            raise Refused(
                f"{name} is set by the comparison itself, which continues its runs and never replaces them. "
                "Leave it out, and give another output_dir for another comparison."
            )
    return {name: value for name, value in args.shared.items() if value is not None}


def _settled(
    settings: Mapping[str, Any], kind: Kind, announce: Callable[[str], None] = lambda text: None
) -> tuple[Any, float | None, tuple[float, float] | None]:
    """Return the arguments of a run, with what was left open; its threshold; and the range of its reward.

    Raises:
        Refused: settings contradict each other, as far as that is known before the run.
    """
    run: Any = arguments(KINDS[kind], settings)
    if kind == "train":
        return plan_training(run, announce, settings)
    spec = describe(run.env, run.max_episode_steps)
    if "estimator" in settings:
        control_settings(run, spec)
    return run, spec.solved, None


def _unit(settings: Mapping[str, Any]) -> str:
    """Return what a sample of a run with these settings is."""
    if "env" not in settings:
        return "completions"
    return "environment steps" if settings.get("num_steps") else "episodes"


def _samples_per_step(settings: Mapping[str, Any], estimator: Estimator) -> int:
    """Return the samples of a training step, without the refills of DAPO.

    An estimator with a greedy baseline generates one more completion for each prompt.
    """
    if "env" in settings:
        return int(settings["num_envs"] * (settings.get("num_steps") or 1))
    per_prompt = settings["num_generations"] + ("greedy_rewards" in estimator.needs)
    return int(settings["prompts_per_step"] * per_prompt)


def read_arm(text: str, axes: Mapping[str, Any], kind: Any, others: Sequence[str] = ()) -> Arm:
    """Read one arm, such as `rloo`, `grpo,scale=none`, `baseline=group_mean` or `mine.py:baseline`.

    Args:
        text: a preset, or a function that is the baseline; then changes, each NAME=VALUE, where NAME is an
            axis of the estimator or another setting of a run. Without a preset the changes are to the
            default estimator. Changes are separated by commas; a comma in brackets belongs to a value. The name of
            a control is short for the first of the others that is none, with that `control_arm`.
        axes: axes that all arms share.
        kind: the dataclass of the settings of a run.
        others: the texts of the arms, the reference first.

    Raises:
        Refused: there is no such preset, axis or setting, one is given twice, or a value is not allowed.
    """
    axes = dict(axes)
    own = {}
    settings = field_types(kind)
    try:
        preset, changes = read_changes(text)
        if preset in CONTROLS:
            usual = [other for other in others if read_changes(other)[0] not in CONTROLS]
            if not usual or kind is KINDS["control"]:
                raise Refused(
                    "it is a control, made of another arm of a comparison of language models; name such an arm too."
                )
            preset, of_usual = read_changes(usual[0])
            changes = {**of_usual, **changes, "control_arm": text.partition(",")[0].strip()}
        rates = checked("learning_rate", changes.pop("learning_rate", ()), tuple[Positive, ...])
        for name, value in changes.items():
            if name in {*RESERVED, "estimator"} | measured(kind):
                raise Refused(f"{name} must be the same for all arms; leave it out there.")
            if name in CHOSEN["train"] and value is None:
                raise Refused(f"{name} was given as None; give a value, or leave it out.")
            if name in AXES:
                axes[name] = value
            elif name in settings:
                own[name] = value
            else:
                raise Refused(f"there is no setting {name!r}.{nearest(name, [*AXES, *settings])}")
        estimator = Estimator.preset(preset, **axes) if preset else arguments(Estimator, axes)
    except Refused as error:
        raise Refused(f"The arm {text!r} cannot be used: {error}") from error
    usual = plain(Estimator())
    changed_axes = {axis: value for axis, value in plain(estimator).items() if value != usual[axis]}
    return Arm(text, {"estimator": changed_axes, **own}, rates)
