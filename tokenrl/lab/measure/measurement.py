"""Measures the gradients of many estimators on one set of completions of a real model.

The command, `tokenrl lab measure`, prints tables with what their columns mean, and writes the numbers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokenrl.core.estimator import Estimator
from tokenrl.core.rows import zero_spread
from tokenrl.core.statistics import Interval, generator_of
from tokenrl.errors import Refused
from tokenrl.files import write_json
from tokenrl.keywords import takes
from tokenrl.lab.measure.arguments import DEFAULT_ESTIMATORS, OF_TEACHER, MeasureArguments
from tokenrl.lab.measure.noise import Measurement, measure_estimators
from tokenrl.lab.measure.projections import (
    AT_ONCE,
    chosen_parameters,
    project,
)
from tokenrl.language import Distribution, Policy, Samples, collect_samples, open_policy, open_task
from tokenrl.runs import Console, choose_threads, rich_console, rich_table, using_threads
from tokenrl.settings import arguments

MAX_ROWS = 1024
"""Completions per forward pass, if their logits are few."""
MAX_LOGITS = 2**24
"""With eight directions at once, in float32, the logits and their derivatives then take about 2 GB."""


@dataclass(frozen=True)
class Measured:
    """Everything that was measured on one set of completions.

    Attributes:
        model: The path or hub name of the model.
        task: The name of the task.
        settings: Numbers of prompts, completions and probes, and mean reward and length of the completions.
        estimators: One measurement per chosen estimator.
    """

    model: str
    task: str
    settings: dict[str, float]
    estimators: tuple[Measurement, ...]


@takes(MeasureArguments)
def measure_gradients(**options: Any) -> Measured:
    """Measure signal, noise and direction of estimators' gradients, as `tokenrl lab measure` does.

    Args:
        **options: The fields of `MeasureArguments`, the flags of the command.

    Raises:
        Refused: For an option, a preset, a number or a layer that cannot be used.

    Example::

        measured = measure_gradients(task="sort_digits", num_prompts=64)
        {m.estimator: m.noise for m in measured.estimators}
    """
    return measure_with(arguments(MeasureArguments, options), Console(quiet=True))


def measure_with(args: MeasureArguments, console: Console) -> Measured:
    """Sample completions, project the scores of their tokens, and measure every estimator.

    Raises:
        Refused: For a preset, a number or a layer that cannot be used, or a task with too few prompts.
    """
    names = args.estimators or (DEFAULT_ESTIMATORS if args.teacher is None else OF_TEACHER)
    estimators = {name: Estimator.preset(name) for name in names}
    _check(args)
    args, task, rewards = open_task(args, console.note, "lab measure")
    order = torch.randperm(len(task.train_prompts), generator=generator_of(args.seed, "prompts"))
    prompts = list(task.train_prompts.take(order[: args.num_prompts].tolist()))
    if len(prompts) == 1:
        prompts *= args.num_prompts  # every group of such a task has this prompt
    if len(prompts) < args.num_prompts:
        raise Refused(
            f"num_prompts={args.num_prompts}, but the task has {len(prompts)} training prompts."
        )
    policy, sampling = open_policy(args, task, console.note)
    rows = args.rows_at_once or rows_at_once(policy, sampling.max_completion_length)
    parameters = chosen_parameters(policy, args.layers)
    size = sum(p.numel() for p in parameters.values())
    layers = ", ".join(args.layers) or "all"
    completions = args.num_prompts * args.num_generations
    console.note(f"Differentiating {completions} completions in {size:,} parameters ({layers}).")
    threads, _ = choose_threads(policy.size)
    with using_threads(threads):
        samples = collect_samples(policy, rewards, prompts, sampling, rows_at_once=rows)
        samples = replace(samples, has_teacher=args.teacher is not None)
        projections = _projections(policy, samples, parameters, args, sampling, console)
        measurements = measure_estimators(
            samples,
            projections,
            estimators,
            prompts_per_step=args.prompts_per_step,
            seed=args.seed,
        )
    return Measured(policy.source, task.name, _settings(args, samples), measurements)


def _projections(
    policy: Policy,
    samples: Samples,
    parameters: Mapping[str, Tensor],
    args: MeasureArguments,
    distribution: Distribution,
    console: Console,
) -> Tensor:
    """Project the scores of all samples [N, T, K], with a bar that shows the progress."""
    from rich.progress import Progress

    parts = []
    with Progress(console=console.rich) as progress:
        passes = len(samples.parts) * math.ceil(args.probes / AT_ONCE)
        bar = progress.add_task("differentiating", total=passes)
        for rollout in samples.parts:
            part = project(
                policy,
                rollout,
                parameters,
                count=args.probes,
                seed=args.seed,
                max_length=samples.mask.shape[1],
                distribution=distribution,
                regime=samples.regime,
                after=partial(progress.advance, bar),
            )
            parts.append(part)
    return torch.cat(parts)


def rows_at_once(policy: Policy, length: int) -> int:
    """Return how many completions of `length` tokens have 16 million logits, but at most 1024."""
    vocabulary: int = policy.model.config.get_text_config().vocab_size  # type: ignore[union-attr, operator]
    return max(1, min(MAX_ROWS, MAX_LOGITS // (length * vocabulary)))


def _check(args: MeasureArguments) -> None:
    """Refuse numbers that do not fit each other, and what has no forward-mode derivative."""
    prompts = args.num_prompts
    step = args.prompts_per_step
    if args.gradient_checkpointing:
        raise Refused("gradient_checkpointing has no forward-mode derivative. Measure without it.")
    if prompts < 4 * step or prompts % step:
        raise Refused(
            f"num_prompts={prompts} with prompts_per_step={step}: give a multiple of {step}, at least "
            f"{4 * step}."
        )


def _settings(args: MeasureArguments, samples: Samples) -> dict[str, float]:
    dead = zero_spread(samples.rewards, samples.group_size, samples.valid)
    return {
        "num_prompts": args.num_prompts,
        "num_generations": args.num_generations,
        "prompts_per_step": args.prompts_per_step,
        "probes": args.probes,
        "reward": float(samples.rewards[samples.valid].mean()),
        "reward_greedy": float(samples.greedy_rewards.mean()),
        "frac_reward_zero_std": float(dead.double().mean()),
        "completions/mean_length": float(samples.mask.sum(-1).double().mean()),
    }


def run(args: MeasureArguments) -> int:
    """Measure, print the tables and write the file; return the exit code 0.

    Raises:
        Refused: For arguments that cannot be used.
    """
    measured = measure_with(args, Console(quiet=args.quiet))
    if not args.quiet:
        print_tables(measured)
    if args.json is not None:
        write_json(Path(args.json), vars(measured))
    return 0


def print_tables(measured: Measured) -> None:
    """Print the estimators, and below them what the columns mean."""
    console = rich_console(width=140)
    numbers = ("noise of a step", "cosine", "noise of none / its own")
    table = rich_table("", ("estimator", "declared", "units"), numbers)
    for m in measured.estimators:
        units = f"{m.units} {'steps' if m.coupled else 'groups'}"
        table.add_row(m.estimator, m.declared, units, *map(words, (m.noise, m.cosine, m.quieter)))
    console.print(table)
    settings = measured.settings
    console.print(
        f"Over {settings['num_prompts']} prompts of {measured.task} with {settings['num_generations']} "
        f"completions each the mean reward is {settings['reward']:.3g}; in "
        f"{settings['frac_reward_zero_std']:.0%} of the groups all rewards are equal.\n"
        "noise: tr Var g / |E g|^2 of one step; cosine: between E g and that of RLOO on other rows; in "
        "brackets: 95 % bootstrap intervals over units and random directions, too narrow below some 20 "
        "groups of unequal rewards; 'not resolved': the interval of |E g|^2 contains 0, so more prompts are "
        "needed.\n"
    )


def words(estimate: Interval) -> str:
    """Write a number with its interval, to three digits, or 'not resolved'."""
    if math.isnan(estimate.value) or math.isnan(estimate.high):
        return "not resolved"
    if math.isinf(estimate.high):
        return f"not resolved (> {estimate.low:.3g})"
    return f"{estimate.value:.3g} ({estimate.low:.3g} to {estimate.high:.3g})"
