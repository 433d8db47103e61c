"""Baselines that remember earlier steps, and the quantile of the other rows."""

from __future__ import annotations

import math

import pytest
import torch
from refusals import refused, stopped

from tokenrl.core import Estimator
from tokenrl.core.memories import read, update
from tokenrl.lab import measure_bias, tabular_problem


def test_the_tracker_by_hand():
    """a <- .5 a + r, b <- .5 b + 1 - r, begun at the running mean; a row that abstains is not seen."""
    tracker = Estimator(baseline="tracker", tracker_decay=0.5, running_mean_init=0.2).memory()
    keys = torch.tensor([7, 7, 2**62, 5])
    assert tracker.read(keys).tolist() == pytest.approx([0.2] * 4)
    rewards, valid = (
        torch.tensor([1.0, 0.5, 0.0, torch.nan]),
        torch.tensor([True, True, True, False]),
    )
    assert update(tracker, keys, rewards, valid) == pytest.approx(0.2)  # what the step has read
    mean = 0.9 * 0.2 + 0.1 * 0.5
    first, second = 1.6 / 2.5, 0.1 / 1.5
    assert tracker.read(keys).tolist() == pytest.approx([first, first, second, mean])
    again = Estimator(baseline="tracker", tracker_decay=0.5).memory()
    again.load_state_dict(tracker.state_dict())
    for one in (tracker, again):
        # in control the rewards of an episode are summed
        update(one, keys[:1], torch.tensor([[0.0, 1.0]]))
    assert torch.equal(tracker.read(keys), again.read(keys))
    assert tracker.read(keys[:1]).tolist() == pytest.approx([1.8 / 2.25])
    for wrong in (1.5, -0.1):
        with stopped(f"from 0 to 1, but one is {wrong}"):
            update(tracker, keys[:1], torch.tensor([wrong]))


class Best:
    """The largest reward of each prompt so far."""

    def __init__(self):
        self.best = {}

    def read(self, keys):
        return torch.tensor([self.best.get(key, 0.0) for key in keys.tolist()])

    def update(self, keys, rewards):
        for key, reward in zip(keys.tolist(), rewards.tolist(), strict=True):
            self.best[key] = max(reward, self.best.get(key, reward))

    def state_dict(self):
        return dict(self.best)

    def load_state_dict(self, state):
        self.best = dict(state)


class Forgetful:
    read = update = print


class Demanding(Forgetful):
    def __init__(self, size):
        self.size = size


def test_a_class_of_ones_own_is_a_memory():
    e = Estimator(baseline=Best)
    assert (e.bias_status, e.needs_memory) == ("exact", True)
    memory, keys = e.memory(), torch.tensor([3, 4])
    assert update(memory, keys, torch.tensor([2.0, 3.0])) == 0.0
    assert memory.read(keys).tolist() == [2.0, 3.0] and e.memory().read(keys).tolist() == [
        0.0,
        0.0,
    ]
    assert update(memory, keys, torch.zeros(2)) == 2.5  # the mean of what was read
    verdict = measure_bias(e, [tabular_problem(1, prompts=2, vocabulary=2)])
    assert verdict.found == "exact" and "the memory held fixed" in verdict.tried
    with refused("'Forgetful' has no state_dict and no load_state_dict"):
        Estimator(baseline=Forgetful).memory()
    with stopped(r"'Demanding' failed: it raised TypeError: .*'size'"):
        Estimator(baseline=Demanding).memory()
    memory.best[4] = torch.nan
    with refused("'Best' must return a tensor of 2 finite numbers"):
        read(memory, keys)


@pytest.mark.parametrize("share", [0.01, 0.3, 0.5, 0.7, 1.0])
def test_the_quantile_of_the_other_rows(share):
    """The least return of the others that at least this share of them do not exceed."""
    rewards = [2.5, 0.0, 7.0, 1.0, 1.0, 7.0, 2.0]
    wanted = []
    for i, reward in enumerate(rewards):
        others = sorted(rewards[:i] + rewards[i + 1 :])
        wanted.append(reward - others[math.ceil(share * len(others)) - 1])
    e = Estimator(baseline="quantile", baseline_quantile=share)
    spoiled = torch.tensor([*rewards, torch.nan])
    shared = {"group_size": len(spoiled), "valid": ~spoiled.isnan()}
    found = e.advantages(spoiled, torch.ones(len(spoiled), 1), **shared).policy
    assert found.tolist() == [*wanted, 0.0]
    alone = e.advantages(spoiled[:2], torch.ones(2, 1), group_size=2, valid=shared["valid"][-2:])
    assert alone.policy.tolist() == [0.0, 0.0]
