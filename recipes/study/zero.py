"""Question 9: the base models of the plans `zero_*.yaml`, and the noise of both arms at each of them.

    python recipes/study/zero.py

Makes in `runs/study/zero_bases` what is not there yet, and writes `tables/zero/noise.csv`. The variance of a
constant baseline is a parabola in the constant; three measured points say where its least lies.
"""

# /// script
# requires-python = ">=3.10"
# dependencies = ["tokenrl-lm"]
# [tool.uv.sources]
# tokenrl-lm = { path = "../..", editable = true }
# ///

from __future__ import annotations

from pathlib import Path

import pandas as pd

import tokenrl
from tokenrl.lab import measure_gradients

TABLE = Path(__file__).parent / "tables" / "zero" / "noise.csv"
BASES = Path("runs/study/zero_bases")
UPDATES = {
    "sort_digits": (100, 150, 200, 300, 450, 700),
    "reverse_text": (400, 600, 800, 1000, 1400, 2000),
}
"""Updates of the warm start of the bases 1, 2, ... of each task; the number is also the seed."""
CONSTANT = "reinforce,baseline=constant,baseline_constant={}"
ARMS = ("rloo", "reinforce", CONSTANT.format(-1), CONSTANT.format(1))


def make_base(task: str, seed: int, updates: int) -> Path:
    """Warm-start a model with random weights on the task's demonstrations, unless it is there."""
    folder = BASES / f"{task}_{seed}"
    if not (folder / "summary.json").exists():
        tokenrl.sft(
            task=task, model="tiny", base_seed=seed, seed=seed, max_steps=updates, threads=1,
            output_dir=str(folder), resume="auto", quiet=True,
        )  # fmt: skip
    return folder


def noise(task: str, model: str, **settings: object) -> dict[str, object]:
    """Measure the variance of a step: that of rloo, divided by that of no baseline, and the best constant.

    Returns:
        The mean reward; `ratio` with its 95 % interval, for rewards of 0 and 1; `ratio_1_2`, for rewards of 1
        and 2; and `constant`, the constant baseline of least variance, for rewards of 0 and 1.
    """
    measured = measure_gradients(task=task, model=model, estimators=ARMS, **settings)
    rloo, none, lower, upper = measured.estimators
    below, at_0, above = (arm.variance.value for arm in (lower, none, upper))
    constant = (below - above) / (2 * (below + above - 2 * at_0))
    ratio = rloo.variance_ratio
    cells = {"ratio": ratio.value, "low": ratio.low, "high": ratio.high, "constant": constant}
    cells |= {"ratio_1_2": rloo.variance.value / below}
    return {"reward": measured.settings["reward"], **cells}


def main() -> None:
    """Make the bases and measure them."""
    rows = []
    for task, lengths in UPDATES.items():
        for seed, updates in enumerate(lengths, 1):
            base = make_base(task, seed, updates)
            cells = noise(task, str(base), num_prompts=256, prompts_per_step=16, probes=64)
            rows.append({"task": task, "base": seed, "updates": updates, **cells})
    TABLE.parent.mkdir(exist_ok=True)
    pd.DataFrame(rows).to_csv(TABLE, index=False, float_format="%.4g")


if __name__ == "__main__":
    main()
