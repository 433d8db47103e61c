"""Defines the plan of a comparison, and keeps it in plan.json, which is written before anything runs."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from tokenrl.core.estimator import Estimator
from tokenrl.errors import Refused, read_file
from tokenrl.lab.compare.intervals import LEAST_PAIRS, detectable_difference
from tokenrl.runs.directory import acquire_lock
from tokenrl.runs.files import write_json
from tokenrl.settings import arguments

Kind = Literal["train", "control"]
Role = Literal["comparison", "tuning"]
"""What a run is for: the comparison, or the choice of an arm's learning rate."""
SCORES = {
    "area": "mean held-out sampled reward over the evaluations of the budget",
    "reward": "held-out sampled reward at the end",
    "area_greedy": "mean held-out greedy reward over the evaluations of the budget",
    "reward_greedy": "held-out greedy reward at the end",
}
"""The scores of a run in words; in control the rewards are returns of episodes."""
DECLARATION = (
    "below a function f in its file, f.range = (0, 1), or f.binary = True if it is always 0 or 1"
)
COMPUTATION = ("threads", "mixed_precision", "training_attention")
"""Settings that say how a run computes; a comparison sets them unless the user does."""


@dataclass(frozen=True)
class Arm:
    """One of the ways of training that are compared.

    Attributes:
        label: what the user wrote, such as `grpo,scale=none`.
        settings: its own settings, as JSON holds them; `estimator` is among them.
    """

    label: str
    settings: dict[str, Any]

    @property
    def estimator(self) -> Estimator:
        """The estimator of the arm."""
        return arguments(Estimator, self.settings["estimator"])


@dataclass(frozen=True)
class Problem:
    """What the arms are compared on: a task or environment with a model, a group size and a learning rate.

    The comparisons on one problem are one family: their verdicts share one level of significance.

    Attributes:
        label: name in tables, such as `sort_digits`; if there are several, `sort_digits, num_generations=4`.
        settings: the settings that all its runs share, as JSON holds them; `task` or `env` among them.
        budget: number of samples at which all runs are compared.
        unit: what a sample is: `completions`, or in control `episodes` (or `environment steps`).
        per_step: samples of a training step without greedy completions or refills.
        every: samples between two evaluations; 0 for a single one at the end.
        margin: smaller differences count as none; None where equivalence is not judged.
        reward_range: the least and the largest reward, if the reward declares them.
        solved: the reward from which the task counts as solved; None if it names none.
    """

    label: str
    settings: dict[str, Any]
    budget: int
    unit: str
    per_step: int
    every: int
    margin: float | None = None
    reward_range: tuple[float, float] | None = None
    solved: float | None = None

    @property
    def margin_in_words(self) -> str:
        """The margin, and what it costs to have none."""
        if self.margin is not None:
            return f"margin {self.margin:g}"
        sentence = "no margin: a difference can be found, but no arm is called as good as another. Give --margin"
        if self.unit == "completions":
            sentence += f", or declare the range of each reward: {DECLARATION}"
        return sentence

    @property
    def evaluated_at(self) -> tuple[int, ...]:
        """Numbers of samples at which curves are read; the last is the budget.

        Arms whose steps have as many samples as `per_step` are evaluated there. The curves of other arms are
        interpolated.
        """
        step = self.every or self.budget
        return (*range(step, self.budget, step), self.budget)

    def samples_per_step(self, arm: Arm) -> int:
        """Return the samples of a training step of an arm, without the refills of DAPO.

        An estimator with a greedy baseline generates one more completion for each prompt.
        """
        if self.unit != "completions":
            return self.per_step
        settings = {**self.settings, **arm.settings}
        per_prompt = settings["num_generations"] + ("greedy_rewards" in arm.estimator.needs)
        return int(settings["prompts_per_step"] * per_prompt)

    def max_steps(self, arm: Arm) -> int:
        """Return the steps in which an arm without refills generates the samples of the budget."""
        return math.ceil(self.budget / self.samples_per_step(arm))

    def length_in_words(self, arm: Arm) -> str:
        """The number of steps of an arm and their samples; runs with refills are read at the budget."""
        length = f"{arm.label}: {self.max_steps(arm)} steps of {self.samples_per_step(arm)}"
        if arm.estimator.zero_spread == "refill":
            length += f" and refills, read at {self.budget:,} {self.unit}"
        return length


