"""Defines the result of a comparison."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tokenrl.lab.compare.noise import GradientNoise
from tokenrl.lab.compare.records import Plan, RunRecord, runs_of_arm
from tokenrl.lab.compare.statistics.found import Judgement
from tokenrl.lab.compare.statistics.overall import Overall
from tokenrl.lab.compare.statistics.survival import ToThreshold
from tokenrl.lab.compare.tuning import Sensitivity


@dataclass(frozen=True)
class Comparison:
    """What a comparison found; its directory holds the same in files.

    Attributes:
        output_dir: the directory.
        plan: what was planned before anything was run.
        records: what was read from each run, of all roles.
        judgement: paired differences and verdicts in the metric of the plan.
        beside: the same in other metrics, by name, which decide nothing.
        findings: by problem, sentences about what the numbers do and do not say.
        to_threshold: by problem, samples and seconds of each arm to a threshold.
        rates: the learning rate of each arm, by problem and arm.
        sensitivity: by problem and arm, the scores by learning rate on the tuning seeds; empty unless tuned.
        noise: noise and bias of the gradient by problem, checkpoint and arm; empty if not measured.
        overall: all problems together; None for a single one, or if their rewards have no declared range.
        versions: versions of the packages.
        wall_seconds: seconds that the command took; a continued one counts its last part only.
        exit_code: 0, or 1 if a run of the comparison failed.
    """

    output_dir: Path
    plan: Plan
    records: tuple[RunRecord, ...]
    judgement: Judgement
    beside: dict[str, Judgement]
    findings: dict[str, tuple[str, ...]]
    to_threshold: dict[str, tuple[ToThreshold, ...]]
    rates: dict[tuple[str, str], float]
    sensitivity: Sensitivity
    noise: tuple[GradientNoise, ...]
    overall: Overall | None
    versions: dict[str, str]
    wall_seconds: float

    def runs(self, problem: str, arm: str) -> list[RunRecord]:
        """Return the records of an arm's runs on a problem, without those of the tuning, by seed."""
        return runs_of_arm(self.records, problem, arm)

    @property
    def exit_code(self) -> int:
        """0, or 1 if a run of the comparison failed; failures on tuning seeds only make a rate a bad one."""
        return int(any(r.state != "finished" and r.run.role != "tuning" for r in self.records))
