"""Races estimators to Nguyen's formulas: how many must be sampled until one is exact?

    python recipes/formulas/race.py --part settings     # chooses rate and entropy weight, on problems of Livermore
    python recipes/formulas/race.py --part race         # the runs that are compared
    python recipes/formulas/race.py --part prior        # the same of four arms, from a prior
    python recipes/formulas/race.py --part free         # the same of two arms, without allowed tokens
    python recipes/formulas/race.py --part table        # one arm on all twelve problems

Each run that ends adds a line to `runs/formulas/race.csv`, and the same command again makes the runs that are missing.
The plan is `recipes/study/plans/17_formulas.txt`.
"""

# /// script
# requires-python = ">=3.10"
# dependencies = ["tokenrl-lm"]
# [tool.uv.sources]
# tokenrl-lm = { path = "../..", editable = true }
# ///

from __future__ import annotations

import csv
import os
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import redirect_stdout
from itertools import product
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd
import tyro
from nguyen import LIVERMORE, PROBLEMS
from search import new_model, prior, searched

Part = Literal["settings", "race", "prior", "free", "table"]
ARMS: dict[str, tuple[str, dict[str, Any]]] = {
    "dsr": ("dsr", {}),
    "best of 20": ("max_at_k,objective_order=20", {}),
    "best of 100": ("max_at_k,objective_order=100", {}),
    "running mean": ("reinforce_running_mean", {}),
    "replay": ("rloo", {"replay": 10, "replay_memory": 10}),
    "untrained": ("rloo", {}),
}
"""The estimator of each arm, and its other settings."""
FEWER = range(3)
"""Seeds of the parts `prior` and `free`."""
UNTRAINED = 1e-12
"""A learning rate at which no weight changes."""
GRID = ((5e-4, 0.005), (1e-3, 0.005), (2e-3, 0.005), (1e-3, 0.0))
"""The rates and the weights of the entropy bonus that each arm tries."""


class Run(NamedTuple):
    """What names a run; its budget is the most formulas that it samples."""

    part: str
    arm: str
    problem: int
    seed: int
    budget: int
    rate: float
    entropy: float


def rows_of(part: str, table: Path) -> pd.DataFrame:
    """Return the rows of a part, with log10 of the formulas, or of the budget where a run is not solved."""
    rows = pd.read_csv(table).query("part == @part")
    return rows.assign(log=np.log10(rows["formulas"].fillna(rows["budget"])))


def chosen(table: Path) -> dict[str, tuple[float, float]]:
    """Return the rate and the entropy weight of each arm that solved soonest, as the plan says.

    That is the least mean of log10 of the formulas, and of equal means the greatest mean reward of the best formula.
    """
    means = rows_of("settings", table).groupby(["arm", "rate", "entropy"])[["log", "reward"]].mean()
    ranked = means.sort_values(["log", "reward"], ascending=[True, False]).reset_index()
    best = ranked.groupby("arm").first()
    return {arm: (float(row.rate), float(row.entropy)) for arm, row in best.iterrows()}


def winner(table: Path) -> str:
    """Return the arm with the most solved runs of the race; of equal arms the one that solved soonest."""
    arms = rows_of("race", table).groupby("arm")
    ranked = arms.agg({"formulas": "count", "log": "mean"})
    return str(ranked.sort_values(["formulas", "log"], ascending=[False, True]).index[0])


def runs(part: str, table: Path) -> Iterator[Run]:
    """Yield the runs of a part in their order: all of a seed before those of the next."""
    if part == "settings":
        trained = [arm for arm in ARMS if arm != "untrained"]
        for problem, setting, arm in product(LIVERMORE, GRID, trained):
            yield Run(part, arm, problem, 100, 50_000, *setting)
        return
    problems: tuple[int, ...] = (2, 3, 6, 8, 9, 11)
    arms, seeds, budget = list(ARMS), range(5), 60_000
    if part == "free":
        arms, seeds = ["dsr", "best of 20"], FEWER
    elif part == "prior":
        arms, seeds = ["dsr", "best of 20", "running mean", "untrained"], FEWER
    elif part == "table":
        arms, problems, seeds, budget = [winner(table)], tuple(PROBLEMS), range(10, 15), 100_000
    settings = {"untrained": (UNTRAINED, 0.0), **chosen(table)}
    for seed, arm, problem in product(seeds, arms, problems):
        yield Run(part, arm, problem, seed, budget, *settings[arm])


def prior_of(variables: str, seed: int) -> str:
    """Return the directory of the prior of a seed, which is trained where it is missing."""
    folder = f"runs/formulas/prior/{variables}-{seed}"
    if not Path(folder, "summary.json").exists():  # a folder has one user at a time
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
            prior(variables, folder, seed=seed)
    return folder


def result(run: Run) -> dict[str, Any]:
    """Make a run, and return its row of the table."""
    problem = (LIVERMORE if run.part == "settings" else PROBLEMS)[run.problem]
    estimator, settings = ARMS[run.arm]
    if run.part == "free":
        settings = settings | {"allowed": None}
    start = time.monotonic()
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
        make_model = prior_of if run.part == "prior" else new_model
        trained = searched(
            problem.row(run.seed),
            f"runs/formulas/race/{os.getpid()}",
            model=make_model(problem.variables, run.seed),
            estimator=f"{estimator},entropy_coef={run.entropy}",
            formulas=run.budget,
            learning_rate=run.rate,
            seed=run.seed,
            resume=None,
            overwrite=True,
            **settings,
        )
    best = trained.best_completions[0]
    return {
        **run._asdict(),
        "formulas": trained.completions_until_solved,
        "best": best["completion"],
        "reward": best["reward"],
        "recovered": problem.is_recovered(best["completion"], run.seed),
        "seconds": round(time.monotonic() - start, 1),
    }


def missing_runs(part: str, table: Path) -> list[Run]:
    """Return the runs of a part that have no row in a table."""
    rows = csv.DictReader(table.read_text().splitlines())
    ended = {tuple(row[name] for name in Run._fields) for row in rows}
    return [run for run in runs(part, table) if tuple(map(str, run)) not in ended]


def main(part: Part, workers: int = 2, table: Path = Path("runs/formulas/race.csv")) -> None:
    """Make the runs of a part that are missing.

    Args:
        part: the part of the plan.
        workers: runs at a time.
        table: file of the rows, which is added to.
    """
    columns = [*Run._fields, "formulas", "best", "reward", "recovered", "seconds"]
    if not table.exists():
        table.parent.mkdir(parents=True, exist_ok=True)
        table.write_text(",".join(columns) + "\n")
    missing = missing_runs(part, table)
    starts = {(PROBLEMS[run.problem].variables, run.seed) for run in missing if run.part == "prior"}
    with ProcessPoolExecutor(workers) as pool, table.open("a", newline="") as file:
        # each by one process, before the runs that share them
        list(pool.map(prior_of, *zip(*sorted(starts), strict=True)) if starts else [])
        futures = [pool.submit(result, run) for run in missing]
        try:
            for number, future in enumerate(as_completed(futures)):
                csv.DictWriter(file, columns, lineterminator="\n").writerow(future.result())
                file.flush()
                print(f"{number + 1} of {len(missing)} runs", flush=True)
        finally:
            pool.shutdown(cancel_futures=True)


if __name__ == "__main__":
    tyro.cli(main)
