"""Checks and measures tokenrl on your GPU (CUDA, or Apple's MPS), and prints tables in Markdown.

Nearly all numbers on our pages come from CPUs, so tables from a GPU are welcome: send what this program
prints as an issue. It downloads nothing: the models have random weights and are made here. It begins
no measurement of speed after ten minutes. Each measurement is a process of its own; if it fails, its line
says why and the rest goes on.

1. Numbers: the same training in float32 (without TF32), with the same seed, on the CPU and on the GPU, for
   three estimators. Rounding alone may lie between them. It can also flip a token, which changes all that
   follows, so metrics are compared for as long as the completions agree (if that is not long, `--seed 1`).
2. Speed: seconds of a step and peak memory for models of 1 M to 1.5 B parameters, tokenrl with its default
   flags, beside TRL where it is installed, with the attention `sdpa` and in bfloat16 where the GPU has it.
   `step_against_trl.py --work gpu-1m` also tries TRL's other settings.
3. Episodes: seconds of a step of 8 x 8 episodes of 12 turns, as in `turns_against_trl.py`, alike.

    python recipes/benchmarks/on_your_gpu.py | tee table.md
    pip install -c constraints.txt -e '.[benchmarks]'        # for TRL beside it
    python recipes/benchmarks/on_your_gpu.py --tiny          # tries the program out, also without a GPU

Look for: the verdict "equal up to rounding" three times.
"""

# /// script
# requires-python = ">=3.10"
# dependencies = ["tokenrl-lm"]
# [tool.uv.sources]
# tokenrl-lm = { path = "../..", editable = true }
# ///

from __future__ import annotations

import math
import sys
import tempfile
import time
from argparse import Namespace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import tyro
from one_trainer import GPU_WORK, device, print_measurement
from step_against_trl import (
    COLUMNS,
    TRAINER,
    print_heading,
    print_row,
    run,
    shape_row,
    versions,
)
from turns_against_trl import COLUMNS as TURN_COLUMNS, row as turns_row

RELATIVE, ABSOLUTE = 1e-3, 1e-5
"""Rounding may change a metric by this share of its largest value on the CPU, and by this much beside it.

Attention by another formula, on a CPU, changed metrics by far less; bfloat16 changed the norm of the gradient
by more.
"""
SECONDS = 600.0
ESTIMATORS = {
    "rloo": {"estimator": "rloo"},
    "grpo, KL in the loss": {"estimator": "grpo,beta=0.1", "num_iterations": 2},
    "ppo, with a critic": {"estimator": "ppo"},
}
TRAININGS = ("training", "verdict", "steps with equal completions", "metrics that differ at all")
TRAININGS += ("largest difference",)
Rows = list[dict[str, float | None]]


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """Train with an estimator in float32; returns the rows of its metrics."""
    import tokenrl  # isort: skip  # before torch, as the command does
    import torch

    from tokenrl.runs import read_metrics

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    settings = {"max_steps": job["steps"], "seed": job["seed"], "cpu": device(job) == "cpu"}
    settings |= {"mixed_precision": "no", "training_attention": "as_loaded", "quiet": True}
    # with the task's own, ratios at the clip's edge amplify rounding
    settings |= {"learning_rate": 2e-4}
    settings |= {"eval_size": 8, "eval_every": 0, "eval_generations": 0, "log_completions": 0}
    settings |= {"prompts_per_step": 2, "num_generations": 4} if job["tiny"] else {}
    settings |= ESTIMATORS[job["name"]]
    with tempfile.TemporaryDirectory() as folder:
        tokenrl.train(task="vowels", output_dir=f"{folder}/run", **settings)
        return {"rows": read_metrics(Path(folder, "run", "metrics.jsonl"))[1:]}


def verdict(here: Rows, there: Rows) -> list[str]:
    """Whether two trainings are equal up to rounding, for how many steps, and how far their metrics are apart.

    Steps agree for as long as rewards and lengths of completions are equal.
    """
    names = [*here[-1]]
    ours, theirs = (pd.DataFrame(rows, columns=names, dtype=float) for rows in (here, there))
    decided = ["reward", "completions/mean_length"]
    agree = np.isclose(ours[decided], theirs[decided], rtol=1e-6).all(1)
    steps = int(agree.cumprod().sum())
    ours, theirs = ours[:steps], theirs[:steps]
    gaps = (ours - theirs).abs().where(ours.isna() == theirs.isna(), math.inf).max().fillna(0)
    beyond = gaps > RELATIVE * ours.abs().max().fillna(0) + ABSOLUTE
    judged = "equal up to rounding" if steps else "not equal: the first completions differ"
    if beyond.any():
        judged = f"not equal: {gaps.index[beyond][-1]}"
    differ = f"{(gaps > 0).sum()} of {len(names)}"
    return [judged, f"{steps} of {len(here)}", differ, f"{gaps.max():.1e}"]


def main(seed: int = 0, tiny: bool = False) -> int:
    """Print the tables.

    Args:
        seed: Seed of the trainings whose numbers are compared.
        tiny: Tiny shapes and few steps, as a trial.
    """
    ends, program = time.monotonic() + SECONDS, Path(__file__)
    turns, shapes = (2, ["tiny"]) if tiny else (12, [*GPU_WORK])
    speeds = [partial(shape_row, name) for name in shapes]
    args = Namespace(steps=2 if tiny else 6, rounds=1, tokenrl={})
    job = {"tiny": tiny, "seed": seed, "steps": args.steps}
    about = run(TRAINER, {"part": "device"})
    if about.get("kind", "cpu") == "cpu" and not tiny:
        print("torch has no GPU here. To try this program: --tiny.", file=sys.stderr)
        return 2
    print_heading(TRAININGS, f"{versions(about)}; task vowels in float32, beside the CPU")
    for name in ESTIMATORS:
        training = job | {"name": name}
        here, there = (run(program, training | {"cpu": cpu}) for cpu in (True, False))
        error = here.get("error") or there.get("error")
        print_row([name, error] if error else [name, *verdict(here["rows"], there["rows"])])
    tables = (
        (COLUMNS, f"Speed of GRPO, {args.steps} steps", bool(about["bf16"]), speeds),
        (TURN_COLUMNS, "Episodes of GRPO, in float32", False, [partial(turns_row, turns, 0)]),
    )
    for columns, heading, bf16, rows in tables:
        print_heading(columns, heading)
        for row in rows:
            if time.monotonic() < ends:
                print_row(row(args, [{"bf16": bf16, "attention": "sdpa"}]))
    return 0


if __name__ == "__main__":
    if "--measure" in sys.argv:  # in a process of its own
        print_measurement(measure)
    else:
        sys.exit(tyro.cli(main, description=__doc__))
