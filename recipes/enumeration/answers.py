"""Answers questions that users of policy gradients argue about, by enumeration in float64.

    python recipes/enumeration/answers.py

A completion has up to three tokens of three; its logits are a random linear function of four parameters, so that all
prefixes share them. Each section is a question; a row of its table holds medians over 20 such problems. Look at the
bias, the sine of the angle between the expected gradient and the true one: 0 means the same direction. `rewards.md` and
`groups.md` in `recipes/pages/explain` have the text.
"""

# /// script
# requires-python = ">=3.10"
# dependencies = ["tokenrl-lm"]
# [tool.uv.sources]
# tokenrl-lm = { path = "../..", editable = true }
# ///

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from statistics import fmean, pstdev
from typing import Any, NamedTuple

import torch
import tyro
from figures import program, show
from torch import Tensor

from tokenrl import Estimator
from tokenrl.lab import Moments, Problem, exact_moments, off_policy_moments, tabular_problem

PARAMETERS = 4
SLOPES = ("scores", "entropy_slopes", "kl_slopes")
GROUP = 4
MOST = 8
"""The most completions of a prompt that are sampled until one is right and one is wrong."""
ASCENT = 0.2
"""Length of a step of gradient ascent in the space of the logits."""
CORRECTIONS = {
    "no correction": "rloo",
    "weights of tokens": "importance=token",
    "weights of sequences, cap 2": "importance=sequence,importance_cap=2.0",
    "weights of sequences": "importance=sequence",
}
COLUMNS = (
    "mask",
    "truncated",
    "logprobs",
    "ref_logprobs",
    "entropy",
    "token_kl",
    "values",
    *SLOPES,
)
"""What a problem holds of each completion, but for rewards and probabilities."""
Rewards = tuple[float, ...]
Weights = Callable[[Rewards], Sequence[float]]


def shared_problem(seed: int, rewards: str = "binary", **options: Any) -> Problem:
    """List all completions of a random policy whose prefixes share four parameters."""
    draw = torch.Generator().manual_seed(1000 + seed)
    problem = tabular_problem(seed, rewards=rewards, **options)
    features = torch.randn(problem.scores.shape[-1], PARAMETERS, generator=draw, dtype=torch.double)
    slopes = {name: getattr(problem, name) @ features for name in SLOPES}
    return replace(problem, **slopes)


class Level(NamedTuple):
    """The completions that have one reward.

    Attributes:
        reward: the reward.
        chance: their probability together.
        score: the mean of their scores [D].
        norm: the mean of the squared norms of their scores.
    """

    reward: float
    chance: float
    score: Tensor
    norm: float


def levels_of(problem: Problem) -> list[Level]:
    """Return the levels of the rewards, on which alone the weights of an estimator depend."""
    scores = problem.scores.sum(-2)[0]  # [M, D]
    levels = []
    for reward in problem.totals[problem.chances > 0].unique():
        chances = problem.chances[0] * (problem.totals[0] == reward)
        chance = float(chances.sum())
        norm = float(chances @ scores.square().sum(-1)) / chance
        levels.append(Level(float(reward), chance, chances @ scores / chance, norm))
    return levels


def adaptive_groups(levels: Sequence[Level], most: int = MOST) -> Iterator[tuple[Level, ...]]:
    """Yield all groups that are sampled until two rewards differ, of at most so many completions."""
    drawn = [(level,) for level in levels]
    while drawn:
        group = drawn.pop()
        if len({level.reward for level in group}) > 1 or len(group) == most:
            yield group
        else:
            drawn += [(*group, level) for level in levels]


