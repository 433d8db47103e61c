"""Arms whose gradients differ by a constant factor only are found, and told where an optimiser cancels it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from made_comparison import EPISODES, NONE, PROBLEM, RLOO, arm, compared, record, said, six

from tokenrl.core import Estimator
from tokenrl.lab.compare.factors import same_up_to_a_factor
from tokenrl.lab.compare.records import Arm, Problem

MEAN = arm("mean", baseline="group_mean")


def factor(other: Arm = MEAN, *, end: float = 0.8, problem: Problem = PROBLEM, **options: Any) -> list[str]:
    records = [*six(RLOO, problem=problem), *six(other, end, 0.003, problem=problem)]
    return said(compared(records, arms=(RLOO, other), problem=problem, **options), "Optimiser")


def test_arms_that_differ_by_a_factor_come_out_alike_under_adamw() -> None:
    (text,) = factor()
    assert text.startswith("Optimiser: the gradients of rloo and mean differ only by a constant factor")
    assert "AdamW" in text and "--optimizer sgd" in text
    (text,) = factor(problem=EPISODES, margin=None)
    assert "and Adam divides" in text and "--optimizer" not in text


def test_a_factor_is_not_blamed_where_it_shows_itself() -> None:
    assert factor(end=0.81) == [], "the arms do not come out alike"
    assert factor(NONE) == []
    sgd = replace(PROBLEM, settings={**PROBLEM.settings, "optimizer": "sgd"})
    assert factor(problem=sgd) == []
    assert factor(problem=replace(sgd, settings={**PROBLEM.settings, "optimizer": "adamw"}))
    assert factor(rates={("digits", "mean"): 2e-3}) == []
    assert factor(rates={("digits", "mean"): 2e-3, ("digits", "rloo"): 2e-3})
    one = compared([record(RLOO), record(MEAN)], arms=(RLOO, MEAN))
    assert said(one, "Optimiser") == [], "a single pair does not show it"


SAME = [
    ({}, {"baseline": "group_mean"}),
    ({}, {"aggregation": "fixed_length"}),
    ({"aggregation": "fixed_length"}, {"baseline": "group_mean"}),
    ({}, {"ratio": "token"}),
    ({"ratio": "token", "epsilon": 0.1}, {"ratio": "token"}),
    ({"scale_eps": 0.1}, {"baseline": "group_mean"}),
    ({"kl_estimator": "k3"}, {"baseline": "group_mean", "kl_placement": "loss"}),
    ({"scale": "group_std"}, {"scale": "group_std", "aggregation": "fixed_length"}),
]
OTHER = [
    ({}, {"baseline": "none"}),
    ({}, {"aggregation": "token_mean"}),
    ({}, {"scale": "group_std"}),
    ({"scale": "group_std"}, {"scale": "group_std", "scale_eps": 0.1}),
    ({"truncations": "drop"}, {"truncations": "drop", "baseline": "group_mean"}),
    ({"returns": "reward_to_go"}, {"returns": "reward_to_go", "baseline": "group_mean"}),
]


def gradients(axes: dict[str, Any]) -> torch.Tensor:
    """The gradient in the log-probabilities of an estimator's loss in two steps of two groups of four."""
    estimator, found = Estimator(**axes), []
    for seed in range(2):
        draw = torch.Generator().manual_seed(seed)
        rewards, old = (torch.randn(8, 3, generator=draw).double() for _ in range(2))
        logprobs = old.clone().requires_grad_()
        mask = (torch.arange(3) < torch.randint(1, 4, (8, 1), generator=draw)).double()
        valid = torch.arange(8) != (5 if estimator.truncations == "drop" else -1)
        got = rewards if estimator.returns == "reward_to_go" else rewards[:, 0]
        advantages = estimator.advantages(got, mask, group_size=4, valid=valid).policy
        weights = estimator.token_weights(mask, max_length=7, valid=valid)
        loss = estimator.loss(logprobs, advantages, weights, mask, old_logprobs=old)
        found.append(torch.autograd.grad(loss, logprobs)[0])
    return torch.stack(found)


@pytest.mark.parametrize(("one", "other", "same"), [(*p, True) for p in SAME] + [(*p, False) for p in OTHER])
def test_pairs_by_a_factor_are_those_whose_gradients_are_parallel(
    one: dict[str, Any], other: dict[str, Any], same: bool
) -> None:
    arms = arm("a", **one), arm("b", **other)
    assert list(same_up_to_a_factor(PROBLEM, arms)) == ([arms] if same else [])
    first, second = gradients(one), gradients(other)
    factor = (first * second).sum() / (second * second).sum()
    assert factor > 0 and torch.allclose(first, factor * second, rtol=1e-6, atol=1e-9) == same


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (arm("a", beta=0.1), arm("b", baseline="group_mean", beta=0.1)),
        (arm("a", entropy_coef=0.1), arm("b", baseline="group_mean", entropy_coef=0.1)),
        (arm("a"), arm("b", {"learning_rate": 0.1}, baseline="group_mean")),
        (arm("a"), arm("b", {"num_generations": 8}, baseline="group_mean")),
        (arm("a", {"num_iterations": 2}), arm("b", {"num_iterations": 2}, ratio="token")),
        (arm("a"), arm("b", ratio="sequence_mean")),
    ],
    ids=["KL", "entropy", "rate", "size", "several updates", "ratio of sequences"],
)
def test_a_factor_beside_another_term_or_setting_is_more_than_a_factor(one: Arm, other: Arm) -> None:
    assert list(same_up_to_a_factor(PROBLEM, (one, other))) == []


def test_of_several_arms_each_pair_is_found() -> None:
    arms = (arm("a"), NONE, arm("b", baseline="group_mean"), arm("c", aggregation="fixed_length"))
    pairs = [(one.label, other.label) for one, other in same_up_to_a_factor(PROBLEM, arms)]
    assert pairs == [("a", "b"), ("a", "c"), ("b", "c")]
