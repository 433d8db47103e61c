"""Searches for the twelve formulas of Nguyen by policy gradients on a tiny model that starts with random weights.

    python recipes/formulas/nguyen.py --problem 5 --estimator max_at_k,objective_order=25

The problems and what counts as solved are those of Deep Symbolic Regression (Petersen et al. 2021, arXiv 1912.04871):
20 points drawn evenly from an interval, and an NRMSE below 1e-12.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import tokenrl

HERE = Path(__file__).parent
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
        columns = {
            name: generator.uniform(self.low, self.high, points) for name in self.variables
        }
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


def main() -> None:
    """Train on one problem."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--problem", type=int, choices=PROBLEMS, default=1)
    parser.add_argument("--estimator", default="max_at_k,objective_order=25")
    parser.add_argument("--formulas", type=int, default=50_000)
    parser.add_argument("--batch", type=int, default=500)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--entropy", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output-dir")
    args = parser.parse_args()
    row = PROBLEMS[args.problem].row(args.seed)
    folder = args.output_dir or f"runs/formulas/{args.problem}-{args.estimator}-{args.seed}"
    estimator = tokenrl.Estimator.preset(args.estimator, entropy_coef=args.entropy)
    run = tokenrl.train(
        task={"train": [row], "test": [row]},
        reward=f"{HERE / 'formulas.py'}:fit",
        allowed=f"{HERE / 'formulas.py'}:rule",
        model="tiny",
        estimator=estimator,
        prompts_per_step=1,
        num_generations=args.batch,
        max_steps=args.formulas // args.batch,
        max_completion_length=31,
        learning_rate=args.learning_rate,
        lr_scheduler_type="constant",
        eval_generations=0,
        eval_every=0,
        stop_after_zero_spread=0,
        seed=args.seed,
        output_dir=folder,
        overwrite=True,
    )
    print(json.dumps({"problem": args.problem, "exit": run.exit_reason, "steps": run.steps}))


if __name__ == "__main__":
    main()