def moments_of(
    weights: Weights, drawn: Iterator[tuple[Level, ...]], problem: Problem
) -> tuple[Moments, float]:
    """Return the moments of the sum of weighted scores over random groups, and the mean size of a group."""
    target = problem.gradient()
    mean = torch.zeros_like(target[0])
    second = size = 0.0
    for group in drawn:
        rewards, chances, scores, norms = zip(*group, strict=True)
        chance = math.prod(chances)
        factors = torch.tensor(weights(rewards), dtype=torch.double)
        score = torch.stack(scores)
        gradient = factors @ score
        spread = torch.tensor(norms) - score.square().sum(-1)
        mean = mean + chance * gradient
        second += chance * float(gradient @ gradient + factors**2 @ spread)
        size += chance * len(group)
    return Moments(mean[None], target, second), size


def rloo(rewards: Rewards) -> list[float]:
    """Return RLOO's weights: the reward less the mean of the other rewards, over the size of the group."""
    n = len(rewards)
    return [(r - (sum(rewards) - r) / (n - 1)) / n for r in rewards]


def positive(rewards: Rewards) -> list[float]:
    """Return RLOO's weights where they are above 0."""
    return [max(w, 0) for w in rloo(rewards)]


def negative(rewards: Rewards) -> list[float]:
    """Return RLOO's weights where they are below 0."""
    return [min(w, 0) for w in rloo(rewards)]


def earlier(rewards: Rewards) -> list[float]:
    """Return the reward of each row but the first, less the mean of the rewards of the rows before it."""
    later = [rewards[i] - sum(rewards[:i]) / i for i in range(1, len(rewards))]
    return [0.0, *later]


def summary(moments: Moments, expected: float) -> dict[str, float]:
    """Return the factor beside the true gradient, the bias in direction, the noise, and the expected factor."""
    bias = sine(moments.cosine)
    return {"/ grad p": moments.scale, "bias": bias, "noise": moments.noise, "expected": expected}


def sine(cosine: float) -> float:
    """Return what is left of a gradient of length 1 beside the best multiple of another, by their cosine."""
    return math.sqrt(max(0.0, 1 - cosine**2))


def signs(problems: int) -> None:
    """Positive samples alone, or negative ones: with rewards 0 and 1."""

    def constant(value: float, seed: int) -> dict[str, float]:
        estimator = Estimator(baseline="constant", baseline_constant=value)
        return summary(exact_moments(estimator, shared_problem(seed), group_size=1), 1.0)

    def half(weights: Weights, seed: int) -> dict[str, float]:
        problem = shared_problem(seed)
        p = float(problem.chances[0] @ problem.totals[0])
        return summary(of_groups(weights, problem), 1 - p if weights is positive else p)

    rows = {"weights r": partial(constant, 0.0), "weights r - 1": partial(constant, 1.0)}
    rows["RLOO's positive half"] = partial(half, positive)
    rows["RLOO's negative half"] = partial(half, negative)
    show("Positive or negative samples alone (rewards 0 and 1)", rows, problems)


def of_groups(weights: Weights, problem: Problem, size: int = GROUP) -> Moments:
    """Return the moments of weights in groups of a size."""
    return moments_of(weights, itertools.product(levels_of(problem), repeat=size), problem)[0]


def flipped(
    problem: Problem,
    false_positives: float,
    false_negatives: float,
    long: bool,
    corrected: bool = False,
) -> Problem:
    """Return the problem as a verifier rewards it that errs with two probabilities.

    Args:
        problem: the problem, with rewards 0 and 1.
        false_positives: probability that a wrong completion is rewarded.
        false_negatives: probability that a right one is not.
        long: whether the verifier errs on completions of the greatest length alone.
        corrected: whether both probabilities are known for each completion, and the reward is corrected by them,
            so that its mean is 1 for a right completion and 0 for a wrong one.
    """
    right = problem.rewards
    errs = torch.ones_like(right)  # where the verifier errs [P, M]
    if long:
        errs = errs * (problem.mask.sum(-1) == problem.mask.shape[-1])
    rewards = torch.stack([right, 1 - right])  # [2, P, M]
    if corrected:
        rewards = (rewards - errs * false_positives) / (
            1 - errs * (false_positives + false_negatives)
        )
    errs = errs * (right * false_negatives + (1 - right) * false_positives)
    doubled = {
        "rewards": torch.cat([*rewards], dim=1),
        "environment": torch.cat([1 - errs, errs], dim=1),
    }
    for name in COLUMNS:
        column = getattr(problem, name)
        doubled[name] = torch.cat([column] * 2, dim=int(name not in ("mask", "truncated")))
    return replace(problem, **doubled)


