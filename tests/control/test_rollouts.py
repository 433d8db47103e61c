"""Rows are episodes, or pieces of them, with nothing of the steps that only reset."""

from __future__ import annotations

import itertools

import gymnasium
import numpy as np
import pytest
import torch
from counting_env import register
from gymnasium import spaces
from gymnasium.vector import VectorEnv
from hypothesis import given, settings, strategies as st

from tokenrl.control.environments import Environments, describe
from tokenrl.control.policies import Policy, Shape
from tokenrl.control.rollouts import Pieces, Steps, collect_episodes, into_rows


def policy_of(size=2, actions=2):
    return Policy(Shape(size, "softmax", actions, hidden=()), torch.Generator().manual_seed(0))


def draws(seed=0):
    return torch.Generator().manual_seed(seed)


def test_unequal_episodes_are_not_mixed_with_those_that_follow():
    envs = Environments("CartPole-v1", 16)
    rollout = collect_episodes(envs, policy_of(4), 500, draws(), seed=3)
    lengths = rollout.mask.sum(1)
    assert lengths.unique().numel() > 3
    assert torch.equal(rollout.rewards.sum(1), lengths.float())  # one point a step
    assert torch.equal(rollout.mask, torch.arange(rollout.mask.shape[1]) < lengths[:, None])
    beyond = (rollout.final_observations[:, 0].abs() > 2.4) | (
        rollout.final_observations[:, 2].abs() > 0.209
    )
    assert beyond.all()  # the states in which poles fall, not the fresh ones after the reset


def test_pieces_leave_the_dummy_step_out_and_go_on_where_they_were():
    """Episodes of 3, 1, 4 steps, in pieces of 5 steps of which those after an end only reset."""
    pieces = Pieces(Environments(register(), 1), 5, seed=0)
    first = pieces.collect(policy_of(), draws())  # 3 steps, reset, 1 step
    assert first.mask.tolist() == [[True, True, True], [True, False, False]]
    assert first.rewards.tolist() == [[1, 2, 3], [11, 0, 0]]
    assert first.terminated.tolist() == [True, True]
    assert first.final_observations.tolist() == [[0, 3], [1, 1]]
    assert (first.returns.tolist(), first.lengths.tolist()) == ([6, 11], [3, 1])
    second = pieces.collect(policy_of(), draws())  # reset, 4 steps
    assert second.rewards.tolist() == [[21, 22, 23, 24]]
    assert second.returns.tolist() == [90]
    assert (first.env_steps, second.env_steps) == (4, 4)


def test_a_piece_that_is_cut_is_neither_terminated_nor_truncated():
    pieces = Pieces(Environments(register(lengths=(7,)), 2), 4, seed=0)
    cut = pieces.collect(policy_of(), draws())
    assert not cut.terminated.any() and not cut.truncated.any()
    assert cut.final_observations.tolist() == [[0, 4], [0, 4]]
    assert cut.returns.numel() == 0
    rest = pieces.collect(policy_of(), draws())
    assert rest.returns.tolist() == [28, 28]
    assert rest.lengths.tolist() == [7, 7]
    assert rest.observations[0, 0].tolist() == [0, 4]


@pytest.mark.parametrize("env", ["Acrobot-v1", "gridworld"])
def test_an_episode_is_one_that_gymnasium_itself_would_play(env):
    """The rewards of a rollout are those of `gymnasium.make` under the same actions from the same start."""
    spec = describe(env)
    envs = Environments(env, 2)
    rollout = collect_episodes(
        envs, policy_of(spec.observation_size, spec.actions), spec.horizon, draws(), seed=11
    )
    single = gymnasium.make(spec.env)
    for row in range(2):
        single.reset(seed=11 + row)
        actions = rollout.actions[row, rollout.mask[row]]
        played = [single.step(int(action)) for action in actions]
        assert [step[1] for step in played] == pytest.approx(
            rollout.rewards[row, rollout.mask[row]].tolist()
        )
        assert played[-1][2] == bool(rollout.terminated[row])
        assert not any(step[2] or step[3] for step in played[:-1])


