"""Runs `tokenrl lab measure`: prints tables and their meaning in plain words, and writes the numbers."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from tokenrl.lab.measure.arguments import MeasureArguments
from tokenrl.lab.measure.measurement import Measured, measure_with
from tokenrl.lab.measure.paired import GroupSize, Measurement
from tokenrl.lab.measure.unit_statistics import Estimate, reciprocal
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
        print(reading(measured))
    if args.json is not None:
        write_text(args.json, json.dumps(record(measured), indent=1, allow_nan=False) + "\n")
    return 0


def record(measured: Measured) -> dict[str, Any]:
    """Return all numbers and the reading for JSON; numbers that are not finite become None."""
    return {**_plain(asdict(measured)), "reading": reading(measured)}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(x) for key, x in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(x) for x in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def print_tables(measured: Measured) -> None:
    """Print estimators, layers and group sizes, and below them what the columns mean."""
    console = rich_console(width=140)
    numbers = ("noise of a step", "cosine", "noise of none / its own")
    for title, measurements in {"": measured.estimators, **measured.layers}.items():
        table = rich_table(title, ("estimator", "declared", "units"), numbers)
        for m in measurements:
            units = f"{m.units} {'steps' if m.coupled else 'groups'}"
            table.add_row(m.estimator, m.declared, units, *map(words, (m.noise, m.cosine, m.quieter)))
        console.print(table)
    if measured.group_sizes:
        numbers = ("G", "noise of as many completions", "noise with half the G / its own")
        table = rich_table("", ("estimator",), numbers)
        for s in measured.group_sizes:
            quieter = "" if s.quieter is None else words(s.quieter)
            table.add_row(s.estimator, str(s.group_size), words(s.noise), quieter)
        console.print(table)
    console.print(
        "noise: tr Var g / |E g|^2 of one step; cosine: between E g and that of RLOO on other rows; in "
        "brackets: 95 % intervals; 'not resolved': the interval of |E g|^2 contains 0, so more prompts are "
        "needed.\n"
    )


def words(estimate: Estimate) -> str:
    """Write a number with its interval, to three digits, or 'not resolved'."""
    if estimate.value is None or estimate.high is None or estimate.low is None:
        return "not resolved"
    if not math.isfinite(estimate.high):
        return f"not resolved (> {estimate.low:.3g})"
    return f"{estimate.value:.3g} ({estimate.low:.3g} to {estimate.high:.3g})"


def reading(measured: Measured) -> str:
    """Say what the numbers mean and how uncertain they are, in a few sentences."""
    s, found = measured.settings, measured.estimators
    sentences = [
        f"Over {s['num_prompts']:.0f} prompts of {measured.task} with {s['num_generations']:.0f} completions "
        f"each the mean reward is {s['reward']:.3g}, and {s['frac_reward_zero_std']:.0%} of the groups have "
        "equal rewards throughout."
    ]
    sentences += [text for text in (_noises(found), _directions(found), _sizes(measured.group_sizes)) if text]
    probes = s["probes"]
    sentences.append(
        f"Intervals are 95 % bootstrap intervals over the units and the {probes:.0f} random directions on "
        f"which gradients were projected (which alone leave an error of {math.sqrt(2 / probes):.0%} in a "
        "squared length); they hold for this model as it is now, not for a whole training run."
    )
    return " ".join(sentences)


def _noises(found: Sequence[Measurement]) -> str:
    """Say how large the noise is, and which estimators have more or less of it than without a baseline."""
    known = [m for m in found if m.noise.resolved]
    if known:
        best = min(known, key=lambda m: m.noise.value or math.inf)
        text = (
            f"The least noise was found for {best.estimator}: that of one step is {words(best.noise)} times "
            "its squared signal."
        )
    else:
        text = "No signal can be told apart from 0, so the noise is not resolved: take more prompts."
    resolved = [m for m in found if m.quieter.resolved and m.quieter.low != m.quieter.high]
    less = [m for m in resolved if (m.quieter.low or 0) > 1]
    more = [m for m in resolved if (m.quieter.high or 0) < 1]
    parts = [
        _foremost(less, "less", lambda m: m.quieter),
        _foremost(more, "more", lambda m: reciprocal(m.quieter)),
    ]
    if less or more:
        text += f" Compared with no baseline, {'; '.join(p for p in parts if p)}."
    rest = [m.estimator for m in resolved if m not in less and m not in more]
    return text + (f" No difference from no baseline is seen for: {', '.join(rest)}." if rest else "")


def _foremost(found: Sequence[Measurement], word: str, ratio: Callable[[Measurement], Estimate]) -> str:
    """Describe RLOO and the two estimators that differ most with their factors, and name the others."""
    if not found:
        return ""
    ordered = sorted(found, key=lambda m: (m.estimator != "rloo", -(ratio(m).value or 0)))
    text = " and ".join(f"{m.estimator} has {words(ratio(m))}" for m in ordered[:3]) + f" times {word} noise"
    others = ", ".join(m.estimator for m in ordered[3:])
    return text + (f" (the same holds, by smaller factors, for {others})" if others else "")


def _directions(found: Sequence[Measurement]) -> str:
    """Say which estimators point in another direction than RLOO, by how much, and which may not."""
    resolved = [m for m in found if m.cosine.resolved and m.declared not in ("exact", "exact_up_to_scale")]
    off = sorted((m for m in resolved if (m.cosine.high or 0) < 1), key=lambda m: m.cosine.value or 0)
    parts = [f"{m.estimator} points {degrees(m.cosine)} away from the gradient" for m in off[:3]]
    text = "; ".join(parts)
    text = f"{text[0].upper()}{text[1:]}." if parts else ""
    rest = [m for m in resolved if m not in off]
    if rest:
        far = max(_angle(m.cosine.low) for m in rest)
        text += (
            f" No angle is seen for {', '.join(m.estimator for m in rest)}, with intervals that reach "
            f"to {far:.0f} degrees."
        )
    return text.strip()


def degrees(cosine: Estimate) -> str:
    """Write the angle in degrees with its interval."""
    angle, near, far = (_angle(x) for x in (cosine.value, cosine.high, cosine.low))
    return f"{angle:.0f} degrees ({near:.0f} to {far:.0f})"


def _angle(cosine: float | None) -> float:
    """Return the angle in degrees; estimates of a cosine may exceed 1."""
    return math.degrees(math.acos(max(-1.0, min(1.0, cosine or 0.0))))


def _sizes(sizes: Sequence[GroupSize]) -> str:
    """Say how doubling the group changes the noise of one estimator, RLOO if it was measured."""
    names = [s.estimator for s in sizes]
    name = "rloo" if "rloo" in names else names[0] if names else ""
    steps = [s for s in sizes if s.estimator == name and s.quieter is not None and s.quieter.resolved]
    if not steps:
        return ""
    parts = [
        f"{words(s.quieter)} from {s.group_size // 2} to {s.group_size}"
        for s in steps
        if s.quieter is not None
    ]
    gains = ", and by ".join(parts)
    return f"At equally many completions, doubling the group divides the noise of {name} by {gains}."
