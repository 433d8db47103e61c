"""Holds the advice, lays it out as a page, and writes it to files."""

from __future__ import annotations

import shlex
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

from tokenrl.advisor.page import Page, Sheet, write_markdown
from tokenrl.core.baselines import check_horizon
from tokenrl.core.estimator import Estimator
from tokenrl.core.presets import PRESETS
from tokenrl.errors import Refused
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


class Finding(NamedTuple):
    """One thing that the metrics of a run show.

    Attributes:
        topic: what was looked at, such as `entropy`.
        verdict: `fine`, `watch` or `act`.
        text: the number, and what it means.
        value: the number itself; None if there is none.
        steps: the first and the last step that the number is from.
        changes: the settings to change, by name.
    """

    topic: str
    verdict: str
    text: str
    value: float | None
    steps: tuple[int, int]
    changes: dict[str, Any]


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
        heads: the policy heads; empty for a language model, which has its own.
        warnings: what may go wrong.
        findings: what the metrics of a run show; only in a diagnosis.
        again: the command that repeats the run with the changes advised; only in a diagnosis.
    """

    subject: str
    command: str
    arguments: Any
    facts: dict[str, str]
    settings: list[Setting]
    measurements: dict[str, Any]
    heads: list[Head] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    again: str = ""

    def page(self, config: str | None) -> Page:
        """Lay the advice out; `config` is the file with the settings that the command reads, if any."""
        heads = [(h.name, "-" if h.parameters is None else f"{h.parameters:,}", h.reason) for h in self.heads]
        settings = [(setting.name, written(setting.value), setting.reason) for setting in self.settings]
        sheets = [
            Sheet("Facts", ("", ""), list(self.facts.items())),
            Sheet(
                "Findings", ("topic", "verdict", "finding", "steps", "change"), list(map(_row, self.findings))
            ),
            Sheet("Policy heads", ("head", "parameters", "reason"), heads),
            Sheet("Settings", ("setting", "value", "reason"), settings),
        ]
        line = f"tokenrl {self.command} --config {shlex.quote(config)}" if config else self.again
        lead = "Run it again with" if self.findings else "Run it"
        return Page(
            f"tokenrl advise: {self.subject}", sheets, lead, line or command_line(self), self.warnings
        )


def _row(finding: Finding) -> tuple[str, ...]:
    first, last = finding.steps
    steps = str(last) if first == last else f"{first} to {last}"
    return (finding.topic, finding.verdict, finding.text, steps, shlex.join(flags(finding.changes)) or "-")


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


def written(value: Any) -> str:
    """Return a value as text: 'none' for None, short numbers, layers as 64 x 64."""
    if value is None or value == ():
        return "none"
    if isinstance(value, tuple):
        return " x ".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def write_advice(advice: Advice, page: Page, *, config: str | None, json: str | None, md: str | None) -> None:
    """Write the arguments to `config`, as in config.json, the whole advice to `json`, and the page to `md`.

    Raises:
        Stopped: a file could not be written.
    """
    if config is not None:
        write_json(Path(config), {"kind": advice.command, **asdict(advice.arguments)})
    if json is not None:
        kept = ("subject", "command", "arguments", "facts", "measurements", "warnings")
        record = {name: getattr(advice, name) for name in kept} | {"line": page.command}
        for name in ("settings", "heads", "findings"):
            record[name] = [entry._asdict() for entry in getattr(advice, name)]
        write_json(Path(json), record)
    if md is not None:
        write_markdown(page, Path(md))


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
    words += flags({name: value for name, value in given.items() if value != defaults[name]})
    words += flags(
        {f"estimator.{n}": v for n, v in _differences(estimator, Estimator.preset(preset)).items()}
    )
    return shlex.join(words)


def _differences(given: Estimator, default: Estimator) -> dict[str, Any]:
    values = {f.name: getattr(given, f.name) for f in fields(given)}
    return {name: value for name, value in values.items() if value != getattr(default, name)}


def flags(values: dict[str, Any]) -> list[str]:
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