def test_a_time_limit_truncates_whole_episodes_and_does_not_terminate_them():
    envs = Environments(register(limit=2), 3)
    rollout = collect_episodes(envs, policy_of(), 2, draws(), seed=0)
    assert rollout.rewards.tolist() == [[1, 2]] * 3 and rollout.env_steps == 6
    assert rollout.final_observations.tolist() == [[0, 2]] * 3
    assert rollout.truncated.all() and not rollout.terminated.any()
    assert rollout.returns.tolist() == [3] * 3


class Rewriting(VectorEnv):
    """Writes each answer into the same memory, and into the actions."""

    observation_space = single_observation_space = spaces.Box(-9, 99, (2,), np.float32)
    single_action_space = spaces.Discrete(2)
    num_envs = 1

    def reset(self, *, seed=None, options=None):
        self.memory = np.zeros((1, 2), np.float32), np.zeros(1), *np.zeros((2, 1), bool)
        return self.memory[0], {}

    def step(self, actions):
        for part in self.memory:
            part[:] = 1 - part
        actions[:] = 9
        return *self.memory, {}


def test_environments_may_write_into_the_same_memory_again():
    envs = Environments("CartPole-v1", 1, vector=Rewriting())
    start, actions = envs.reset(), np.ones(1, int)
    first, second = envs.step(actions), envs.step(actions)
    assert start.tolist() == [[0, 0]] and actions.tolist() == [1]
    assert [part.tolist() for part in first] == [[[1, 1]], [1], [True], [True]]
    assert [part.tolist() for part in second] == [[[0, 0]], [0], [False], [False]]


def test_every_step_of_a_long_episode_has_random_numbers_of_its_own():
    envs, policy = Environments(register(limit=200, lengths=(200,)), 4), policy_of()
    policy.head.weight.data.zero_()  # the same distribution in every state
    actions = collect_episodes(envs, policy, 200, draws(), seed=0).actions
    assert not torch.equal(actions[:, :64], actions[:, 64:128])


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 4), st.integers(2, 9), st.integers(0, 2**31))
def test_rows_are_what_a_walk_through_the_steps_finds(envs, n, seed):
    draw = torch.Generator().manual_seed(seed)
    over, kind = torch.rand(2, envs, n, generator=draw) < torch.tensor([0.3, 0.5])[:, None, None]
    dummy = torch.zeros(envs, n, dtype=torch.bool)
    dummy[:, 0] = torch.rand(envs, generator=draw) < 0.3
    for t in range(n):
        over[:, t] &= ~dummy[:, t]
        if t + 1 < n:
            dummy[:, t + 1] = over[:, t]
    if dummy.all():
        return
    observations = torch.arange(envs * n * 2.0).reshape(envs, n, 2)
    after = -torch.arange(envs * 2.0).reshape(envs, 2) - 1
    actions, rewards = torch.arange(envs * n).reshape(envs, n), observations[..., 0] + 0.5
    rollout = into_rows(
        Steps(observations, actions, rewards, over & kind, over & ~kind, dummy), after
    )
    following = torch.cat([observations[:, 1:], after[:, None]], 1)
    row, steps = 0, []
    for e, t in itertools.product(range(envs), range(n)):
        if not dummy[e, t]:
            steps.append(t)
        if not steps or not (over[e, t] or t + 1 == n):
            continue
        mask = torch.arange(rollout.mask.shape[1]) < len(steps)
        assert torch.equal(rollout.mask[row], mask)
        for column, source in zip(rollout[:3], (observations, actions, rewards), strict=True):
            assert torch.equal(column[row, mask], source[e, steps])
            assert not column[row, ~mask].any()
        assert rollout.terminated[row] == (over & kind)[e, t]
        assert rollout.truncated[row] == (over & ~kind)[e, t]
        assert torch.equal(rollout.final_observations[row], following[e, t])
        row, steps = row + 1, []
    assert row == len(rollout.mask) and rollout.env_steps == int((~dummy).sum())
