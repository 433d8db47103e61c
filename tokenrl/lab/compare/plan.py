"""Defines the plan of a comparison, and keeps it in plan.json, which is written before anything runs."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any, Literal

from tokenrl.core.estimator import Estimator
from tokenrl.errors import Refused, read_file, refusing
from tokenrl.lab.compare.intervals import LEAST_PAIRS, detectable_difference
from tokenrl.runs.directory import acquire_lock
from tokenrl.runs.files import flat, write_json
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


@dataclass(frozen=True)
class Arm:
    """One of the ways of training that are compared.

    Attributes:
        label: what the user wrote, such as `grpo,scale=none`.
        settings: its own settings, as JSON holds them; `estimator` is among them.
        rates: its own learning rates, of which the best is compared; none if it has those of the problem.
    """

    label: str
    settings: dict[str, Any]
    rates: tuple[float, ...] = ()

    @property
    def estimator(self) -> Estimator:
        """The estimator of the arm."""
        return arguments(Estimator, self.settings["estimator"])


@dataclass(frozen=True)
class Problem:
    """What the arms are compared on: a task or environment with a model and a group size.

    The comparisons on one problem are one family: their verdicts share one level of significance.

    Attributes:
        label: name in tables, such as `sort_digits`; if there are several, `sort_digits, num_generations=4`.
        settings: the settings that all its runs share, as JSON holds them; `task` or `env` among them.
        rates: the learning rates of arms that have none of their own.
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
    rates: tuple[float, ...]
    budget: int
    unit: str
    per_step: int
    every: int
    margin: float | None = None
    reward_range: tuple[float, float] | None = None
    solved: float | None = None

    @property
    def evaluated_at(self) -> tuple[int, ...]:
        """Numbers of samples at which curves are read; the last is the budget.

        Arms whose steps have as many samples as `per_step` are evaluated there. The curves of other arms are
        interpolated.
        """
        step = self.every or self.budget
        return (*range(step, self.budget, step), self.budget)

    def rates_of(self, arm: Arm) -> tuple[float, ...]:
        """Return the learning rates that an arm tries, or the rate that it has."""
        return arm.rates or self.rates

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
        tuning_seeds: seeds on which an arm with several learning rates tries each of them.
        failure_below: the reward at the end below which a run counts as failed.
        all_pairs: whether all arms are compared with each other.
        command: the command line that repeats the comparison; empty if a Python program made it.
    """

    problems: tuple[Problem, ...]
    arms: tuple[Arm, ...]
    reference: str
    metric: str
    seeds: tuple[int, ...]
    tuning_seeds: tuple[int, ...]
    failure_below: float | None = None
    all_pairs: bool = False
    command: str = ""

    @property
    def margins(self) -> dict[str, float | None]:
        """The margins of equivalence by problem."""
        return {problem.label: problem.margin for problem in self.problems}

    def run(
        self, problem: Problem, arm: Arm, seed: int, rate: float, role: Role = "comparison"
    ) -> PlannedRun:
        """Plan one run. Its length and the steps between evaluations follow from the problem's samples."""
        settings = {
            **problem.settings,
            **arm.settings,
            "learning_rate": rate,
            "seed": seed,
            "keep_checkpoints": 1,
            "max_steps": problem.max_steps(arm),
        }
        if problem.every:
            every = round(problem.every / problem.samples_per_step(arm))
            settings["eval_every"] = max(1, every)
        folder = folder_of(arm.label)
        if role == "tuning":
            folder += f"-tuning-{rate:g}"
        path = f"runs/{folder_of(problem.label)}/{folder}/seed_{seed}"
        return PlannedRun(problem.label, arm.label, role, seed, path, settings)

    def tuning_runs(self) -> list[PlannedRun]:
        """Return the runs that choose learning rates: each rate of an arm with several, on each tuning seed."""
        runs = []
        for problem, arm in product(self.problems, self.arms):
            rates = problem.rates_of(arm)
            if len(rates) > 1:
                tried = product(self.tuning_seeds, rates)
                runs += [self.run(problem, arm, seed, rate, "tuning") for seed, rate in tried]
        return runs

    def runs(self, rates: Mapping[tuple[str, str], float]) -> list[PlannedRun]:
        """Return the runs of the comparison. Runs of a seed stand together, so that pairs are complete early.

        Args:
            rates: the best learning rate by problem and arm, where an arm has several.
        """
        runs = []
        for problem, seed, arm in product(self.problems, self.seeds, self.arms):
            rate = rates.get((problem.label, arm.label), problem.rates_of(arm)[0])
            runs.append(self.run(problem, arm, seed, rate))
        return runs

    def describe(self) -> dict[str, str]:
        """Describe, by heading, what is compared, at what cost, and how small a difference that can show."""
        facts = {
            "arms": ", ".join(f"{arm.label} ({_declared(self, arm)})" for arm in self.arms),
            "reference": self.reference,
            "metric": f"{self.metric}: {SCORES[self.metric]}",
        }
        for problem in self.problems:
            margin = "no margin, so that no arm is called as good as another (--margin sets one)"
            if problem.margin is not None:
                margin = f"margin {problem.margin:g}"
            facts[f"on {problem.label}"] = f"{problem.budget:,} {problem.unit}, {margin}"
            steps = [
                f"{arm.label}: {problem.max_steps(arm)} steps of {problem.samples_per_step(arm)}"
                for arm in self.arms
            ]
            facts[f"length on {problem.label}"] = "; ".join(steps)
        runs = self.runs({})
        tuning = self.tuning_runs()
        rates = sorted({run.learning_rate for run in [*runs, *tuning]})
        facts |= {
            "seeds": f"{self.seeds[0]} to {self.seeds[-1]}",
            "learning rate": ", ".join(f"{rate:g}" for rate in rates),
            "runs": f"{len(runs)}",
        }
        if tuning:
            seeds = f"{self.tuning_seeds[0]} to {self.tuning_seeds[-1]}"
            facts["learning rate"] += f"; of several an arm has the best on seeds {seeds}"
            facts["runs"] += f", and {len(tuning)} for the choice of learning rates"
        pairs = len(self.seeds)
        facts["can show"] = (
            f"{pairs} pairs are too few for a verdict; give {LEAST_PAIRS} seeds or more"
        )
        if pairs >= LEAST_PAIRS:
            count = len(self.arms)
            comparisons = math.comb(count, 2) if self.all_pairs else count - 1
            deviations = detectable_difference(pairs, 1.0, comparisons)
            facts["can show"] = (
                f"with a power of 80 % that a difference of {deviations:.2g} standard deviations of a paired "
                "difference is not 0; whether it counts depends on the margin"
            )
        return facts


