"""Searches for the twelve formulas of Nguyen by policy gradients on a tiny model that starts with random weights.

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
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tyro
from formulas import fit

import tokenrl

TOKENS = "+-*/scelxy>"
SOLVED = 1 / (1 + 1e-12)


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
        """Return the row of the data: the prompt, the variables, and their values and the formula's at points."""
        generator = np.random.default_rng(seed)
        columns = {name: generator.uniform(self.low, self.high, points) for name in self.variables}
        target = self.formula(**columns)
        lists = {name: x.tolist() for name, x in columns.items()}
        return {"prompt": TOKENS, "variables": self.variables, **lists, "target": target.tolist()}


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
    estimator: str = "max_at_k,objective_order=25",
    formulas: int = 50_000,
    batch: int = 500,
    learning_rate: float = 5e-4,
    seed: int = 0,
    output_dir: str = "runs/formulas",
) -> None:
    """Search for a formula.

    Args:
        problem: number of the problem, from 1 to 12.
        estimator: the estimator, such as dsr or rloo.
        formulas: the most formulas that are sampled.
        batch: formulas of a step.
        learning_rate: the learning rate, which is constant.
        seed: seed of the points and of the run.
        output_dir: directory of the run, which is replaced.
    """
    row = PROBLEMS[problem].row(seed)
    program = Path(__file__).with_name("formulas.py")
    run = tokenrl.train(
        task={"train": [row], "test": [row]},
        reward=f"{program}:fit",
        stop_at_reward=SOLVED,
        allowed=f"{program}:rule",
        model="tiny",
        estimator=estimator,
        prompts_per_step=1,
        num_generations=batch,
        max_steps=formulas // batch,
        max_completion_length=31,
        learning_rate=learning_rate,
        lr_scheduler_type="constant",
        eval_generations=0,
        eval_every=0,
        stop_after_zero_spread=0,
        seed=seed,
        output_dir=output_dir,
        overwrite=True,
    )
    best = run.best_completions[0]
    fresh = PROBLEMS[problem].row(seed + 1, points=1000)
    columns = {name: [value] for name, value in fresh.items() if name != "prompt"}
    result = {
        "problem": problem,
        "formulas": run.completions_until_solved,
        "best": best["completion"],
        "reward": best["reward"],
        "recovered": fit([best["completion"]], **columns)[0] >= 1 - 1e-9,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    tyro.cli(main)
