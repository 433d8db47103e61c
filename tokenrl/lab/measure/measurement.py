"""Measures the gradients of many estimators on one set of completions of a real model.

The command, `tokenrl lab measure`, prints tables with what their columns mean, and writes the numbers.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tokenrl.core.estimator import Estimator
from tokenrl.core.rows import zero_spread
from tokenrl.core.statistics import Interval
from tokenrl.errors import Refused
from tokenrl.keywords import takes
from tokenrl.lab.measure.arguments import MeasureArguments
from tokenrl.lab.measure.noise import (
    GroupSize,
    Measurement,
    measure_estimators,
    measure_group_sizes,
)
from tokenrl.lab.measure.projections import AT_ONCE, Projections, chosen_parameters, project
from tokenrl.lab.measure.rollouts import Samples, collect
from tokenrl.language.policy.model import Policy
from tokenrl.language.rollout.distribution import distribution_of
from tokenrl.language.rollout.sampling import Sampling
from tokenrl.runs.console import Console, rich_console, rich_table
from tokenrl.runs.files import check_place, write_text
from tokenrl.runs.threads import choose_threads, using_threads
from tokenrl.settings import arguments

if TYPE_CHECKING:
    from tokenrl.language.rewards.rewards import Rewards
    from tokenrl.language.tasks.task import Task

MOST_ROWS = 1024
"""Completions per forward pass, if their logits are few."""
LOGITS_AT_ONCE = 2**24
"""With eight directions at once, in float32, the logits and their derivatives then take about 2 GB."""


@dataclass(frozen=True)
class Measured:
    """Everything that was measured on one set of completions.

    Attributes:
        model: The path or hub name of the model.
        task: The name of the task.
        settings: Numbers of prompts, completions and probes, and mean reward and length of the completions.
        estimators: One measurement per chosen estimator.
        group_sizes: Noise by group size, for estimators that compare only the completions of a prompt.
    """

    model: str
    task: str
    settings: dict[str, float]
    estimators: tuple[Measurement, ...]
    group_sizes: tuple[GroupSize, ...]


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
        Refused: For a preset, a number or a layer that cannot be used, or for lack of memory.
    """
    from tokenrl.language.tasks.task import check_single_turn, find_task

    chosen = {name: Estimator.preset(name) for name in args.estimators}
    args = _checked(args, console.note)
    task, rewards = find_task(args)
    check_single_turn(rewards, "lab measure")
    policy = _policy(args, task, console)
    parameters = chosen_parameters(policy, args.layers)
    size, layers = sum(p.numel() for p in parameters.values()), ", ".join(args.layers) or "all"
    rows = args.num_prompts * args.num_generations
    console.note(f"Differentiating {rows} completions in {size:,} parameters ({layers}).")
    threads, _ = choose_threads(policy.size)
    with using_threads(threads):
        samples, projections = _in_memory(policy, task, rewards, parameters, args, console)
        options: dict[str, Any] = {"prompts_per_step": args.prompts_per_step, "seed": args.seed}
        return Measured(
            model=policy.source,
            task=task.name,
            settings=_settings(args, samples),
            estimators=measure_estimators(samples, projections, chosen, **options),
            group_sizes=measure_group_sizes(samples, projections, chosen, **options),
        )


def _policy(args: MeasureArguments, task: Task, console: Console) -> Policy:
    """Load the policy; from a run that trained an adapter, the policy in which only that adapter trains."""
    from tokenrl.language.policy.loading import device_for
    from tokenrl.language.policy.model import load_policy
    from tokenrl.language.supervised.base import make_policy

    adapter = Path(args.model, "model", "adapter") if isinstance(args.model, (str, Path)) else None
    if adapter is not None and os.path.isdir(adapter) and not args.lora_r:
        console.note(
            f"{args.model} trained an adapter, so the gradient is measured in the adapter."
        )
        trained = load_policy(
            adapter, merge_adapter=False, dtype=args.dtype, trust_remote_code=args.trust_remote_code
        )
        args = replace(args, model=trained)  # type: ignore[arg-type]
    policy = make_policy(args, task, console.note)
    policy.model.to(device_for(policy.size, args.cpu))
    return policy


