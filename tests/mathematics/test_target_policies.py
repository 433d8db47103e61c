"""What TPO and delight ascend, by enumeration in two ways, and by what is left as groups grow."""

from __future__ import annotations

import pytest
import torch
from refusals import refused
from torch.testing import assert_close

from tokenrl.core import Estimator
from tokenrl.lab import exact_moments, measure_bias
from tokenrl.lab.exact.problems import tabular_problem
from tokenrl.lab.exact.verdict import problems_of

ETA = 0.7
TARGET = Estimator.preset("tpo", eta=ETA)
DELIGHT = Estimator.preset("dg", eta=ETA)


def by_target(totals, group_size, mask, logprobs):
    """What is left of the totals after TPO's advantages, as sums over the rows of a group."""
    rewards, scores = (x.view(-1, group_size) for x in (totals, (logprobs * mask).sum(1)))
    middle = rewards.mean(1, keepdim=True)
    std = (rewards - middle).square().mean(1, keepdim=True).sqrt()
    tilt = ((rewards - middle) / std.clamp(min=1e-12) / ETA).exp()
    chances = scores.exp() / scores.exp().sum(1, keepdim=True)
    tilted = chances * tilt / (chances * tilt).sum(1, keepdim=True)
    return totals - group_size * (tilted - chances).flatten()


def by_gate(totals, mask, logprobs):
    """What is left of the totals after the advantages of DG, of each token."""
    advantages = (totals - totals.mean())[:, None]
    return totals[:, None] - advantages / (1 + (advantages * logprobs / ETA).exp())


@pytest.mark.parametrize(("named", "own"), [(TARGET, by_target), (DELIGHT, by_gate)])
def test_a_function_of_ones_own_has_the_same_expectation(named, own):
    for problem in problems_of(named)[:6]:
        ours, theirs = (exact_moments(e, problem) for e in (named, Estimator(baseline=own)))
        assert_close(theirs.mean, ours.mean, rtol=1e-9, atol=1e-9)
        assert theirs.second == pytest.approx(ours.second)
    verdict = measure_bias(Estimator(baseline=own))
    assert (verdict.declared, verdict.found) == ("unknown", "biased")


@pytest.mark.parametrize("eta", [0.3, 1.0, 5.0])
def test_with_large_groups_tpo_ascends_the_mean_exponential_under_the_squared_policy(eta):
    """With a group in which each completion is as frequent as it is probable, scores u held fixed."""
    counts, rewards = torch.tensor([1, 2, 3, 6]), torch.tensor([2.0, 0.0, 1.0, -1.0]).double()
    logits = counts.double().log().requires_grad_()
    log_pi = logits.log_softmax(0)
    chances = log_pi.detach().exp()
    centred = rewards - chances @ rewards
    u = centred / (chances @ centred.square()).sqrt()
    objective = (torch.logsumexp(2 * log_pi + u / eta, 0) - torch.logsumexp(2 * log_pi, 0)) / 2
    (expected,) = torch.autograd.grad(objective, logits, retain_graph=True)
    drawn = torch.arange(4).repeat_interleave(counts)
    inputs = {"group_size": 12, "logprobs": log_pi.detach()[drawn, None]}
    advantages = Estimator.preset("tpo", eta=eta).advantages(
        rewards[drawn], torch.ones(12, 1).double(), **inputs
    )
    (ascended,) = torch.autograd.grad((advantages.policy * log_pi[drawn]).mean(), logits)
    assert_close(ascended, expected)


def test_a_policy_that_has_reached_its_target_has_no_gradient_left():
    rewards = torch.tensor([1.0, 3.0, 0.0]).double()
    old = torch.tensor([[-1.0], [-2.0], [-0.5]]).double()
    mask, sizes = torch.ones(3, 1).double(), {"group_size": 3}
    first = TARGET.advantages(rewards, mask, logprobs=old, **sizes).policy
    u = (rewards - rewards.mean()) / rewards.std(correction=0)
    inputs = sizes | {"logprobs": old, "present_logprobs": old + u[:, None] / ETA + 0.3}
    later = TARGET.advantages(rewards, mask, **inputs).policy
    assert first.abs().max() > 0.5
    assert_close(later, torch.zeros_like(later), rtol=0, atol=1e-12)


def test_a_mild_target_is_the_mean_under_the_squared_policy_and_no_temperature_undoes_that():
    """As eta grows the direction stays biased: a large eta is a small step, not another objective."""
    problem = tabular_problem(2, group_size=3)
    mild = [
        exact_moments(Estimator.preset("tpo", eta=eta), problem).cosine for eta in (1e2, 1e4, 1e6)
    ]
    assert mild[2] == pytest.approx(mild[1], abs=1e-4) and mild[2] < 0.99


def test_a_gate_that_is_half_open_is_half_of_the_gradient_without_it():
    problem = tabular_problem(2, group_size=3)
    open_, plain = (
        exact_moments(e, problem).mean
        for e in (Estimator.preset("dg", eta=1e9), Estimator(baseline="batch_mean"))
    )
    assert_close(open_, plain / 2, rtol=1e-6, atol=1e-9)


def test_what_a_target_does_not_go_with_is_refused():
    for changes in (
        {"baseline": "rloo"},
        {"baseline": "none", "returns": "reward_to_go"},
        {"baseline": "none", "components": "separate"},
    ):
        with refused("scale .target. makes the advantages by itself"):
            Estimator(scale="target", **changes)
    with refused("logprobs was not given, and scale 'target' needs it"):
        TARGET.advantages(torch.ones(2), torch.ones(2, 1), group_size=2)
