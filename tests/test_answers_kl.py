"""The answers on the KL, groups and branches, computed a second time: by autograd and by listing what is drawn."""

from __future__ import annotations

import itertools
import math

import groups
import kl_gradients
import pytest
import torch
from folders import RECIPES
from torch.testing import assert_close

from tokenrl.core.effects import KL_EFFECTS
from tokenrl.lab import prompt_weight, tabular_problem

LENGTH, TOKENS = 2, 3


def listed(logits):
    """All completions of at most two tokens, of which 0 is the end: for each its tokens' log-probabilities."""
    table = logits.log_softmax(-1)  # prefixes: nothing, 1, 2
    ended = [[table[0, 0]]]
    return ended + [
        [table[0, first], table[first, second]] for first in (1, 2) for second in range(TOKENS)
    ]


def logits_of(seed, distance):
    draw = torch.Generator().manual_seed(seed)
    logits, change = torch.randn(2, 3, TOKENS, generator=draw, dtype=torch.double)
    return logits.requires_grad_(), logits + distance * change


def k3_with_ratio(row, ref_row):
    return sum(
        torch.exp(x - x.detach()) * (torch.exp(r - x) - (r - x) - 1)
        for x, r in zip(row, ref_row, strict=True)
    )


@pytest.mark.parametrize("seed", [0, 3])
def test_the_forms_of_the_kl_have_the_gradients_that_autograd_gives(seed):
    """Those that are settings of an estimator are in `mathematics/test_expectations.py`."""
    logits, reference = logits_of(seed, 1.0)
    problem = kl_gradients.apart(seed, 1.0, LENGTH)
    rows, ref_rows = listed(logits), listed(reference.detach())
    pairs = list(zip(rows, ref_rows, strict=True))
    kl = sum(sum(row).exp() * (sum(row) - sum(ref)) for row, ref in pairs)
    (truth,) = torch.autograd.grad(kl, logits, retain_graph=True)
    assert_close(kl_gradients.kl_gradient(problem), truth.flatten())
    assert_close(
        kl_gradients.per_token(problem), kl_gradients.FORMS["the same, discount 1"](problem)
    )
    loss = sum(
        sum(row).exp().detach() * k3_with_ratio(row, ref_row)
        for row, ref_row in zip(rows, ref_rows, strict=True)
    )
    (gradient,) = torch.autograd.grad(loss, logits)
    assert_close(kl_gradients.FORMS["k3 times the ratio"](problem), gradient.flatten())


def test_the_page_has_every_form_that_is_exact():
    problem = kl_gradients.apart(0)
    truth = kl_gradients.kl_gradient(problem)
    exact = [
        (fields["kl_placement"], fields["kl_estimator"])
        for name, fields in kl_gradients.PLACES.items()
        if kl_gradients.error(kl_gradients.placed(problem, name), truth) < 1e-10
    ]
    assert {*exact} == {pair for pair, choice in KL_EFFECTS.items() if choice.status == "exact"}
    page = (RECIPES / "pages" / "explain" / "kl.md").read_text()
    assert page.count("| $\\nabla \\mathrm{KL}$ |") == len(exact)


@pytest.mark.parametrize(
    ("form", "gamma"),
    [
        ("mean - k1 in the advantage", 0.0),
        ("the same, discount 0.9", 0.9),
        ("the same, discount 1", 1.0),
    ],
)
def test_a_mean_of_k1_in_the_advantage_is_a_loop_over_tokens(form, gamma):
    logits, reference = logits_of(1, 1.0)
    pairs = list(zip(listed(logits), listed(reference.detach()), strict=True))
    chances = [sum(row).exp().detach() for row, _ in pairs]
    ratios = [[(x - r).detach() for x, r in zip(*pair, strict=True)] for pair in pairs]
    tokens = sum(p * len(k1) for p, k1 in zip(chances, ratios, strict=True))
    mean = sum(p * sum(k1) for p, k1 in zip(chances, ratios, strict=True)) / tokens
    loss = 0.0
    for (row, _), p, k1 in zip(pairs, chances, ratios, strict=True):
        for t, x in enumerate(row):
            later = sum(gamma ** (u - t) * (k1[u] - mean) for u in range(t, len(row)))
            loss = loss + p * later * x
    (gradient,) = torch.autograd.grad(loss, logits)
    assert_close(kl_gradients.FORMS[form](kl_gradients.apart(1, 1.0, LENGTH)), gradient.flatten())


