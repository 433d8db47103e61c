"""Holds the advice, prints it, and writes it to files."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

from tokenrl.core.estimator import Estimator
from tokenrl.core.guards import check_horizon
from tokenrl.core.presets import PRESETS
from tokenrl.errors import Refused
from tokenrl.runs.console import rich_console, rich_table
from tokenrl.runs.files import write_json


class Setting(NamedTuple):
    """One recommendation: a field of the arguments (such as `estimator.baseline`), its value, the reason."""

    name: str
    value: Any
    reason: str


class Head(NamedTuple):
    """A policy head, the number of parameters of a policy with it, and why it is chosen or not."""

    name: str
    parameters: int | None
    reason: str


@dataclass
class Advice:
    """Settings for a run, with their reasons and the measurements behind them.

    Attributes:
        subject: the environment or the task.
        command: the command that trains, `control` or `train`.
        arguments: the arguments of that command, as its dataclass.
        facts: what was measured, as texts by name.
        settings: the recommended settings.
        measurements: the numbers behind the recommendations.
        heads: the policy heads; empty for a language model, which has its own.
        warnings: what may go wrong.
    """

    subject: str
    command: str
    arguments: Any
    facts: dict[str, str]
    settings: list[Setting]
    measurements: dict[str, Any]
    heads: list[Head] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def judge_horizon(estimator: Estimator, horizon: int | None, allow_no_baseline: bool) -> list[str]:
    """Return the warning about long episodes without a baseline, if `allow_no_baseline` lets them through.

    Raises:
        Refused: there is no baseline beyond 500 steps, and that is not allowed.
    """
    try:
        check_horizon(estimator, horizon)
    except Refused as refusal:
        if not allow_no_baseline:
            raise
        return [f"allowed by --allow-no-baseline: {refusal}"]
    return []


def print_advice(advice: Advice, config: str | None) -> None:
    """Print facts, heads, settings with reasons, warnings, and the command that runs with these settings."""
    console = rich_console()

    def show(title: str, columns: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
        table = rich_table(title, columns, show_header=any(columns), overflow="fold")
        table.columns[1].style = "bold"
        for row in rows:
            table.add_row(*row)
        console.print(table)

    show(f"tokenrl advise: {advice.subject}", ("", ""), list(advice.facts.items()))
    if advice.heads:
        rows = [
            (h.name, "-" if h.parameters is None else f"{h.parameters:,}", h.reason) for h in advice.heads
        ]
        show("Policy heads", ("head", "parameters", "reason"), rows)
    rows = [(setting.name, written(setting.value), setting.reason) for setting in advice.settings]
    show("Settings", ("setting", "value", "reason"), rows)
    for warning in advice.warnings:
        console.print(f"warning: {warning}", style="yellow")
    line = f"tokenrl {advice.command} --config {shlex.quote(config)}" if config else command_line(advice)
    console.print(f"Run it: {line}", soft_wrap=True)


def written(value: Any) -> str:
    """Return a value as text: 'none' for None, short numbers, layers as 64 x 64."""
    if value is None or value == ():
        return "none"
    if isinstance(value, tuple):
        return " x ".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def write_advice(advice: Advice, *, config: str | None, json: str | None) -> None:
    """Write the arguments to the file `config`, as in config.json, and the whole advice to `json`."""
    if config is not None:
        write_json(Path(config), {"kind": advice.command, **asdict(advice.arguments)})
    if json is not None:
        kept = ("subject", "command", "arguments", "measurements", "warnings")
        record = {name: getattr(advice, name) for name in kept}
        record["settings"] = [setting._asdict() for setting in advice.settings]
        record["heads"] = [head._asdict() for head in advice.heads]
        write_json(Path(json), record)


def command_line(advice: Advice) -> str:
    """Return the command for these arguments: the nearest preset, and a flag for each value that differs."""
    arguments = advice.arguments
    # Resolved settings cannot be made without values, but their fields keep the arguments' defaults.
    defaults = {f.name: f.default for f in fields(arguments) if f.name != "estimator"}
    given = {name: getattr(arguments, name) for name in defaults}
    words = ["tokenrl", advice.command]
    estimator: Estimator = arguments.estimator
    preset = min(PRESETS, key=lambda name: len(_differences(estimator, Estimator.preset(name))))
    words += ["--estimator", preset]
    words += _flags({name: value for name, value in given.items() if value != defaults[name]}, "--")
    words += _flags(_differences(estimator, Estimator.preset(preset)), "--estimator.")
    return shlex.join(words)


def _differences(given: Estimator, default: Estimator) -> dict[str, Any]:
    values = {f.name: getattr(given, f.name) for f in fields(given)}
    return {name: value for name, value in values.items() if value != getattr(default, name)}


def _flags(values: dict[str, Any], prefix: str) -> list[str]:
    words = []
    for name, value in values.items():
        flag = prefix + name.replace("_", "-")
        if isinstance(value, bool):
            words.append(flag if value else flag.replace(prefix, prefix + "no-", 1))
        elif isinstance(value, tuple):
            words += [flag, *map(str, value)]
        else:
            words += [flag, str(value)]
    return words
