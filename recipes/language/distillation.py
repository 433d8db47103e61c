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

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Literal

import numpy as np
import tyro
from matplotlib.figure import Figure

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


@dataclass(frozen=True)
class Arguments:
    """Train a teacher and its students, print the verdicts, and draw the curves."""

    task: Literal["sort_digits", "calculator"] = "sort_digits"
    """The task of the teacher and of the students."""
    arms: tuple[str, ...] = ()
    """The presets; those without opd in their name have no teacher. Default: all, and with --cold those that need
    no reward, which a student with random weights never gets."""
    seeds: int = 6
    """Students of each arm."""
    max_steps: int = 100
    """Updates of a student."""
    teacher_steps: int = 450
    """Updates of the teacher."""
    cold: bool = False
    """Start the students from random weights."""
    workers: int = 2
    """Runs at the same time, with a thread each."""
    output_dir: Path = Path("runs/distillation")
    """Directory of the runs and of the figure."""


def train(directory: Path, *flags: str) -> Path:
    """Make a run in a process of its own, or continue it, and return its directory."""
    command = [sys.executable, "-m", "tokenrl", "train", "--resume", "auto", "--quiet"]
    command += ["--output-dir", str(directory), *flags]
    if not (directory / "summary.json").exists():
        subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    return directory


def make_teacher(args: Arguments) -> Path:
    """Return the directory of a teacher: a model of twice the width, warm-started, then trained by RLOO."""
    start = args.output_dir / f"{args.task}_start"
    if not start.exists():
        model, tokenizer = replace(toy_tasks.load(args.task).build, hidden=256)(seed=0)
        model.save_pretrained(start)
        tokenizer.save_pretrained(start)
    flags = ("--task", args.task, "--model", str(start), "--warm-start")
    steps = ("--max-steps", str(args.teacher_steps))
    return train(args.output_dir / f"{args.task}_teacher", *flags, *steps)


def main(args: Arguments) -> None:
    """Make the runs, print mean scores with verdicts against the first arm, and draw the curves."""
    teacher = make_teacher(args)
    arms = args.arms or [arm for arm in ARMS if arm.startswith("opd") or not args.cold]
    name = f"{args.task}_cold" if args.cold else args.task
    shared = ["--task", args.task, "--max-steps", str(args.max_steps)]
    shared += ["--eval-every", str(args.max_steps // 10)]
    if args.cold:
        shared += ["--model", "tiny"]
    flags = {}
    for arm in arms:
        for seed in range(args.seeds):
            flags[arm, seed] = [*shared, "--estimator", arm, "--seed", str(seed)]
            if "opd" in arm:
                flags[arm, seed] += ["--teacher", str(teacher)]
            if arm.startswith("opd"):
                flags[arm, seed] += ["--reward", "none"]
    with ThreadPoolExecutor(args.workers) as pool:
        runs = []
        for (arm, seed), words in flags.items():
            directory = args.output_dir / f"{name}_{arm}_{seed}"
            runs.append(pool.submit(train, directory, *words))
        for run in runs:
            run.result()

    rows = []
    axes = (figure := Figure(figsize=(6, 3.5), layout="constrained")).subplots()
    for arm in arms:
        curves = []
        for seed in range(args.seeds):
            run = read_run(args.output_dir / f"{name}_{arm}_{seed}")
            curves.append([row["reward"] for row in run.evaluations])
            rows.append({"arm": arm, "seed": seed, "score": fmean(curves[-1][1:])})
        mean = np.mean(curves, 0)
        steps = [row["step"] for row in run.evaluations]
        axes.plot(steps, np.transpose(curves), color=ARMS[arm], alpha=0.2, linewidth=1)
        axes.plot(steps, mean, color=ARMS[arm], label=arm)
        print(f"{arm:14} reward at the end {mean[-1]:.3f}")
    axes.set(xlabel="updates", ylabel="reward on held-out prompts", title=name)
    axes.legend(frameon=False)
    figure.savefig(args.output_dir / f"{name}.png", dpi=150)
    (family,) = judge_scores(rows, margin=0.02).families
    for arm in family.arms:
        print(f"{arm.arm:14} area {arm.mean:.4f}")
    print(family.headline(), *family.sentences(), sep="\n")


if __name__ == "__main__":
    main(tyro.cli(Arguments))