def _in_memory(
    policy: Policy,
    task: Task,
    rewards: Rewards,
    parameters: Mapping[str, Tensor],
    args: MeasureArguments,
    console: Console,
) -> tuple[Samples, Projections]:
    """Sample and project as many completions at once as memory allows: half as many whenever it runs out.

    Raises:
        Refused: When not even the completions of one prompt fit, or the task has too few prompts.
    """
    from accelerate.utils.memory import should_reduce_batch_size
    from rich.progress import Progress

    from tokenrl.language.supervised.defaults import completion_limit

    prompts = list(task.train_prompts)[: args.num_prompts]
    if len(prompts) < args.num_prompts:
        raise Refused(
            f"num_prompts={args.num_prompts}, but the task has {len(prompts)} training prompts."
        )
    sampling = Sampling(
        max_completion_length=args.max_completion_length
        or completion_limit(task, args.model, policy)[0],
        num_generations=args.num_generations,
        seed=args.seed,
        **distribution_of(args),
    )
    rows = args.rows_at_once or rows_at_once(policy, sampling.max_completion_length)
    projected = partial(
        project,
        policy,
        parameters=parameters,
        count=args.probes,
        seed=args.seed,
        distribution=args,
        entropy=any(Estimator.preset(name).needs_entropy for name in args.estimators),
    )
    while True:
        try:
            samples = collect(policy, rewards, prompts, sampling, rows_at_once=rows)
            scoring, width = samples.scoring, samples.mask.shape[1]
            with Progress(console=console.rich) as progress:
                total = len(samples.parts) * math.ceil(args.probes / AT_ONCE)
                advance = partial(
                    progress.advance, progress.add_task("differentiating", total=total)
                )
                parts = [
                    projected(x, width=width, scoring=scoring, after=advance) for x in samples.parts
                ]
            logprobs, slopes = zip(*parts, strict=True)
            whole = None if slopes[0] is None else torch.cat([x.cpu() for x in slopes])
            return samples, Projections(torch.cat([x.cpu() for x in logprobs]), whole)
        except RuntimeError as error:
            if not should_reduce_batch_size(error):
                raise
            if rows <= args.num_generations:
                raise Refused(
                    f"Memory ran out with the {rows} completions of one prompt. Fewer --probes, a shorter "
                    "--max-completion-length, --layers last or --lora-r 8 need less."
                ) from error
        rows //= 2
        console.note(f"Memory ran out; going on with {rows} completions at once.")


def rows_at_once(policy: Policy, length: int) -> int:
    """Return how many completions of `length` tokens have 16 million logits, but at most 1024."""
    vocabulary: int = policy.model.config.get_text_config().vocab_size  # type: ignore[union-attr, operator]
    return max(1, min(MOST_ROWS, LOGITS_AT_ONCE // (length * vocabulary)))


def _checked(args: MeasureArguments, announce: Callable[[str], None]) -> MeasureArguments:
    """Check the numbers; return the arguments with the form of the prompts, which is announced."""
    from tokenrl.language.policy.prompts import fill_form, form_line, form_of

    g, b, p = args.num_generations, args.num_prompts, args.prompts_per_step
    if g & (g - 1):
        raise Refused(f"num_generations={g}: give a power of two, so that groups can be halved.")
    if args.gradient_checkpointing:
        raise Refused("gradient_checkpointing has no forward-mode derivative. Measure without it.")
    if b < 4 * p or b % p:
        raise Refused(
            f"num_prompts={b} with prompts_per_step={p}: give a multiple of {p}, at least {4 * p}."
        )
    args = arguments(MeasureArguments, vars(fill_form(args)))
    for line in form_line(form_of(args), args.model).values():
        announce(f"Asked: {line}.")
    return args


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
    if args.json is not None:
        check_place(args.json)
    measured = measure_with(args, Console(quiet=args.quiet))
    if not args.quiet:
        print_tables(measured)
    if args.json is not None:
        write_text(Path(args.json), json.dumps(record(measured), indent=1, allow_nan=False) + "\n")
    return 0


def record(measured: Measured) -> dict[str, Any]:
    """Return all numbers for JSON; those that are not finite become None."""
    return asdict(measured, dict_factory=_finite) | {"settings": _finite(measured.settings.items())}


def _finite(items: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    return {key: None if isinstance(x, float) and not math.isfinite(x) else x for key, x in items}


def print_tables(measured: Measured) -> None:
    """Print estimators and group sizes, and below them what the columns mean."""
    console = rich_console(width=140)
    numbers = ("noise of a step", "cosine", "noise of none / its own")
    table = rich_table("", ("estimator", "declared", "units"), numbers)
    for m in measured.estimators:
        units = f"{m.units} {'steps' if m.coupled else 'groups'}"
        table.add_row(m.estimator, m.declared, units, *map(words, (m.noise, m.cosine, m.quieter)))
    console.print(table)
    if measured.group_sizes:
        numbers = ("G", "noise of as many completions", "noise with half the G / its own")
        table = rich_table("", ("estimator",), numbers)
        for size in measured.group_sizes:
            quieter = "" if size.quieter is None else words(size.quieter)
            table.add_row(size.estimator, str(size.group_size), words(size.noise), quieter)
        console.print(table)
    s = measured.settings
    console.print(
        f"Over {s['num_prompts']:.0f} prompts of {measured.task} with {s['num_generations']:.0f} completions "
        f"each the mean reward is {s['reward']:.3g}; in {s['frac_reward_zero_std']:.0%} of the groups all "
        "rewards are equal.\n"
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
