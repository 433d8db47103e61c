"""Searches for a formula that fits your points, by policy gradients on a tiny model that has read random formulas.

    python recipes/formulas/search.py --data points.csv

The first line of the file names its columns. The last column is what the formula is to give, and the others, at
most three, are its variables. Formulas are made of + - * / sin cos exp log and the variables, without numbers: a
constant such as 2 must be built, as (x + x) / x. Look for `best`, the formula, and `error`, its NRMSE.
"""

# /// script
# requires-python = ">=3.10"
# dependencies = ["tokenrl-lm"]
# [tool.uv.sources]
# tokenrl-lm = { path = "../..", editable = true }
# ///

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import tyro
from formulas import ARITY, BINARY, LONGEST, UNARY, infix, rule

import tokenrl
from toy_tasks.models import TinyModel

PROGRAM = Path(__file__).with_name("formulas.py")
SOLVED = 1 / (1 + 1e-12)
"""The reward of a formula whose NRMSE is 1e-12: it is taken to be exact."""
ESTIMATOR = "max_at_k,objective_order=20,entropy_coef=0.005"


def random_formulas(variables: str, count: int, seed: int) -> list[str]:
    """Return random formulas of some variables, as the rule allows them.

    Each token is binary, unary or a variable with chances of about .4, .15 and .45, so that .95 arguments open for each
    that closes. Equal chances of all tokens would give hardly any formula of fewer than 30 tokens.
    """
    automaton = rule({"variables": variables})
    chances = dict.fromkeys(BINARY, 0.1) | dict.fromkeys(UNARY, 0.15 / 4)
    chances |= dict.fromkeys(variables, 0.45 / len(variables))
    draw = random.Random(seed)
    formulas: list[str] = []
    while len(formulas) < count:
        state, formula = 0, ""
        while (edges := automaton.edges[state]) and len(formula) < LONGEST:
            (token,) = draw.choices([*edges], [chances[token] for token in edges])
            state, formula = edges[token], formula + token
        if state in automaton.accepting:
            formulas.append(formula)
    return formulas


def new_model(variables: str, seed: int) -> Any:
    """Return a model of two layers with random weights that writes formulas, and its tokenizer."""
    return TinyModel((*ARITY, *variables, ">"), hidden=32, context=LONGEST + 16)(seed)


def prior(variables: str, output_dir: str | Path, *, seed: int = 0) -> str:
    """Train a model on random formulas, and return the directory of its run.

    Args:
        variables: the names of the variables, a letter for each.
        output_dir: directory of the run; one that has ended there is taken as it is.
        seed: seed of the formulas, of their order and of the first weights.
    """
    formulas = random_formulas(variables, 20_000, seed)
    run = tokenrl.sft(
        task=[{"prompt": ">", "completion": formula} for formula in formulas],
        model=new_model(variables, seed),
        output_dir=str(output_dir),
        resume="auto",
        max_steps=300,
        batch_size=64,
        learning_rate=3e-3,
        seed=seed,
    )
    if run.exit_code:
        raise SystemExit(f"{output_dir} was stopped; the same command goes on.")
    return str(output_dir)


def searched(
    row: Mapping[str, Any],
    output_dir: str | Path,
    *,
    model: Any,
    estimator: str = ESTIMATOR,
    formulas: int = 200_000,
    batch: int = 500,
    learning_rate: float = 2e-3,
    seed: int = 0,
    **settings: Any,
) -> tokenrl.RunResult:
    """Search for a formula, and return the run.

    Args:
        row: the names of the variables, the values of each at the points, and the `target` there.
        output_dir: directory of the run, which goes on where one was stopped there.
        model: the model to start from, such as `prior` or `new_model` return.
        estimator: the estimator, such as dsr or rloo.
        formulas: the most formulas that are sampled.
        batch: formulas of a step.
        learning_rate: the learning rate, which is constant.
        seed: seed of the sampling.
        settings: other settings of `tokenrl.train`, which come first.
    """
    rows = [{"prompt": ">", **row}]
    return tokenrl.train(
        **{
            "task": {"train": rows, "test": rows},
            "reward": f"{PROGRAM}:fit",
            "stop_at_reward": SOLVED,
            "allowed": f"{PROGRAM}:rule",
            "model": model,
            "estimator": estimator,
            "prompts_per_step": 1,
            "num_generations": batch,
            "max_steps": formulas // batch,
            "max_completion_length": LONGEST + 1,
            "learning_rate": learning_rate,
            "lr_scheduler_type": "constant",
            "eval_generations": 0,
            "eval_every": 0,
            "stop_after_zero_spread": 0,
            "seed": seed,
            "output_dir": str(output_dir),
            "resume": "auto",
            **settings,
        }
    )


def read_points(data: str | Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the row of a file of points, and the name of the column of each variable.

    Raises:
        SystemExit: the file does not have two to four columns of numbers without gaps.
    """
    points = pd.read_csv(data).apply(pd.to_numeric, errors="coerce")
    if not 2 <= len(points.columns) <= 4 or points.isna().any(axis=None):
        raise SystemExit(
            f"{data} has the columns {', '.join(points.columns)}, and {points.isna().sum().sum()} cells without a "
            "number. Give one to three columns of variables and then the target, with a number in each cell."
        )
    *names, _ = points.columns
    variables = "xyz"[: len(names)]
    columns = zip((*variables, "target"), points.columns, strict=True)
    row = {"variables": variables, **{letter: points[name].tolist() for letter, name in columns}}
    return row, dict(zip(variables, names, strict=True))


def main(
    data: str,
    estimator: str = ESTIMATOR,
    formulas: int = 200_000,
    learning_rate: float = 2e-3,
    from_prior: bool = True,
    seed: int = 0,
    output_dir: str = "runs/formulas/own",
) -> None:
    """Search for a formula of your points.

    Args:
        data: file of comma-separated values, with names of the columns in its first line.
        estimator: the estimator, such as dsr or rloo.
        formulas: the most formulas that are sampled.
        learning_rate: the learning rate, which is constant.
        from_prior: start from a model that has read random formulas, most of them short; else from random weights,
            whose formulas have nearly all 30 tokens.
        seed: seed of the run.
        output_dir: directory of the prior and of the search; the same command goes on there after a kill.
    """
    row, names = read_points(data)
    model = new_model(row["variables"], seed)
    if from_prior:
        model = prior(row["variables"], f"{output_dir}/prior", seed=seed)
    run = searched(
        row,
        f"{output_dir}/search",
        model=model,
        estimator=estimator,
        formulas=formulas,
        learning_rate=learning_rate,
        seed=seed,
    )
    for best in run.best_completions:
        error = 1 / best["reward"] - 1
        print(json.dumps({"best": infix(best["completion"], names), "error": error}))


if __name__ == "__main__":
    tyro.cli(main)
