"""Holds advice, prints it as tables, writes it to files, and gives the command line that carries it out."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

from tokenrl.core.baselines import check_horizon
from tokenrl.core.estimator import Estimator
from tokenrl.core.presets import PRESETS
from tokenrl.errors import Refused
from tokenrl.runs.console import rich_console, rich_table
from tokenrl.runs.files import write_json
from tokenrl.runs.findings import Finding


class Setting(NamedTuple):
    """One recommendation: a field of the arguments (such as `estimator.baseline`), its value, the reason."""

    name: str
    value: Any
    reason: str


@dataclass
class Advice:
    """Settings for a run, with their reasons and the measurements behind them.

    Attributes:
        subject: the environment, the task, or the run that is diagnosed.
        command: the command that trains, `control` or `train`.
        arguments: the arguments of that command, as its dataclass.
        facts: what was measured, as texts by name.
        settings: the recommended settings.
        measurements: the numbers behind the recommendations.
        warnings: what may go wrong.
        findings: what the metrics of a run show; only in a diagnosis.
        again: the command that repeats the run with the changes advised; only in a diagnosis.
    """

    subject: str
    command: str
    arguments: Any
    facts: Mapping[str, str]
    settings: list[Setting] = field(default_factory=list)
    measurements: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    again: str = ""

    def line(self, config: str | None) -> str:
        """Return the command that carries the advice out, from the file with the settings if there is one."""
        if config:
            return shlex.join(["tokenrl", self.command, "--config", config])
        return self.again or command_line(self.command, self.arguments)

    def show(self, config: str | None) -> None:
        """Print the facts, the findings, the settings, the warnings and the command."""
        console = rich_console()
        console.print(f"tokenrl advise: {self.subject}", style="bold", markup=False)
        found = [(f.weight, f.flag, f.text, shlex.join(flags(f.changes)) or "-") for f in self.findings]
        settings = [(setting.name, written(setting.value), setting.reason) for setting in self.settings]
        for columns, rows in (
            (("", ""), list(self.facts.items())),
            (("weight", "finding", "what it is", "change"), found),
            (("setting", "value", "reason"), settings),
        ):
            if rows:
                table = rich_table("", columns, header=any(columns), overflow="fold")
                for row in rows:
                    table.add_row(*row)
                console.print(table)
        for warning in self.warnings:
            console.print(f"warning: {warning}", style="yellow", markup=False)
        lead = "Run it again with" if self.again else "Run it"
        console.print(f"{lead}: {self.line(config)}", soft_wrap=True, markup=False)

    def write(self, config: str | None, json: str | None) -> None:
        """Write the arguments to `config`, as in config.json, and the whole advice to `json`.

        Raises:
            Stopped: a file could not be written.
        """
        if config is not None:
            write_json(Path(config), {"kind": self.command, **asdict(self.arguments)})
        if json is not None:
            record = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "again"}
            for name in ("settings", "findings"):
                record[name] = [entry._asdict() for entry in record[name]]
            write_json(Path(json), record | {"line": self.line(config)})


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


def bias_in_words(estimator: Estimator) -> str:
    """Return the bias of an estimator in words; an entropy bonus changes the objective, not the bias."""
    return replace(estimator, entropy_coef=0.0).bias_status.replace("_", " ")


def one_figure(number: float) -> float:
    """Round to one significant figure, where only the order of magnitude matters."""
    return float(f"{number:.0e}")


def written(value: Any) -> str:
    """Return a value as text: 'none' for None, short numbers, layers as 64 x 64."""
    if value is None or value == ():
        return "none"
    if isinstance(value, tuple):
        return " x ".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def command_line(command: str, arguments: Any) -> str:
    """Return the command for these arguments: the nearest preset, and a flag for each value that differs."""
    estimator: Estimator = arguments.estimator
    preset = min(PRESETS, key=lambda name: len(_differences(estimator, Estimator.preset(name))))
    # Resolved settings cannot be made without values, but their fields keep the arguments' defaults.
    defaults = {f.name: f.default for f in fields(arguments) if f.name != "estimator"}
    changes = {name: getattr(arguments, name) for name in defaults}
    changes = {name: value for name, value in changes.items() if value != defaults[name]}
    axes = _differences(estimator, Estimator.preset(preset))
    changes |= {f"estimator.{name}": value for name, value in axes.items()}
    return shlex.join(["tokenrl", command, "--estimator", preset, *flags(changes)])


def _differences(given: Estimator, default: Estimator) -> dict[str, Any]:
    values = {f.name: getattr(given, f.name) for f in fields(given)}
    return {name: value for name, value in values.items() if value != getattr(default, name)}


def flags(values: Mapping[str, Any]) -> list[str]:
    """Return the words of the command line for settings by name, such as `estimator.entropy_coef`."""
    words = []
    for name, value in values.items():
        path, _, last = name.rpartition(".")
        last = f"no-{last}" if value is False else last
        flag = "--" + ".".join(filter(None, (path, last))).replace("_", "-")
        if isinstance(value, bool):
            words.append(flag)
        elif str(value).startswith("-"):  # else the number would look like a flag
            words.append(f"{flag}={value}")
        else:
            words += [flag, *(map(str, value) if isinstance(value, tuple) else [str(value)])]
    return words
