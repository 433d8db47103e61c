"""Searches for the twelve formulas of Nguyen by policy gradients on a tiny model with random weights.

    python recipes/formulas/nguyen.py --problem 5 --estimator dsr

The problems and what counts as solved are those of Deep Symbolic Regression (Petersen et al. 2021, arXiv 1912.04871):
20 points drawn evenly from an interval, and an NRMSE below 1e-12. A formula that reaches it is tried at 1,000 other
points. Look for `formulas`, how many were sampled until then, and `recovered`.
"""

# /// script
# requires-python = ">=3.10"
# dependencies = ["tokenrl-lm"]
# [tool.uv.sources]
# tokenrl-lm = { path = "../..", editable = true }
# ///

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import tyro
from formulas import fit
from search import ESTIMATOR, new_model, searched


class Problem(NamedTuple):
    """A formula and the interval of its variables."""

    formula: Callable[..., Any]
    low: float
    high: float

    @property
    def variables(self) -> str:
        """The names of its variables."""
        return "xy"[: self.formula.__code__.co_argcount]

    def row(self, seed: int, points: int = 20) -> dict[str, Any]:
        """Return the row of the data: the variables, and their values and the formula's at points."""
        generator = np.random.default_rng(seed)
        columns = {name: generator.uniform(self.low, self.high, points) for name in self.variables}
        target = self.formula(**columns)
        lists = {name: x.tolist() for name, x in columns.items()}
        return {"variables": self.variables, **lists, "target": target.tolist()}

    def is_recovered(self, formula: str, seed: int) -> bool:
        """Return whether a formula in prefix notation is this one also at 1,000 other points."""
        columns = {name: [value] for name, value in self.row(seed + 1, points=1000).items()}
        return fit([formula], **columns)[0] >= 1 - 1e-9


PROBLEMS = {
    1: Problem(lambda x: x**3 + x**2 + x, -1, 1),
    2: Problem(lambda x: x**4 + x**3 + x**2 + x, -1, 1),
    3: Problem(lambda x: x**5 + x**4 + x**3 + x**2 + x, -1, 1),
    4: Problem(lambda x: x**6 + x**5 + x**4 + x**3 + x**2 + x, -1, 1),
    5: Problem(lambda x: np.sin(x**2) * np.cos(x) - 1, -1, 1),
    6: Problem(lambda x: np.sin(x) + np.sin(x + x**2), -1, 1),
    7: Problem(lambda x: np.log(x + 1) + np.log(x**2 + 1), 0, 2),
    8: Problem(lambda x: np.sqrt(x), 0, 4),
    9: Problem(lambda x, y: np.sin(x) + np.sin(y**2), 0, 1),
    10: Problem(lambda x, y: 2 * np.sin(x) * np.cos(y), 0, 1),
    11: Problem(lambda x, y: x**y, 0, 1),
    12: Problem(lambda x, y: x**4 - x**3 + y**2 / 2 - y, 0, 1),
}


def main(
    problem: int = 1,
    estimator: str = ESTIMATOR,
    formulas: int = 200_000,
    learning_rate: float = 2e-3,
    seed: int = 0,
    output_dir: str = "runs/formulas/nguyen",
) -> None:
    """Search for a formula.

    Args:
        problem: number of the problem, from 1 to 12.
        estimator: the estimator, such as dsr or rloo.
        formulas: the most formulas that are sampled.
        learning_rate: the learning rate, which is constant.
        seed: seed of the points and of the run.
        output_dir: directory of the run; the same command goes on there after a kill.
    """
    row = PROBLEMS[problem].row(seed)
    run = searched(
        row,
        output_dir,
        model=new_model(row["variables"], seed),
        estimator=estimator,
        formulas=formulas,
        learning_rate=learning_rate,
        seed=seed,
    )
    best = run.best_completions[0]
    result = {
        "problem": problem,
        "formulas": run.completions_until_solved,
        "best": best["completion"],
        "reward": best["reward"],
        "recovered": PROBLEMS[problem].is_recovered(best["completion"], seed),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    tyro.cli(main)
