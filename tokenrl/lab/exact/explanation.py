"""Explains one estimator: its choices, what they do to the gradient and why, and where it comes from.

It may be a preset with changes, or a configuration of TRL.
"""

from __future__ import annotations

from tokenrl.core.bias import effects, objective_line
from tokenrl.core.effects import EXACT
from tokenrl.core.estimator import Estimator
from tokenrl.core.presets import PRESETS, Preset
from tokenrl.lab.exact.catalogue import LabArguments
from tokenrl.lab.exact.trl_config import read_trl_config
from tokenrl.runs.output import rich_console, rich_table

CHOICES = ("baseline", "scale", "aggregation", "ratio", "returns", "zero_spread", "truncations")
"""The axes that are shown, also those where the estimator is as RLOO."""

CUSTOM = Preset({}, "no preset has these fields")


def explain(args: LabArguments) -> dict[str, Estimator]:
    """Print what the estimator of `--preset` or `--trl-config` is, and why its gradient is what it is.

    Returns:
        That estimator and rloo, by name; nothing if neither option was used.

    Raises:
        Refused: The preset or the file cannot be used.
    """
    name = args.preset if args.trl_config is None else args.trl_config
    if name is None:
        return {}
    if args.trl_config is not None:
        title, estimator, beyond = read_trl_config(name)
    else:
        estimator = Estimator.preset(name)
        preset = PRESETS.get(name) or PRESETS.get(estimator.preset_name, CUSTOM)
        title = preset.paper
        beyond = [preset.beyond]
    causes = [
        f"{effect.reason} ({effect.status})"
        for effect in effects(estimator)
        if effect.status != EXACT
    ]
    parts = {
        "source": [title],
        "estimator": [written(estimator)],
        "choices": [", ".join(f"{axis} {getattr(estimator, axis)}" for axis in CHOICES)],
        "objective": [*objective_line(estimator).values()],
        "gradient": [estimator.bias_status],
        "because": causes or [estimator.bias_reason],
        "beyond the axes": beyond,
    }
    table = rich_table("", ("", name), overflow="fold")
    for heading, lines in parts.items():
        for number, line in enumerate(filter(None, lines)):
            table.add_row("" if number else heading, line)
    rich_console(width=120).print(table)
    return {name: estimator, "rloo": Estimator()}


def written(estimator: Estimator) -> str:
    """Write an estimator as `--estimator` takes it: the nearest preset, with what differs from it."""
    forms = []
    for name in PRESETS:
        preset = vars(Estimator.preset(name))
        changes = [
            f"{field}={value}" for field, value in vars(estimator).items() if value != preset[field]
        ]
        forms.append([name, *changes])
    shortest = min(forms, key=len)
    return ",".join(shortest)
