"""Holds the settings of `tokenrl advise` and its advice, prints it, and gives the command that carries it out.

Imports no torch and no gymnasium.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from tokenrl.core.axes import Baseline
from tokenrl.lab.exact.explanation import written
from tokenrl.runs.files import flat
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
    """Write the settings for an environment to this file, for --config of `tokenrl control`."""
    json: str | None = None
    """Write settings, reasons and measurements to this file, as JSON."""


@dataclass(frozen=True)
class Advice:
    """What is recommended, with its reasons and the measurements behind them.

    Attributes:
        subject: the environment, or the run that is diagnosed.
        command: the command that trains, `control` or `train`.
        line: the command line that carries the advice out; or why there is nothing to change.
        measured: what was measured, by name.
        findings: what the table of rules says about it.
        arguments: the recommended arguments of the command, as its dataclass; None for a run.
        reasons: the reason of each recommended setting by its name, such as `estimator.baseline`.
    """

    subject: str
    command: str
    line: str
    measured: Mapping[str, Any]
    findings: Sequence[Finding]
    arguments: Any = None
    reasons: Mapping[str, str] = field(default_factory=dict)

    def show(self) -> None:
        """Print what was measured, the findings, the settings and the command."""
        console = rich_console()
        console.print(f"tokenrl advise: {self.subject}", style="bold")
        settings = flat(vars(self.arguments)) if self.reasons else {}
        tables: dict[tuple[str, ...], Iterable[Iterable[Any]]] = {
            ("measured", ""): self.measured.items(),
            ("kind", "finding", "what it is"): [
                (LEVELS[finding.weight], finding.flag, finding.text) for finding in self.findings
            ],
            ("setting", "value", "reason"): [
                (name, settings[name], reason) for name, reason in self.reasons.items()
            ],
        }
        for header, rows in tables.items():
            table = rich_table("", header, overflow="fold")
            for row in rows:
                table.add_row(*(f"{x:.4g}" if isinstance(x, float) else str(x) for x in row))
            if table.rows:
                console.print(table)
        console.print(self.line, soft_wrap=True)


def command_line(command: str, arguments: Any) -> str:
    """Return the command for these arguments: the nearest preset, and a flag for each value that differs."""
    changes = {"estimator": written(arguments.estimator)}
    for part in fields(arguments):
        value = getattr(arguments, part.name)
        if part.name != "estimator" and value != part.default:
            changes[part.name] = value
    return shlex.join(["tokenrl", command, *flags(changes)])


def flags(values: Mapping[str, Any]) -> list[str]:
    """Return the words of the command line for settings by name, such as `estimator.entropy_coef`."""
    words = []
    for name, value in values.items():
        words.append(f"--{name.replace('_', '-')}")
        if value is not True:
            words += map(str, value if isinstance(value, tuple) else [value])
    return words
