"""One score per arm over several tasks: interquartile means and performance profiles, computed by rliable.

    python recipes/study/overall_scores.py runs/compared     of a comparison by `tokenrl compare`
    python recipes/study/overall_scores.py runs/compared --metric reward_greedy

Scores are normalised to the range that each task's reward declares; the last columns are the shares of runs
above a score (a performance profile). rliable resamples the runs of each task (a stratified bootstrap) and
does not pair arms by seed, so two arms whose intervals overlap may still differ; with fewer than ten runs per
task the intervals are too narrow. What decides are the paired differences in the comparison's own report.
"""

# /// script
# requires-python = ">=3.10"
# dependencies = ["tokenrl-lm", "rliable", "pandas<3"]
# [tool.uv.sources]
# tokenrl-lm = { path = "../..", editable = true }
# ///

import json
from pathlib import Path

import numpy as np
import pandas as pd
import tyro

GRID = np.linspace(0, 1, 6)
"""Scores above which the share of runs is counted."""


def main(comparison: tyro.conf.Positional[Path], metric: str = "area") -> None:
    try:
        from rliable import library, metrics
    except (ImportError, TypeError) as error:  # with pandas 3 it cannot be imported either
        raise SystemExit("This recipe needs rliable: pip install rliable 'pandas<3'") from error
    runs = pd.read_csv(comparison / "runs.csv").query("role == 'comparison'")
    for problem in json.loads((comparison / "plan.json").read_text())["plan"]["problems"]:
        low, high = problem["reward_range"] or (np.nan, np.nan)
        runs.loc[runs["problem"] == problem["label"], "score"] = (runs[metric] - low) / (high - low)
    if runs["score"].isna().any():
        raise SystemExit(
            f"Each run needs the score {metric}, and each task a reward with a declared range."
        )
    table = runs.pivot(index=["arm", "seed"], columns="problem", values="score")
    # [runs, tasks]
    scores = {arm: of_arm.to_numpy() for arm, of_arm in table.groupby("arm", sort=False)}
    np.random.seed(0)  # rliable draws from this generator
    means, ends = library.get_interval_estimates(
        scores, lambda x: np.array([metrics.aggregate_iqm(x)])
    )
    shares, _ = library.create_performance_profile(scores, GRID)
    rows = {arm: [means[arm][0], *ends[arm][:, 0], *shares[arm]] for arm in scores}
    columns = ["interquartile mean", "low", "high", *(f"above {score:.1f}" for score in GRID)]
    print(
        pd.DataFrame.from_dict(rows, orient="index", columns=columns).to_string(float_format="%.3f")
    )


if __name__ == "__main__":
    tyro.cli(main)