@dataclass(frozen=True)
class PlannedRun:
    """One run of a comparison: an ordinary run directory.

    Attributes:
        problem: label of the problem.
        arm: label of the arm.
        role: what it is for.
        seed: its seed.
        path: its directory, relative to the directory of the comparison.
        settings: all its settings, without the directory.
    """

    problem: str
    arm: str
    role: Role
    seed: int
    path: str
    settings: dict[str, Any]

    @property
    def kind(self) -> Kind:
        """The command that makes the run."""
        return "control" if "env" in self.settings else "train"

    @property
    def learning_rate(self) -> float:
        """The learning rate of the run."""
        return float(self.settings["learning_rate"])


@dataclass(frozen=True)
class Plan:
    """A comparison as it was planned, before anything was run.

    Attributes:
        problems: what the arms are compared on.
        arms: the arms, in the order in which they were given.
        reference: label of the arm that the others are compared with.
        metric: name of the score that decides.
        seeds: seeds of the comparison.
        tuning_seeds: seeds on which learning rates are chosen; none unless they are tuned.
        failure_below: the reward at the end below which a run counts as failed.
        all_pairs: whether all arms are compared with each other.
        changes: sentences about changes after results were known, which make the comparison exploratory.
        command: the command line that repeats the comparison; empty if a Python program made it.
    """

    problems: tuple[Problem, ...]
    arms: tuple[Arm, ...]
    reference: str
    metric: str
    seeds: tuple[int, ...]
    tuning_seeds: tuple[int, ...] = ()
    failure_below: float | None = None
    all_pairs: bool = False
    changes: tuple[str, ...] = ()
    command: str = ""

    @property
    def labels(self) -> tuple[str, ...]:
        """The labels of the arms."""
        return tuple(arm.label for arm in self.arms)

    @property
    def margins(self) -> dict[str, float | None]:
        """The margins of equivalence by problem."""
        return {problem.label: problem.margin for problem in self.problems}

    @property
    def comparisons(self) -> int:
        """Number of comparisons on each problem."""
        count = len(self.arms)
        return math.comb(count, 2) if self.all_pairs else count - 1

    def run(
        self,
        problem: Problem,
        arm: Arm,
        seed: int,
        role: Role = "comparison",
        rate: float | None = None,
    ) -> PlannedRun:
        """Plan one run; its learning rate is `rate`, else the rate of the arm, else of the problem.

        Its length and the steps between evaluations follow from the problem's samples and the arm's cost.
        """
        settings = {
            **problem.settings,
            **arm.settings,
            "seed": seed,
            "keep_checkpoints": 1,
            "max_steps": problem.max_steps(arm),
        }
        if problem.every:
            every = round(problem.every / problem.samples_per_step(arm))
            settings["eval_every"] = max(1, every)
        if rate:
            settings["learning_rate"] = rate
        folder = _folders(self.labels)[arm.label]
        if role == "tuning":
            folder += f"-tuning-{settings['learning_rate']:g}"
        path = f"runs/{_folders(self.margins)[problem.label]}/{folder}/seed_{seed}"
        return PlannedRun(problem.label, arm.label, role, seed, path, settings)

    def runs(self, rates: Mapping[tuple[str, str], float] | None = None) -> list[PlannedRun]:
        """Return the runs of the comparison. Runs of a seed stand together, so that pairs are complete early.

        Args:
            rates: learning rates by problem and arm, where they have been tuned.
        """
        rates = rates or {}
        return [
            self.run(problem, arm, seed, rate=rates.get((problem.label, arm.label)))
            for problem in self.problems
            for seed in self.seeds
            for arm in self.arms
        ]

    def _declared(self, arm: Arm) -> str:
        """Return the declared bias of an arm, off-policy where it samples from weights of earlier steps."""
        settings = self.problems[0].settings | arm.settings
        if settings.get("sync_every", 1) > 1:
            return f"off-policy {arm.estimator.off_policy_status}"
        return arm.estimator.bias_status

    def describe(self) -> dict[str, str]:
        """Describe, by heading, what is compared, at what cost, and how small a difference that can show."""
        runs = self.runs()
        pairs = len(self.seeds)
        seeds = f"{self.seeds[0]} to {self.seeds[-1]}"
        rates = ", ".join(f"{rate:g}" for rate in sorted({run.learning_rate for run in runs}))
        if self.tuning_seeds:
            seeds += f"; {self.tuning_seeds[0]} to {self.tuning_seeds[-1]} for tuning"
            rates = "for each arm the best of a grid, in ten runs or more"
        facts = {
            "arms": ", ".join(f"{arm.label} ({self._declared(arm)})" for arm in self.arms),
            "reference": self.reference,
            "metric": f"{self.metric}: {SCORES[self.metric]}",
        }
        for problem in self.problems:
            budget = f"{problem.budget:,} {problem.unit}"
            facts[f"on {problem.label}"] = f"{budget}, {problem.margin_in_words}"
            facts[f"length on {problem.label}"] = "; ".join(map(problem.length_in_words, self.arms))
        power = f"{pairs} pairs are too few for a verdict; give {LEAST_PAIRS} seeds or more"
        if pairs >= LEAST_PAIRS:
            deviations = detectable_difference(pairs, 1.0, self.comparisons)
            power = (
                f"with a power of 80 % that a difference of {deviations:.2g} standard deviations of a paired "
                "difference is not 0; whether it counts depends on the margin"
            )
        below = ""
        if self.failure_below is not None:
            below = f", or end below a reward of {self.failure_below:g}"
        settings = self.problems[0].settings
        computation = [f"{name} {settings[name]}" for name in COMPUTATION if name in settings]
        return facts | {
            "seeds": seeds,
            "learning rate": rates,
            "runs": str(len(runs)),
            "computation": f"{', '.join(computation)} in each run, whatever runs beside it",
            "failures": f"runs that break off or have no score{below}",
            "can show": power,
        }


