"""Answers three questions on groups of completions by exact sums, in float64, and draws a figure.

    python recipes/enumeration/groups.py

`bias` asks what the advantage of a row is on average, and what that does to the gradient. `branches` asks whether
values of prefixes from sampled continuations are worth their tokens. `means` follows the exact gradient of three
divisors where right answers are short, long, or both; `--figure` draws it. The page is
`recipes/pages/explain/groups.md`.
"""

# /// script
# requires-python = ">=3.10"
# dependencies = ["tokenrl-lm"]
# [tool.uv.sources]
# tokenrl-lm = { path = "../..", editable = true }
# ///

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import tyro
from answers import of_groups, rloo
from figures import program, save, show
from matplotlib.figure import Figure
from scipy import stats
from torch import Tensor

from tokenrl.lab import Problem, all_completions, prompt_weight, tabular_problem

FIGURE = Path(__file__).parents[1] / "figures" / "token_mean.png"
SIZE = 8
"""Completions of a group of RLOO that is compared with branches."""
LONG = 6
"""Tokens of a long answer; a short one has one token."""
STEPS, RATE = 400, 0.1
DIVISORS = {
    "sum": ("#0072B2", "-"),
    "mean over all tokens": ("#E69F00", ":"),
    "mean of each completion": ("#D55E00", "-"),
}
"""The divisors of a sum over tokens, with the colours and lines of the figure."""
LENGTHS = torch.tensor([1.0, LONG, 1.0, LONG], dtype=torch.double)
"""Tokens of the four answers: short and long ones, twice."""


def bias(_: int) -> None:
    """The advantage of a row on average, in groups whose rewards differ; and the factor beside grad p."""

    def advantages(p: float, size: int, _: int) -> dict[str, float]:
        right, wrong = mixed_mean(p, size), -mixed_mean(1 - p, size)
        return {
            "right": right,
            "1 - p": 1 - p,
            "wrong": wrong,
            "-p": -p,
            "/ grad p": float(prompt_weight("rloo", p, size)),
        }

    sizes = ((0.1, 4), (0.1, 8), (0.5, 4), (0.9, 4), (0.02, 16))
    rows = {f"p {p:g}, group of {size}": partial(advantages, p, size) for p, size in sizes}
    show("Reward less the mean of the group, where rewards of 0 and 1 differ", rows, 1)


def mixed_mean(p: float, size: int) -> float:
    """Return the mean of 1 less the group's mean for a right row of a group that has a wrong one."""
    others = np.arange(size - 1)  # that are right, of the other rows
    chances = stats.binom.pmf(others, size - 1, p)
    return np.average(1 - (others + 1) / size, weights=chances)


class Prefixes(NamedTuple):
    """What a completion has at each of its prefixes; each is a tensor [M, T].

    Attributes:
        value: the mean reward of completions that begin with the prefix.
        variance: the variance of that reward.
        remaining: the mean number of tokens that follow.
    """

    value: Tensor
    variance: Tensor
    remaining: Tensor


def prefixes_of(problem: Problem, ids: Tensor) -> Prefixes:
    """Sum over the completions that share each prefix; `ids` [M, T] number the prefixes."""
    chances, lengths = problem.chances[0], problem.mask.sum(-1)
    rewards = problem.totals[0]
    sums = torch.zeros(4, int(ids.max()) + 1, dtype=torch.double)
    for t in range(ids.shape[1]):
        columns = torch.stack([torch.ones_like(rewards), rewards, rewards**2, lengths - t])
        sums.index_add_(1, ids[:, t], columns * chances * problem.mask[:, t])
    value, square, remaining = (sums[1:] / sums[0])[:, ids] * problem.mask
    return Prefixes(value, square - value**2, remaining)


def branch_cost(problem: Problem, branches: int) -> float:
    """Return noise times tokens of a completion whose prefixes are valued by sampled continuations.

    The advantage of a token is the value after it less the value before it. Each value is the mean reward of
    `branches` continuations of its own; with 0 branches values are exact and cost nothing.
    """
    chances, scores = problem.chances[0], problem.scores[0]
    prefixes = prefixes_of(problem, all_completions(3, problem.mask.shape[1]).prefix)
    following = torch.zeros_like(prefixes.value)
    following[:, :-1] = prefixes.value[:, 1:]
    last = problem.mask.sum(-1).long() - 1
    following[torch.arange(len(last)), last] = problem.totals[0]
    advantages = (following - prefixes.value) * problem.mask
    gradients = torch.einsum("mt,mtd->md", advantages, scores)
    signal = float((chances @ gradients).square().sum())
    variance = float(chances @ gradients.square().sum(-1)) - signal
    tokens = float(chances @ problem.mask.sum(-1))
    if branches:
        slopes = scores.clone()  # of the negative value of each prefix
        slopes[:, 1:] -= scores[:, :-1]
        slopes = slopes * problem.mask[..., None]
        spread = prefixes.variance / branches * slopes.square().sum(-1)
        variance += float(chances @ spread.sum(-1))
        tokens += branches * float(chances @ prefixes.remaining.sum(-1))
    return variance / signal * tokens


