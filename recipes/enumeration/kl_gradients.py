"""Compares what toolkits add to the loss for a KL with the gradient of the KL of whole completions, in float64.

    python recipes/enumeration/kl_gradients.py

A completion has up to three tokens of three, and its policy is a random distance away from the reference. Each row
has the medians over 20 such problems, whose prefixes have logits of their own, and the worst problem. Look at the
error: the length of the difference between the expected gradient and the true one, over the length of the true one.
The figure shows how the error grows with the distance. The page is `recipes/pages/explain/kl.md`.
"""

# /// script
# requires-python = ">=3.10"
# dependencies = ["tokenrl-lm"]
# [tool.uv.sources]
# tokenrl-lm = { path = "../..", editable = true }
# ///

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import tyro
from figures import program, save, show
from matplotlib.figure import Figure
from torch import Tensor

from tokenrl import Estimator
from tokenrl.lab import Moments, Problem, all_completions, exact_moments, tabular_problem

FIGURE = Path(__file__).parents[1] / "figures" / "kl_gradients.png"
DISTANCES = (0.03, 0.1, 0.3, 1.0, 2.0)
"""Standard deviations of the difference between the logits of policy and reference."""
PLACES = {
    "k1 in the reward": {"kl_estimator": "k1", "kl_placement": "reward"},
    "k1 in the loss": {"kl_estimator": "k1", "kl_placement": "loss"},
    "k2 in the loss": {"kl_estimator": "k2", "kl_placement": "loss"},
    "k3 in the loss": {"kl_estimator": "k3", "kl_placement": "loss"},
    "closed form, with its path": {"kl_estimator": "closed_form_path", "kl_placement": "loss"},
    "full path in the loss": {"kl_estimator": "full_path", "kl_placement": "loss"},
    "k2 of the whole sequence": {"kl_estimator": "k2_sequence", "kl_placement": "loss"},
}
SIZE = 4
"""Completions of a group, for the noise."""


def apart(
    seed: int, distance: float = 1.0, length: int = 3, ends: tuple[int, ...] = (0,)
) -> Problem:
    """List the completions of a random policy at a distance from its reference, with rewards of 0 and 1.

    The reference's logits are the policy's plus `distance` times noise. The tokens of `ends` end a completion.
    """
    rows = all_completions(3, length, ends=ends)
    draw = torch.Generator().manual_seed(seed)
    shape = (2, len(rows.prefixes), 3)
    logits, noise = torch.randn(shape, generator=draw, dtype=torch.double)
    options = {"rows": rows, "logits": logits, "reference": logits + distance * noise}
    return tabular_problem(seed, length=length, rewards="binary", **options)


def kl_gradient(problem: Problem) -> Tensor:
    """Return the gradient [D] of the KL of whole completions to the reference."""
    return (problem.gradient(beta=0.0) - problem.gradient(beta=1.0))[0]


def log_ratios(problem: Problem) -> Tensor:
    """Return k1 of each token [M, T], the log-probability under the policy less that under the reference."""
    return (problem.logprobs - problem.ref_logprobs)[0]


def descent(problem: Problem, weights: Tensor) -> Tensor:
    """Return the expectation [D] of the scores of all tokens, times their weights [M, T]."""
    return torch.einsum(
        "m,mt,mtd->d", problem.chances[0], weights * problem.mask, problem.scores[0]
    )


def of_estimator(problem: Problem, rewards: Tensor, **fields: Any) -> Tensor:
    """Return what an estimator without a baseline descends in expectation, with these rewards [D]."""
    estimator = Estimator(baseline="none", **fields)
    return -exact_moments(estimator, replace(problem, rewards=rewards), group_size=1).mean[0]


def placed(problem: Problem, place: str) -> Tensor:
    """Return what an estimator of tokenrl descends in expectation if it has a KL and no reward [D]."""
    return of_estimator(problem, torch.zeros_like(problem.rewards), beta=1.0, **PLACES[place])


def with_ratio(problem: Problem) -> Tensor:
    """Return the expected gradient [D] of k3 times the ratio to the sampling policy, at a ratio of 1."""
    ratios = (-log_ratios(problem)).exp()
    k3 = ratios - 1 + log_ratios(problem)
    return descent(problem, k3 + 1 - ratios)  # of the ratio, then of k3


def centred(problem: Problem, **credit: Any) -> Tensor:
    """Return the expected gradient [D] of k1 in the advantage, less its mean over all tokens of a large batch."""
    k1, chances = log_ratios(problem), problem.chances[0]
    mean = (chances @ k1.sum(-1)) / (chances @ problem.mask.sum(-1))
    return of_estimator(problem, ((mean - k1) * problem.mask)[None], **credit)


