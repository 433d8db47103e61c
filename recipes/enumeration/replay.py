"""Says what replayed completions do to the expected gradient, by enumeration in float64.

    python recipes/enumeration/replay.py

Two completions are sampled from an older policy and go into the replay of `tokenrl train`. A completion that it keeps,
drawn with equal probabilities, is learnt from under the present policy. All pairs are listed, so the expected gradient
of that row is exact. Look at the bias, its distance from the gradient of the mean reward relative to the length of the
latter. The row is weighted by the importance of the estimator. `recipes/pages/explain/off_policy.md` has the text.
"""

# /// script
# requires-python = ">=3.10"
# dependencies = ["tokenrl-lm"]
# [tool.uv.sources]
# tokenrl-lm = { path = "../..", editable = true }
# ///

from dataclasses import replace
from itertools import product
from statistics import median

import torch
import tyro

from tokenrl import Estimator
from tokenrl.lab import Perturbation, Problem, exact_moments, perturbed_problem

WEIGHTS = ("none", "token", "sequence")


def replayed(problem: Problem, capacity: int) -> Problem:
    """Return the problem in which its sampler draws two completions, and one of the best `capacity` is learnt from."""
    rewards = problem.totals[0]
    chances = problem.of_sampler.chances[0]
    shares = torch.zeros_like(chances)  # how often each completion is the replayed one
    for pair in product(range(len(chances)), repeat=2):
        kept = sorted(set(pair), key=lambda number: -rewards[number])[:capacity]
        shares[kept] += chances[list(pair)].prod() / len(kept)
    return replace(problem, environment=shares / chances)


def bias(seed: int, weights: str, capacity: int) -> float:
    """Return the relative bias of the expected gradient of a replayed row.

    Args:
        seed: seed of both policies and of the rewards.
        weights: the importance of the estimator.
        capacity: completions that are kept: with 1 the better of two, with 2 both.
    """
    problem = perturbed_problem(seed, Perturbation(noise=0.5), group_size=1)
    estimator = Estimator.preset("reinforce", importance=weights)
    gradient = exact_moments(estimator, replayed(problem, capacity)).mean.sum(0)
    true = problem.gradient().sum(0)
    return float((gradient - true).norm() / true.norm())


def main(problems: int = 20) -> None:
    """Print the median bias over random problems.

    Args:
        problems: number of problems.
    """
    print(f"{'importance':12} {'the better is kept':>20} {'both are kept':>16}")
    for weights in WEIGHTS:
        better, both = (
            median(bias(seed, weights, capacity) for seed in range(problems)) for capacity in (1, 2)
        )
        print(f"{weights:12} {better:20.3f} {both:16.3f}")


if __name__ == "__main__":
    tyro.cli(main)
