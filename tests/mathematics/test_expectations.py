"""What the expected gradient of each choice is, as a formula, by summing over every group in float64."""

from __future__ import annotations

import itertools
from dataclasses import replace
from math import comb

import pytest
import torch

from tokenrl.core import Estimator
from tokenrl.core.rows import overlong_penalty
from tokenrl.lab import Problem, exact_moments, tabular_problem

torch.set_num_threads(1)
CLOSE = {"rtol": 1e-10, "atol": 1e-12}


def mean_of(fields: dict, problem: Problem, size: int) -> torch.Tensor:
    return exact_moments(Estimator(**fields), problem, group_size=size).mean


def ascent(problem: Problem, worth: torch.Tensor) -> torch.Tensor:
    """The gradient [P, D] of the mean over prompts of `E[worth]`, with worth [P, M] held fixed."""
    return torch.einsum("pm,pmtd->pd", problem.chances * worth, problem.scores) / len(worth)


def ascent_by_token(problem: Problem, worth: torch.Tensor) -> torch.Tensor:
    """E[sum_t worth_t grad log pi_t] with worth [P, M, T]."""
    return torch.einsum("pm,pmt,pmtd->pd", problem.chances, worth, problem.scores) / len(worth)


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0))


def to_go(x: torch.Tensor) -> torch.Tensor:
    return x.flip(-1).cumsum(-1).flip(-1)


@pytest.mark.parametrize("baseline", ["rloo", "group_mean", "constant"])
def test_sequence_mean_ascends_reward_per_length(baseline: str) -> None:
    """Each baseline b is held fixed in E[(R - b)/L], and a mean that contains the row shrinks it."""
    problem = tabular_problem(10)
    j = (problem.chances * problem.totals).sum()
    shift = 0.8 if baseline == "constant" else j
    wanted = ascent(problem, (problem.totals - shift) / problem.mask.sum(-1))
    wanted = wanted * (2 / 3 if baseline == "group_mean" else 1.0)
    fields = {"baseline": baseline, "baseline_constant": 0.8, "aggregation": "sequence_mean"}
    torch.testing.assert_close(mean_of(fields, problem, 3), wanted, **CLOSE)
    assert cosine(wanted, problem.gradient()) < 0.999


@pytest.mark.parametrize("scale", ["loo_std", "other_groups_std"])
def test_a_divisor_of_other_rows_multiplies_the_gradient_by_its_mean(scale: str) -> None:
    """E[1/(std of two rows + eps)], of the same prompt or of the other one."""
    one = scale == "loo_std"
    problem = tabular_problem(27, prompts=1 if one else 2, length=2)
    found = mean_of({"scale": scale, "scale_eps": 0.1}, problem, 3 if one else 2)
    for x in range(len(found)):
        p, r = (
            (problem.chances[0], problem.totals[0])
            if one
            else (problem.chances[1 - x], problem.totals[1 - x])
        )
        pairs = itertools.product(range(len(p)), repeat=2)
        factor = sum(p[i] * p[j] / (torch.stack([r[i], r[j]]).std() + 0.1) for i, j in pairs)
        torch.testing.assert_close(found[x], factor * problem.gradient()[x], **CLOSE)


@pytest.mark.parametrize(("size", "ratio"), [(2, 0.90), (4, 0.85), (16, 0.94)])
def test_whitening_weighs_hard_prompts_down_in_small_steps(size: int, ratio: float) -> None:
    """Two prompts of one yes or no each, p = .1 and .5: the weight of the first relative to the second."""
    e = Estimator(baseline="group_mean", scale="token_whiten", scale_eps=1e-8)
    chances, weights = (0.1, 0.5), [0.0, 0.0]
    for k in itertools.product(range(size + 1), repeat=2):
        rewards = torch.cat([torch.arange(size) < n for n in k]).double()
        advantages = e.advantages(rewards, torch.ones(2 * size, 1), group_size=size).policy
        pairs = zip(k, chances, strict=True)
        chance = torch.tensor(
            [comb(size, n) * p**n * (1 - p) ** (size - n) for n, p in pairs]
        ).prod()
        for x, p in enumerate(chances):
            rows = slice(x * size, (x + 1) * size)
            slope = (advantages[rows] * (rewards[rows] - p)).mean()
            weights[x] += float(chance * slope) / (p * (1 - p))
    assert weights[0] / weights[1] == pytest.approx(ratio, abs=0.006)


# KL and entropy


def step_kl(problem: Problem) -> torch.Tensor:
    """The log ratio of each listed token [P, M, T]."""
    return problem.logprobs - problem.ref_logprobs


