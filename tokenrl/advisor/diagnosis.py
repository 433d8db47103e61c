"""Diagnoses a run from what it has recorded, and recommends what to change when it is run again."""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from tokenrl.advisor.findings import (
    clip_finding,
    critic_finding,
    destroyed_finding,
    entropy_finding,
    horizon_finding,
    kl_finding,
    signal_finding,
    skipped_finding,
    truncation_finding,
)
from tokenrl.advisor.gradient_noise import noise_finding
from tokenrl.advisor.history import History, read_run
from tokenrl.advisor.progress import progress_finding, read_progress
from tokenrl.advisor.rules import ACT, FINE, WATCH
from tokenrl.advisor.show import Advice, Finding, flags

CHECKS = (
    destroyed_finding,
    entropy_finding,
    noise_finding,
    signal_finding,
    truncation_finding,
    horizon_finding,
    critic_finding,
    clip_finding,
    kl_finding,
    skipped_finding,
)
"""What is looked at after the progress of the reward, in the order shown."""


def advise_run(path: str) -> Advice:
    """Diagnose a run of `tokenrl train` or `tokenrl control`, finished or not.

    Raises:
        Refused: there is no such run, its files are damaged, or it has made no step yet.
    """
    history = read_run(path)
    found = diagnose(history)
    changes = together(found)
    target = unused(history.path)
    words = [
        "tokenrl",
        history.kind,
        "--config",
        str(history.path / "config.json"),
        "--output-dir",
        str(target),
    ]
    return Advice(
        subject=str(history.path),
        command=history.kind,
        arguments=changed(history.arguments, changes | {"output_dir": str(target), "overwrite": False}),
        facts=facts(history, found),
        settings=[],
        measurements={"changes": changes, "running": history.running, "steps": history.step},
        findings=found,
        again=shlex.join([*words, *flags(changes)]),
    )


def diagnose(history: History) -> list[Finding]:
    """Return the findings: first the progress of the reward, then what may explain it."""
    progress = read_progress(history)
    causes = [finding for check in CHECKS if (finding := check(history, progress)) is not None]
    if progress.lost:  # the other numbers are those of a policy that is lost, and its settings may be right
        causes = [causes[0], *(finding._replace(changes={}) for finding in causes[1:])]
    explained = any(finding.verdict == ACT for finding in causes)
    return [progress_finding(history, progress, explained), *causes]


def together(findings: Iterable[Finding]) -> dict[str, Any]:
    """Collect the changes of all findings; of two for one setting, that of the first `act` finding counts."""
    out: dict[str, Any] = {}
    for finding in sorted(findings, key=lambda finding: finding.verdict != ACT):  # stable: act first
        for name, value in finding.changes.items():
            out.setdefault(name, value)
    return out


def changed(arguments: Any, changes: dict[str, Any]) -> Any:
    """Return the arguments with the changes made; a name such as `estimator.beta` is that of an axis."""
    axes = {n.removeprefix("estimator."): v for n, v in changes.items() if n.startswith("estimator.")}
    own = {name: value for name, value in changes.items() if not name.startswith("estimator.")}
    return replace(arguments, **own, estimator=replace(arguments.estimator, **axes))


def facts(history: History, findings: list[Finding]) -> dict[str, str]:
    """Return the facts that the advice shows."""
    counts = [(sum(f.verdict == verdict for f in findings), verdict) for verdict in (ACT, WATCH, FINE)]
    threshold = "no threshold" if history.threshold is None else f"{history.threshold:g}"
    solved = "" if history.threshold is None else f", {'' if history.solved else 'not '}reached"
    return {
        "run": history.title,
        "status": history.status,
        "solved at": threshold + solved,
        "verdicts": ", ".join(f"{count} {verdict}" for count, verdict in counts),
    }


def unused(run: Path) -> Path:
    """Return the name of a directory beside the run that does not exist yet: run-2, run-3 and so on."""
    number, place = 2, run.resolve() if run.name in ("", "..") else run
    while (found := place.with_name(f"{run.resolve().name}-{number}")).exists():
        number += 1
    return found
