"""Advantages of turns: against a second implementation by loops, and what one turn per row leaves."""

from __future__ import annotations

import doctest
import itertools
from dataclasses import replace

import pytest
import torch
from drawing import normals, seeded
from torch.testing import assert_close

import tokenrl.lab.exact.turns as turns_module
from tokenrl.core import Estimator
from tokenrl.core.choices import CHOICES
from tokenrl.errors import Refused
from tokenrl.lab import exact_moments, named_estimators, turn_problems
from tokenrl.lab.exact.verdict import Claim

LAYOUT = (
    "0........",
    ".00.1....",
    "0.11.22..",
    "00.......",
    ".0.1.....",
    "0011.2...",
    ".00......",
    "0..11....",
)
"""The turn of each action, for each row and position of a step; a dot is no action."""
N, T, K, SIZE = 8, 9, 3, 4
"""Rows, positions and turns of a step, and rows of a group."""


def a_step(seed=0, layout=LAYOUT):
    """Every input of a step; off the mask these are junk."""
    draw = seeded(seed)
    mask = torch.tensor([[character != "." for character in row] for row in layout])
    turns = torch.tensor([[int(number) for number in row.replace(".", "7")] for row in layout])
    rewards, *random = normals(draw, 4, N, T)
    names = ("logprobs", "ref_logprobs", "values")
    inputs = dict(zip(names, random, strict=True)) | {"score_norms": random[0].abs()}
    inputs = {name: x.masked_fill(~mask, torch.nan) for name, x in inputs.items()}
    inputs["greedy_rewards"] = normals(draw, N)
    sizes = {"group_size": SIZE, "baseline_value": 0.4}
    return {"rewards": rewards, "mask": mask, "turns": turns, **sizes, **inputs}


def by_loops(step, column):
    """Sum rewards [N, K] over each turn, or what actions have, or take the value of a turn's first action."""
    sums, reached = torch.zeros(N, K, dtype=torch.double), torch.zeros(N, K, dtype=torch.bool)
    for i, t in itertools.product(range(N), range(T)):
        is_action = bool(step["mask"][i, t])
        numbers = step["turns"][i, : t + 1][step["mask"][i, : t + 1]].tolist()
        latest = max(numbers, default=0)
        begins = is_action and numbers.count(latest) == 1
        if {"rewards": True, "values": begins}.get(column, is_action):
            sums[i, latest] += step[column][i, t]
        reached[i, latest] |= is_action
    return sums, reached


def tokens_of(step, by_turn):
    """Give each token the number of its turn, by a loop."""
    spread = torch.zeros(N, T, dtype=torch.double)
    for i, t in step["mask"].nonzero().tolist():
        spread[i, t] = by_turn[i, step["turns"][i, t]]
    return spread


def allowed(baseline, scale, returns):
    if returns == "total":
        return "episode" not in baseline + scale
    return returns != "episode_normalized" or CHOICES["baseline"][baseline].any_units


@pytest.mark.parametrize("scale", ["none", "group_std", "token_whiten", "episode_std"])
def test_a_turn_is_a_step_in_time(scale):
    """The same numbers as from the rewards, values and score norms [N, K] of turns, summed by loops."""
    step = a_step() | {"valid": torch.arange(N) != 5}
    rewards, reached = by_loops(step, "rewards")
    inputs = {name: by_loops(step, name)[0] for name in ("values", "score_norms")}
    for name in ("group_size", "greedy_rewards", "baseline_value", "valid"):
        inputs[name] = step[name]
    for baseline, returns in itertools.product(CHOICES["baseline"], CHOICES["returns"]):
        if not allowed(baseline, scale, returns):
            continue
        axes = {"baseline": baseline, "scale": scale, "returns": returns, "window": 1}
        estimator = Estimator(**axes, gamma=0.9, lam=0.8)
        wanted = estimator.advantages(rewards, reached, **inputs)
        result = estimator.advantages(**step)
        policy = wanted.policy[:, None].expand(N, K) if wanted.policy.ndim == 1 else wanted.policy
        rows = result.policy[:, None] * step["mask"] if result.policy.ndim == 1 else result.policy
        words = f"{baseline}, {returns}"
        assert_close(rows, tokens_of(step, policy), msg=lambda text: f"{words}: {text}")  # noqa: B023
        assert_close(result.returns * step["mask"], tokens_of(step, wanted.returns))


def test_what_is_added_to_the_rewards_is_added_to_tokens():
    """A KL in the reward, and the penalty on long rows by the number of their tokens."""
    step = a_step(1)
    axes = {"returns": "reward_to_go", "baseline": "timestep_mean"}
    added = Estimator(**axes, beta=0.3, overlong_buffer=4)
    result = added.advantages(**step, max_length=6).policy
    kl = torch.where(step["mask"], step["logprobs"] - step["ref_logprobs"], 0.0)
    penalty = -((step["mask"].sum(-1) - 2) / 4).clamp(0, 1).double()
    last = [int(row.nonzero().max()) for row in step["mask"]]
    step["rewards"] = step["rewards"] - 0.3 * kl
    step["rewards"][torch.arange(N), last] += penalty
    assert_close(result, Estimator(**axes).advantages(**step).policy)


PROBLEM = replace(turn_problems()[0], group_size=2)


CATALOGUE = named_estimators()


@pytest.mark.parametrize("name", CATALOGUE)
def test_what_is_declared_holds_for_turns(name):
    """The catalogue on rows of two turns: no bias where none is declared, and a bias where one is."""
    estimator, rewards = CATALOGUE[name], PROBLEM.rewards
    whole = estimator.objective != "reward" or estimator.scale == "target"
    if estimator.returns == "total" and not whole:
        estimator = replace(estimator, returns="reward_to_go")
    if estimator.components == "separate" or estimator.objective != "reward":
        rewards = PROBLEM.totals.abs()
    size = max(3 if estimator.scale == "loo_std" else 2, min(estimator.fewest_rows, 3))
    try:
        status = exact_moments(estimator, replace(PROBLEM, rewards=rewards), group_size=size).status
    except Refused:  # a group of more than three
        assert estimator.fewest_rows > 3
        return
    declared = estimator.bias_status
    assert Claim("biased" if declared == "asymptotic" else declared, status).ok, (declared, status)


@pytest.mark.slow
def test_the_example_in_the_docstring():
    done = doctest.testmod(turns_module)
    assert done.attempted >= 4 and done.failed == 0
