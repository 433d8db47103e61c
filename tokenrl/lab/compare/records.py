"""Defines what a comparison plans, and what it reads from the runs. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

Kind = Literal["train", "control"]
Role = Literal["comparison", "tuning", "itself"]
"""Why a run is made: for the comparison, to choose an arm's learning rate, or to compare the reference with
itself on other seeds."""


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
        prompts_per_step: prompts of a training step; in control 1.
        num_generations: completions per prompt, in control episodes of an update.
        learning_rate: the rate that is recommended for the problem.
        reward_range: the least and the largest reward, if the reward declares them.
        solved: the reward from which the task counts as solved, if it says so.
    """

    label: str
    kind: Kind
    settings: dict[str, Any]
    budget: int
    unit: str
    prompts_per_step: int
    num_generations: int
    learning_rate: float
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
class RunRecord:
    """What a comparison reads from one run's directory.

    Attributes:
        run: the run.
        state: `finished`; `failed` (an error or a stop ended it before its budget was used); or `missing`.
        reason: why it failed, in words; else empty.
        samples: number of samples generated up to each evaluation; the first is 0.
        curves: by name without `eval_`, the metrics of each evaluation, as `reward` and `reward_greedy`.
            Where the run failed, or stopped before its budget was used, the last evaluation is repeated at
            the later places.
        seconds: seconds of training steps up to each evaluation.
        training: means over training steps that gates and sentences need: `entropy` (last tenth),
            `entropy_start` (first tenth), `frac_reward_zero_std_start` (first tenth), `clipped_ratio` (all
            steps), `grad_clipped` (share of updates with a clipped gradient), `skipped`, `idle`.
        scores: by name, the metrics that arms can be compared by: `area`, `reward`, `reward_greedy`, ...
        completions: some sampled held-out or training completions, rows with prompt, completion and reward.
    """

    run: PlannedRun
    state: Literal["finished", "failed", "missing"]
    reason: str = ""
    samples: tuple[float, ...] = ()
    curves: dict[str, tuple[float, ...]] = field(default_factory=dict)
    seconds: tuple[float, ...] = ()
    training: dict[str, float] = field(default_factory=dict)
    scores: dict[str, float] = field(default_factory=dict)
    completions: tuple[dict[str, Any], ...] = ()


def runs_of_arm(records: Iterable[RunRecord], problem: str, arm: str) -> list[RunRecord]:
    """Return the records of an arm's runs on a problem, without those of other roles, by seed.

    Args:
        records: records of any runs.
        problem: label of the problem.
        arm: label of the arm.
    """
    key = (problem, arm, "comparison")
    found = [r for r in records if (r.run.problem, r.run.arm, r.run.role) == key]
    return sorted(found, key=lambda record: record.run.seed)


@dataclass(frozen=True)
class Plan:
    """A comparison as it was planned, before anything was run.

    Attributes:
        problems: what the arms are compared on.
        arms: the arms, in the order in which they were given.
        reference: label of the arm that the others are compared with.
        metric: name of the score that decides, as in `RunRecord.scores`.
        margins: by problem, the difference that counts as none; None where equivalence is not judged.
        seeds: seeds of the comparison.
        itself_seeds: seeds of the runs that compare the reference with itself; as many, or none.
        tuning_seeds: seeds on which learning rates are chosen; none unless they are tuned.
        rates: factors of the recommended learning rate that are tried; (1,) unless they are tuned.
        noise: whether the noise of the arms' gradients is measured too.
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
    noise: bool = False
    changes: tuple[str, ...] = ()
    command: str = ""