def branches(problems: int) -> None:
    """Noise times sampled tokens: the tokens that a signal-to-noise ratio of 1 takes."""

    def costs(length: int, seed: int) -> dict[str, float]:
        problem = tabular_problem(seed, length=length, rewards="binary")
        tokens = SIZE * float(problem.chances[0] @ problem.mask.sum(-1))
        group = of_groups(rloo, problem, SIZE).noise * tokens
        one, four, exact = (branch_cost(problem, count) for count in (1, 4, 0))
        named = {f"RLOO of {SIZE}": group, "1 branch": one, "4 branches": four, "exact": exact}
        return named | {"share worse": one > group}

    rows = {f"at most {length} tokens": partial(costs, length) for length in (3, 4, 6)}
    show("Values of prefixes from sampled continuations", rows, problems)


def ascent(rewards: Tensor, divisor: str) -> Tensor:
    """Follow the exact gradient of a divisor on four answers; returns their probabilities by step [S, 4].

    The answers are short and long ones, of which `rewards` [4] says which are right. A policy chooses between the
    four at once, so that an answer's score counts once. The baseline is the mean reward.
    """
    logits = torch.zeros(4, dtype=torch.double)
    path = []
    for _ in range(STEPS):
        p = logits.softmax(0)
        path.append(p)
        divisors = {
            "sum": torch.ones_like(p),
            "mean over all tokens": (p @ LENGTHS).expand(4),
            "mean of each completion": LENGTHS,
        }
        weights = p * (rewards - p @ rewards) / divisors[divisor]
        logits = logits + RATE * (weights - p * weights.sum())
    return torch.stack(path)


CASES = {
    "right answers are short": (1.0, 0.0, 0.0, 0.0),
    "right answers are long": (0.0, 1.0, 0.0, 0.0),
    "short and long ones are right": (1.0, 1.0, 0.0, 0.0),
}
"""The rewards of a short and a long answer, then of a short and a long wrong one."""


def means(_: int) -> None:
    """What each divisor makes of four answers after 400 steps of its exact gradient."""

    def shares(rewards: tuple[float, ...], divisor: str, _: int) -> dict[str, float]:
        p = ascent(torch.tensor(rewards, dtype=torch.double), divisor)[-1]
        right = torch.tensor(rewards).bool()
        is_long = LENGTHS == LONG
        named = {"right": p[right].sum()}
        named["long | right"] = p[right & is_long].sum() / p[right].sum()
        named["long | wrong"] = p[~right & is_long].sum() / p[~right].sum()
        return {name: float(share) for name, share in named.items()}

    rows = {
        f"{case}, {divisor}": partial(shares, rewards, divisor)
        for case, rewards in CASES.items()
        for divisor in DIVISORS
    }
    show(f"After {STEPS} steps of the expected gradient", rows, 1)


def draw(_: int) -> None:
    """Draw the mean length by the probability of a right answer, along the ascent of each divisor."""
    figure = Figure(figsize=(9, 3.2), dpi=110, layout="constrained")
    panels = figure.subplots(1, 3, sharey=True)
    for axes, (case, rewards) in zip(panels, CASES.items(), strict=True):
        for divisor, (colour, line) in DIVISORS.items():
            path = ascent(torch.tensor(rewards, dtype=torch.double), divisor)
            right = path @ torch.tensor(rewards, dtype=torch.double)
            axes.plot(right, path @ LENGTHS, line, color=colour, label=divisor, linewidth=2)
        axes.set(xlabel="probability to be right", title=case, xlim=(0, 1))
    panels[0].set(ylabel="mean length, tokens", ylim=(0, LONG))
    panels[0].legend(frameon=False)
    save(figure, FIGURE)


main = program(bias, branches, means, figure_of=draw)


if __name__ == "__main__":
    tyro.cli(main)