def _folders(labels: Iterable[str]) -> dict[str, str]:
    """Return a folder for each label; one that an earlier label has gets a plus sign, which no label leaves."""
    folders: dict[str, str] = {}
    for label in labels:
        folder = re.sub(r"[^a-z0-9_.=-]+", "-", label, flags=re.IGNORECASE).strip("-.")[:80]
        earlier = ["", *map(str.lower, folders.values())]
        while folder.lower() in earlier:
            folder += "+"
        folders[label] = folder
    return folders


def write_plan(plan: Plan, output_dir: Path) -> None:
    """Write plan.json: the plan, and its description in words."""
    output_dir.mkdir(parents=True, exist_ok=True)
    write_json(output_dir / "plan.json", {"plan": asdict(plan), "in words": plan.describe()})


def read_plan(output_dir: Path) -> Plan:
    """Read the plan of a comparison from plan.json.

    Raises:
        Refused: the file cannot be read, or was not written by this version.
    """
    path = output_dir / "plan.json"
    try:
        return arguments(Plan, json.loads(read_file(path))["plan"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise Refused(
            f"{path} cannot be read ({error}). Remove it, or give another --output-dir."
        ) from error


def lock_plan(output_dir: Path) -> Any:
    """Make the directory of a comparison and lock it, so that no other process changes its plan or its runs.

    Raises:
        Refused: the directory holds files, but no comparison; another process has locked it; or it cannot be
            made.
    """
    read_earlier_plan(output_dir)
    busy = f"Another process works on the comparison in {str(output_dir)!r}. Wait, or give another directory."
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        return acquire_lock(output_dir, busy)
    except OSError as error:
        raise Refused(
            f"output_dir {str(output_dir)!r} cannot be used ({error}); give another."
        ) from error


def read_earlier_plan(output_dir: Path) -> Plan | None:
    """Return the plan of the comparison that a directory holds; None if it holds nothing.

    Raises:
        Refused: it holds something else.
    """
    names = os.listdir(output_dir) if os.path.isdir(output_dir) else []
    if "plan.json" in names:
        return read_plan(output_dir)
    if set(names) - {".lock"}:
        raise Refused(f"{output_dir} holds files, but no comparison. Give an empty --output-dir.")
    return None
