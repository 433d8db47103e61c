"""Runs `tokenrl lab measure`: prints tables and what their columns mean, and writes the numbers."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tokenrl.lab.measure.arguments import MeasureArguments
from tokenrl.lab.measure.measurement import Measured, measure_with
from tokenrl.lab.measure.unit_statistics import Estimate
from tokenrl.runs.console import Console, rich_console, rich_table
from tokenrl.runs.files import check_place, write_text


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
        "brackets: 95 % bootstrap intervals over units and random directions; 'not resolved': the interval "
        "of |E g|^2 contains 0, so more prompts are needed.\n"
    )


def words(estimate: Estimate) -> str:
    """Write a number with its interval, to three digits, or 'not resolved'."""
    if estimate.value is None or estimate.high is None or estimate.low is None:
        return "not resolved"
    if not math.isfinite(estimate.high):
        return f"not resolved (> {estimate.low:.3g})"
    return f"{estimate.value:.3g} ({estimate.low:.3g} to {estimate.high:.3g})"
