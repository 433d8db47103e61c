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

from tokenrl.lab import prompt_weight, tabular_problem

PAGE = (RECIPES / "pages" / "explain" / "targets.md").read_text(encoding="utf-8")
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


def weights(name, rewards, old, now):
    """What the scores of the completions of a group are multiplied by."""
    centred, size = rewards - rewards.mean(), len(rewards)
    std = centred.std() or 1.0
    if "TPO" in name:
        eta = float((re.findall(r"eta = (\S+)", name) or [1])[0])
        return softmax(old + centred / std / eta) - softmax(now)
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


def cosine(found, objective, policy):
    """The cosine with the gradient of a function of the log-probabilities."""
    leaf = torch.tensor(policy, requires_grad=True)
    gradient = torch.autograd.grad(objective(leaf.log_softmax(0)), leaf)[0].numpy()
    return found @ gradient / np.linalg.norm(found) / np.linalg.norm(gradient)


def of_reward(name, size, policy, rewards):
    mean = torch.tensor(rewards)
    return cosine(step(name, policy, rewards, size), lambda x: x.exp() @ mean, policy)


def of_limit(name, size, policy, rewards, limit="eta"):
    """The cosine with the gradient of half the log of a mean under the square of the policy, or with its limits."""
    p = np.exp(policy)
    centred = rewards - p @ rewards
    u = torch.tensor(centred / math.sqrt(p @ centred**2))
    eta = float(name.split()[-1])
    objective = {
        "eta": lambda x: (2 * x + u / eta).logsumexp(0) - (2 * x).logsumexp(0),
        "large": lambda x: (x.exp() ** 2 @ u) / (x.exp() ** 2).sum(),
        "small": lambda x: x[u.argmax()] - (x.exp() ** 2).sum().log() / 2,
    }[limit]
    return cosine(step(name, policy, rewards, size), objective, policy)


def median_and_least(numbers):
    return pytest.approx([np.median(numbers), min(numbers)], abs=6e-4)


NAMES = r"(?:TPO|DG|GRPO|RLOO)[^|,]*(?:, eta = \S+)?"


@pytest.mark.parametrize(("name", "cells"), [x for x in rows(NAMES) if len(x[1]) == 5])
def test_the_cosines_with_the_mean_reward(name, cells):
    for size, cell in zip((2, 4, 8), cells, strict=False):
        assert cell == median_and_least([of_reward(name, size, *x) for x in BANDITS])
    for size, cell in zip((2, 8), cells[3:], strict=True):
        assert cell == [pytest.approx(of_reward(name, size, *RARE), abs=6e-4)]


@pytest.mark.parametrize(("name", "cells"), rows(r"eta = \S+"))
def test_the_cosines_with_what_tpo_tends_to(name, cells):
    columns = [(2, "eta"), (4, "eta"), (8, "eta"), (8, "large"), (8, "small")]
    for (size, limit), cell in zip(columns, cells, strict=True):
        numbers = [of_limit(f"TPO, {name}", size, *x, limit) for x in BANDITS]
        assert cell == median_and_least(numbers)
    assert of_limit(f"TPO, {name}", 48, *BANDITS[0]) > 0.99999


@pytest.mark.parametrize(("name", "cells"), rows("[A-Z]+, (?:one|four)[^|]*"))
def test_the_changes_of_the_passes(name, cells):
    for rate, cell in zip((0.1, 2.0, 20.0), cells, strict=True):
        changes = [
            sum(p * (softmax(logits) - np.exp(x)) @ r for p, logits in moved(name, x, r, 8, rate))
            for x, r in BANDITS
        ]
        assert cell == median_and_least(changes)


@pytest.mark.parametrize(("names", "cells"), rows(rf"[a-z][^|]* \| {NAMES}"))
def test_the_weights_of_prompts_and_their_shares_of_a_step(names, cells):
    steps = []
    for p, cell in zip((0.01, 0.3, 0.9), cells, strict=True):
        wrong = {"any": 7, "one right, one wrong": 1, "one right, 1,000 wrong": 1000}
        ratio = wrong.get(names.split(" |")[0], 1 / p - 1)
        spread = np.log([ratio, 1])
        policy = np.log([1 - p, p])
        steps.append(step(names, policy, np.array([0.0, 1.0]), 8, 1.0, spread)[1])
        assert cell[0] == pytest.approx(steps[-1] / (p * (1 - p)), abs=6e-4)
    assert [cell[1] for cell in cells] == pytest.approx(np.array(steps) / sum(steps), abs=6e-4)


def test_every_table_is_tested():
    assert len(rows(NAMES)) == 6 and len(rows(rf"[a-z][^|]* \| {NAMES}")) == 11
    assert len(rows(r"eta = \S+")) == 3


def test_the_best_answer_gains_in_expectation_whatever_eta_is_and_however_rewards_are_scaled():
    for policy, rewards in (*BANDITS, RARE):
        for eta in (0.1, 1, 10):
            found = step(f"TPO, eta = {eta}", policy, rewards, 8)
            assert found[rewards.argmax()] > 0
            scaled = step(f"TPO, eta = {eta}", policy, 1000 * rewards + 3, 8)
            np.testing.assert_allclose(scaled, found)


def test_the_weights_that_the_text_names():
    named = re.findall(r"is (\S+) for `max_at_k` with an order of 7, and (\S+) for `maxrl`", PAGE)
    presets = ("max_at_k,objective_order=7", "maxrl")
    weights = [float(prompt_weight(x, 0.01, 8)) for x in presets]
    assert [*map(float, named[0])] == pytest.approx(weights, abs=6e-4)
