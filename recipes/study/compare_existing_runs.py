"""Judge runs that exist already: which settings are better, paired by seed?

    python recipes/study/compare_existing_runs.py runs/*
    python recipes/study/compare_existing_runs.py runs/* --margin 0.02 --failure-below 0.2

The directories are those that `tokenrl train` or `tokenrl control` wrote. Runs with equal settings but for
their seeds are an arm; an arm is named by the settings in which it differs from others. The score of a run is
its mean held-out reward over all evaluations but the one before training, so give runs of equal length, with
equally many samples per step. Runs that somebody has looked at before deciding what to compare give
exploratory verdicts: repeat them with `tokenrl compare`, which plans arms and seeds before it makes any run.
"""

# /// script
# requires-python = ">=3.10"
# dependencies = ["tokenrl-lm"]
# [tool.uv.sources]
# tokenrl-lm = { path = "../..", editable = true }
# ///

from pathlib import Path
from statistics import fmean

import pandas as pd
import tyro

from tokenrl.lab import judge_scores
from tokenrl.runs import ended_by_itself, read_run

NO_SETTINGS = ("seed", "output_dir", "title", "command", "versions", "resume", "overwrite", "quiet")
NO_SETTINGS += ("code", "warm_started")


def main(
    directories: tyro.conf.Positional[tuple[Path, ...]],
    margin: float | None = None,
    failure_below: float | None = None,
) -> None:
    runs = [read_run(path) for path in directories if (path / "metrics.jsonl").is_file()]
    # one column per axis or setting
    settings = pd.json_normalize([run.config for run in runs]).astype(str)
    names = [name for name in settings if settings[name].nunique() > 1]
    names = [name for name in names if name.partition(".")[0] not in NO_SETTINGS]
    rows = []
    for run, values in zip(runs, settings[names].to_dict("records"), strict=True):
        rewards = [row["reward"] for row in run.evaluations[1:]]
        rows.append(
            {
                "arm": ", ".join(f"{name}={value}" for name, value in values.items()) or "all runs",
                "seed": run.config["seed"],
                "score": fmean(rewards) if rewards else float("nan"),
                "failed": not ended_by_itself(run.summary),
            }
        )
    (family,) = judge_scores(rows, margin=margin, failure_below=failure_below).families
    for arm in family.arms:
        print(f"{arm.mean:8.4f}  {arm.count} failed  {arm.arm}")
    print(family.headline(), *family.sentences(), sep="\n")


if __name__ == "__main__":
    tyro.cli(main)
