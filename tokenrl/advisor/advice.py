"""Holds the settings of `tokenrl advise` and its advice, prints it, and gives the command that carries it out.

Imports no torch and no gymnasium.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from tokenrl.core.axes import Baseline
from tokenrl.core.estimator import Estimator
from tokenrl.core.presets import PRESETS
from tokenrl.runs.findings import Finding
from tokenrl.runs.output import rich_console, rich_table
from tokenrl.settings import Count, Seed, Settings, Several

LEVELS = {"void": "grave problem", "act": "problem", "watch": "remark"}
"""The weights of findings in words, the gravest first."""


@dataclass(frozen=True)
class AdviseArguments(Settings):
    """Recommend settings for an environment, or diagnose a run, with reasons."""

    env: str = ""
    """Id of a gymnasium environment, or gridworld, trap, walk, costly_walk, bandit.
    For your own environment, name the file or module that registers it: my_envs.py:Mine-v0."""
    run: str = ""
    """Directory of a run of `tokenrl train` or `tokenrl control`, finished or not, to diagnose."""
    head: Literal["auto", "softmax", "gaussian"] = "auto"
    """Distribution of an agent's actions; auto chooses by the action space."""
    baseline: Baseline | None = None
    """Baseline to use. Default: the one recommended."""
    max_episode_steps: Count | None = None
    """Steps after which an episode is cut. Default: the environment's own limit."""
    allow_no_baseline: bool = False
    """Allow training without a baseline where episodes may be longer than 500 steps."""
    episodes: Several = 50
    """Number of random episodes that are measured; fewer if they are long."""
    seed: Seed = 0
    """Seed of the measurement, and of the recommended training."""
    config: str | None = None
    """Write the settings to this file, for --config of `tokenrl control`."""
    json: str | None = None
    """Write settings, reasons and measurements to this file, as JSON."""


@dataclass(frozen=True)
class Advice:
    """Settings for a run, with their reasons and the measurements behind them.

    Attributes:
        subject: the environment, or the run that is diagnosed.
        command: the command that trains, `control` or `train`.
        arguments: the arguments of that command, as its dataclass.
        line: the command line that carries the advice out; empty if there is nothing to change.
        measured: what was measured, by name.
        findings: what the table of rules says about it; their changes are those that `line` makes.
        settings: `name`, such as `estimator.baseline`, `value` and `reason` of each recommended setting; none
            in a diagnosis, where they are the changes of findings.
        unchanged: why there is nothing to change, where `line` is empty.
    """

    subject: str
    command: str
    arguments: Any
    line: str
    measured: Mapping[str, Any]
    findings: Sequence[Finding] = ()
    settings: Sequence[Mapping[str, Any]] = ()
    unchanged: str = ""

    def show(self) -> None:
        """Print what was measured, the findings, the settings and the command."""
        console = rich_console()
        console.print(f"tokenrl advise: {self.subject}", style="bold")
        findings = []
        for finding in self.findings:
            change = shlex.join(flags(finding.changes))
            findings.append((LEVELS[finding.weight], finding.flag, finding.text, change))
        tables: dict[tuple[str, ...], Iterable[Iterable[Any]]] = {
            ("measured", ""): self.measured.items(),
            ("kind", "finding", "what it is", "change"): findings,
            ("setting", "value", "reason"): [setting.values() for setting in self.settings],
        }
        for header, rows in tables.items():
            table = rich_table("", header, overflow="fold")
            for row in rows:
                table.add_row(*map(written, row))
            if table.rows:
                console.print(table)
        console.print(f"Run it: {self.line}" if self.line else self.unchanged, soft_wrap=True)


def merge(findings: Iterable[Finding]) -> dict[str, Any]:
    """Return the changes of all findings; of two changes of one setting, the gravest finding's counts.

    A grave finding may explain those of lower precedence, whose changes are then left out: all else may be
    the consequence of a destroyed policy, and a higher rate for a flat reward is advised if nothing else is
    wrong.
    """
    findings = sorted(findings, key=lambda finding: list(LEVELS).index(finding.weight))
    grave = [finding.precedence for finding in findings if finding.weight != "watch"]
    changes: dict[str, Any] = {}
    for finding in findings:
        if finding.precedence >= max(grave, default=0):
            changes = {**finding.changes, **changes}
    return changes


def settings_of(arguments: Any) -> dict[str, Any]:
    """Return the settings by name, with the axes of the estimator as `estimator.baseline` and so on."""
    axes = {f"estimator.{name}": value for name, value in vars(arguments.estimator).items()}
    return vars(arguments) | axes


def advised(findings: Iterable[Finding], arguments: Any) -> list[Finding]:
    """Return the findings, with changes only where the arguments that are advised have all of them."""
    settings = settings_of(arguments).items()
    return [f if dict(f.changes).items() <= settings else replace(f, changes={}) for f in findings]


def with_changes(arguments: Any, changes: Mapping[str, Any]) -> Any:
    """Return arguments with changes by name, such as `seed` or `estimator.baseline`."""
    axes = {}
    settings = {}
    for name, value in changes.items():
        if name.startswith("estimator."):
            axes[name.removeprefix("estimator.")] = value
        else:
            settings[name] = value
    return replace(arguments, **settings, estimator=replace(arguments.estimator, **axes))


def written(value: Any) -> str:
    """Return a value as text: short numbers, and layers as 64 x 64."""
    if value is None or value == ():
        return "none"
    if isinstance(value, tuple):
        return " x ".join(map(str, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def command_line(command: str, arguments: Any) -> str:
    """Return the command for these arguments: the nearest preset, and a flag for each value that differs."""
    changes = {}
    for field in fields(arguments):
        value = getattr(arguments, field.name)
        if field.name != "estimator" and value != field.default:
            changes[field.name] = value
    axes = {preset: _other_axes(arguments.estimator, preset) for preset in PRESETS}
    nearest = min(axes, key=lambda preset: len(axes[preset]))
    words = flags(changes | axes[nearest])
    return shlex.join(["tokenrl", command, "--estimator", nearest, *words])


def _other_axes(estimator: Estimator, preset: str) -> dict[str, Any]:
    """Return the axes in which an estimator differs from a preset, as `estimator.baseline` and so on."""
    axes = vars(Estimator.preset(preset))
    return {f"estimator.{n}": x for n, x in vars(estimator).items() if x != axes[n]}


def flags(values: Mapping[str, Any]) -> list[str]:
    """Return the words of the command line for settings by name, such as `estimator.entropy_coef`."""
    words = []
    for name, value in values.items():
        *owner, last = name.replace("_", "-").split(".")
        flag = "--" + ".".join([*owner, f"no-{last}" if value is False else last])
        if isinstance(value, bool):
            words.append(flag)
        elif str(value).startswith("-"):  # else the number would look like a flag
            words.append(f"{flag}={value}")
        else:
            words += [flag, *map(str, value if isinstance(value, tuple) else [value])]
    return words
