"""Defines the plan of a comparison, and keeps it in plan.json, which is written before anything runs."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, Literal

from tokenrl.core.estimator import Estimator
from tokenrl.errors import Refused, read_file, refusing
from tokenrl.files import flat, write_json
from tokenrl.lab.compare.intervals import LEAST_PAIRS, detectable_difference
from tokenrl.lab.compare.looks import looked_twice
from tokenrl.language import TrainArguments
from tokenrl.runs import acquire_lock
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
CONTROLS = {
    "random": "a control: the rewards of each step change places at random",
    "best_of_n": "a control without training: it samples held-out prompts as often as the other arms sample prompts; "
    "its score is the best reward that each has got",
}
"""The arms that are there by name, values of the setting `control_arm`, in words."""


@dataclass(frozen=True)
class Arm:
    """One of the ways of training that are compared.

    Attributes:
        label: what the user wrote, such as `grpo,scale=none`.
        settings: the settings of its runs, as JSON holds them, but for seed and learning rate; `estimator` is
            among them.
        rates: its learning rates. Of several the one that is best on the tuning seeds is compared.
    """

    label: str
    settings: dict[str, Any]
    rates: tuple[float, ...] = ()

    @property
    def estimator(self) -> Estimator:
        """The estimator of the arm."""
        return arguments(Estimator, self.settings["estimator"])

    @property
    def control(self) -> str:
        """In words what it controls for; empty for other arms."""
        return CONTROLS.get(self.settings.get("control_arm", ""), "")

    @property
    def declared(self) -> str:
        """Its name, and its control or the declared bias of its runs."""
        declares: Any = self.estimator
        if "task" in self.settings:
            declares = arguments(TrainArguments, self.settings)
        status = self.control or declares.bias_status
        return f"{self.label} ({status})"


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


@dataclass(frozen=True)
class Plan:
    """A comparison on one problem as it was planned, before anything was run.

    Attributes:
        problem: the name of the task or environment.
        arms: the arms, in the order in which they were given.
        reference: label of the arm that the others are compared with.
        metric: name of the score that decides.
        seeds: seeds of the comparison.
        looks: the numbers of seeds after which the arms are judged; the last is that of all seeds.
        tuning_seeds: seeds on which an arm with several learning rates tries each of them.
        budget: number of samples at which all runs are compared.
        unit: what a sample is: `completions`, or in control `episodes` (or `environment steps`).
        every: samples between two evaluations; 0 for a single one at the end.
        margin: smaller differences count as none; None where equivalence is not judged.
        solved: the reward from which the task counts as solved; None if it names none.
        ceiling: the reward from which little is left to gain; None if it is unknown.
        failure_below: the reward at the end below which a run counts as failed.
        all_pairs: whether all arms are compared with each other.
        command: the command line that repeats the comparison; empty if a Python program made it.
    """

    problem: str
    arms: tuple[Arm, ...]
    reference: str
    metric: str
    seeds: tuple[int, ...]
    looks: tuple[int, ...]
    tuning_seeds: tuple[int, ...]
    budget: int
    unit: str
    every: int
    margin: float | None = None
    solved: float | None = None
    ceiling: float | None = None
    failure_below: float | None = None
    all_pairs: bool = False
    command: str = ""

    def run(self, arm: Arm, seed: int, rate: float, role: Role = "comparison") -> PlannedRun:
        """Plan one run."""
        folder = folder_of(arm.label)
        if role == "tuning":
            folder += f"-tuning-{rate:g}"
        path = f"runs/{folder_of(self.problem)}/{folder}/seed_{seed}"
        settings = {**arm.settings, "learning_rate": rate, "seed": seed}
        return PlannedRun(self.problem, arm.label, role, seed, path, settings)

    def tuning_runs(self) -> list[PlannedRun]:
        """Return the runs that choose learning rates: each rate of an arm with several, on each tuning seed."""
        tuned = [arm for arm in self.arms if len(arm.rates) > 1]
        return [
            self.run(arm, seed, rate, "tuning")
            for arm in tuned
            for seed, rate in product(self.tuning_seeds, arm.rates)
        ]

    def runs(self, rates: Mapping[str, float]) -> list[PlannedRun]:
        """Return the runs of the comparison. Runs of a seed stand together, so that pairs are complete early.

        Args:
            rates: the best learning rate by arm, where an arm has several.
        """
        return [
            self.run(arm, seed, rates.get(arm.label, arm.rates[0]))
            for seed, arm in product(self.seeds, self.arms)
        ]

    def describe(self) -> dict[str, str]:
        """Describe, by heading, what is compared, at what cost, and how small a difference that can show."""
        margin = "no margin, so that no arm is called as good as another (--margin sets one)"
        if self.margin is not None:
            margin = f"margin {self.margin:g}"
        tuning = self.tuning_runs()
        earlier = ", ".join(map(str, self.looks[:-1]))
        looks = (
            f"; arms that are decided after {earlier} of them make no more runs" if earlier else ""
        )
        rates = sorted({rate for arm in self.arms for rate in arm.rates})
        facts = {
            "arms": ", ".join(arm.declared for arm in self.arms),
            "reference": self.reference,
            "metric": f"{self.metric}: {SCORES[self.metric]}",
            f"on {self.problem}": f"{self.budget:,} {self.unit}, {margin}",
            "steps": "; ".join(f"{arm.label}: {arm.settings['max_steps']}" for arm in self.arms),
            "seeds": f"{self.seeds[0]} to {self.seeds[-1]}{looks}",
            "learning rate": ", ".join(f"{rate:g}" for rate in rates),
            "runs": f"{'at most ' if earlier else ''}{len(self.seeds) * len(self.arms)}",
            "can show": f"{len(self.seeds)} pairs are too few for a verdict; give {LEAST_PAIRS} seeds or more",
        }
        if tuning:
            seeds = f"{self.tuning_seeds[0]} to {self.tuning_seeds[-1]}"
            facts["learning rate"] += f"; of several an arm has the best on seeds {seeds}"
            facts["runs"] += f", and {len(tuning)} for the choice of learning rates"
        if len(self.seeds) >= LEAST_PAIRS:
            others = len(self.arms) - 1
            comparisons = math.comb(others + 1, 2) if self.all_pairs else others
            deviations = detectable_difference(len(self.seeds), 1.0, comparisons)
            facts["can show"] = (
                f"with a power of 80 % that a difference of {deviations:.2g} standard deviations of a paired "
                "difference is not 0; whether it counts depends on the margin"
            )
        return facts


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
    if "plan.json" in names:
        before = read_plan(output_dir)
        if changes := differing(_facts(before), _facts(plan)):
            same_seeds = replace(plan, seeds=before.seeds, looks=before.looks)
            looks = len(before.seeds), len(plan.seeds)
            again = ""
            if looks[0] < looks[1] and not differing(_facts(before), _facts(same_seeds)):
                again = f" {looked_twice(*looks)}"
            raise Refused(
                f"{output_dir} holds another comparison: {changes[:900]}. Give the arguments that it was "
                f"started with (plan.json has its command), or another --output-dir.{again}"
            )
    elif set(names) - {".lock"}:
        raise Refused(f"{output_dir} holds files, but no comparison. Give an empty --output-dir.")


def _facts(plan: Plan) -> dict[str, Any]:
    """Return what a plan says by names such as `arms.rloo.settings.max_grad_norm`, without its command."""
    arms = {arm.label: asdict(arm) for arm in plan.arms}
    return flat({**asdict(plan), "arms": arms, "command": ""})


def differing(there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """Return in words in which settings two comparisons, or two runs, differ; empty if in none."""
    return "; ".join(
        f"{name} is {there.get(name)} there and {here.get(name)} here"
        for name in {**there, **here}
        if there.get(name) != here.get(name)
    )


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
