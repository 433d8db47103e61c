"""A reward, a teacher, or both: trains students of half a million weights over seeds, and compares them.

    python recipes/language/distillation.py --task sort_digits

First a teacher of 2 million weights learns the task by RLOO. Then each arm starts from the task's base model and
samples the same number of completions: RLOO on the reward, three forms of on-policy distillation without a
reward, and RLOO with the KL to the teacher. `--cold` starts students from random weights instead. Runs that have
ended are read, not made again.
"""

# /// script
# requires-python = ">=3.10"
# dependencies = ["tokenrl-lm"]
# [tool.uv.sources]
# tokenrl-lm = { path = "../..", editable = true }
# ///

from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import numpy as np
import tyro
from matplotlib.figure import Figure

import tokenrl
import toy_tasks
from tokenrl.lab import judge_scores
from tokenrl.runs import read_run

ARMS = {
    "rloo": "#999999",
    "opd": "#E69F00",
    "opd_full": "#56B4E9",
    "opd_full_path": "#0072B2",
    "rloo_opd": "#D55E00",
}
"""The presets that are compared, and their colours."""


RUNS = Path("runs/distillation")


def train(name: str, **settings: Any) -> Path:
    """Make a run, or continue it, and return its directory."""
    directory = RUNS / name
    if not (directory / "summary.json").exists():
        settings |= {"threads": 1, "resume": "auto", "quiet": True}
        if tokenrl.train(output_dir=str(directory), **settings).exit_code:
            raise SystemExit(f"{directory} was stopped; the same command goes on.")
    return directory


def make_teacher(task: str, steps: int) -> Path:
    """Return the directory of a teacher: a model of twice the width, warm-started, then trained by RLOO."""
    start = RUNS / f"{task}_start"
    if not start.exists():
        model, tokenizer = replace(toy_tasks.load(task).build, hidden=256)(seed=0)
        model.save_pretrained(start)
        tokenizer.save_pretrained(start)
    return train(f"{task}_teacher", task=task, model=str(start), warm_start=True, max_steps=steps)


def main(
    task: Literal["sort_digits", "calculator"] = "sort_digits",
    arms: tuple[str, ...] = (),
    seeds: int = 6,
    max_steps: int = 100,
    teacher_steps: int = 450,
    cold: bool = False,
) -> None:
    """Make the runs, print mean scores with verdicts against the first arm, and draw the curves.

    Args:
        task: The task of the teacher and of the students.
        arms: The presets; those without opd in their name have no teacher. Default: all, and with --cold those
            that need no reward, which a student with random weights never gets.
        seeds: Students of each arm.
        max_steps: Updates of a student.
        teacher_steps: Updates of the teacher.
        cold: Start the students from random weights.
    """
    teacher = make_teacher(task, teacher_steps)
    arms = arms or tuple(arm for arm in ARMS if arm.startswith("opd") or not cold)
    name = f"{task}_cold" if cold else task
    shared: dict[str, Any] = {"task": task, "max_steps": max_steps, "eval_every": max_steps // 10}
    shared |= {"model": "tiny"} if cold else {}
    rows = []
    axes = (figure := Figure(figsize=(6, 3.5), layout="constrained")).subplots()
    for arm in arms:
        curves = []
        settings = shared | ({"teacher": str(teacher)} if "opd" in arm else {})
        settings |= {"reward": "none"} if arm.startswith("opd") else {}
        for seed in range(seeds):
            run = read_run(train(f"{name}_{arm}_{seed}", estimator=arm, seed=seed, **settings))
            curves.append([row["reward"] for row in run.evaluations])
            rows.append({"arm": arm, "seed": seed, "score": fmean(curves[-1][1:])})
        mean = np.mean(curves, 0)
        steps = [row["step"] for row in run.evaluations]
        axes.plot(steps, np.transpose(curves), color=ARMS[arm], alpha=0.2, linewidth=1)
        axes.plot(steps, mean, color=ARMS[arm], label=arm)
        print(f"{arm:14} reward at the end {mean[-1]:.3f}")
    axes.set(xlabel="updates", ylabel="reward on held-out prompts", title=name)
    axes.legend(frameon=False)
    figure.savefig(RUNS / f"{name}.png", dpi=150)
    (family,) = judge_scores(rows, margin=0.02).families
    for arm in family.arms:
        print(f"{arm.arm:14} area {arm.mean:.4f}")
    print(family.headline(), *family.sentences(), sep="\n")


if __name__ == "__main__":
    tyro.cli(main)
