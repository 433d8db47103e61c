"""Question 9: base models of the plans `zero_*.yaml`, the noise of both arms at each of them, and the answers.

    python recipes/study/zero.py                           bases, in runs/study/zero_bases, and their noise
    python recipes/study/zero.py --bases                   only the bases, those of question 12 too
    python recipes/study/zero.py --answer COMMIT COMMIT    runs.csv, bases.csv and pretrained.csv

The variance of a constant baseline is a parabola in the constant; three measured points say where its least
lies. Of the runs on the twelve bases those seeds count that are complete everywhere.
"""

# /// script
# requires-python = ">=3.10"
# dependencies = ["tokenrl-lm"]
# [tool.uv.sources]
# tokenrl-lm = { path = "../..", editable = true }
# ///

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import tyro
from choice import at_best_rates_of_others
from judging import MARGIN, interval
from scipy import stats

import tokenrl
from tokenrl.lab import measure_gradients
from tokenrl.language import load_task, warm_started_base
from tokenrl.runs import read_run

TABLES = Path(__file__).parent / "tables" / "zero"
BASES = Path("runs/study/zero_bases")
PRETRAINED = BASES / "pretrained" / "warm_start"
"""SmolLM2 after the warm start of `recipes/pages/tutorials/pretrained.md`; only where that has been run into here."""
UPDATES = {
    "sort_digits": (100, 150, 200, 300, 450, 700),
    "reverse_text": (400, 600, 800, 1000, 1400, 2000),
}
"""Updates of the warm start of the bases 1, 2, ... of each task; the number is also the seed."""
COUNTDOWN = (250, 350, 500, 650, 800, 1000)
"""The same for the bases of countdown, which question 12 has."""
OLD = {
    "1_sort_digits": "sort_digits",
    "1_shifted": "recipes/study/own.py:shifted",
    "1_reverse_text": "reverse_text",
    "1_countdown": "countdown",
}
"""Parts of question 1 and their tasks, whose own base was measured after its runs: no prediction."""
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
    return {
        "reward": measured.settings["reward"],
        "ratio": ratio.value,
        "low": ratio.low,
        "high": ratio.high,
        "constant": constant,
        "ratio_1_2": rloo.variance.value / below,
    }


def collect() -> pd.DataFrame:
    """Return a row for each run that has finished."""
    rows = []
    for path in sorted(Path("runs/study").glob("zero_*/runs/*/*/seed_*/summary.json")):
        run = read_run(path.parent)
        if run.summary["exit_reason"] != "finished":
            continue
        cells = {name: run.config[name] for name in ("model", "seed", "learning_rate")}
        cells["processor"] = run.config["versions"]["processor"]
        estimator = run.config["estimator"]
        arm = {"none": "0", "constant": f"{estimator['baseline_constant']:g}"}
        steps = pd.DataFrame(run.metrics).set_index("step")[1:]
        cells |= {
            "plan": path.parts[2],
            "arm": arm.get(estimator["baseline"], "rloo"),
            "area": steps["eval_reward"].mean(),
            "reward": run.evaluations[-1]["reward"],
            "clipped": steps["grad_clipped"].mean(),
            "seconds": run.summary["wall_seconds"],
            "equal": steps["frac_reward_zero_std"].mean(),
        }
        rows.append(cells)
    return pd.DataFrame(rows)


def differences(runs: pd.DataFrame, constant: str = "0") -> pd.DataFrame:
    """Return rloo minus a constant baseline by base and seed, each at the rate best on the other seeds."""
    areas = runs.pivot_table("area", ["model", "arm", "learning_rate"], "seed").dropna(axis=1)
    scores = areas.groupby(["model", "arm"]).apply(
        lambda by_rate: pd.Series(at_best_rates_of_others(by_rate.to_numpy()[None]), areas.columns)
    )
    return scores.xs("rloo", level="arm") - scores.xs(constant, level="arm")


def side(low: Any, high: Any) -> Any:
    """Return on which side of 0 an interval lies: 1, -1, or 0 if it contains 0."""
    return (low > 0) * 1 - (high < 0) * 1


