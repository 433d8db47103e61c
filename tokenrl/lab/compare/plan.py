"""Defines the plan of a comparison, and keeps it in plan.json, which is written before anything runs."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from tokenrl.errors import Refused
from tokenrl.runs.files import plain, write_json

Kind = Literal["train", "control"]
Role = Literal["comparison", "tuning", "itself"]
"""Why a run is made: for the comparison, to choose an arm's learning rate, or to compare the reference with
itself on other seeds."""
JUDGED = ("reference", "metric", "margins", "failure_below", "all_pairs")
"""Fields of a plan that decide how runs are judged, and not which runs there are."""


@dataclass(frozen=True)
class Problem:
    """What the arms are compared on: a task or environment with a model, a group size and a learning rate.

    The comparisons on one problem are one family: their verdicts share one level of significance.

    Attributes:
        label: name in tables, such as `sort_digits`; if there are several, `sort_digits, num_generations=4`.
        kind: the command that makes its runs.
        settings: the settings that all its runs share, as JSON holds them; `task` or `env` among them.
        budget: number of samples that each run may generate.
        unit: what a sample is: `completions`, or in control `episodes` (or `environment steps`).
        per_step: samples of a training step without greedy completions or refills.
        num_generations: completions per prompt, in control episodes of an update.
        learning_rate: the rate that is recommended for the problem.
        places: numbers of samples at which runs are evaluated, without that before training.
        reward_range: the least and the largest reward, if the reward declares them.
        solved: the reward from which the task counts as solved, if it says so.
    """

    label: str
    kind: Kind
    settings: dict[str, Any]
    budget: int
    unit: str
    per_step: int
    num_generations: int
    learning_rate: float
    places: tuple[float, ...]
    reward_range: tuple[float, float] | None = None
    solved: float | None = None


@dataclass(frozen=True)
class Arm:
    """One of the ways to train that are compared.

    Attributes:
        label: the arm as the user wrote it, such as `grpo,scale=none`.
        settings: the settings that it sets itself, as JSON holds them; `estimator` is among them.
        bias: the declared bias of its estimator.
        exploratory: whether it was added after results of the comparison were known.
    """

    label: str
    settings: dict[str, Any]
    bias: str = ""
    exploratory: bool = False


@dataclass(frozen=True)
class PlannedRun:
    """One run of a comparison, which becomes an ordinary run directory.

    Attributes:
        problem: label of the problem.
        arm: label of the arm.
        seed: its seed.
        role: why it is made.
        kind: the command that makes it.
        path: its directory, relative to that of the comparison.
        settings: all its settings but `output_dir` and `resume`, as JSON holds them.
    """

    problem: str
    arm: str
    seed: int
    role: Role
    kind: Kind
    path: str
    settings: dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """A comparison as it was planned, before anything was run.

    Attributes:
        problems: what the arms are compared on.
        arms: the arms, in the order in which they were given.
        reference: label of the arm that the others are compared with.
        metric: name of the score that decides.
        margins: by problem, the difference that counts as none; None where equivalence is not judged.
        seeds: seeds of the comparison.
        itself_seeds: seeds of the runs that compare the reference with itself; as many, or none.
        tuning_seeds: seeds on which learning rates are chosen; none unless they are tuned.
        rates: factors of the recommended learning rate that are tried; (1,) unless they are tuned.
        failure_below: the reward at the end below which a run counts as failed.
        all_pairs: whether all arms are compared with each other.
        existing: the runs, where they existed before the comparison; else empty.
        changes: what was changed after results were known, in words; it makes the comparison exploratory.
        command: the command line that repeats the comparison; empty if a Python program made it.
    """

    problems: tuple[Problem, ...]
    arms: tuple[Arm, ...]
    reference: str
    metric: str
    margins: dict[str, float | None]
    seeds: tuple[int, ...]
    itself_seeds: tuple[int, ...] = ()
    tuning_seeds: tuple[int, ...] = ()
    rates: tuple[float, ...] = (1.0,)
    failure_below: float | None = None
    all_pairs: bool = False
    existing: tuple[PlannedRun, ...] = ()
    changes: tuple[str, ...] = ()
    command: str = ""

    @property
    def comparisons(self) -> int:
        """Number of comparisons on each problem."""
        others = len(self.arms) - 1
        return others * (others + 1) // 2 if self.all_pairs else others

    def run(
        self, problem: Problem, arm: Arm, seed: int, role: Role = "comparison", rate: float | None = None
    ) -> PlannedRun:
        """Plan one run: an arm on a problem with a seed.

        Args:
            problem: what the run trains on.
            arm: how it trains.
            seed: its seed.
            role: why it is made.
            rate: its learning rate; None for the arm's own, else the problem's.
        """
        settings = {**problem.settings, "learning_rate": problem.learning_rate, **arm.settings, "seed": seed}
        settings |= {"keep_checkpoints": 1} | ({} if rate is None else {"learning_rate": rate})
        if problem.kind == "train":  # the same budget, evaluated at the same numbers of samples
            every = settings["eval_every"] * problem.num_generations / settings["num_generations"]
            settings |= {"max_samples": problem.budget, "eval_every": max(1, round(every)) if every else 0}
        folder = _slug(arm.label, [other.label for other in self.arms])
        folder += {"comparison": "", "itself": "-itself", "tuning": f"-tuning-{rate or 0:g}"}[role]
        place = _slug(problem.label, [other.label for other in self.problems])
        path = f"runs/{place}/{folder}/seed_{seed}"
        return PlannedRun(problem.label, arm.label, seed, role, problem.kind, path, settings)

    def runs(self, rates: Mapping[tuple[str, str], float] | None = None) -> list[PlannedRun]:
        """Return the runs of the comparison, those of one seed together, so that pairs are complete early.

        Args:
            rates: learning rates by problem and arm, where they have been tuned.
        """
        runs = list(self.existing)
        for problem in () if runs else self.problems:
            for place, seed in enumerate(self.seeds):
                for arm in self.arms:
                    rate = (rates or {}).get((problem.label, arm.label))
                    runs.append(self.run(problem, arm, seed, rate=rate))
                    if arm.label == self.reference and self.itself_seeds:
                        runs.append(self.run(problem, arm, self.itself_seeds[place], "itself", rate))
        return runs


def _slug(label: str, all_labels: Sequence[str]) -> str:
    """Return a label as the name of a folder; labels that become the same get their place."""

    def plainly(text: str) -> str:
        return re.sub(r"[^A-Za-z0-9_.=-]+", "-", text).strip("-.")[:80] or "arm"

    same = [other for other in all_labels if plainly(other).lower() == plainly(label).lower()]
    return plainly(label) + (f"-{same.index(label) + 1}" if len(same) > 1 else "")


def write_plan(plan: Plan, output_dir: Path, expected: Mapping[str, Any]) -> None:
    """Write plan.json: the plan, and what may be expected of it."""
    output_dir.mkdir(parents=True, exist_ok=True)
    write_json(output_dir / "plan.json", {"plan": asdict(plan), "expected": dict(expected)})


def read_plan(output_dir: Path) -> Plan:
    """Read the plan of a comparison from plan.json.

    Raises:
        Refused: the file cannot be read, or it is not one that this version wrote.
    """
    path = output_dir / "plan.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["plan"]
        kinds = {"problems": Problem, "arms": Arm, "existing": PlannedRun}
        lists = {name: tuple(kind(**one) for one in found[name]) for name, kind in kinds.items()}
        values: dict[str, Any] = {n: tuple(x) if isinstance(x, list) else x for n, x in found.items()}
        return Plan(**values | lists)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise Refused(
            f"{path} cannot be read ({error}). Give another --output-dir, or replace it with --overwrite."
        ) from error


def settle_plan(plan: Plan, output_dir: Path, *, overwrite: bool) -> Plan:
    """Compare a plan with the one that the directory holds; return it with what has changed since.

    More seeds, more arms, and another way to judge are allowed. If runs of the older plan have begun, they
    are noted, and added arms are marked as exploratory: who looks at results before choosing what to compare,
    or when to stop, will find differences by chance more often than the level says.

    Args:
        plan: the plan.
        output_dir: the directory of the comparison.
        overwrite: remove the comparison that the directory holds.

    Raises:
        Refused: the directory holds a comparison of other problems, arms or seeds, or something else.
    """
    if not os.path.exists(output_dir / "plan.json"):
        if os.path.isdir(output_dir) and any(output_dir.iterdir()):
            raise Refused(
                f"{output_dir} holds files, but no comparison. Give a new or an empty --output-dir."
            )
        return plan
    if overwrite:
        shutil.rmtree(output_dir)
        return plan
    old = read_plan(output_dir)
    changes = _changes(old, plan, output_dir)
    if not plan.existing and not any((output_dir / "runs").rglob("config.json")):
        return plan
    known = {arm.label for arm in old.arms if not arm.exploratory}
    arms = tuple(replace(arm, exploratory=arm.label not in known) for arm in plan.arms)
    return replace(plan, arms=arms, changes=tuple(dict.fromkeys([*old.changes, *changes])))


def _changes(old: Plan, new: Plan, output_dir: Path) -> list[str]:
    """Return in words how a plan differs from the older one.

    Raises:
        Refused: it differs in more than it may.
    """
    wrong, changes = [], []
    for name in ("tuning_seeds", "rates", "existing"):
        if plain(getattr(old, name)) != plain(getattr(new, name)):
            wrong.append(f"{name}: {str(getattr(old, name))[:300]}, now {str(getattr(new, name))[:300]}")
    for before, now in zip(old.problems, new.problems, strict=False):
        one, other = ({**asdict(p), **p.settings, "settings": None} for p in (before, now))
        names = [n for n in dict.fromkeys([*one, *other]) if plain(one.get(n)) != plain(other.get(n))]
        wrong += [f"{n}: {one.get(n)}, now {other.get(n)}" for n in names if n != "places"]
    if len(old.problems) != len(new.problems):
        wrong.append(f"{len(old.problems)} problems, now {len(new.problems)}")
    arms, added = {arm.label: plain(arm.settings) for arm in new.arms}, [arm.label for arm in new.arms]
    for arm in old.arms:
        if arms.get(arm.label) != plain(arm.settings):
            wrong.append(
                f"the arm {arm.label!r}: {'had other settings' if arm.label in arms else 'was there'}"
            )
        else:
            added.remove(arm.label)
    if added:
        changes.append(f"the arms {', '.join(added)} were added after runs had begun")
    if old.seeds[: len(new.seeds)] != new.seeds[: len(old.seeds)]:
        wrong.append(f"seeds: {old.seeds}, now {new.seeds}")
    elif len(old.seeds) != len(new.seeds):
        changes.append(
            f"the number of seeds was changed from {len(old.seeds)} to {len(new.seeds)} on the way"
        )
    for name in JUDGED:
        before, now = plain(getattr(old, name)), plain(getattr(new, name))
        if before != now:
            changes.append(f"{name} was changed from {before} to {now} after runs had begun")
    if wrong:
        raise Refused(
            f"{output_dir} holds another comparison: {'; '.join(wrong)}. Give the arguments that it was "
            "started with (plan.json has its command), another --output-dir, or --overwrite to replace it."
        )
    return changes