@pytest.mark.parametrize("beta", [0.02, 1.5])
def test_the_gradient_of_a_kl_in_the_loss(beta: float) -> None:
    """Of k2 it is E[sum_t l_t s_t]: the KL of each step with its prefix held fixed; of k1 nothing."""
    problem = tabular_problem(12)
    plain, ratio = problem.gradient(), step_kl(problem)
    wanted = {
        "k1": plain,
        "k2": plain - beta * ascent_by_token(problem, ratio),
        # the forward KL of each step: its gradient is minus that of log pi under the reference
        "k3": plain - beta * ascent_by_token(problem, 1 - (-ratio).exp()),
        "full_path": problem.gradient(beta=beta),
        "k2_sequence": problem.gradient(beta=beta),
    }
    for name, gradient in wanted.items():
        fields = {"beta": beta, "kl_estimator": name, "kl_placement": "loss"}
        torch.testing.assert_close(mean_of(fields, problem, 2), gradient, **CLOSE)
        exact = name in ("full_path", "k2_sequence")
        assert ((gradient - problem.gradient(beta=beta)).norm() < 1e-12) == exact


def test_the_gradient_of_a_kl_in_the_reward_lacks_the_estimates_own() -> None:
    problem, beta = tabular_problem(13), 0.4
    ratio = step_kl(problem)
    held = {"k1": ratio, "k2": ratio.square() / 2, "k3": (-ratio).exp() - 1 + ratio}
    for name, penalty in held.items():
        wanted = ascent(problem, problem.totals - beta * penalty.sum(-1))
        found = mean_of({"beta": beta, "kl_estimator": name}, problem, 2)
        torch.testing.assert_close(found, wanted, **CLOSE)
        assert ((wanted - problem.gradient(beta=beta)).norm() < 1e-12) == (name == "k1")


def test_the_entropy_bonus_holds_the_prefix_fixed() -> None:
    problem, coefficient = tabular_problem(15), 0.7
    plain = torch.einsum("pm,pmtd->pd", problem.chances, problem.entropy_slopes)
    found = mean_of({"entropy_coef": coefficient}, problem, 2)
    torch.testing.assert_close(found, problem.gradient() + coefficient * plain, **CLOSE)
    # The gradient of the entropy of whole completions has another term: an action changes later entropy.
    later = ascent_by_token(problem, to_go(problem.entropy) - problem.entropy)
    whole = problem.gradient(entropy_coef=coefficient)
    torch.testing.assert_close(whole, found + coefficient * later, **CLOSE)


# Rows that are left out


def spread_chances(problem: Problem, size: int) -> torch.Tensor:
    """The probability [P] that the rewards of a group, 0 or 1, are not all equal."""
    p = (problem.chances * problem.totals).sum(-1)
    return 1 - p**size - (1 - p) ** size


@pytest.mark.parametrize("size", [2, 3])
def test_truncations_that_are_masked(size: int) -> None:
    """It is grad E[m R] - J grad P(m = 1), m = 1 for rows that ended by themselves, so that ending is paid.

    With a fixed baseline b it ascends E[m (R - b)].
    """
    problem = tabular_problem(51)
    ended = ~problem.truncated
    j = (problem.chances * problem.totals).sum()
    wanted = ascent(problem, (problem.totals - j) * ended)
    torch.testing.assert_close(mean_of({"truncations": "mask"}, problem, size), wanted, **CLOSE)
    for b in (0.0, 0.8):
        wanted = ascent(problem, (problem.totals - b) * ended)
        fields = {"truncations": "mask", "baseline": "constant", "baseline_constant": b}
        torch.testing.assert_close(mean_of(fields, problem, size), wanted, **CLOSE)


def test_dropped_and_refilled_groups_weigh_prompts() -> None:
    """Dropped: E[1/kept | it is kept], whatever the other does. Refilled: one number, 1/mean P(kept)."""
    problem = tabular_problem(11, prompts=2, vocabulary=2, rewards="binary")
    kept, target = spread_chances(problem, 2), problem.gradient()
    assert abs(float(kept[0] - kept[1])) > 0.05
    weights = kept.flip(0) / 2 + (1 - kept.flip(0))
    dropped, refilled = (mean_of({"zero_spread": what}, problem, 2) for what in ("drop", "refill"))
    torch.testing.assert_close(dropped, 2 * weights[:, None] * target, **CLOSE)
    torch.testing.assert_close(refilled, target / kept.mean(), **CLOSE)
    alone = tabular_problem(11, vocabulary=2, rewards="binary")
    torch.testing.assert_close(
        mean_of({"zero_spread": "drop"}, alone, 2), alone.gradient(), **CLOSE
    )