def analyse(table: np.ndarray) -> pd.Series:
    """Split differences by base and seed, [bases, seeds], as zero_sort_digits.yaml says, and judge their mean."""
    bases, seeds = table.shape
    mean, of_base, of_seed = table.mean(), table.mean(1), table.mean(0)
    rest = table - of_base[:, None] - of_seed + mean
    freedom = np.array([bases - 1, seeds - 1, (bases - 1) * (seeds - 1)])
    sums = [seeds * (of_base - mean) ** 2, bases * (of_seed - mean) ** 2, rest**2]
    squares = np.array([part.sum() for part in sums]) / freedom
    total = squares[0] + squares[1] - squares[2]
    degrees = total**2 / (squares**2 / freedom).sum()
    if total < squares[0]:
        total, degrees = squares[0], freedom[0]
    half = stats.t.ppf(1 - 0.05 / 4, degrees) * np.sqrt(total / table.size)
    verdict = ["undecided", "better", "worse"][side(mean - half, mean + half)]
    if abs(mean) + half <= MARGIN:
        verdict = "equivalent"
    of_bases, of_seeds = np.maximum(squares[:2] - squares[2], 0) / (seeds, bases)
    quantiles = stats.f.ppf([0.975, 0.025], freedom[0], freedom[2])
    ratio_low, ratio_high = (squares[0] / squares[2] / quantiles - 1) / seeds
    cells = {"mean": mean, "low": mean - half, "high": mean + half, "verdict": verdict}
    cells |= {"var_base": of_bases, "var_seed": of_seeds, "var_rest": squares[2]}
    return pd.Series(cells | {"ratio_low": ratio_low, "ratio_high": ratio_high})


def judge(code: str, code_pretrained: str) -> None:
    """Write the runs, and for each base the difference beside its prediction; print the answers."""
    runs = collect().sort_values(["model", "arm", "learning_rate", "seed"])
    pretrained = runs["plan"] == "zero_pretrained"
    runs["code"] = np.where(pretrained, code_pretrained, code)
    runs.to_csv(TABLES / "runs.csv", index=False, float_format="%.6g")
    noise = pd.read_csv(TABLES / "noise.csv")
    tables = differences(runs[~pretrained])
    means = []
    for task in UPDATES:
        table = tables.filter(like=task, axis=0).to_numpy()
        print(task, table.shape, analyse(table).to_string(), sep="\n")
        means += [interval(row, 0.05) for row in table]
    bases = noise.join(pd.DataFrame(means, columns=["mean", "mean_low", "mean_high"]))
    bases["predicted"] = side(1 - bases["high"], 1 - bases["low"])
    bases["observed"] = side(bases["mean_low"], bases["mean_high"])
    bases.to_csv(TABLES / "bases.csv", index=False, float_format="%.4g")
    measured = pd.read_csv(TABLES / "noise_pretrained.csv")
    outcomes = measured[["ratio", "low", "high"]].copy()
    outcomes.loc[1] = [measured["ratio_1_2"][0], np.nan, np.nan]
    outcomes.insert(0, "constant", ["0", "-1"])
    rows = [
        differences(runs[pretrained], constant).to_numpy()[0] for constant in outcomes["constant"]
    ]
    outcomes[["mean", "mean_low", "mean_high"]] = [interval(row, 0.05 / 2) for row in rows]
    outcomes["predicted"] = np.sign(1 - outcomes["ratio"]).astype(int)
    outcomes["observed"] = side(outcomes["mean_low"], outcomes["mean_high"])
    outcomes.to_csv(TABLES / "pretrained.csv", index=False, float_format="%.4g")
    print(outcomes.to_string())


def measure() -> None:
    """Make the bases and measure them; measure those of question 1 and the pretrained one too."""
    steps = {"num_prompts": 256, "prompts_per_step": 16, "probes": 64}
    rows = []
    for task, lengths in UPDATES.items():
        for seed, updates in enumerate(lengths, 1):
            base = make_base(task, seed, updates)
            cells = noise(task, str(base), **steps)
            rows.append({"task": task, "base": seed, "updates": updates, **cells})
    TABLES.mkdir(exist_ok=True)
    pd.DataFrame(rows).to_csv(TABLES / "noise.csv", index=False, float_format="%.4g")
    old = []
    for part, source in OLD.items():
        base = warm_started_base(load_task(source))
        old.append({"part": part, **noise(source, str(base), **steps)})
    pd.DataFrame(old).to_csv(TABLES / "old.csv", index=False, float_format="%.4g")
    if PRETRAINED.exists():
        steps |= {"prompts_per_step": 8, "lora_r": 8, "rows_at_once": 128}
        table = pd.DataFrame([noise("sort_digits", str(PRETRAINED), **steps)])
        table.to_csv(TABLES / "noise_pretrained.csv", index=False, float_format="%.4g")


def main(bases: bool = False, answer: tuple[str, str] | None = None) -> None:
    """Make the base models and measure the noise of both arms at each.

    Args:
        bases: Only make base models, those of question 12 too.
        answer: Judge finished runs instead. The commits of the code that ran on the twelve bases and on the
            pretrained model.
    """
    if answer:
        judge(*answer)
    elif bases:
        for task, lengths in (UPDATES | {"countdown": COUNTDOWN}).items():
            for seed, updates in enumerate(lengths, 1):
                make_base(task, seed, updates)
    else:
        measure()


if __name__ == "__main__":
    tyro.cli(main)
