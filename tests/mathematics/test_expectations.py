"""What the expected gradient of each choice is, as a formula, by summing over every group in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tokenrl.core import Estimator
from tokenrl.core.choices import AXES
from tokenrl.core.rows import LossTerms, overlong_penalty
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
    prompts = 1 if scale == "loo_std" else 2
    problem = tabular_problem(27, prompts=prompts, length=2)
    means = mean_of({"scale": scale, "scale_eps": 0.1}, problem, 4 - prompts)
    for prompt, mean in enumerate(means):
        divisors = prompts - 1 - prompt  # the prompt of the divisor
        chances, rewards = problem.chances[divisors], problem.totals[divisors]
        deviations = torch.stack(torch.meshgrid(rewards, rewards, indexing="ij")).std(0)
        factor = chances @ (1 / (deviations + 0.1)) @ chances
        torch.testing.assert_close(mean, factor * problem.gradient()[prompt], **CLOSE)


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
        # the KL of each step in closed form has the mean of k2
        "closed_form": plain - beta * ascent_by_token(problem, ratio),
        "closed_form_path": problem.gradient(beta=beta),
    }
    for name, gradient in wanted.items():
        fields = {"beta": beta, "kl_estimator": name, "kl_placement": "loss"}
        torch.testing.assert_close(mean_of(fields, problem, 2), gradient, **CLOSE)
        exact = name in ("full_path", "k2_sequence", "closed_form_path")
        assert ((gradient - problem.gradient(beta=beta)).norm() < 1e-12) == exact
        if name in ("k2", "full_path"):  # the KL of a step as the baseline changes no mean
            fields["kl_baseline"] = "closed_form"
            torch.testing.assert_close(mean_of(fields, problem, 2), gradient, **CLOSE)


def test_closed_forms_of_a_kl_have_the_noise_that_is_computed_by_hand() -> None:
    """The direction of a row, listed with every completion: its mean square gives E|g|^2."""
    problem = tabular_problem(14)
    problem = replace(problem, rewards=torch.zeros_like(problem.rewards))
    divergence, log_ratio = problem.token_kl[..., None], step_kl(problem)[..., None]
    to_later = to_go(problem.token_kl)[..., None] - divergence
    following = to_go(step_kl(problem))[..., None]
    directions = {
        ("closed_form", "none"): problem.kl_slopes,
        ("closed_form_path", "none"): problem.kl_slopes + to_later * problem.scores,
        ("k2", "none"): log_ratio * problem.scores,
        ("k2", "closed_form"): (log_ratio - divergence) * problem.scores,
        ("full_path", "closed_form"): (following - divergence) * problem.scores,
    }
    for (name, baseline), slopes in directions.items():
        estimator = Estimator(
            baseline="none",
            beta=1.0,
            kl_placement="loss",
            kl_estimator=name,
            kl_baseline=baseline,
        )
        moments = exact_moments(estimator, problem, group_size=1)
        lengths = slopes.sum(-2).square().sum(-1)  # [P, M]
        assert moments.second == pytest.approx(float((problem.chances * lengths).sum()))


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


# Ratios, where the rows were sampled by another policy


def off_policy(problem: Problem, **fields: object) -> torch.Tensor:
    """The expected gradient [D] at the policy, over all pairs of rows that its reference sampled."""
    e = Estimator(epsilon=1.0, epsilon_high=1e9, **fields)
    pairs = torch.cartesian_prod(*[torch.arange(len(problem.mask))] * 2)  # [C, 2]
    old = problem.ref_logprobs[0, pairs]
    inputs = (problem.totals[0], problem.mask, problem.values[0])

    def step(rewards: torch.Tensor, mask: torch.Tensor, values: torch.Tensor) -> LossTerms:
        return e.loss_terms(rewards, mask, group_size=2, max_length=3, values=values)

    terms = torch.vmap(step)(*(x[pairs] for x in inputs))
    chances = old.sum((1, 2)).exp()[:, None, None]
    terms = terms._replace(weights=terms.weights * chances)
    theta = torch.zeros(problem.scores.shape[-1], dtype=torch.double, requires_grad=True)
    logprobs = problem.logprobs[0, pairs] + problem.scores[0, pairs] @ theta
    flat = (x.flatten(0, 1) for x in (logprobs, *terms[:3], old))
    *inputs, old_logprobs = flat
    return -torch.autograd.grad(e.loss(*inputs, old_logprobs=old_logprobs), theta)[0]


@pytest.mark.parametrize("returns", ["total", "reward_to_go"])
@pytest.mark.parametrize("baseline", ["rloo", "value"])
def test_the_sequence_ratio_is_exact_off_policy_and_the_others_are_not(baseline, returns) -> None:
    problem = tabular_problem(40, length=2)
    target = problem.gradient()[0]
    axes = {"baseline": baseline, "returns": returns}
    exact = off_policy(problem, **axes, ratio="sequence_product")
    torch.testing.assert_close(exact, target, **CLOSE)
    for ratio in set(AXES["ratio"]) - {"sequence_product"}:
        biased = off_policy(problem, **axes, ratio=ratio)
        assert float((biased - target).norm() / target.norm()) > 0.01
