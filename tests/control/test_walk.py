"""The walk on a line: where it ends, what it pays, and when it is cut."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env

from tokenrl.control.worlds.walk import Walk
from tokenrl.core import Estimator
from tokenrl.errors import Refused


def play(actions: list[int], **options) -> list[tuple]:
    """(x, reward, terminated, truncated) of each step until the episode ends."""
    env = Walk(**options)
    start, _ = env.reset(seed=0)
    assert start.tolist() == [0]
    seen = []
    for action in actions:
        observation, *rest, _ = env.step(action)
        seen.append((float(observation[0]), *rest))
        if rest[1] or rest[2]:
            break
    return seen


def test_gymnasium_accepts_it():
    env = Walk()
    check_env(env)
    assert env.observation_space.dtype == np.float32


@pytest.mark.parametrize(("action", "side"), [(1, 1), (0, -1)])
def test_it_ends_beyond_1_and_pays_by_the_side(action, side):
    seen = play([action] * 20)
    assert [x for x, *_ in seen] == pytest.approx([side * 0.1 * k for k in range(1, 12)])
    assert [reward for _, reward, *_ in seen] == pytest.approx([-0.01] * 10 + [side - 0.01])
    assert [(t, u) for *_, t, u in seen] == [(False, False)] * 10 + [(True, False)]
    assert sum(reward for _, reward, *_ in seen) == pytest.approx({1: 0.89, -1: -1.11}[side])


def test_standing_about_is_cut_after_50_steps_and_costs():
    seen = play([0, 1] * 40)
    assert len(seen) == 50
    assert [(t, u) for *_, t, u in seen] == [(False, False)] * 49 + [(False, True)]
    assert sum(reward for _, reward, *_ in seen) == pytest.approx(-0.5)


def test_the_last_step_may_end_it_at_the_limit():
    assert play([1] * 11, time_limit=11)[-1][2:] == (True, False)
    assert play([1] * 11, time_limit=10)[-1][2:] == (False, True)
    assert len(play([0, 1] * 40, time_limit=None)) == 80


def test_tenths_do_not_drift():
    """There and back 1000 times ends at 0 exactly, and the end lies where it lay."""
    seen = play([1, 0] * 1000 + [1] * 11, time_limit=None)
    assert seen[1999][0] == 0
    assert len(seen) == 2011
    assert seen[-1][2]


def test_what_is_refused():
    with pytest.raises(Refused, match="time_limit"):
        Walk(time_limit=0)
    env = Walk()
    env.reset()
    for action in (-1, 2):
        with pytest.raises(Refused, match="action"):
            env.step(action)


def test_ten_steps_with_a_reward_at_the_end():
    """G_t = 0.99^(9 - t); normalised, the first five actions are pushed down and the last five up."""
    rewards, mask = torch.zeros(1, 10, dtype=torch.double), torch.ones(1, 10, dtype=torch.bool)
    rewards[0, -1] = 1.0
    plain = Estimator(baseline="none", returns="reward_to_go", gamma=0.99)
    whiten = replace(plain, scale="token_whiten", scale_ddof=0, scale_eps=0)
    raw, normalised = (e.advantages(rewards, mask, group_size=None).policy[0] for e in (plain, whiten))
    wanted = torch.tensor([0.99 ** (9 - t) for t in range(10)], dtype=torch.double)
    torch.testing.assert_close(raw, wanted, rtol=1e-12, atol=0)
    mean, sd = float(wanted.mean()), float(wanted.std(correction=0))
    assert normalised.tolist() == pytest.approx([(g - mean) / sd for g in wanted.tolist()], rel=1e-10)
    assert (normalised < 0).tolist() == [True] * 5 + [False] * 5


@pytest.mark.parametrize("paid", [0.7, -0.7])
def test_a_step_with_positive_return_raises_the_probability_of_the_action_taken(paid):
    estimator = Estimator(baseline="none", returns="reward_to_go")
    logits = torch.tensor([0.3, -0.2], dtype=torch.double, requires_grad=True)
    mask = torch.ones(1, 1, dtype=torch.double)
    advantages = estimator.advantages(mask * paid, mask, group_size=None).policy
    weights = estimator.token_weights(mask, max_length=1)
    loss = estimator.loss(logits.log_softmax(0)[1].reshape(1, 1), advantages, weights, mask)
    (slope,) = torch.autograd.grad(loss, logits)
    before, after = (x.softmax(0)[1] for x in (logits.detach(), logits.detach() - 0.1 * slope))
    assert (after > before) == (paid > 0)
