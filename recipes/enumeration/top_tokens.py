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
from statistics import median
from typing import Literal

import torch
import tyro

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


def main(
    samplers: tuple[Sampler, ...] = ("temperature=0.8", "noise=0.3", "older"),
    tops: tuple[int, ...] = (1, 2, 4, 8, 12),
    vocabulary: int = 16,
    problems: int = 10,
) -> None:
    """Print the distance to the gradient with all tokens, over the length of that gradient, and its share."""
    print("sampler            top   off, median   worst   left out   share, median   worst")
    for sampler in samplers:
        off: dict[str, list[float]] = {}
        left_out: dict[str, list[float]] = {}
        for seed in range(problems):
            problem = problem_of(sampler, seed, vocabulary)
            chances = problem.of_sampler.chances
            # The baseline that RLOO has in the mean, with one completion per step in place of two.
            mean_reward = float((chances * problem.totals).sum())
            base = Estimator(baseline="constant", baseline_constant=mean_reward)
            centred = replace(base, importance_centre=True)
            whole = exact_moments(centred, problem).mean.sum(0)
            visits = chances[..., None] * problem.mask
            ordered = problem.sampler.vocabulary.exp().sort(-1, descending=True).values
            for top in (0, *tops):
                estimator = replace(centred, importance_centre_top=top) if top else base
                listed = exact_moments(estimator, problem).mean.sum(0)
                rest = ordered[..., top:].sum(-1)
                name = str(top or "-")
                off.setdefault(name, []).append(float((listed - whole).norm() / whole.norm()))
                left_out.setdefault(name, []).append(float((visits * rest).sum() / visits.sum()))
        for name, distances in off.items():
            shares = [part / whole for part, whole in zip(distances, off["-"], strict=True)]
            columns = (
                f"{median(distances):11.4f} {max(distances):9.4f} {median(left_out[name]):10.3f}"
            )
            columns += f" {median(shares):15.3f} {max(shares):7.3f}"
            print(f"{sampler:18} {name:>3}  {columns}", flush=True)


if __name__ == "__main__":
    tyro.cli(main)