def per_token(problem: Problem) -> Tensor:
    """Return the gradient [D] of the KL per token, times the mean length."""
    chances, lengths = problem.chances[0], problem.mask.sum(-1, keepdim=True)
    mean = (chances @ log_ratios(problem).sum(-1)) / (chances @ lengths[:, 0])
    return kl_gradient(problem) - mean * descent(problem, lengths.expand_as(problem.mask))


FORMS = {place: partial(placed, place=place) for place in PLACES}
FORMS |= {
    "k3 times the ratio": with_ratio,
    "mean - k1 in the advantage": partial(centred, returns="blame_window", window=1),
    "the same, discount 0.9": partial(centred, returns="reward_to_go", gamma=0.9),
    "the same, discount 1": partial(centred, returns="reward_to_go"),
}


def error(gradient: Tensor, target: Tensor) -> float:
    """Return the length of the difference, over that of the target."""
    return float((gradient - target).norm() / target.norm())


def forms(problems: int) -> None:
    """The gradient of each form, beside that of the KL of whole completions and of the KL per token."""

    def beside(form: Callable[[Problem], Tensor], seed: int) -> dict[str, float]:
        problem = apart(seed)
        gradient, target = form(problem), kl_gradient(problem)
        off, cosine = error(gradient, target), float(torch.cosine_similarity(gradient, target, 0))
        named = {"error": off, "worst": off, "least cosine": cosine}
        return named | {"to per token": error(gradient, per_token(problem))}

    rows = {name: partial(beside, form) for name, form in FORMS.items()}
    show("What descends the KL to the reference", rows, problems)


def with_rewards(
    place: str, beta: float, seed: int, baseline: str = "rloo", zero: float = 0.0
) -> Moments:
    """Return the moments of reward and KL together, in groups of four."""
    problem = apart(seed)
    estimator = Estimator(baseline=baseline, beta=beta, **PLACES[place])
    problem = replace(problem, rewards=problem.rewards + zero)
    return exact_moments(estimator, problem, group_size=SIZE)


def noise(problems: int) -> None:
    """Reward and KL together, by RLOO in groups of four: bias and noise of the whole gradient."""

    def measured(place: str, beta: float, seed: int) -> dict[str, float]:
        moments = with_rewards(place, beta, seed)
        bias = moments.relative_bias
        return {"error": bias, "worst": bias, "noise": moments.noise}

    for beta in (0.05, 0.5):
        rows = {
            place: partial(measured, place, beta) for place in PLACES if place != "k1 in the loss"
        }
        show(f"Reward and KL, beta {beta:g}", rows, problems)


def squares(problems: int) -> None:
    """Square losses of the log ratio: what a mean of the other completions does to the noise.

    The loss of a completion is half of `(r / beta - l - c)` squared, with l its log ratio to the reference. On fresh
    samples its gradient is `(l + c - r / beta)` times the score, as that of the KL in the reward. The constant c is
    0, or the mean of the other completions' `r / beta - l`.
    """

    def noises(beta: float, zero: float, seed: int) -> dict[str, float]:
        plain, mean = (
            with_rewards("k1 in the reward", beta, seed, baseline, zero)
            for baseline in ("none", "rloo")
        )
        bias = max(plain.relative_bias, mean.relative_bias)
        ratio = plain.noise / mean.noise
        return {"error": bias, "c = 0": plain.noise, "mean": mean.noise, "ratio": ratio}

    rows = {
        f"beta {beta:g}, rewards {zero:g} and {zero + 1:g}": partial(noises, beta, zero)
        for beta in (0.05, 0.5)
        for zero in (0.0, 1.0)
    }
    show("Square losses: noise with c = 0, and with the mean of the others", rows, problems)


def draw(problems: int) -> None:
    """Draw the error of three forms by the KL of a completion, for two lengths."""
    figure = Figure(figsize=(8, 3.4), dpi=110, layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    shown = {
        "k3 in the loss": "#D55E00",
        "k3 times the ratio": "#0072B2",
        "the same, discount 1": "#009E73",
    }
    for axes, length in zip(panels, (3, 6), strict=True):
        for name, colour in shown.items():
            points = []
            for distance in DISTANCES:
                listed = [apart(seed, distance, length) for seed in range(problems)]
                kls = [float(p.chances[0] @ log_ratios(p).sum(-1)) for p in listed]
                errors = [error(FORMS[name](p), kl_gradient(p)) for p in listed]
                points.append((median(kls), median(errors)))
            label = "mean - k1, discount 1" if "same" in name else name
            axes.plot(*zip(*points, strict=True), "o-", color=colour, label=label)
        axes.set(xscale="log", xlabel="KL of a completion, nats", title=f"at most {length} tokens")
    panels[0].set(ylabel="error of the gradient, median", ylim=(0, None))
    panels[0].legend(frameon=False)
    save(figure, FIGURE)


main = program(forms, noise, squares, figure_of=draw)


if __name__ == "__main__":
    tyro.cli(main)
