"""Rows are episodes, or pieces of them, with nothing of the steps that only reset."""

from __future__ import annotations

import itertools

import gymnasium
import numpy as np
import pytest
import torch
from counting_env import register
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv
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


@pytest.mark.parametrize(("limit", "length"), [(100, 3), (2, 2)])
def test_whole_episodes_one_each(limit, length):
    """A time limit truncates them and does not terminate them."""
    envs = Environments(register(limit=limit), 3)
    rollout = collect_episodes(envs, policy_of(), limit, draws(), seed=0)
    assert rollout.mask.sum(1).tolist() == [length] * 3 and rollout.env_steps == 3 * length
    assert rollout.rewards.tolist() == [[1, 2, 3][:length]] * 3
    assert rollout.observations[0].tolist() == [[0, 0], [0, 1], [0, 2]][:length]
    assert rollout.final_observations.tolist() == [[0, length]] * 3
    assert rollout.terminated.tolist() == [limit == 100] * 3 == (~rollout.truncated).tolist()
    assert rollout.returns.tolist() == [sum(range(length + 1))] * 3


class Together(VectorEnv):
    """Copies that end after their number plus 2 steps; `own` memory is written again in each step."""

    observation_space = single_observation_space = spaces.Box(-9, 99, (2,), np.float32)
    single_action_space = spaces.Discrete(2)

    def __init__(self, num_envs=1, own=True, **_):
        self.num_envs, self.own, self.closed = num_envs, own, False
        self.metadata = {"autoreset_mode": AutoresetMode.NEXT_STEP}
        self.memory = (
            np.zeros((num_envs, 2), np.float32),
            np.zeros(num_envs),
            *np.zeros((2, num_envs), bool),
        )

    def _answer(self):
        self.memory[0][:], self.memory[1][:] = self.time[:, None], self.time * (self.time % 3)
        self.memory[2][:] = self.time == np.arange(self.num_envs) + 2
        return self.memory if self.own else [x.copy() for x in self.memory]

    def reset(self, *, seed=None, options=None):
        self.time = np.zeros(self.num_envs)
        return self._answer()[0], {}

    def step(self, actions):
        self.time = np.where(self.memory[2], 0, self.time + 1)
        answer = self._answer()
        if self.own:
            actions[:] = 0
        return *answer, {}


@pytest.mark.parametrize("num_steps", [None, 5])
def test_environments_may_write_into_the_same_memory_again(num_steps):
    def rollout(own):
        gymnasium.registry.pop("tokenrl-tests/Together-v0", None)
        gymnasium.register(
            "tokenrl-tests/Together-v0",
            vector_entry_point=Together,
            max_episode_steps=9,
            kwargs={"own": own},
        )
        envs = Environments("tokenrl-tests/Together-v0", 3)
        if num_steps is None:
            return collect_episodes(envs, policy_of(), 9, draws(), seed=0)
        pieces = Pieces(envs, num_steps, seed=0)
        pieces.collect(policy_of(), draws())
        return pieces.collect(policy_of(), draws())

    expected, other = rollout(False), rollout(True)
    assert expected.actions.any() and len(expected.rewards.unique()) > 2
    for name, x in expected._asdict().items():
        assert torch.equal(getattr(other, name), x), name


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
    assert rollout.env_steps == int((~dummy).sum())
    following, place, row = torch.cat([observations[:, 1:], after[:, None]], 1), 0, []
    for e, t in itertools.product(range(envs), range(n)):
        row += [t] * (not dummy[e, t])
        if row and (over[e, t] or t + 1 == n):
            own = rollout.mask[place]
            assert own.tolist() == [True] * len(row) + [False] * (len(own) - len(row))
            for found, all_of in zip(rollout[:3], (observations, actions, rewards), strict=True):
                assert (
                    torch.equal(found[place, own], all_of[e, row])
                    and (found[place, ~own] == 0).all()
                )
            ends = over[e, t] & kind[e, t], over[e, t] & ~kind[e, t]
            assert (rollout.terminated[place], rollout.truncated[place]) == ends
            assert torch.equal(rollout.final_observations[place], following[e, t])
            place, row = place + 1, []
    assert place == len(rollout.mask)
