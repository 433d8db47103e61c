"""Comparisons of records that are made up, so that a test can choose every number in them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tokenrl.lab.compare.comparison import Comparison
from tokenrl.lab.compare.judging import judged
from tokenrl.lab.compare.records import Arm, Plan, PlannedRun, Problem, Role, RunRecord
from tokenrl.lab.compare.results import due_places
from tokenrl.lab.compare.scores import scores_of

PROBLEM = Problem(
    label="digits",
    kind="train",
    settings={"task": "sort_digits", "eval_every": 10},
    budget=400,
    unit="completions",
    prompts_per_step=2,
    num_generations=4,
    learning_rate=1e-3,
    reward_range=(0.0, 1.0),
)
EPISODES = replace(
    PROBLEM,
    label="walk",
    kind="control",
    settings={"env": "walk", "max_steps": 50, "eval_every": 10},
    unit="episodes",
    prompts_per_step=1,
    num_generations=8,
    reward_range=None,
)
PLACES = (80.0, 160.0, 240.0, 320.0, 400.0)
"""Where runs of these problems are evaluated."""
NORMAL = {
    "entropy": 0.4,
    "entropy_start": 0.6,
    "frac_reward_zero_std_start": 0.3,
    "clipped_ratio": 0.1,
    "grad_clipped": 0.2,
    "skipped": 0.0,
    "idle": 0.0,
}
"""What a run without any trouble tells of its training."""


def arm(label: str, settings: Mapping[str, object] | None = None, **axes: object) -> Arm:
    return Arm(label, {"estimator": axes, **(settings or {})})


RLOO, NONE = arm("rloo"), arm("none", baseline="none")


def noise(seed: int, size: float = 0.002) -> float:
    """A spread over six seeds, with mean 0; no two arms get the same if their sizes differ."""
    return size * (-1.0, 0.6, -0.2, 1.0, -0.6, 0.2)[seed % 6]


def rising(end: float, spread: float = 0.0) -> tuple[float, ...]:
    """A learning curve from 0 that is straight until it stays at its end."""
    return (0.0, 0.5 * end + spread, end + spread, end + spread, end + spread, end + spread)


def record(
    of: Arm = RLOO,
    seed: int = 0,
    rewards: Sequence[float] = rising(0.8),
    greedy: Sequence[float] | None = None,
    *,
    problem: Problem = PROBLEM,
    role: Role = "comparison",
    seconds: float = 2.0,
    failed: str = "",
    **training: float,
) -> RunRecord:
    """A run with an evaluation before training and one at each place of its problem."""
    settings = {**problem.settings, "learning_rate": problem.learning_rate, **of.settings, "seed": seed}
    path = f"runs/{problem.label}/{of.label}-{role}/seed_{seed}"
    run = PlannedRun(problem.label, of.label, seed, role, problem.kind, path, settings)
    places = due_places(problem)
    curves = {"reward": tuple(rewards), "reward_greedy": tuple(rewards if greedy is None else greedy)}
    told = {**NORMAL, **training}
    return RunRecord(
        run,
        "failed" if failed else "finished",
        failed,
        samples=(0.0, *places),
        curves=curves,
        seconds=tuple(seconds * place for place in range(len(places) + 1)),
        training=told,
        scores=scores_of((0.0, *places), curves, told, places),
    )


def six(of: Arm, end: float = 0.8, spread: float = 0.002, **options: Any) -> list[RunRecord]:
    """Runs of an arm on six seeds, which end near the same reward."""
    return [record(of, seed, rising(end, noise(seed, spread)), **options) for seed in range(6)]


def compared(
    records: Sequence[RunRecord],
    *,
    arms: Sequence[Arm] = (RLOO, NONE),
    problem: Problem = PROBLEM,
    output_dir: Path = Path("made"),
    metric: str = "area",
    margin: float | None = 0.02,
    rates: dict[tuple[str, str], float] | None = None,
    sensitivity: dict[tuple[str, str], dict[float, tuple[float, ...]]] | None = None,
    changes: tuple[str, ...] = (),
) -> Comparison:
    """Judge records as `compare` does; the first arm is the reference."""
    seeds = sorted({one.run.seed for one in records if one.run.role == "comparison"})
    itself = sorted({one.run.seed for one in records if one.run.role == "itself"})
    plan = Plan(
        problems=(problem,),
        arms=tuple(arms),
        reference=arms[0].label,
        metric=metric,
        margins={problem.label: margin},
        seeds=tuple(seeds),
        itself_seeds=tuple(itself),
        changes=changes,
        command="tokenrl compare --arms rloo none",
    )
    return judged(output_dir, plan, records, rates or {}, sensitivity or {}, print)


def said(found: Comparison, first: str) -> list[str]:
    """The findings on the first problem that begin with a word."""
    return [text for text in found.findings[found.plan.problems[0].label] if text.startswith(f"{first}:")]