@pytest.mark.parametrize(("p", "size"), [(0.1, 4), (0.9, 3)])
def test_the_mean_advantage_of_mixed_groups_is_a_sum_over_groups(p, size):
    chance, advantage, gradient = 0.0, 0.0, 0.0
    for rewards in itertools.product((0.0, 1.0), repeat=size):
        probability = math.prod(p if r else 1 - p for r in rewards)
        for r, weight in zip(rewards, groups.rloo(rewards), strict=True):
            gradient += probability * weight * (1 / p if r else -1 / (1 - p))
        if rewards[0] and not all(rewards):
            chance += probability
            advantage += probability * (1 - sum(rewards) / size)
    assert groups.mixed_mean(p, size) == pytest.approx(advantage / chance)
    assert prompt_weight("rloo", p, size).item() == pytest.approx(gradient) == pytest.approx(1)


def test_the_noise_of_one_branch_is_a_sum_over_all_its_outcomes():
    """The value of each prefix is 1 or 0 by a draw of its own, which is listed here."""
    problem = tabular_problem(4, length=LENGTH, rewards="binary")
    chances, rewards, scores = problem.chances[0], problem.totals[0], problem.scores[0]
    tokens = problem.mask.sum(-1)
    start = float(chances @ rewards)
    assert 0 < start < 1
    # tokens of the completion, and of a continuation of the empty prefix
    mean, second, cost = 0.0, 0.0, 2 * float(chances @ tokens)
    for row, chance in enumerate(chances):
        later = scores[row, 0]  # of the rows that begin with the same token
        same = [
            m for m in range(len(chances)) if tokens[m] == 2 and bool((scores[m, 0] == later).all())
        ]
        following = (
            float(rewards[same] @ chances[same] / chances[same].sum()) if tokens[row] == 2 else None
        )
        cost += float(chance) if following is not None else 0.0
        values = [start] if following is None else [start, following]
        for drawn in itertools.product((0.0, 1.0), repeat=len(values)):
            weight = float(chance) * math.prod(
                v if x else 1 - v for v, x in zip(values, drawn, strict=True)
            )
            after = [*drawn[1:], float(rewards[row])]
            gradient = sum((after[t] - drawn[t]) * scores[row, t] for t in range(int(tokens[row])))
            mean = mean + weight * gradient
            second += weight * float(gradient @ gradient)
    assert_close(mean, problem.gradient()[0])
    signal = float(mean @ mean)
    assert groups.branch_cost(problem, 1) == pytest.approx((second - signal) / signal * cost)


@pytest.mark.parametrize("divisor", ["sum", "mean over all tokens", "mean of each completion"])
def test_a_step_of_ascent_follows_the_expectation_of_the_surrogate(divisor):
    rewards = torch.tensor([1.0, 1.0, 0.0, 0.0], dtype=torch.double)
    lengths = torch.tensor([1.0, groups.LONG, 1.0, groups.LONG], dtype=torch.double)
    logits = torch.zeros(4, dtype=torch.double, requires_grad=True)
    p = logits.softmax(0)
    weights = {"sum": 1.0, "mean over all tokens": 1 / float(p.detach() @ lengths)}.get(
        divisor, 1 / lengths
    )
    gain = (p * (rewards - float(p.detach() @ rewards)) * weights).sum()
    (gradient,) = torch.autograd.grad(gain, logits)
    path = groups.ascent(rewards, divisor)
    assert_close(path[0], torch.full((4,), 0.25, dtype=torch.double))
    assert_close(path[1], (groups.RATE * gradient).softmax(0))