def test_a_long_row_is_penalised_before_the_baseline() -> None:
    penalty = overlong_penalty(torch.tensor([0, 6, 7, 8, 9, 10, 12]), 10, 4)
    assert penalty.tolist() == [0, 0, -0.25, -0.5, -0.75, -1, -1]
    e, mask = Estimator(overlong_buffer=2), torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    got = e.advantages(torch.tensor([1.0, 3.0]), mask, group_size=2, max_length=4)
    assert got.policy.tolist() == [-3.0, 3.0] and got.returns.tolist() == [[0] * 4, [3, 3, 0, 0]]
    problem = tabular_problem(55)
    penalty = overlong_penalty(problem.mask.sum(-1).long(), problem.max_length, 4)
    wanted = ascent(problem, problem.totals + penalty)
    torch.testing.assert_close(mean_of({"overlong_buffer": 4}, problem, 2), wanted, **CLOSE)


# Baselines in the limit, and their variance


@pytest.mark.parametrize("kind", ["graded", "dense"])
def test_variance_is_a_parabola_in_a_baseline_of_each_timestep(kind: str) -> None:
    """Through a function of the user's: b_t* = E[(S . s_t) R] / E|s_t|^2."""
    problem = tabular_problem(24, rewards=kind)
    p, r, s = problem.chances[0], problem.totals[0], problem.scores[0]
    norms = torch.einsum("y,ytd->t", p, s.square())
    best = torch.einsum("y,yd,ytd,y->t", p, s.sum(1), s, r) / norms

    def variance(b: torch.Tensor) -> float:
        e = Estimator(baseline=lambda totals, mask, **_: b.expand(mask.shape))
        return exact_moments(e, problem, group_size=1).variance

    for b in (torch.zeros(3), torch.tensor([1.0, -0.5, 0.2]), best + 0.1):
        b = b.double()
        wanted = float(((b - best).square() * norms).sum())
        assert variance(b) - variance(best) == pytest.approx(wanted, rel=1e-9)


# Ratios, where the rows were sampled by another policy


def off_policy(problem: Problem, **fields: object) -> torch.Tensor:
    """The expected gradient [D] at the policy, over all pairs of rows that its reference sampled."""
    e = Estimator(epsilon=1.0, epsilon_high=1e9, **fields)
    pairs = torch.cartesian_prod(*[torch.arange(len(problem.mask))] * 2)  # [C, 2]
    old, mask = problem.ref_logprobs[0, pairs], problem.mask[pairs]

    def step(y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        rows = problem.mask[y]
        got = e.advantages(
            problem.totals[0, y], rows, group_size=2, values=problem.values[0, y]
        ).policy
        return got, e.token_weights(rows, max_length=3)

    advantages, weights = torch.vmap(step)(pairs)
    weights = weights * old.sum((1, 2)).exp()[:, None, None]
    theta = torch.zeros(problem.scores.shape[-1], dtype=torch.double, requires_grad=True)
    logprobs = problem.logprobs[0, pairs] + problem.scores[0, pairs] @ theta
    flat = (x.flatten(0, 1) for x in (logprobs, advantages, weights, mask))
    return -torch.autograd.grad(e.loss(*flat, old_logprobs=old.flatten(0, 1)), theta)[0]


@pytest.mark.parametrize("returns", ["total", "reward_to_go"])
@pytest.mark.parametrize("baseline", ["none", "rloo", "value"])
def test_the_sequence_ratio_is_exact_off_policy_and_the_others_are_not(baseline, returns) -> None:
    problem = tabular_problem(40, length=2)
    target = problem.gradient()[0]
    exact = off_policy(problem, baseline=baseline, returns=returns, ratio="sequence_product")
    torch.testing.assert_close(exact, target, **CLOSE)
    for ratio in ("none", "token", "sequence_mean", "geometric_clip", "cispo", "trust"):
        found = off_policy(problem, baseline=baseline, returns=returns, ratio=ratio)
        assert float((found - target).norm() / target.norm()) > 0.01


def test_a_reward_that_is_shifted_by_a_function_of_the_prompt_changes_nothing() -> None:
    problem = tabular_problem(60, prompts=2, length=2)
    moved = replace(problem, rewards=problem.rewards + torch.tensor([[3.0], [-2.0]]).double())
    for fields in ({}, {"baseline": "opo"}, {"baseline": "group_mean", "scale": "group_std"}):
        torch.testing.assert_close(mean_of(fields, moved, 2), mean_of(fields, problem, 2), **CLOSE)
