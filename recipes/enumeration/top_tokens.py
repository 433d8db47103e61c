"""Measures how many of the sampler's most probable tokens centred scores need, by enumeration.

    python recipes/enumeration/top_tokens.py

Completions have two tokens of 16. A row is one way in which the sampler differs, and one k of
`importance_centre_top`. Look for the k from which on the gradient is that of all tokens, beside the probability
of the tokens that are left out: the share of the bias that is left is about as large in the median, and may be several
times as large. `recipes/pages/explain/off_policy.md` has the text.
"""

# /// script
# requires-python = ">=3.10"
# dependencies = ["tokenrl-lm"]
# [tool.uv.sources]
# tokenrl-lm = { path = "../..", editable = true }
# ///

from dataclasses import replace
from functools import partial
from typing import Literal

import torch
import tyro
from figures import show

from tokenrl import Estimator
from tokenrl.lab import Perturbation, Problem, exact_moments, tabular_problem

SPREAD = 2.0
"""Standard deviation of the policy's logits."""
Sampler = Literal["temperature=0.8", "noise=0.3", "older"]
SAMPLERS = {
    "temperature=0.8": Perturbation(temperature=0.8),
    "noise=0.3": Perturbation(noise=0.3),
}
ASCENT = 5.0
"""Length of the step of gradient ascent by which an older policy is behind, as a learning rate."""


def problem_of(sampler: Sampler, seed: int, vocabulary: int) -> Problem:
    """A random policy with one of `SAMPLERS`, or with an older policy."""
    draw = torch.Generator().manual_seed(seed)
    logits = SPREAD * torch.randn(vocabulary, vocabulary, generator=draw, dtype=torch.double)
    make = partial(tabular_problem, seed, vocabulary=vocabulary, length=2, group_size=1)
    if sampler == "older":
        slope = make(logits=logits).gradient().reshape(logits.shape)
        return make(logits=logits + ASCENT * slope, sampler=lambda z: logits.expand(z.shape))
    return make(logits=logits, sampler=lambda z: SAMPLERS[sampler].logits(z, seed + 1000))


def measured(sampler: Sampler, vocabulary: int, top: int, seed: int) -> dict[str, float]:
    """Return how far the gradient with `top` tokens is from that with all, and the probability of the others."""
    problem = problem_of(sampler, seed, vocabulary)
    chances = problem.of_sampler.chances
    # The baseline that RLOO has in the mean, with one completion per step in place of two.
    mean_reward = float((chances * problem.totals).sum())
    base = Estimator(baseline="constant", baseline_constant=mean_reward)
    centred = replace(base, importance_centre=True)
    listed = replace(centred, importance_centre_top=top) if top else base
    whole, part, without = (exact_moments(x, problem).mean.sum(0) for x in (centred, listed, base))
    ordered = problem.sampler.vocabulary.exp().sort(-1, descending=True).values
    visits = chances[..., None] * problem.mask
    left_out = float((visits * ordered[..., top:].sum(-1)).sum() / visits.sum())
    off = float((part - whole).norm() / whole.norm())
    left = float((part - whole).norm() / (without - whole).norm())
    named = {"off": off, "worst": off, "left out": left_out}
    return named | {"of the bias": left, "worst of the bias": left}


def main(
    samplers: tuple[Sampler, ...] = ("temperature=0.8", "noise=0.3", "older"),
    tops: tuple[int, ...] = (1, 2, 4, 8, 12),
    vocabulary: int = 16,
    problems: int = 10,
) -> None:
    """Print the distance to the gradient with all tokens, over the length of that gradient, and its share."""
    for sampler in samplers:
        rows = {f"top {top}": partial(measured, sampler, vocabulary, top) for top in (0, *tops)}
        show(sampler, rows, problems, "{:.4f}")


if __name__ == "__main__":
    tyro.cli(main)
