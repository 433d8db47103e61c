"""Objectives other than the mean reward: their formulas, their gradients and what they refuse."""

from __future__ import annotations

import itertools
from statistics import fmean

import pytest
import torch
from drawing import normals, seeded
from refusals import refused
from torch.testing import assert_close

from tokenrl.core import Estimator
from tokenrl.core.objectives import check_rewards
from tokenrl.lab import measure_bias, prompt_weight, tabular_problem
from tokenrl.lab.exact.objectives import slopes_in_probability


def advantages(estimator: Estimator, rewards: torch.Tensor, valid: torch.Tensor | None = None):
    mask = rewards.new_ones(len(rewards), 2)
    return estimator.advantages(rewards, mask, group_size=len(rewards), valid=valid).policy


BEST = {"baseline": "none", "objective": "max_at_k"}
SUCCESS = {"baseline": "none", "objective": "log_success"}
RISK = {"baseline": "none", "objective": "quantile"}
SUBTRACTED = {
    "leave_one_out": lambda n, order: (1, order),
    "sloo": lambda n, order: (n / (n - 1), order),
    "sloo_minus_one": lambda n, order: (1, order - 1),
    "no_baseline": lambda n, order: (0, 1),
}
"""The weight of the mean maximum of others, and how many these are."""


def by_listing_subsets(rewards: list[float], order: int, form: str) -> list[float]:
    """The sums of the paper, written out over all subsets and multiplied by the number of rows."""
    weight, drawn = SUBTRACTED[form](len(rewards), order)
    result = []
    for i, reward in enumerate(rewards):
        others = rewards[:i] + rewards[i + 1 :]
        best = fmean(max((reward, *s)) for s in itertools.combinations(others, order - 1))
        best_of_others = fmean(map(max, itertools.combinations(others, drawn)))
        result.append(order * (best - weight * best_of_others))
    return result


@pytest.mark.parametrize("form", SUBTRACTED)
@pytest.mark.parametrize("size", [3, 4, 6, 7])
@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_the_best_of_k_is_the_sum_over_all_subsets(form: str, size: int, order: int):
    """Also with ties, negative rewards and rows that abstain, whose reward may be nan."""
    if (form, order) == ("sloo_minus_one", 1):
        return
    draw = seeded(1)
    e = Estimator.preset("max_at_k", objective_order=order, objective_form=form)
    graded = torch.randint(0, 3, (size,), generator=draw).double() - 1
    for rewards in (normals(draw, size), graded):
        if size < e.fewest_rows:
            words = f"group_size is {size}. Take {e.fewest_rows} or more"
            with refused(words):
                advantages(e, rewards)
            continue
        expected = rewards.new_tensor(by_listing_subsets(rewards.tolist(), order, form))
        assert_close(advantages(e, rewards), expected, atol=1e-12, rtol=1e-12)
        spoilt = torch.nn.functional.pad(rewards, (1, 1), value=torch.nan)
        padded = torch.nn.functional.pad(expected, (1, 1))
        assert_close(advantages(e, spoilt, ~spoilt.isnan()), padded)
        few = torch.arange(size) < e.fewest_rows - 1
        assert not advantages(e, rewards, few).any()


def test_large_groups_are_computed_without_overflow_and_in_float32():
    draw = seeded(3)
    rewards = normals(draw, 1024)
    for order in (2, 8, 512, 1023):
        e = Estimator.preset("max_at_k", objective_order=order)
        exact, rounded = advantages(e, rewards), advantages(e, rewards.float())
        # Over all rows, m s_i sums to k m times the mean maximum, and k rho_k(others) to the same.
        assert abs(exact.mean()) < 1e-9 * order * rewards.abs().max()
        assert (exact - rounded).abs().max() < 1e-4 * exact.abs().max()


@pytest.mark.parametrize(
    ("size", "share", "best"), [(2, 0.05, 1), (7, 0.3, 2), (10, 0.3, 3), (4, 0.99, 3)]
)
def test_the_best_share_counts_by_what_it_exceeds_the_next_return(
    size: int, share: float, best: int
):
    """Also with ties, and rows that abstain, whose reward may be nan."""
    draw = seeded(5)
    e = Estimator(**RISK, objective_share=share)
    for rewards in (normals(draw, size), torch.randint(0, 3, (size,), generator=draw).double()):
        threshold = sorted(rewards.tolist())[-best - 1]
        expected = rewards.new_tensor(
            [max(x - threshold, 0) * size / best for x in rewards.tolist()]
        )
        assert_close(advantages(e, rewards), expected, atol=1e-12, rtol=1e-12)
        spoilt = torch.nn.functional.pad(rewards, (1, 1), value=torch.nan)
        padded = torch.nn.functional.pad(expected, (1, 1))
        assert_close(advantages(e, spoilt, ~spoilt.isnan()), padded)


def mean_of_best(chances: torch.Tensor, returns: torch.Tensor, share: float) -> torch.Tensor:
    """The mean of the best share of returns, which takes the part of a return that fits into the share."""
    left, total = torch.tensor(share).double(), 0.0
    for i in returns.argsort(descending=True):
        part = chances[i].minimum(left)
        total, left = total + part * returns[i], left - part
    return total / share


