"""Comparisons whose runs are made up, so that tests need no training."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tokenrl.lab.compare.arms import read_arms
from tokenrl.lab.compare.comparison import Comparison
from tokenrl.lab.compare.judging import judged
from tokenrl.lab.compare.plan_file import write_plan
from tokenrl.lab.compare.planning import runs_of
from tokenrl.lab.compare.records import Plan, PlannedRun, Problem, RunRecord
from tokenrl.lab.compare.scores import scores_of
from tokenrl.language.training.arguments import TrainArguments
from tokenrl.settings import field_types

EVALUATIONS = 10
TRAINING = {"entropy": 0.1, "entropy_start": 0.5, "clipped_ratio": 0.0, "frac_reward_zero_std_start": 0.1}
TRAINING |= {"grad_clipped": 0.2, "skipped": 0.0, "idle": 0.0}


def problem(label: str = "sort_digits", **changes) -> Problem:
    settings = {"task": label, "eval_every": 10, "num_generations": 8, "prompts_per_step": 16}
    given = {
        "label": label,
        "kind": "train",
        "settings": settings,
        "budget": 12_800,
        "unit": "completions",
        "prompts_per_step": 16,
        "num_generations": 8,
        "learning_rate": 2e-4,
        "reward_range": (0.0, 1.0),
    }
    return Problem(**{**given, **changes})


def plan(arms=("reinforce", "rloo", "grpo"), problems=None, seeds: int = 6, **changes) -> Plan:
    problems = problems or [problem()]
    read = read_arms(arms, {}, list(field_types(TrainArguments)))
    given = {
        "problems": tuple(problems),
        "arms": read,
        "reference": read[0].label,
        "metric": "area",
        "margins": {p.label: 0.02 for p in problems},
        "seeds": tuple(range(seeds)),
    }
    return Plan(**{**given, **changes})


def record(run: PlannedRun, on: Problem, end: float, start: float = 0.2, **changes) -> RunRecord:
    """Make up a run whose reward approaches `end`."""
    samples = tuple(on.budget * i / EVALUATIONS for i in range(EVALUATIONS + 1))
    reward = tuple(end + (start - end) * 0.5**i for i in range(EVALUATIONS + 1))
    entropy = tuple(0.5 * 0.8**i for i in range(EVALUATIONS + 1))
    curves = {"reward": reward, "reward_greedy": reward, "entropy": entropy}
    given = {
        "run": run,
        "state": "finished",
        "samples": samples,
        "curves": curves,
        "seconds": tuple(s / 1000 for s in samples),
        "training": dict(TRAINING),
        "scores": scores_of(samples, curves, TRAINING, samples[1:]),
        "completions": ({"prompt": "1 <b> 2 =", "completion": "12", "reward": 1.0},),
    }
    return RunRecord(**{**given, **changes})


def comparison(folder: Path, planned: Plan, ends=None, spread: float = 0.01, **changes) -> Comparison:
    """Judge made-up runs of a plan.

    Args:
        folder: where the plan is written.
        planned: the plan.
        ends: final reward by arm; 0.9 for those that are missing.
        spread: standard deviation of the runs' final rewards.
        changes: by path of a run, fields of its record that are others.
    """
    noise, on = np.random.default_rng(0), {p.label: p for p in planned.problems}
    records = []
    for run in runs_of(planned):
        end = (ends or {}).get(run.arm, 0.9) + spread * noise.standard_normal()
        records.append(record(run, on[run.problem], end, **changes.get(run.path, {})))
    folder.mkdir(parents=True, exist_ok=True)
    write_plan(planned, folder, {})
    return judged(folder, planned, records, {}, {}, print)
