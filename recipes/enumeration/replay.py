"""Says what replayed completions do to the expected gradient, by enumeration in float64.

    python recipes/enumeration/replay.py

Some completions are sampled from an older policy and go into the replay of `tokenrl train`, which keeps each text once.
One of the texts that it keeps, drawn with equal probabilities, is learnt from under the present policy. All sets of
texts are listed, so the expected gradient of that row is exact. Look at the bias, its distance from the gradient of the
mean reward relative to the length of the latter. The row is weighted by the importance of the estimator.
`recipes/pages/explain/off_policy.md` has the text.
"""

# /// script
# requires-python = ">=3.10"
# dependencies = ["tokenrl-lm"]
# [tool.uv.sources]
# tokenrl-lm = { path = "../..", editable = true }
# ///

from dataclasses import replace
from functools import partial

import numpy as np
import torch
import tyro
from figures import show

from tokenrl import Estimator
from tokenrl.lab import Perturbation, Problem, exact_moments, perturbed_problem

WEIGHTS = ("none", "token", "sequence")
CASES = {"best of 2": (2, 1), "both of 2": (2, 2)} | {f"all of {n}": (n, n) for n in (3, 8, 32)}
"""How many completions are sampled, and the most texts that are kept of them."""


def replayed(problem: Problem, samples: int, capacity: int) -> Problem:
    """Return the problem in which the row that is learnt from is one of the best distinct texts of its sampler.

    Args:
        problem: its sampler draws the completions.
        samples: completions that are sampled.
        capacity: the most texts that are kept; each is learnt from equally often.
    """
    rewards = problem.totals[0].tolist()
    chances = problem.of_sampler.chances[0].numpy()
    texts = len(chances)
    sets = (
        np.arange(2**texts)[:, None] >> np.arange(texts) & 1
    )  # [2^M, M], by the bits of its number
    # A set is what was sampled if all samples are in it, and in none of the smaller ones.
    probabilities = (sets @ chances) ** samples
    for bit in range(texts):
        halves = probabilities.reshape(-1, 2, 2**bit)
        halves[:, 1] -= halves[:, 0]
    best_first = sorted(range(texts), key=lambda text: -rewards[text])
    ranked = sets[:, best_first]
    kept = ranked * (ranked.cumsum(1) <= capacity)
    shares = np.empty(texts)
    shares[best_first] = probabilities[1:] @ (kept[1:] / kept[1:].sum(1, keepdims=True))
    return replace(problem, environment=torch.from_numpy(shares / chances))


def bias(problem: Problem, row: Problem, weights: str) -> float:
    """Return the relative bias of the expected gradient of the row that is learnt from.

    Args:
        problem: the problem, whose gradient is wanted.
        row: the same, as `replayed` returns it.
        weights: the importance of the estimator.
    """
    estimator = Estimator.preset("reinforce", importance=weights)
    return replace(exact_moments(estimator, row), target=problem.gradient()).relative_bias


def main(problems: int = 20) -> None:
    """Print the median bias over random problems.

    Args:
        problems: number of problems.
    """

    def biases(weights: str, seed: int) -> dict[str, float]:
        problem = perturbed_problem(seed, Perturbation(noise=0.5), group_size=1)
        rows = {name: replayed(problem, *case) for name, case in CASES.items()}
        return {name: bias(problem, row, weights) for name, row in rows.items()}

    show("Bias by importance", {x: partial(biases, x) for x in WEIGHTS}, problems)


if __name__ == "__main__":
    tyro.cli(main)