@pytest.mark.parametrize("share", [0.1, 0.3, 0.6, 0.8])
def test_in_large_groups_the_gradient_is_that_of_the_mean_of_the_best_share(share: float):
    """Of completions with these logits and returns, summed over all that a group of n can hold."""
    logits = torch.tensor([0.3, -2.2, 0.8]).double().requires_grad_()
    returns = torch.tensor([0.2, 2.0, -0.4]).double()
    chances = logits.softmax(0)
    (target,) = torch.autograd.grad(
        mean_of_best(chances, returns, share), logits, retain_graph=True
    )
    scores = torch.eye(3).double() - chances.detach()
    e = Estimator(**RISK, objective_share=share)
    slopes = slopes_in_probability(e, returns[None], chances.detach()[None], 0)
    assert_close((chances.detach() * slopes[0]) @ scores, target)
    errors = []
    for size in (10, 20, 40):
        mean = torch.zeros(3).double()
        for counts in itertools.product(range(size + 1), repeat=2):
            if sum(counts) <= size:
                every = torch.tensor([*counts, size - sum(counts)])
                law = torch.distributions.Multinomial(size, chances.detach())
                weight = law.log_prob(every.double()).exp() * every / size
                credit = advantages(e, returns.repeat_interleave(every))
                first = (every.cumsum(0) - every).clamp(max=size - 1)
                mean += (weight * credit[first]) @ scores
        errors.append(float((mean - target).norm() / target.norm()))
    assert errors[0] > 1e-3 and errors[2] < errors[1] < errors[0], errors


def order_mean(order: int, p: torch.Tensor) -> torch.Tensor:
    """ML_T(p), the first terms of the series of log p around 1."""
    return sum((1 - (1 - p) ** k) / k for k in range(1, order + 1))


def slope(objective, p: torch.Tensor) -> torch.Tensor:
    leaf = p.clone().requires_grad_()
    return torch.autograd.grad(objective(leaf).sum(), leaf)[0]


@pytest.mark.parametrize("size", [3, 5, 8])
def test_the_weight_of_a_prompt_is_the_derivative_of_the_objective_in_its_success_rate(
    size: int,
) -> None:
    p = torch.tensor([0.02, 0.1, 0.35, 0.6, 0.97]).double()
    laws = [({}, lambda p: p), ({"baseline": "group_mean"}, lambda p: (size - 1) / size * p)]
    laws.append(({**BEST, "objective_order": 2}, lambda p: 1 - (1 - p) ** 2))
    laws.append((SUCCESS, lambda p: order_mean(size - 1, p)))
    kept = {**SUCCESS, "objective_form": "keep_failures"}
    laws.append((kept, lambda p: order_mean(size, p)))
    for fields, objective in laws:
        weight = prompt_weight(Estimator(**fields), p, size)
        assert_close(weight, slope(objective, p), atol=1e-10, rtol=1e-10)


def test_negative_rewards_have_no_logarithm():
    e, valid = Estimator.preset("maxrl"), torch.tensor([True, True, False])
    check_rewards(e.objective, torch.tensor([[0.5, -0.5], [1.0, 0.0], [-1.0, torch.nan]]), valid)
    rewards = torch.tensor([[1.0, 0.0], [-1.0, 0.5], [0.0, 0.0]])
    with refused(r"the reward -0\.5\. Give rewards of 0 or more"):
        check_rewards(e.objective, rewards, valid)
    check_rewards("reward", rewards, valid)
    with refused("rewards of 0 or more"):
        measure_bias(e, [tabular_problem(2)])


@pytest.mark.parametrize(
    ("name", "statuses"),
    [
        ("max_at_k", ["exact", "exact", "biased"]),
        ("dsr", ["biased", "biased", "biased"]),
        ("maxrl", ["biased", "exact", "biased"]),
        ("maxrl,aggregation=token_mean", ["biased", "asymptotic", "biased"]),
        ("baseline=opo,scale=group_std", ["biased", "biased", "biased"]),
        ("scale=batch_std", ["asymptotic", "exact_per_prompt", "asymptotic"]),
    ],
)
def test_what_a_gradient_is_for_the_mean_reward_and_on_rewards_of_0_and_1(name, statuses):
    e = Estimator.preset(name)
    assert [e.bias_status, e.binary_bias_status, e.reward_bias_status] == statuses


REFUSED = {
    "baseline=none,objective=max_at_k": "objective_order 4",
    "objective_order=4": "the objective is 'reward'",
    "objective_share=0.1": "the objective 'reward'",
    "baseline=none,objective=quantile": "needs a share, such as objective_share 0.05",
    "maxrl,objective_order=4": "follows from the number of completions",
    "objective_form=sloo": "not a form of the objective 'reward'",
    "objective=log_success": "by itself, without baseline 'rloo'. Set baseline 'none'",
    "maxrl,scale=batch_std": "Set scale 'none'",
    "maxrl,returns=reward_to_go": "Set returns 'total'",
    "maxrl,beta=0.1": "kl_placement 'loss'",
    "maxrl,overlong_buffer=4": "Leave overlong_buffer out",
    "pkpo,objective_order=1": "2 or more",
}


@pytest.mark.parametrize(("name", "words"), REFUSED.items())
def test_what_does_not_go_with_an_objective_is_refused(name: str, words: str):
    with refused(words):
        Estimator.preset(name)


@pytest.mark.parametrize("form", ["maxrl", "keep_failures", "leave_one_out"])
def test_the_log_of_success_divides_by_a_mean(form: str):
    """Of the group or of the other rows, without those that abstain; -1 or nothing if no row succeeds."""
    rewards, valid = torch.tensor([1.0, 0.0, 0.3, 9.0]).double(), torch.arange(4) < 3
    e = Estimator.preset("maxrl", objective_form=form)
    mean = (1.3 - rewards[:3]) / 2 if form == "leave_one_out" else 1.3 / 3
    wanted = torch.nn.functional.pad((rewards[:3] - mean) / mean, (0, 1))
    assert_close(advantages(e, rewards, valid), wanted)
    assert (advantages(e, rewards * 0) == -1.0 * (form == "keep_failures")).all()
