"""The page on target policies, computed a second time: group by group, with every formula written out in numpy."""

from __future__ import annotations

import math
import re
from functools import cache
from itertools import combinations_with_replacement

import numpy as np
import pytest
import torch
from folders import RECIPES
from scipy.special import expit, log_softmax, softmax
from scipy.stats import multinomial

from tokenrl.lab import tabular_problem

PAGE = (RECIPES / "pages/explain/targets.md").read_text("utf-8").split("## Is the table made")[0]
RARE = np.log([0.9, 0.05, 0.05]), np.array([0.0, 1.0, -3.0])


@cache
def bandit(seed):
    """Log-probabilities and rewards of three answers."""
    problem = tabular_problem(seed, length=1)
    return problem.logprobs[0, :, 0].numpy(), problem.totals[0].numpy()


BANDITS = [*map(bandit, range(20))]


def rows(pattern):
    """The rows of tables whose first cells have the pattern: these, and the numbers of each other cell."""
    listed = re.findall(rf"(?m)^\| ({pattern}) \| (.*\d.*) \|$", PAGE)
    return [
        (names, [[*map(float, re.findall(r"-?\d*\.\d+", cell))] for cell in rest.split(" | ")])
        for names, rest in listed
        if "." in rest
    ]


def eta_of(name):
    return float((re.findall(r"eta = (\S+)", name) or [1])[0])


def weights(name, rewards, old, now):
    """What the scores of the completions of a group are multiplied by."""
    centred, size = rewards - rewards.mean(), len(rewards)
    std = centred.std() or 1.0
    if "TPO" in name or name.startswith("eta"):
        return softmax(old + centred / std / eta_of(name)) - softmax(now)
    if "DG" in name:
        return centred * expit(-centred * now) / size
    if "RLOO" in name:
        return centred / (size - 1)
    advantages = centred / (std * math.sqrt(size / (size - 1)) + 1e-4)
    ratio = np.exp(now - old)
    held = np.where(advantages > 0, ratio > 1.2, ratio < 0.8)
    return advantages * ratio * ~held / size


def moved(name, policy, rewards, size, rate=1.0, spread=0.0):
    """For each group its probability, and the logits after its passes; `spread` is the log of answers by kind."""
    kinds = len(policy)
    for group in map(list, combinations_with_replacement(range(kinds), size)):
        chance = multinomial.pmf(np.bincount(group, minlength=kinds), size, np.exp(policy))
        logits, passes = policy, 4 if "four" in name else 1
        for _ in range(passes):
            old, now = ((log_softmax(x) - spread)[group] for x in (policy, logits))
            factors = weights(name, rewards[group], now if "renewed" in name else old, now)
            scores = np.eye(kinds)[group] - softmax(logits)
            logits = logits + rate / passes * factors @ scores
        yield chance, logits


def step(name, policy, *options):
    return sum(p * (logits - policy) for p, logits in moved(name, policy, *options))


def cosine(name, size, policy, rewards, objective):
    """The cosine of the expected step with the gradient of an objective, u held fixed, in the logits."""
    p, eta = np.exp(policy), eta_of(name)
    centred = torch.tensor(rewards - p @ rewards)
    u = centred / (torch.tensor(p) @ centred**2).sqrt()
    leaf = torch.tensor(policy, requires_grad=True)
    log_policy = leaf.log_softmax(0)
    squared = (2 * log_policy).softmax(0)
    objectives = {
        "reward": log_policy.exp() @ centred,
        "limit": (squared @ (u / eta).exp()).log() / 2,
        "large": squared @ u,
        "small": squared[u.argmax()].log() / 2,
    }
    (gradient,) = torch.autograd.grad(objectives[objective], leaf)
    mean = torch.tensor(step(name, policy, rewards, size))
    return float(torch.cosine_similarity(mean, gradient, dim=0))


def median_and_least(numbers):
    return pytest.approx([np.median(numbers), min(numbers)], abs=6e-4)


NAMES = r"(?:TPO|DG|GRPO|RLOO)[^|,]*(?:, eta = \S+)?"
TABLES = {
    "reward": rows(NAMES),
    "limit": rows(r"eta = \S+"),
    "passes": rows("[A-Z]+, (?:one|four)[^|]*"),
    "prompts": rows(rf"[a-z][^|]* \| {NAMES}"),
}


def test_every_table_is_tested():
    assert [*map(len, TABLES.values())] == [6, 3, 7, 11]


@pytest.mark.parametrize("table", ["reward", "limit"])
def test_the_cosines(table):
    columns = [(2, table), (4, table), (8, table)]
    if table == "limit":
        columns += [(8, "large"), (8, "small")]
    for name, cells in TABLES[table]:
        for (size, objective), cell in zip(columns, cells, strict=False):
            numbers = [cosine(name, size, *x, objective) for x in BANDITS]
            assert cell == median_and_least(numbers)


def test_the_start_with_a_rare_bad_answer():
    for name, (*_, small, large) in TABLES["reward"]:
        cosines = [cosine(name, size, *RARE, "reward") for size in (2, 8)]
        assert [*small, *large] == pytest.approx(cosines, abs=6e-4)


def test_tpo_tends_to_the_gradient_of_its_limit():
    for eta in (0.1, 1, 10):
        assert min(cosine(f"TPO, eta = {eta}", 40, *x, "limit") for x in BANDITS) > 0.998


@pytest.mark.parametrize(("name", "cells"), TABLES["passes"])
def test_the_changes_of_the_passes(name, cells):
    for rate, cell in zip((0.1, 2.0, 20.0), cells, strict=True):
        changes = [
            sum(p * (softmax(logits) - np.exp(x)) @ r for p, logits in moved(name, x, r, 8, rate))
            for x, r in BANDITS
        ]
        assert cell == median_and_least(changes)


@pytest.mark.parametrize(("names", "cells"), TABLES["prompts"])
def test_the_weights_of_prompts_and_their_shares_of_a_step(names, cells):
    wrong = {"any": 7, "one right, one wrong": 1, "one right, 1,000 wrong": 1000}
    steps = []
    for p, (weight, _) in zip((0.01, 0.3, 0.9), cells, strict=True):
        answers = wrong.get(names.split(" |")[0], 1 / p - 1), 1
        rewards, policy = np.array([0.0, 1.0]), np.log([1 - p, p])
        steps.append(step(names, policy, rewards, 8, 1.0, np.log(answers))[1])
        assert weight == pytest.approx(steps[-1] / (p * (1 - p)), abs=6e-4)
    assert [share for _, share in cells] == pytest.approx(np.array(steps) / sum(steps), abs=6e-4)


def test_the_weights_that_the_text_names():
    best, log = 7 * 0.99**6, (1 - 0.99**7) / 0.01
    assert f"{best:.3f} for `max_at_k` with an order of 7, and {log:.3f} for `maxrl`" in PAGE


def test_the_best_answer_gains_in_expectation_however_rewards_are_scaled():
    for policy, rewards in (*BANDITS, RARE):
        mean = step("TPO", policy, rewards, 8)
        assert mean[rewards.argmax()] > 0
        np.testing.assert_allclose(step("TPO", policy, 1000 * rewards + 3, 8), mean)
