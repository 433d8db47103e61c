"""Rows are episodes, or pieces of them, with nothing of the steps that only reset."""

from __future__ import annotations

import gymnasium
import numpy as np
import pytest
import torch
from counting_env import Counting, register
from drawing import seeded
from gymnasium.vector import SyncVectorEnv
from gymnasium.wrappers import TimeLimit

from tokenrl.control.environments import Environments, describe
from tokenrl.control.policies import Policy, Shape
from tokenrl.control.rollouts import Pieces, collect_episodes


def policy_of(size=2, actions=2):
    return Policy(Shape(size, "softmax", actions, hidden=()), seeded(0))


def test_pieces_leave_idle_steps_out_and_go_on_where_they_were():
    """Two environments in pieces of 5 steps; the step after an end only resets.

    Episodes of the first have 3, 1 and 4 steps. A time limit of 7 steps cuts those of the second.
    """
    first, second = Counting((3, 1, 4)), TimeLimit(Counting((9,)), 7)
    envs = Environments(register(), 2)
    envs.vector = SyncVectorEnv([lambda: first, lambda: second])
    pieces = Pieces(envs, 5, seed=0)
    rollout = pieces.collect(policy_of(), seeded(0))
    assert rollout.rewards.tolist() == [[1, 2, 3, 0, 0], [11, 0, 0, 0, 0], [1, 2, 3, 4, 5]]
    assert rollout.mask.sum(1).tolist() == [3, 1, 5]
    steps = [[0, 1, 2, 0, 0], [0, 0, 0, 0, 0], [0, 1, 2, 3, 4]]
    assert rollout.observations[..., 1].tolist() == steps
    assert rollout.final_observations.tolist() == [[0, 3], [1, 1], [0, 5]]
    assert rollout.terminated.tolist() == [True, True, False] and not rollout.truncated.any()
    assert (rollout.returns.tolist(), rollout.lengths.tolist()) == ([6, 11], [3, 1])
    rest = pieces.collect(
        policy_of(), seeded(0)
    )  # a reset and 4 steps; 2 steps, a reset and 2 steps
    assert rest.rewards.tolist() == [[21, 22, 23, 24], [6, 7, 0, 0], [11, 12, 0, 0]]
    assert rest.mask.sum() == 8 and rest.observations[1, 0].tolist() == [0, 5]
    assert rest.terminated.tolist() == [True, False, False]
    assert rest.truncated.tolist() == [False, True, False]
    assert sorted(rest.returns.tolist()) == [28, 90] and sorted(rest.lengths.tolist()) == [4, 7]


@pytest.mark.parametrize("env", ["Acrobot-v1", "gridworld"])
def test_an_episode_is_one_that_gymnasium_itself_would_play(env):
    """The rewards of a rollout are those of `gymnasium.make` under the same actions from the same start."""
    spec = describe(env)
    policy = policy_of(spec.observation_size, spec.actions)
    rollout = collect_episodes(Environments(env, 4), policy, seeded(0), seed=11)
    single = gymnasium.make(spec.env)
    for row, mask in enumerate(rollout.mask):
        single.reset(seed=11 + row)
        played = [single.step(int(action)) for action in rollout.actions[row, mask]]
        rewards = rollout.rewards[row, mask].tolist()
        assert [step[1] for step in played] == pytest.approx(rewards)
        assert not any(step[2] or step[3] for step in played[:-1])
        ends = rollout.terminated[row].item(), rollout.truncated[row].item()
        assert ends == (played[-1][2], not played[-1][2])
        assert np.allclose(rollout.final_observations[row], played[-1][0])


def test_every_step_of_a_long_episode_has_random_numbers_of_its_own():
    envs, policy = Environments(register(limit=200, lengths=(200,)), 4), policy_of()
    policy.head.weight.data.zero_()  # the same distribution in every state
    actions = collect_episodes(envs, policy, seeded(0), seed=0).actions
    assert not torch.equal(actions[:, :64], actions[:, 64:128])