def standardised(rewards: Rewards) -> list[float]:
    """Return the reward less the mean of the group, over the standard deviation and the size of the group."""
    mean, divisor = fmean(rewards), (pstdev(rewards) or 1) * len(rewards)
    return [(r - mean) / divisor for r in rewards]


def verifier(problems: int) -> None:
    """A verifier that errs: what is left of the gradient of the probability to be right."""

    def noisy(weights: Weights, errors: tuple[Any, ...], seed: int) -> dict[str, float]:
        problem = shared_problem(seed)
        drawn = itertools.product(levels_of(flipped(problem, *errors)), repeat=GROUP)
        moments, _ = moments_of(weights, drawn, problem)
        without = moments.scale / of_groups(weights, problem).scale
        return {"/ without": without, "bias": sine(moments.cosine), "noise": moments.noise}

    cases = {
        "FP 0, FN 0": (0.0, 0.0, False),
        "FP 0.2, FN 0": (0.2, 0.0, False),
        "FP 0, FN 0.2": (0.0, 0.2, False),
        "FP 0.2, FN 0.2": (0.2, 0.2, False),
        "FP 0.2, FN 0, only where long": (0.2, 0.0, True),
        "the same, corrected": (0.2, 0.0, True, True),
    }
    rows = {
        f"{name}, {title}": partial(noisy, weights, errors)
        for name, weights in {"RLOO": rloo, "divided by the std": standardised}.items()
        for title, errors in cases.items()
    }
    show("A noisy verifier, beside one that never errs", rows, problems)


def adaptive(problems: int) -> None:
    """Sampling a prompt until two rewards differ."""

    def sampled(weights: Weights, rewards: str, seed: int) -> dict[str, float]:
        problem = shared_problem(seed, rewards)
        moments, size = moments_of(weights, adaptive_groups(levels_of(problem)), problem)
        bias = sine(moments.cosine)
        return {"/ grad J": moments.scale, "bias": bias, "worst": bias, "E n - 1": size - 1}

    rows = {
        f"{name}, {rewards} rewards": partial(sampled, weights, rewards)
        for rewards in ("binary", "graded")
        for name, weights in {"RLOO": rloo, "the mean of earlier rows": earlier}.items()
    }
    show(f"Sampling until two rewards differ, at most {MOST}", rows, problems)


def teachers_of(seed: int) -> tuple[Problem, Problem, Problem]:
    """Return a problem with three teachers: one saw a failure, one a success, and one what the row itself was."""
    draw = torch.Generator().manual_seed(2000 + seed)
    problem = shared_problem(seed)
    contexts = torch.randn(2, 7, 3, generator=draw, dtype=torch.double)  # of seven prefixes
    failure, success = (shared_problem(seed, reference=logits) for logits in contexts)
    is_right = problem.rewards[0].bool()[:, None]  # [M, 1]
    columns = {}
    for name in ("ref_logprobs", "token_kl", "kl_slopes"):
        of_failure, of_success = getattr(failure, name), getattr(success, name)
        right = is_right if of_failure.ndim == 3 else is_right[..., None]
        columns[name] = torch.where(right, of_success, of_failure)
    return failure, success, replace(problem, **columns)