def _declared(plan: Plan, arm: Arm) -> str:
    """Return the declared bias of an arm, off-policy where it samples from weights of earlier steps."""
    settings = plan.problems[0].settings | arm.settings
    if settings.get("sync_every", 1) > 1:
        return f"off-policy {arm.estimator.off_policy_status}"
    return arm.estimator.bias_status


def folder_of(label: str) -> str:
    """Return the folder of a problem or of an arm, for the paths of its runs."""
    return re.sub(r"[^a-z0-9_.=-]+", "-", label, flags=re.IGNORECASE).strip("-.")[:150]


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


def check_plan(plan: Plan, output_dir: Path) -> None:
    """Check that a directory may hold a comparison: it is empty, or holds this comparison already.

    A comparison is continued with the plan that it was started with. Who sees results before choosing what to
    compare, or when to stop, finds differences by chance more often than the level says.

    Raises:
        Refused: the directory holds another comparison, or files and no comparison.
    """
    names = os.listdir(output_dir) if os.path.isdir(output_dir) else []
    if "plan.json" not in names:
        if set(names) - {".lock"}:
            raise Refused(
                f"{output_dir} holds files, but no comparison. Give an empty --output-dir."
            )
        return
    earlier = _facts(read_plan(output_dir))
    facts = _facts(plan)
    changes = [
        f"{name} is {earlier.get(name)} there and {facts.get(name)} here"
        for name in earlier | facts
        if earlier.get(name) != facts.get(name)
    ]
    if changes:
        raise Refused(
            f"{output_dir} holds another comparison: {'; '.join(changes)[:900]}. Give the arguments that it was "
            "started with (plan.json has its command), or another --output-dir."
        )


def _facts(plan: Plan) -> dict[str, Any]:
    """Return what a plan says by names such as `arms.rloo.settings.max_grad_norm`, without its command."""
    parts = asdict(plan)
    del parts["command"]
    for name in ("problems", "arms"):
        parts[name] = {part["label"]: part for part in parts[name]}
    return flat(parts)


def start_plan(plan: Plan, output_dir: Path) -> Any:
    """Make and lock the directory of a comparison, write plan.json into it, and return the lock.

    Raises:
        Refused: the directory holds another comparison, or files and no comparison; another process has
            locked it; or it cannot be made.
    """
    check_plan(plan, output_dir)
    busy = f"Another process works on the comparison in {str(output_dir)!r}. Wait, or give another directory."
    with refusing(f"output_dir {str(output_dir)!r} cannot be used", "Give another."):
        output_dir.mkdir(parents=True, exist_ok=True)
        lock = acquire_lock(output_dir, busy)
        write_json(output_dir / "plan.json", {"plan": asdict(plan), "in words": plan.describe()})
    return lock
