"""Holds the settings of `tokenrl advise` and its advice, prints it, and gives the command that carries it out.

Imports no torch and no gymnasium.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from tokenrl.lab.exact.explanation import written
from tokenrl.runs.console import Console
from tokenrl.runs.output import rich_table
from tokenrl.runs.rules import Finding
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
    """Directory of a run of `tokenrl train` or `tokenrl control`, finished or not, to diagnose. On a command line
    it may stand first without its flag: tokenrl advise runs/a."""
    max_episode_steps: Count | None = None
    """Steps after which an episode is cut. Default: the environment's own limit."""
    episodes: Several = 50
    """Number of random episodes that are measured; fewer if they are long."""
    seed: Seed = 0
    """Seed of the measurement, and of the recommended training."""


@dataclass(frozen=True)
class Advice:
    """What is recommended, with its reasons and the measurements behind them.

    Attributes:
        subject: the environment, or the run that is diagnosed.
        line: the command line that carries the advice out, or repeats the run.
        measured: what was measured, in words by name.
        findings: what the table of rules says about it.
        reasons: the value of each recommended setting, with its reason, by its name, such as
            `estimator.baseline`; empty for a run.
    """

    subject: str
    line: str
    measured: Mapping[str, str]
    findings: Sequence[Finding]
    reasons: Mapping[str, tuple[Any, str]] = field(default_factory=dict)

    def show(self) -> None:
        """Print what was measured, the findings, the settings and the command."""
        console = Console()
        console.facts(f"tokenrl advise: {self.subject}", self.measured)
        for finding in self.findings:
            console.note(f"{LEVELS[finding.weight]}: {finding}")
        table = rich_table("", ("setting", "value", "reason"), overflow="fold")
        for name, (value, reason) in self.reasons.items():
            table.add_row(name, str(value), reason)
        if self.reasons:
            console.print(table)
        console.note(self.line)


def command_line(command: str, arguments: Any) -> str:
    """Return the command for these arguments: the nearest preset, and a flag for each value that differs."""
    changes = {"estimator": written(arguments.estimator)}
    for part in fields(arguments):
        value = getattr(arguments, part.name)
        if part.name != "estimator" and value != part.default:
            changes[part.name] = value
    words = ["tokenrl", command]
    for name, value in changes.items():
        words.append(f"--{name.replace('_', '-')}")
        if value is not True:
            words += map(str, value if isinstance(value, tuple) else [value])
    return shlex.join(words)