def informed(problems: int) -> None:
    """A teacher that has seen the prompt, another completion of it, or the row itself."""

    def teacher(
        parts: Callable[[float], tuple[float, float, float]], seed: int
    ) -> dict[str, float]:
        """Compare two forms, where failure, success and the row itself have been seen with these chances."""
        teachers = teachers_of(seed)
        chances = parts(float(teachers[2].chances[0] @ teachers[2].totals[0]))
        sampled, closed = (
            sum(
                p * distilled(Estimator.preset(form), x)
                for p, x in zip(chances, teachers, strict=True)
            )
            for form in ("opd_to_go", "opd_full_path")
        )
        compared = Moments(sampled[None], closed[None], second=0.0)
        distance = compared.relative_bias
        return {"distance": distance, "worst": distance, "cosine": compared.cosine}

    rows = {
        "the prompt alone": partial(teacher, lambda p: (1.0, 0.0, 0.0)),
        "the reward of a sibling": partial(teacher, lambda p: (1 - p, p, 0.0)),
        "the reward of the row itself": partial(teacher, lambda p: (0.0, 0.0, 1.0)),
    }
    show("A teacher that has seen something", rows, problems)


def distilled(form: Estimator, problem: Problem) -> Any:
    """Return the expected gradient [D] of a form of distillation, without rewards."""
    problem = replace(problem, rewards=torch.zeros_like(problem.rewards))
    return exact_moments(form, problem, group_size=1).mean[0]


def entropies(problems: int) -> None:
    """The gradient of the tokens with the highest entropies alone."""

    def keeping(share: float, seed: int) -> dict[str, float]:
        problem = shared_problem(seed, "continuous")
        chances, totals = problem.chances[0], problem.totals[0]
        kept = most_uncertain(problem, share)  # [M, T]
        weights = (chances * (totals - chances @ totals))[:, None] * kept
        mean = torch.einsum("mt,pmtd->pd", weights, problem.scores)
        cosine = Moments(mean, problem.gradient(), second=0.0).cosine
        tokens = float((chances @ kept).sum() / (chances @ problem.mask).sum())
        return {"kept": tokens, "bias": sine(cosine), "cosine": cosine, "least cosine": cosine}

    rows = {f"share {share:g}": partial(keeping, share) for share in (1.0, 0.8, 0.5, 0.2)}
    show("Keeping the tokens of the highest entropies", rows, problems)


def most_uncertain(problem: Problem, share: float) -> Tensor:
    """Return 1 for the tokens whose entropy is at least the quantile above which the share lies [M, T]."""
    visits = problem.chances[0][:, None] * problem.mask
    entropy = torch.where(problem.mask.bool(), problem.entropy[0], -math.inf)
    order = entropy.flatten().argsort(descending=True)
    before = visits.flatten()[order].cumsum(0) - visits.flatten()[order]
    least = entropy.flatten()[order][before < share * float(visits.sum())].min()
    return (entropy >= least).double() * problem.mask


def lagged_problem(seed: int, lag: int) -> Problem:
    """Return the policy after `lag` steps of gradient ascent, sampled from the policy before them."""
    draw = torch.Generator().manual_seed(3000 + seed)
    before = torch.randn(7, 3, generator=draw, dtype=torch.double)  # of seven prefixes
    logits = before
    for _ in range(lag):
        slope = tabular_problem(seed, logits=logits).gradient().reshape(logits.shape)
        logits = logits + ASCENT * slope / slope.norm()
    return tabular_problem(seed, logits=logits, sampler=lambda z: before.expand(z.shape))


def stale(problems: int) -> None:
    """A sampler with the weights of earlier steps: what corrections leave, by the number of steps."""

    def behind(lag: int, name: str, seed: int) -> dict[str, float]:
        moments, _ = off_policy_moments(Estimator.preset(name), lagged_problem(seed, lag))
        bias = moments.relative_bias
        return {"bias": bias, "worst": bias, "noise": moments.noise}

    rows = {
        f"{lag} steps, {title}": partial(behind, lag, name)
        for lag in (1, 4, 16)
        for title, name in CORRECTIONS.items()
    }
    show("A sampler that is some steps behind", rows, problems)


main = program(signs, verifier, adaptive, informed, entropies, stale)


if __name__ == "__main__":
    tyro.cli(main)
